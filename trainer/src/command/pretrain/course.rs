//! How far a pre-training has come, and what it goes on with after it was stopped: a folder beside its output,
//! written whole, and gone when the model is there.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{Entry, write_tensors};
use flow::log;
use flow::staged::Staged;
use serde::{Deserialize, Serialize};

use super::PretrainConfig;
use crate::network::optimizer::AdamW;
use crate::network::shards::{self, MASTER, Shards};
use crate::run::align::Stopped;
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::run::resume;
use crate::tensor::parameters::Parameters;

/// Time between two savings.
const SAVE_EVERY: Duration = Duration::from_mins(10);
/// What the folder is called, after the output.
const SUFFIX: &str = ".unfinished";
/// State: the weights that an earlier stage made.
const MADE: &str = "made";
/// Metadata: a [`Position`], and the settings.
const POSITION: &str = "position";
const SETTINGS: &str = "settings";
/// Settings that may change.
const FREE: [&str; 2] = ["output", "bf16"];

/// What trains.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, PartialOrd, Serialize)]
pub(super) enum Stage {
    Autoencoder,
    Flow,
}

/// Where a run was when it was saved.
#[derive(Debug, Deserialize, Serialize)]
struct Position {
    stage: Stage,
    /// Steps done of that stage.
    step: usize,
    /// Moving average of its error.
    recent: f64,
}

/// What a stage changes, and how long it takes.
pub(super) struct Training<'a> {
    pub(super) stage: Stage,
    /// In the order of the optimiser's segments.
    pub(super) trained: Vec<&'a Parameters>,
    /// What an earlier stage made, which this one reads.
    pub(super) made: Option<&'a Parameters>,
    pub(super) n_steps: usize,
}

/// The course of one run.
pub(super) struct Course<'a> {
    config: &'a PretrainConfig,
    folder: PathBuf,
    saved: Option<(Position, Shards)>,
}

impl<'a> Course<'a> {
    /// That of `config`, from where it was stopped if it is to `resume`.
    ///
    /// # Errors
    /// When there is something to resume and it is not asked for, cannot be read, or is of other settings.
    pub(super) fn open(config: &'a PretrainConfig, resume: bool) -> Result<Self> {
        let name = config.output.file_name().context("output names no folder")?;
        let mut name = name.to_owned();
        name.push(SUFFIX);
        let folder = config.output.with_file_name(name);
        if !folder.exists() {
            if resume {
                log::warn(&format!("{}: not there, so this is a new run", folder.display()));
            }
            return Ok(Self { config, folder, saved: None });
        }
        let at = || folder.display().to_string();
        ensure!(
            resume,
            "{} holds an unfinished run: go on with --resume, or remove it to begin anew",
            at()
        );
        let shards = Shards::open(&folder)?;
        let position: Position =
            serde_json::from_str(shards.metadata(POSITION)?).with_context(at)?;
        let before = toml::from_str(shards.metadata(SETTINGS)?).with_context(at)?;
        let now = toml::Value::try_from(config)?;
        let changed: Vec<String> = resume::changed(&before, &now)
            .into_iter()
            .filter(|(key, _)| !FREE.contains(&key.as_str()))
            .map(|(_, line)| line)
            .collect();
        if !changed.is_empty() {
            bail!("{} is of other settings: {}", at(), changed.join("; "));
        }
        Ok(Self { config, folder, saved: Some((position, shards)) })
    }

    /// Puts what `stage` made into `made` if the run was beyond it when it was saved, and says whether it was.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn restore_made(&self, stage: Stage, made: &Parameters) -> Result<bool> {
        let Some((_, shards)) = self.saved.as_ref().filter(|(at, _)| at.stage > stage) else {
            return Ok(false);
        };
        shards.restore(MADE, made.masters(), &[made])?;
        made.refresh()?;
        Ok(true)
    }

    /// Makes the steps of a stage, each of which returns its error, and returns the moving average of these.
    ///
    /// # Errors
    /// The first of `step`; [`Stopped`] once everything is saved, when somebody asked for it.
    pub(super) fn train(
        &self,
        training: &Training<'_>,
        optimizer: &mut AdamW,
        mut step: impl FnMut(usize, &mut AdamW) -> Result<f64>,
    ) -> Result<f64> {
        let (first, mut recent) = self.restore(training, optimizer)?;
        let (title, measure) = match training.stage {
            Stage::Autoencoder => ("autoencoder", "mse"),
            Stage::Flow => ("flow", "loss"),
        };
        let progress = Progress::new(title, training.n_steps, first);
        let mut saved = Instant::now();
        for index in first..training.n_steps {
            let is_asked = interrupt::asked();
            if is_asked || saved.elapsed() > SAVE_EVERY {
                let at = Position { stage: training.stage, step: index, recent };
                self.save(training, optimizer, &at)?;
                saved = Instant::now();
            }
            if is_asked {
                progress.say(&format!(
                    "stopped after step {index} of {} of the {title}: the same command with --resume continues",
                    training.n_steps
                ));
                bail!(Stopped);
            }
            let error = step(index, optimizer)?;
            recent = if index == 0 { error } else { 0.98 * recent + 0.02 * error };
            progress.advance(&format!("{measure} {recent:.5}"));
        }
        Ok(recent)
    }

    /// Steps that are done, and the moving average of their errors.
    fn restore(&self, training: &Training<'_>, optimizer: &mut AdamW) -> Result<(usize, f64)> {
        let here = |(at, _): &&(Position, Shards)| at.stage == training.stage;
        let Some((Position { step, recent, .. }, shards)) = self.saved.as_ref().filter(here) else {
            return Ok((0, 0.0));
        };
        let masters = training.trained.iter().flat_map(|network| network.masters());
        shards.restore(MASTER, masters, &training.trained)?;
        for network in &training.trained {
            network.refresh()?;
        }
        optimizer.restore(&training.trained, shards, *step as i64)?;
        Ok((*step, *recent))
    }

    fn save(&self, training: &Training<'_>, optimizer: &AdamW, at: &Position) -> Result<()> {
        let masters = training.trained.iter().flat_map(|network| network.masters());
        let made = training.made.into_iter().flat_map(Parameters::masters);
        let mut entries: Vec<Entry<'_>> = shards::entries(MASTER, masters);
        entries.extend(shards::entries(MADE, made));
        entries.extend(optimizer.entries());
        let settings = toml::to_string(self.config)?;
        let metadata = [(POSITION, serde_json::to_string(at)?), (SETTINGS, settings)];
        let staged = Staged::begin(&self.folder)?;
        write_tensors(&staged.path().join(shards::file_name(0, 1)), &entries, &metadata)?;
        Ok(staged.publish(true)?)
    }

    /// Removes what is not needed any more.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(super) fn finish(self) -> Result<()> {
        let Self { folder, saved, .. } = self;
        drop(saved);
        if folder.exists() {
            fs::remove_dir_all(&folder)
                .with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        Ok(())
    }
}
