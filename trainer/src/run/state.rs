//! Complete checkpoints of a run: a pipeline folder that also holds everything `--resume` needs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::{Weights, write_tensors};
use flow::checksums::Checksums;
use flow::staged;

use super::config::AlignConfig;
use super::resume::Held;
use crate::algorithm::Copies;
use crate::network::model::Model;
use crate::network::optimizer::AdamW;
use crate::network::save::{self, Target};
use crate::tensor::parameters::later;

/// Folder of checkpoints in the output folder.
const CHECKPOINTS: &str = "checkpoints";
/// Optimiser, weights in full precision and position.
const FILE: &str = save::STATE;
/// What the run holds to, in the state's metadata.
const HELD: &str = "held";

/// A checkpoint found.
pub(crate) struct Position {
    pub(crate) folder: PathBuf,
    /// Iterations done.
    pub(crate) iteration: usize,
}

impl Position {
    /// Reads all of it: every file is what it was when it was finished, and the state is of this iteration.
    fn check(&self) -> Result<()> {
        let state = self.folder.join(FILE);
        if let Some(list) = Checksums::open(&self.folder)? {
            list.check_all()?;
        }
        let weights = Weights::open_file(&state)?;
        let iteration = weights.metadata("iteration").unwrap_or("unknown");
        ensure!(
            iteration == self.iteration.to_string(),
            "{}: is the state of iteration {iteration}, not of {}",
            state.display(),
            self.iteration
        );
        Ok(())
    }
}

/// The checkpoint of `output` with the most iterations that is whole; where it `says` so, which were not.
///
/// # Errors
/// When there are some, and none is whole.
pub(crate) fn newest(output: &Path, says: bool) -> Result<Option<Position>> {
    let mut damage = Vec::new();
    for position in all(output)?.into_iter().rev() {
        match position.check() {
            Err(error) => damage.push(format!("{error:#}")),
            Ok(()) if damage.is_empty() => return Ok(Some(position)),
            Ok(()) => {
                let (damage, folder) = (damage.join("; "), position.folder.display());
                if says {
                    eprintln!(
                        "warning: {damage}; going on from {folder}, the newest that is whole"
                    );
                }
                return Ok(Some(position));
            }
        }
    }
    ensure!(
        damage.is_empty(),
        "{}; no checkpoint is whole: remove {} to begin anew",
        damage.join("; "),
        output.join(CHECKPOINTS).display()
    );
    Ok(None)
}

/// Whether `output` holds a checkpoint, whole or not.
pub(crate) fn is_begun(output: &Path) -> Result<bool> {
    Ok(!all(output)?.is_empty())
}

/// Removes what killed runs left half-written, and says so.
pub(crate) fn remove_leftovers(output: &Path) -> Result<()> {
    let mut n_removed = 0;
    for folder in [output.to_owned(), output.join(CHECKPOINTS), output.join("samples")] {
        n_removed += staged::remove_leftovers(&folder)?;
    }
    if n_removed > 0 {
        eprintln!("removed {n_removed} unfinished files and folders of an earlier run");
    }
    Ok(())
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
        found.extend(iteration.map(|iteration| Position { folder: path, iteration }));
    }
    found.sort_by_key(|position| position.iteration);
    Ok(found)
}

/// Writes the checkpoint of iteration `done` and removes all but the newest. `behaviour` is what rolls out,
/// where that is not what trains; `before` is the checkpoint before. Returns its folder.
pub(crate) fn save(
    config: &AlignConfig,
    held: &Held,
    done: usize,
    model: &Model,
    optimizer: &AdamW,
    behaviour: Option<&Copies>,
    before: Option<&Path>,
) -> Result<PathBuf> {
    let dir = config.output.join(CHECKPOINTS).join(format!("iteration-{done:06}"));
    let trained = model.engine.trained();
    let (mut entries, step) = optimizer.entries(trained)?;
    let masters = trained.wholes(trained.masters())?;
    let masters = masters.iter().enumerate();
    entries.extend(masters.map(|(index, master)| later(format!("master.{index}"), master)));
    if let Some(copies) = behaviour {
        entries.extend(copies.entries(trained)?);
    }
    let target = Target { dir: &dir, max_shard_bytes: config.max_shard_bytes(), before };
    save::trained(model, optimizer.averaged(), target, |folder| {
        let metadata = [
            ("iteration", done.to_string()),
            ("optimizer_step", step.to_string()),
            ("config", serde_json::to_string(config)?),
            (HELD, serde_json::to_string(held)?),
        ];
        Ok(write_tensors(&folder.join(FILE), &entries, &metadata)?)
    })?;
    if !trained.group().is_first() {
        return Ok(dir);
    }
    let mut older = all(&config.output)?;
    older.retain(|position| position.iteration != done);
    older.truncate((older.len() + 1).saturating_sub(config.keep));
    for position in older {
        staged::remove(&position.folder)?;
    }
    Ok(dir)
}

/// Takes weights, optimiser and `behaviour` back to `position`, and returns what has changed since that may.
pub(crate) fn restore(
    position: &Position,
    held: &Held,
    optimizer: &mut AdamW,
    model: &Model,
    behaviour: Option<&Copies>,
) -> Result<Vec<String>> {
    let path = position.folder.join(FILE);
    let state = Weights::open_file(&path)?;
    let field = |key: &str| {
        state.metadata(key).with_context(|| format!("{}: no {key} in its metadata", path.display()))
    };
    let step = field("optimizer_step")?.parse().context("optimizer_step is no number")?;
    let before = Held::read(state.metadata(HELD)).with_context(|| path.display().to_string())?;
    let changed = held.check(&before)?;
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
    optimizer.restore(trained, &state, step)?;
    Ok(changed)
}
