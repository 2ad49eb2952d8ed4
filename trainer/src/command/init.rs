//! Whole checkpoints of random weights, of any published size.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use flow::checkpoint::{Entry, write_sharded};
use flow::known;
use flow::pipeline::Component;
use flow::staged::Staged;
use flow::tokens::MAX_TEXT_TOKENS;

use super::published;
use crate::group::seeds::{Use, family};
use crate::network::init::{stream_of, value};
use crate::network::save;
use crate::run::interrupt;
use crate::run::progress::Progress;

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

/// A tokenizer of letters, for models whose own needs a download.
const STAND_IN: [known::File; 6] = [
    (
        "tokenizer/tokenizer.json",
        include_str!("../../../assets/signs-blank/tokenizer/tokenizer.json"),
    ),
    (
        "tokenizer/tokenizer_config.json",
        include_str!("../../../assets/signs-blank/tokenizer/tokenizer_config.json"),
    ),
    (
        "tokenizer/special_tokens_map.json",
        include_str!("../../../assets/signs-blank/tokenizer/special_tokens_map.json"),
    ),
    (
        "tokenizer_2/tokenizer.json",
        include_str!("../../../assets/signs-blank/tokenizer_2/tokenizer.json"),
    ),
    (
        "tokenizer_2/tokenizer_config.json",
        include_str!("../../../assets/signs-blank/tokenizer_2/tokenizer_config.json"),
    ),
    (
        "tokenizer_2/special_tokens_map.json",
        include_str!("../../../assets/signs-blank/tokenizer_2/special_tokens_map.json"),
    ),
];

/// Writes a pipeline folder with random bf16 weights of the true shapes and names.
///
/// # Errors
/// When `like` is neither a known model nor a pipeline folder, or the folder cannot be written.
pub fn run(options: &Options<'_>) -> Result<()> {
    let out = options.out;
    ensure!(!out.exists(), "{} exists: remove it or choose another --out", out.display());
    let pipeline = published::open(options.like)?;
    let mut staged = Staged::begin(out)?;
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
        None => save::carry_over(&pipeline.dir, &mut staged, &Component::ALL, None)?,
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

#[cfg(test)]
mod tests {
    use flow::pipeline::Pipeline;
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
