//! Writing a pipeline folder: new weights, everything else carried over, whole or not at all.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use flow::checkpoint::{Dtype, write_atomically, write_sharded};
use flow::pipeline::Component;
use flow::staged::Staged;
use serde_json::Value;
use tch::Tensor;

use crate::network::model::Model;
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

/// A run's state in its checkpoint.
pub(crate) const STATE: &str = "training_state.safetensors";
/// Files of a checkpoint that are made anew or not at all.
const OWN_FILES: [&str; 3] = [flow::reference::FILE, STATE, "README.md"];

/// Writes `model` as a pipeline folder at `dir`, replacing what is there: `saved` components anew in
/// files of at most `max_shard_bytes`, the rest copied. `finish` may add files before the folder gets its
/// name.
pub(crate) fn pipeline(
    model: &Model,
    dir: &Path,
    saved: &[Saved<'_>],
    max_shard_bytes: usize,
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let staged = Staged::begin(dir)?;
    let anew: Vec<Component> = saved.iter().map(|part| part.component).collect();
    carry_over(&model.pipeline.dir, staged.path(), &anew)?;
    for part in saved {
        let folder = staged.path().join(part.component.folder());
        let entries = match part.averaged {
            Some(averaged) => part.parameters.entries(averaged.iter(), part.dtype),
            None => part.parameters.entries(part.parameters.masters(), part.dtype),
        }?;
        write_sharded(&folder, part.component.stem(), &entries, max_shard_bytes)?;
    }
    finish(staged.path())?;
    Ok(staged.publish(true)?)
}

/// Writes what a run trained to `dir`, replacing what is there: a pipeline folder, or the adapters alone. All
/// ranks call it; the first one writes.
pub(crate) fn trained(
    model: &Model,
    averaged: Option<&[Tensor]>,
    dir: &Path,
    max_shard_bytes: usize,
    finish: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let parameters = model.engine.trained();
    let wholes = match averaged {
        Some(averaged) => parameters.wholes(averaged.iter()),
        None => parameters.wholes(parameters.masters()),
    }?;
    if !parameters.group().is_first() {
        return Ok(());
    }
    let averaged = Some(&*wholes);
    let Some(adapters) = model.engine.adapters() else {
        let component = Component::Transformer;
        let saved = Saved { component, parameters, averaged, dtype: Dtype::F32 };
        return pipeline(model, dir, &[saved], max_shard_bytes, finish);
    };
    let staged = Staged::begin(dir)?;
    adapters.save(staged.path(), averaged)?;
    finish(staged.path())?;
    Ok(staged.publish(true)?)
}

/// Copies a pipeline folder without the weights of the components `anew`.
pub(crate) fn carry_over(source: &Path, target: &Path, anew: &[Component]) -> Result<()> {
    let listed = || format!("cannot read {}", source.display());
    for entry in fs::read_dir(source).with_context(listed)? {
        let name = entry.with_context(listed)?.file_name();
        let text = name.to_string_lossy();
        if OWN_FILES.contains(&&*text) || text.starts_with('.') {
            continue;
        }
        let is_anew = anew.iter().any(|component| component.folder() == text);
        copy(&source.join(&name), &target.join(&name), is_anew)?;
    }
    Ok(())
}

/// Copies a file, or the files of a folder; weights are left out where new ones follow.
fn copy(from: &Path, to: &Path, without_weights: bool) -> Result<()> {
    let failed = || format!("cannot copy {}", from.display());
    if from.is_file() {
        fs::copy(from, to).with_context(failed)?;
        return Ok(());
    }
    fs::create_dir_all(to).with_context(failed)?;
    for entry in fs::read_dir(from).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        let name = path.file_name().context("a folder entry has a name")?;
        let is_weights = name.to_string_lossy().contains(".safetensors");
        if path.is_file() && !(without_weights && is_weights) {
            fs::copy(&path, to.join(name)).with_context(failed)?;
        }
    }
    Ok(())
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
