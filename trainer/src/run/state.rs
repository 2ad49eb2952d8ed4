//! Complete checkpoints of a run: a pipeline folder that also holds everything `--resume` needs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::{Entry, Weights, write_tensors};

use crate::algorithm::Copies;
use crate::network::model::Model;
use crate::network::optimizer::AdamW;
use crate::network::save;
use crate::run::config::AlignConfig;

/// Folder of checkpoints in the output folder.
const CHECKPOINTS: &str = "checkpoints";
/// Optimiser, weights in full precision and position.
const FILE: &str = save::STATE;
/// Checkpoints kept.
const KEPT: usize = 2;

/// A checkpoint found.
pub(crate) struct Position {
    pub(crate) folder: PathBuf,
    /// Iterations done.
    pub(crate) iteration: usize,
}

/// The checkpoint of `output` with the most iterations; folders without a whole state do not count.
pub(crate) fn newest(output: &Path) -> Result<Option<Position>> {
    Ok(all(output)?.pop())
}

fn all(output: &Path) -> Result<Vec<Position>> {
    let folder = output.join(CHECKPOINTS);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let iteration = name.strip_prefix("iteration-").and_then(|n| n.parse().ok());
        if let Some(iteration) = iteration.filter(|_| path.join(FILE).is_file()) {
            found.push(Position { folder: path, iteration });
        }
    }
    found.sort_by_key(|position| position.iteration);
    Ok(found)
}

/// Writes the checkpoint of iteration `done` and removes all but the newest few. `behaviour` is what rolls
/// out, where that is not what trains.
pub(crate) fn save(
    config: &AlignConfig,
    done: usize,
    model: &Model,
    optimizer: &AdamW,
    behaviour: Option<&Copies>,
) -> Result<()> {
    let folder = config.output.join(CHECKPOINTS).join(format!("iteration-{done:06}"));
    let trained = model.engine.trained();
    let (mut entries, step) = optimizer.entries(trained)?;
    for (index, master) in trained.wholes(trained.masters())?.iter().enumerate() {
        let values = Vec::<f32>::try_from(&master.to_device(tch::Device::Cpu))?;
        entries.push(Entry::f32(format!("master.{index}"), &[values.len()], &values));
    }
    if let Some(copies) = behaviour {
        entries.extend(copies.entries(trained)?);
    }
    save::trained(model, optimizer.averaged(), &folder, config.max_shard_bytes(), |folder| {
        let metadata = [
            ("iteration", done.to_string()),
            ("optimizer_step", step.to_string()),
            ("config", serde_json::to_string(config)?),
        ];
        Ok(write_tensors(&folder.join(FILE), &entries, &metadata)?)
    })?;
    if !trained.group().is_first() {
        return Ok(());
    }
    let mut older = all(&config.output)?;
    older.truncate(older.len().saturating_sub(KEPT));
    for position in older {
        fs::remove_dir_all(&position.folder)
            .with_context(|| format!("cannot remove {}", position.folder.display()))?;
    }
    Ok(())
}

/// Takes weights, optimiser and `behaviour` back to `position`.
pub(crate) fn restore(
    position: &Position,
    config: &AlignConfig,
    optimizer: &mut AdamW,
    model: &Model,
    behaviour: Option<&Copies>,
) -> Result<()> {
    let path = position.folder.join(FILE);
    let state = Weights::open_file(&path)?;
    let field = |key: &str| {
        state.metadata(key).with_context(|| format!("{}: no {key} in its metadata", path.display()))
    };
    let step = field("optimizer_step")?.parse().context("optimizer_step is no number")?;
    let mut before: AlignConfig =
        serde_json::from_str(field("config")?).with_context(|| path.display().to_string())?;
    (before.iterations, before.save_every) = (config.iterations, config.save_every);
    (before.shard_gb, before.minutes) = (config.shard_gb, config.minutes);
    before.output.clone_from(&config.output);
    before.ranks.clone_from(&config.ranks);
    ensure!(
        serde_json::to_value(&before)? == serde_json::to_value(config)?,
        "{}: the run was started with other settings; only iterations, minutes, save_every and shard_gb may change",
        position.folder.display()
    );
    let trained = model.engine.trained();
    for (index, master) in trained.masters().enumerate() {
        let values = state.f32(&format!("master.{index}"))?;
        let part = trained.own_part(&tch::Tensor::from_slice(&values));
        ensure!(
            part.size1()? == master.size1()?,
            "{}: master.{index} has {} numbers",
            path.display(),
            values.len()
        );
        tch::no_grad(|| master.shallow_clone().copy_(&part));
    }
    trained.refresh()?;
    if let Some(copies) = behaviour {
        copies.restore(&state, trained)?;
    }
    optimizer.restore(trained, &state, step)
}
