//! Writing a pipeline folder: new weights, everything else carried over, whole or not at all.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use flow::checkpoint::{Dtype, write_atomically, write_sharded};
use flow::contents::{self, Belonging};
use flow::pipeline::Component;
use flow::staged::Staged;
use serde_json::Value;
use tch::Tensor;

use super::shards::Shards;
use crate::tensor::parameters::Parameters;

/// New values of one component.
pub(crate) struct Saved<'a> {
    pub(crate) component: Component,
    pub(crate) parameters: &'a Parameters,
    /// Flat weights to save in place of the masters: their moving average.
    pub(crate) averaged: Option<&'a [Tensor]>,
    /// Type of the values in the file.
    pub(crate) dtype: Dtype,
}

/// Where a folder is written, and how.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    /// What is there is replaced.
    pub(crate) dir: &'a Path,
    /// Most bytes of weights in one file.
    pub(crate) max_shard_bytes: usize,
    /// A folder written before from the same model: weights that do not change become other names of its.
    pub(crate) before: Option<&'a Path>,
}

/// Writes a pipeline folder: `saved` components anew, the rest as `source` has it. `finish` may add files
/// before the folder gets its name.
pub(crate) fn pipeline(
    source: &Path,
    target: Target<'_>,
    saved: &[Saved<'_>],
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let mut staged = Staged::begin(target.dir)?;
    let anew: Vec<Component> = saved.iter().map(|part| part.component).collect();
    carry_over(source, &mut staged, &anew, target.before)?;
    for part in saved {
        let folder = staged.path().join(part.component.folder());
        let entries = match part.averaged {
            Some(averaged) => part.parameters.entries(averaged.iter(), part.dtype),
            None => part.parameters.entries(part.parameters.masters(), part.dtype),
        }?;
        write_sharded(&folder, part.component.stem(), &entries, target.max_shard_bytes)?;
    }
    finish(staged.path())?;
    Ok(staged.publish(true)?)
}

/// Writes what a run trained, from the files of a checkpoint: a pipeline folder with the rest of `source`, or
/// the adapters alone. `finish` as in [`pipeline`].
///
/// # Errors
/// When something cannot be read or written.
pub(crate) fn trained(
    shards: &Shards,
    source: &Path,
    target: Target<'_>,
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let mut staged = Staged::begin(target.dir)?;
    if !shards.layout()?.is_of_adapters() {
        carry_over(source, &mut staged, &[Component::Transformer], target.before)?;
    }
    weights(shards, staged.path(), target.max_shard_bytes)?;
    finish(staged.path())?;
    Ok(staged.publish(true)?)
}

/// Writes the weights that trained into `folder`, a tensor at a time: where a pipeline has its transformer's,
/// or as a file of adapters.
///
/// # Errors
/// As [`trained`].
pub(crate) fn weights(shards: &Shards, folder: &Path, max_shard_bytes: usize) -> Result<()> {
    let layout = shards.layout()?;
    let entries = shards.weights(&layout)?;
    if layout.is_of_adapters() {
        return Ok(flow::lora::write(folder, entries)?);
    }
    let component = Component::Transformer;
    let folder = folder.join(component.folder());
    Ok(write_sharded(&folder, component.stem(), &entries, max_shard_bytes)?)
}

/// Copies what belongs to the pipeline folder `source`, without the weights of the components `anew`;
/// other weights are taken from `before` where they are there.
pub(crate) fn carry_over(
    source: &Path,
    staged: &mut Staged,
    anew: &[Component],
    before: Option<&Path>,
) -> Result<()> {
    let is_anew = |file: &Belonging| {
        file.is_weights() && anew.iter().any(|c| Some(c.folder()) == file.component())
    };
    let mut files = contents::of(source)?;
    files.retain(|file| !is_anew(file));
    if let Some(before) = before {
        let kept = |name: &str| {
            files.iter().any(|file| {
                file.is_weights()
                    && file.path == Path::new(name)
                    && is_alike(&file.source, &before.join(name))
            })
        };
        let carried = staged.carry(before, kept)?;
        files.retain(|file| !carried.contains(&*file.path.to_string_lossy()));
    }
    for component in anew {
        fs::create_dir_all(staged.path().join(component.folder()))?;
    }
    for file in files {
        let to = staged.path().join(&file.path);
        let copy = || {
            fs::create_dir_all(to.parent().unwrap_or(staged.path()))?;
            fs::copy(&file.source, &to)
        };
        copy().with_context(|| format!("cannot copy {}", file.source.display()))?;
    }
    Ok(())
}

/// Whether two files are of one length: the later was made from the earlier by this run or the one it goes on
/// with.
fn is_alike(a: &Path, b: &Path) -> bool {
    let length = |path: &Path| fs::metadata(path).map(|metadata| metadata.len());
    length(a).is_ok_and(|a| length(b).is_ok_and(|b| a == b))
}

/// Changes values of a JSON config in place.
pub(crate) fn edit_config(path: &Path, values: &[(&str, Value)]) -> Result<()> {
    let mut config: Value = flow::pipeline::read_json(path)?;
    for (key, value) in values {
        config[*key] = value.clone();
    }
    let text = serde_json::to_string_pretty(&config)? + "\n";
    Ok(write_atomically(path, text.as_bytes())?)
}
