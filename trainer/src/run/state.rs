//! Complete checkpoints of a run. Each rank writes its own file, and none waits for another meanwhile; when
//! all have, the first lists what every file must be and gives the folder its name. Where one process holds
//! everything, the folder is what diffusers loads as well.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cluster::Group;
use flow::checkpoint::{Entry, write_tensors};
use flow::checksums::{self, Checksums, Sum};
use flow::log;
use flow::pipeline::Component;
use flow::staged::{self, Staged};
use serde::{Deserialize, Serialize};

use super::config::AlignConfig;
use super::resume::Held;
use super::starvation::Starvation;
use super::validation::Standing;
use crate::algorithm::Copies;
use crate::group::ranks;
use crate::network::model::Model;
use crate::network::optimizer::AdamW;
use crate::network::save;
use crate::network::shards::{self, Layout, MASTER, Shards};
use crate::tensor::parameters::Mesh;

/// Folder of checkpoints in the output folder.
const CHECKPOINTS: &str = "checkpoints";
/// Metadata of the state: iterations done, the optimiser's steps, what the run holds to, and how it went.
const ITERATION: &str = "iteration";
const STEP: &str = "optimizer_step";
const HELD: &str = "held";
const COURSE: &str = "course";
/// A link to the best checkpoint, in the output folder.
const BEST: &str = "best";

/// What a run counts beside its iterations.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Course {
    /// Iterations in a row in which nothing was learnt.
    pub(crate) idle: usize,
    pub(crate) starvation: Starvation,
    /// How it stands by its validations, where it has some.
    #[serde(default)]
    pub(crate) validation: Option<Standing>,
}

impl Course {
    /// Whether another `limit` iterations in a row taught nothing; never where that is 0.
    pub(crate) fn is_idle(&self, limit: usize) -> bool {
        limit > 0 && self.idle > 0 && self.idle.is_multiple_of(limit)
    }
}

/// A checkpoint found.
pub(crate) struct Position {
    pub(crate) folder: PathBuf,
    /// Iterations done.
    pub(crate) iteration: usize,
}

impl Position {
    /// Reads this rank's share of it: every file is what it was when it was finished, and the state is of
    /// this iteration.
    fn check(&self, ranks: &Group) -> Result<()> {
        let list = Checksums::open(&self.folder)?;
        if let Some(list) = &list {
            let files = list.files().enumerate();
            let own = files.filter(|(index, _)| index % ranks.world() == ranks.rank());
            let own: Vec<&str> = own.map(|(_, file)| file).collect();
            list.check_where(|file| own.contains(&file))?;
        }
        let state = Shards::open(&self.folder)?;
        let iteration = state.metadata(ITERATION)?;
        ensure!(
            iteration == self.iteration.to_string(),
            "{}: is the state of iteration {iteration}, not of {}",
            self.folder.display(),
            self.iteration
        );
        if list.is_none() && ranks.is_first() {
            log::warn(&format!(
                "{}: missing, so whether this checkpoint is damaged is not known; going on from it",
                self.folder.join(checksums::FILE).display()
            ));
        }
        Ok(())
    }
}

/// The checkpoint of `output` with the most iterations that is whole, the same on all ranks; the first says
/// which were not.
///
/// # Errors
/// When there are some, and none is whole.
pub(crate) fn newest(output: &Path, ranks: &Group) -> Result<Option<Position>> {
    let home = output.join(CHECKPOINTS);
    let names = || {
        let names = all(output)?.into_iter().filter_map(|position| {
            let name = position.folder.file_name()?.to_str()?.to_owned();
            Some((position.iteration, name))
        });
        Ok(names.collect::<Vec<_>>())
    };
    let mut damage = Vec::new();
    for (iteration, name) in ranks::of_first(ranks, names)?.into_iter().rev() {
        let position = Position { folder: home.join(name), iteration };
        let own = position.check(ranks).err().map(|error| format!("{error:#}"));
        let mut found = ranks::all(ranks, &own)?.into_iter().enumerate();
        match found.find_map(|(rank, why)| Some((rank, why?))) {
            Some((_, why)) if ranks.world() == 1 => damage.push(why),
            Some((rank, why)) => damage.push(format!("rank {rank}: {why}")),
            None if damage.is_empty() => return Ok(Some(position)),
            None => {
                let (damage, folder) = (damage.join("; "), position.folder.display());
                if ranks.is_first() {
                    log::warn(&format!(
                        "{damage}; going on from {folder}, the newest that is whole"
                    ));
                }
                return Ok(Some(position));
            }
        }
    }
    ensure!(
        damage.is_empty(),
        "{}; no checkpoint is whole: remove {} to begin anew",
        damage.join("; "),
        home.display()
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
        log::note(&format!("removed {n_removed} unfinished files and folders of an earlier run"));
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

/// A run after some of its iterations.
pub(crate) struct Moment<'a> {
    pub(crate) config: &'a AlignConfig,
    pub(crate) held: &'a Held,
    pub(crate) course: &'a Course,
    /// Iterations done.
    pub(crate) done: usize,
    pub(crate) model: &'a Model,
    pub(crate) optimizer: &'a AdamW,
    /// What the algorithm keeps beside the weights that train.
    pub(crate) kept: Option<&'a Copies>,
}

impl Moment<'_> {
    /// Writes the checkpoint and removes all but the newest of those before; `before` is the last one. All
    /// ranks call it. Returns the folder.
    ///
    /// # Errors
    /// On all ranks where one cannot write; nothing is removed then.
    pub(crate) fn save(&self, before: Option<&Path>) -> Result<PathBuf> {
        let ranks = self.model.engine.trained().group();
        let home = self.config.output.join(CHECKPOINTS);
        let dir = home.join(name(self.done));
        let mut staged = None;
        let begin = || {
            // The folder's place under its hidden name, too.
            fs::create_dir_all(&home).with_context(|| format!("making {}", home.display()))?;
            let staged = staged.insert(Staged::begin(&dir)?);
            let name = staged.path().file_name().unwrap_or_default();
            Ok(name.to_string_lossy().into_owned())
        };
        let hidden = home.join(ranks::of_first(ranks, begin)?);
        let written = self.write(&hidden);
        let written = match &mut staged {
            Some(staged) => written.and_then(|file| self.complete(staged, before).map(|()| file)),
            None => written,
        };
        let files = ranks::outcomes(ranks, written)?;
        ranks::of_first(ranks, || {
            let Some(mut staged) = staged.take() else { return Ok(()) };
            for (rank, file) in files.iter().enumerate() {
                let Some((name, sum)) = file else { continue };
                staged.take_down(name, *sum).with_context(|| {
                    format!("rank {rank} has written elsewhere: all ranks share the output folder")
                })?;
            }
            staged.publish(true)?;
            self.remove_older()
        })?;
        Ok(dir)
    }

    /// Writes this rank's file into `folder`: its name and sum; nothing where another rank has the same part.
    fn write(&self, folder: &Path) -> Result<Option<(String, Sum)>> {
        let engine = &self.model.engine;
        let Mesh { within, across, .. } = engine.trained().mesh();
        if !across.is_first() {
            return Ok(None);
        }
        let name = shards::file_name(within.rank(), within.world());
        let path = &folder.join(&name);
        let mut entries: Vec<Entry<'_>> = shards::entries(MASTER, engine.trained().masters());
        entries.extend(self.optimizer.entries());
        entries.extend(self.kept.into_iter().flat_map(Copies::entries));
        let metadata = [
            (ITERATION, self.done.to_string()),
            (STEP, self.optimizer.n_steps().to_string()),
            ("config", serde_json::to_string(self.config)?),
            (HELD, serde_json::to_string(self.held)?),
            (COURSE, serde_json::to_string(self.course)?),
            Layout::of(engine).metadata()?,
        ];
        write_tensors(path, &entries, &metadata)?;
        let sum = checksums::sum_of(path);
        Ok(Some((name, sum.with_context(|| format!("cannot read {}", path.display()))?)))
    }

    /// Puts what is not a rank's own beside the files of ranks.
    fn complete(&self, staged: &mut Staged, before: Option<&Path>) -> Result<()> {
        let engine = &self.model.engine;
        if engine.adapters().is_none() {
            let source = &self.model.pipeline.dir;
            save::carry_over(source, staged, &[Component::Transformer], before)?;
        }
        if engine.trained().mesh().within.world() == 1 {
            let shards = Shards::open(staged.path())?;
            save::weights(&shards, staged.path(), self.config.max_shard_bytes())?;
        }
        Ok(())
    }

    /// Removes what is older than the newest and not the best.
    fn remove_older(&self) -> Result<()> {
        let best = self.course.validation.as_ref().and_then(Standing::best);
        if let Some(best) = best {
            link(&self.config.output, best)?;
        }
        let mut older = all(&self.config.output)?;
        older.retain(|position| position.iteration < self.done);
        older.truncate((older.len() + 1).saturating_sub(self.config.keep));
        for position in older.into_iter().filter(|position| Some(position.iteration) != best) {
            staged::remove(&position.folder)?;
        }
        Ok(())
    }
}

/// Name of the checkpoint of iteration `done`.
fn name(done: usize) -> String {
    format!("iteration-{done:06}")
}

/// Lets [`BEST`] name the checkpoint of iteration `best`.
fn link(output: &Path, best: usize) -> Result<()> {
    let link = output.join(BEST);
    let target = Path::new(CHECKPOINTS).join(name(best));
    if !output.join(&target).is_dir() || fs::read_link(&link).is_ok_and(|old| old == target) {
        return Ok(());
    }
    let make = || {
        let work = tempfile::Builder::new().prefix(".best.partial-").tempdir_in(output)?;
        std::os::unix::fs::symlink(&target, work.path().join(BEST))?;
        fs::rename(work.path().join(BEST), &link)
    };
    make().with_context(|| format!("cannot let {} name {}", link.display(), target.display()))
}

/// What [`restore`] found.
#[derive(Default)]
pub(crate) struct Restored {
    pub(crate) course: Course,
    /// What has changed since, of what may.
    pub(crate) changed: Vec<String>,
}

/// What has changed since `position`, of what may.
///
/// # Errors
/// When it is of another run, or cannot be read.
pub(crate) fn check(position: &Position, held: &Held) -> Result<Vec<String>> {
    let state = Shards::open(&position.folder)?;
    let before = Held::read(state.metadata(HELD)?);
    held.check(&before.with_context(|| position.folder.display().to_string())?)
}

/// Takes weights, optimiser and what the algorithm keeps back to `position`, whatever number of ranks it is of.
///
/// # Errors
/// When it is of another run, or cannot be read.
pub(crate) fn restore(
    position: &Position,
    held: &Held,
    optimizer: &mut AdamW,
    model: &Model,
    kept: Option<&Copies>,
) -> Result<Restored> {
    let state = Shards::open(&position.folder)?;
    let at = || position.folder.display().to_string();
    let step = state.metadata(STEP)?.parse().context("optimizer_step is no number")?;
    let changed = check(position, held)?;
    let course = serde_json::from_str(state.metadata(COURSE)?).with_context(at)?;
    ensure!(
        state.layout()? == Layout::of(&model.engine),
        "{}: is the state of other weights than those of {}",
        position.folder.display(),
        model.pipeline.dir.display()
    );
    let trained = model.engine.trained();
    state.restore(MASTER, trained.masters(), &[trained])?;
    trained.refresh()?;
    if let Some(copies) = kept {
        copies.restore(&state, trained)?;
    }
    optimizer.restore(&[trained], &state, step)?;
    Ok(Restored { course, changed })
}
