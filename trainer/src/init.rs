//! Random weights: for a network that has none yet, and whole checkpoints of any published size.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use flow::checkpoint::{Entry, write_sharded};
use flow::known;
use flow::noise::Noise;
use flow::pipeline::{Component, Pipeline};
use flow::staged::Staged;

use crate::interrupt;
use crate::progress::Progress;
use crate::save;
use crate::seeds::{Use, family};
use crate::usage::Usage;

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

/// The initial values of parameter `name`, drawn from `stream` of the seed's noise: zeros where FLUX's
/// adaptive normalisation and outputs start closed, ones for norms, small normals elsewhere.
pub(crate) fn value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let n = shape.iter().product();
    let closed = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"];
    let is_zero = name.rsplit('.').next() == Some("bias")
        || name.starts_with("proj_out.")
        || closed.iter().any(|part| name.contains(part));
    if is_zero {
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
    noise.normal(stream, n).into_iter().map(|x| x * std).collect()
}
