//! Random weights: for a network that has none yet, and whole checkpoints of any published size.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use flow::checkpoint::{Entry, write_sharded};
use flow::known;
use flow::noise::Noise;
use flow::pipeline::{Component, Pipeline};
use flow::staged::Staged;
use flow::tokens::MAX_TEXT_TOKENS;
use flow::usage::Usage;

use crate::interrupt;
use crate::progress::Progress;
use crate::save;
use crate::seeds::{Use, family};

/// What to write.
pub struct Options<'a> {
    /// A name of [`known::MODELS`], or a pipeline folder whose configs and tokenizers are taken.
    pub like: &'a str,
    /// Folder to write; it must not exist.
    pub out: &'a Path,
    /// The weights follow from it.
    pub seed: u64,
    /// Whether all weights stay 0, in files with holes.
    pub zero: bool,
    /// Most bytes of values in one file.
    pub max_shard_bytes: usize,
}

/// Numbers drawn for one tensor; a larger one repeats them, so that billions are quickly there.
const MAX_DRAWN: usize = 1 << 20;

/// A tokenizer of letters, for models whose own needs a download.
const STAND_IN: [known::File; 6] = [
    ("tokenizer/tokenizer.json", include_str!("../../assets/signs-blank/tokenizer/tokenizer.json")),
    (
        "tokenizer/tokenizer_config.json",
        include_str!("../../assets/signs-blank/tokenizer/tokenizer_config.json"),
    ),
    (
        "tokenizer/special_tokens_map.json",
        include_str!("../../assets/signs-blank/tokenizer/special_tokens_map.json"),
    ),
    (
        "tokenizer_2/tokenizer.json",
        include_str!("../../assets/signs-blank/tokenizer_2/tokenizer.json"),
    ),
    (
        "tokenizer_2/tokenizer_config.json",
        include_str!("../../assets/signs-blank/tokenizer_2/tokenizer_config.json"),
    ),
    (
        "tokenizer_2/special_tokens_map.json",
        include_str!("../../assets/signs-blank/tokenizer_2/special_tokens_map.json"),
    ),
];

/// Writes a pipeline folder with random bf16 weights of the true shapes and names.
///
/// # Errors
/// When `like` is neither a known model nor a pipeline folder, or the folder cannot be written.
pub fn run(options: &Options<'_>) -> Result<()> {
    let out = options.out;
    ensure!(!out.exists(), "{} exists: remove it or choose another --out", out.display());
    let pipeline = open(options.like)?;
    let staged = Staged::begin(out)?;
    match known::files(options.like) {
        Some(files) => {
            for (file, text) in files.iter().chain(&STAND_IN) {
                let path = staged.path().join(file);
                fs::create_dir_all(path.parent().expect("a file of the folder"))?;
                fs::write(path, text)?;
            }
            let clip = pipeline.text_encoder.max_position_embeddings;
            for (folder, length) in [("tokenizer", clip), ("tokenizer_2", MAX_TEXT_TOKENS)] {
                let path = staged.path().join(folder).join("tokenizer_config.json");
                save::edit_config(&path, &[("model_max_length", length.into())])?;
            }
        }
        None => save::carry_over(&pipeline.dir, staged.path(), &Component::ALL)?,
    }
    let manifests = Component::ALL.map(|component| (component, pipeline.manifest(component)));
    let n_tensors = manifests.iter().map(|(_, manifest)| manifest.entries().count()).sum();
    let progress = Progress::new("tensors", n_tensors, 0);
    for (component, manifest) in &manifests {
        interrupt::check()?;
        let noise = family(options.seed, Use::Weights);
        let entries: Vec<Entry<'_>> = manifest
            .entries()
            .zip(stream_of(*component)..)
            .map(|((name, shape), stream)| {
                if options.zero {
                    return Entry::bf16_zero(name, shape);
                }
                let progress = &progress;
                Entry::bf16_made(name, shape, move || {
                    progress.advance(component.folder());
                    value(noise, stream, name, shape)
                })
            })
            .collect();
        let folder = staged.path().join(component.folder());
        write_sharded(&folder, component.stem(), &entries, options.max_shard_bytes)?;
    }
    staged.publish(false)?;
    println!("{}", out.display());
    Ok(())
}

/// The pipeline that a name or a folder stands for.
///
/// # Errors
/// When it is neither.
pub(crate) fn open(model: &str) -> Result<Pipeline> {
    if let Some(pipeline) = Pipeline::known(model) {
        return Ok(pipeline);
    }
    let names: Vec<&str> = known::MODELS.iter().map(|(name, _)| *name).collect();
    let unknown =
        || Usage(format!("{model}: neither a pipeline folder nor one of {}", names.join(", ")));
    ensure!(Path::new(model).is_dir(), unknown());
    Ok(Pipeline::open(Path::new(model))?)
}

/// The first noise stream of a component's parameters; they are numbered in manifest order.
pub(crate) fn stream_of(component: Component) -> u64 {
    ((component as u64) << 32) + 1
}

/// Initial values for training: [`value`], but zeros where FLUX's adaptive normalisation and outputs start
/// closed.
pub(crate) fn closed_value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let closed = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"];
    if name.starts_with("proj_out.") || closed.iter().any(|part| name.contains(part)) {
        return vec![0.0; shape.iter().product()];
    }
    value(noise, stream, name, shape)
}

/// Values of parameter `name`, drawn from `stream` of the seed's noise: zeros for biases, ones for norms,
/// small normals elsewhere.
fn value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let n = shape.iter().product();
    if name.rsplit('.').next() == Some("bias") {
        return vec![0.0; n];
    }
    if shape.len() == 1 {
        return vec![1.0; n];
    }
    let fan_in: usize = shape[1..].iter().product();
    let is_table = ["shared", "token_embedding", "position_embedding"];
    let std = if is_table.iter().any(|part| name.contains(part)) {
        0.2
    } else if name.contains("relative_attention_bias") {
        // Heads that look at different distances from the start: letters find their place in a word.
        2.0
    } else if name.contains("SelfAttention.q") {
        // T5 does not scale its scores.
        0.25 / (fan_in as f32).sqrt()
    } else {
        1.0 / (fan_in as f32).sqrt()
    };
    let drawn: Vec<f32> =
        noise.normal(stream, n.min(MAX_DRAWN)).into_iter().map(|x| x * std).collect();
    drawn.iter().copied().cycle().take(n).collect()
}

#[cfg(test)]
mod tests {
    use flow::tokens::Tokenizers;

    use super::*;

    fn written(like: &str, zero: bool, max_shard_bytes: usize) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let out = home.path().join("model");
        run(&Options { like, out: &out, seed: 3, zero, max_shard_bytes }).unwrap();
        let pipeline = Pipeline::open(&out).unwrap();
        for component in Component::ALL {
            pipeline.weights(component).unwrap();
        }
        home
    }

    #[test]
    fn a_folder_is_filled_with_random_shards() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let like = here.join("../tests/fixtures/tiny-flux/pipeline");
        let home = written(&like.to_string_lossy(), false, 100_000);
        let transformer = home.path().join("model/transformer");
        let index = "diffusion_pytorch_model.safetensors.index.json";
        assert!(transformer.join(index).is_file(), "more than one shard");
        let pipeline = Pipeline::open(&home.path().join("model")).unwrap();
        let weights = pipeline.weights(Component::Transformer).unwrap();
        let values = weights.f32("x_embedder.weight").unwrap();
        assert!(values.iter().any(|x| *x != 0.0));
    }

    #[test]
    fn a_published_model_has_its_layout_and_text_lengths() {
        let home = written("flux.1-schnell", true, 10_000_000_000);
        let folder = home.path().join("model");
        assert!(
            folder.join("transformer/diffusion_pytorch_model-00003-of-00003.safetensors").exists()
        );
        let tokenizers = Tokenizers::open(&folder, None).unwrap();
        let ids = tokenizers.encode("a cat").unwrap();
        assert_eq!((ids.clip.len(), ids.t5.len()), (77, 512));
    }
}
