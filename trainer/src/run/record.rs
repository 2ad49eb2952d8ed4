//! What a run was started with beside its settings: program, device, precision, command line. Its file in the
//! run's folder has an entry for every start.

use std::fs;
use std::io::{Read, Seek, SeekFrom, copy};
use std::path::Path;

use anyhow::{Context, Result};
use flow::checkpoint::{open_for_reading, read_bounded, write_atomically};
use flow::{contents, log};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::align::Options;
use super::config::AlignConfig;
use crate::network::model::Model;
use crate::tensor::device::{device_name, precision_name};

/// The file in the run's folder.
pub(crate) const FILE: &str = "starts.json";
/// libtorch as it was built against.
pub(crate) const LIBTORCH: &str = env!("LIBTORCH_VERSION");

/// One start of a run.
#[derive(Serialize)]
struct Start {
    program: String,
    libtorch: &'static str,
    command_line: Vec<String>,
    device: String,
    precision: &'static str,
    threads: usize,
    /// Iterations done before.
    done: usize,
    settings: toml::Table,
}

/// Appends this start to those of the run's folder; a file that is no list is said and begun anew, since a
/// run never depends on what it only shows.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn append(config: &AlignConfig, options: &Options, done: usize) -> Result<()> {
    let path = config.output.join(FILE);
    let start = Start {
        program: format!("ng-train {}", env!("CARGO_PKG_VERSION")),
        libtorch: LIBTORCH,
        command_line: std::env::args().skip(1).collect(),
        device: device_name(options.compute.device),
        precision: precision_name(options.compute.kind),
        threads: options.threads,
        done,
        settings: config.resolved()?,
    };
    let mut starts: Vec<Value> = match read_bounded(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|_| {
            log::warn(&format!("{}: damaged: begun anew", path.display()));
            Vec::new()
        }),
        Err(_) => Vec::new(),
    };
    starts.push(json!(start));
    Ok(write_atomically(&path, &serde_json::to_vec_pretty(&starts)?)?)
}

/// A few lines about what is going to run.
pub(crate) fn banner(
    config: &AlignConfig,
    options: &Options,
    model: &Model,
    n_prompts: usize,
) -> Result<String> {
    let (size, factor) =
        (config.group.rollout.latent_size(&model.pipeline)?, model.pipeline.vae.factor());
    let (setting, group) = (config.setting()?, &config.group);
    let n_trained: usize = model.engine.trained().spans().map(|span| span.whole).sum();
    let what = match &config.lora {
        Some(lora) => format!("adapters of rank {}", lora.rank),
        None => "all weights of the transformer".to_owned(),
    };
    let rewards: Vec<String> =
        group.rewards.iter().map(|reward| format!("{} ({})", reward.name, reward.weight)).collect();
    let numbers = if config.ignores("train_steps")?.is_none() {
        format!("B {}, K {}", setting.n_anchors, setting.n_train_steps)
    } else {
        format!("B {}", setting.n_anchors)
    };
    Ok(format!(
        "ng-train {}, libtorch {LIBTORCH}: {} in {}, threads: {}\n\
         {} learns {what}, {:.2} M numbers, from {}\n\
         {} of {n_prompts} prompts an iteration, {} images each, {numbers}, updates: {}, steps: {}, \
         {} x {} pixels\n\
         rewards (weight): {}; iterations: {}, saved every {} to {}",
        env!("CARGO_PKG_VERSION"),
        device_name(options.compute.device),
        precision_name(options.compute.kind),
        options.threads,
        config.training.algorithm,
        n_trained as f64 / 1e6,
        config.model.display(),
        group.prompts_per_iteration,
        group.group_size,
        setting.n_updates,
        group.rollout.steps,
        size.width * factor,
        size.height * factor,
        rewards.join(", "),
        config.iterations,
        config.save_every,
        config.output.display(),
    ))
}

/// What the last bits of a run depend on beside its settings and its precision, by name.
pub(crate) fn made_by(options: &Options) -> [(&'static str, String); 4] {
    [
        ("ng-train", env!("CARGO_PKG_VERSION").to_owned()),
        ("libtorch", LIBTORCH.to_owned()),
        ("device", device_name(options.compute.device)),
        ("--threads", options.threads.to_string()),
    ]
}

/// SHA-256 over what lies at `path`: of a file its bytes; of a folder the names and sizes of its files, with
/// their first and last 64 KiB.
///
/// # Errors
/// When something there cannot be read.
pub(crate) fn content(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut left = vec![path.to_owned()];
    while let Some(at) = left.pop() {
        if at.is_dir() {
            let mut inside = fs::read_dir(&at)
                .and_then(|entries| {
                    entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>()
                })
                .with_context(|| format!("cannot read {}", at.display()))?;
            inside.sort();
            left.extend(inside.into_iter().rev());
            continue;
        }
        let name = at.strip_prefix(path).unwrap_or(&at);
        take_in(&mut hash, name, &at, !path.is_dir())?;
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// The same over what belongs to the pipeline in `dir`, whatever else lies there.
///
/// # Errors
/// When something of it cannot be read.
pub(crate) fn content_of_pipeline(dir: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    for file in contents::of(dir)? {
        take_in(&mut hash, &file.path, &file.source, false)?;
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// Takes in the name and the size of the file `at`, and its bytes: all of them, or its ends.
fn take_in(hash: &mut Sha256, name: &Path, at: &Path, is_whole: bool) -> Result<()> {
    const ENDS: u64 = 1 << 16;
    let failed = || format!("cannot read {}", at.display());
    let mut file = open_for_reading(at).with_context(failed)?;
    let length = file.metadata().with_context(failed)?.len();
    hash.update(format!("{} {length}\n", name.to_string_lossy()));
    copy(&mut file.by_ref().take(ENDS), hash).with_context(failed)?;
    if length > ENDS {
        let rest = if is_whole { length - ENDS } else { ENDS.min(length - ENDS) };
        file.seek(SeekFrom::End(-(rest as i64))).with_context(failed)?;
        copy(&mut file, hash).with_context(failed)?;
    }
    Ok(())
}
