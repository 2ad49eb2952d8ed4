//! One run from one seed, as processes of their own: `ng-train align`, then `ng-train eval`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{read_bounded, write_atomically};
use flow::pipeline::Pipeline;
use serde::{Deserialize, Serialize};

use super::{CompareConfig, Options, RunConfig, growth, slug};
use crate::algorithm;
use crate::command::eval::OPTIONS;
use crate::run::align::{ALIGNED, Stopped};
use crate::run::config::AlignConfig;
use crate::run::interrupt;
use crate::run::record::{content, content_of_pipeline};
use crate::run::settings::{self, Source};

/// Iterations over whose passes the mean is taken: windows move.
const PERIOD: usize = 100;
/// Between two looks at a process.
const PAUSE: Duration = Duration::from_millis(50);

/// A run from one seed; without a run, the model that all start from.
pub(super) struct Task<'a> {
    pub(super) run: Option<&'a RunConfig>,
    pub(super) seed: u64,
    pub(super) folder: PathBuf,
    /// Images of an iteration.
    pub(super) n_images: f64,
    preset: &'a str,
    settings: Vec<String>,
}

/// What a run's folder is for.
#[derive(Serialize)]
struct Note<'a> {
    /// A prompt, when it is scored.
    images: usize,
    /// Hashes of what files hold.
    model: String,
    prompts: String,
    held_out: String,
    run: &'a AlignConfig,
    /// Says what scores it.
    score: &'a AlignConfig,
}

/// Part of `eval.json`.
#[derive(Deserialize)]
struct Evaluated {
    means: Vec<(String, f64)>,
}

impl<'a> Task<'a> {
    /// That of `run` in a comparison of `config` whose preset is `start`; validations of a run come after `pace` forward
    /// passes each.
    ///
    /// # Errors
    /// When the settings of a run are none.
    pub(super) fn new(
        config: &'a CompareConfig,
        start: &AlignConfig,
        pace: f64,
        run: Option<&'a RunConfig>,
        seed: u64,
    ) -> Result<Self> {
        let name = match run {
            Some(run) => format!("{}-seed{seed}", slug(&run.name)),
            None => "base".to_owned(),
        };
        let folder = config.output.join("runs").join(name);
        let preset = run.and_then(|run| run.preset.as_ref()).unwrap_or(&config.preset);
        let own = run.map_or(&[][..], |run| &run.settings);
        let mut settings: Vec<String> = config.settings.iter().chain(own).cloned().collect();
        settings.push(format!("seed={seed}"));
        let aligned = settings::align(&Source::Preset(preset), &settings)?.config;
        let group = &aligned.group;
        let n_images = (group.prompts_per_iteration * group.group_size) as f64;
        let each = work(&aligned)?;
        settings.push(match (config.passes, config.minutes) {
            (Some(passes), _) => format!("iterations={:.0}", (passes / each).max(1.0)),
            (None, minutes) => format!("minutes={}", minutes.unwrap_or_default()),
        });
        if run.is_some() {
            settings.push(format!("validate_every={:.0}", (pace / each).max(1.0)));
            settings.push(format!("validation={}", config.validation(start)?));
        }
        Ok(Self { run, seed, folder, n_images, preset, settings })
    }

    pub(super) fn label(&self) -> String {
        self.run.map_or("base".to_owned(), |run| format!("{} (seed {})", run.name, self.seed))
    }

    /// Scores of the finished model.
    fn eval(&self) -> PathBuf {
        self.folder.join("eval/eval.json")
    }

    pub(super) fn is_done(&self) -> bool {
        self.eval().is_file()
    }

    /// Held-out metrics of the finished model, by name.
    ///
    /// # Errors
    /// When they were not written, or cannot be read.
    pub(super) fn scores(&self) -> Result<Vec<(String, f64)>> {
        let path = self.eval();
        let columns: Vec<Evaluated> = serde_json::from_slice(&read_bounded(&path)?)
            .with_context(|| path.display().to_string())?;
        let column =
            columns.into_iter().next().with_context(|| format!("{} is empty", path.display()))?;
        Ok(column.means)
    }

    /// Makes the folder and notes what it is for; refuses one that was made for something else: by the text of
    /// presets, or the prompts, of another day, too.
    pub(super) fn claim(&self, config: &CompareConfig, start: &AlignConfig) -> Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let run = settings::align(&Source::Preset(self.preset), &self.settings)?.config;
        let wanted = Note {
            images: config.images,
            model: content_of_pipeline(&run.model)?,
            prompts: content(&run.prompts)?,
            held_out: content(&config.prompts)?,
            score: start,
            run: &run,
        };
        let wanted = toml::to_string(&wanted)?;
        let note = self.folder.join("settings.toml");
        if !note.exists() && fs::read_dir(&self.folder)?.next().is_none() {
            return Ok(write_atomically(&note, wanted.as_bytes())?);
        }
        let found = read_bounded(&note).unwrap_or_default();
        let found = String::from_utf8_lossy(&found);
        // What is left out of one of them shows in the other.
        let odd = wanted.lines().zip(found.lines()).find(|(wanted, found)| wanted != found);
        let odd =
            odd.map_or(String::new(), |(wanted, found)| format!(", `{found}` for `{wanted}`"));
        ensure!(
            found == wanted,
            "{} holds a run with other settings{odd}: remove it or choose another output",
            self.folder.display()
        );
        Ok(())
    }

    /// Trains, where there is a run, and scores.
    pub(super) fn make(
        &self,
        config: &CompareConfig,
        start: &Path,
        options: &Options<'_>,
    ) -> Result<()> {
        if self.run.is_some() && !self.model(start).is_dir() {
            let mut settings = self.settings.clone();
            settings.push(format!("output={}", self.folder.display()));
            let resumed = self.folder.join("checkpoints").is_dir();
            let flags: &[&str] = if resumed { &["--resume"] } else { &[] };
            self.call("align", self.preset, &settings, options, flags)?;
        }
        self.evaluate(config, &[self.model(start)], &self.folder.join("eval"), options)
    }

    /// What is scored: the finished model, or that at the start.
    pub(super) fn model(&self, start: &Path) -> PathBuf {
        self.run.map_or(start.to_owned(), |_| self.folder.join(ALIGNED))
    }

    /// Samples and scores `models` on the held-out prompts, all alike: by the comparison's preset.
    pub(super) fn evaluate(
        &self,
        config: &CompareConfig,
        models: &[PathBuf],
        out: &Path,
        options: &Options<'_>,
    ) -> Result<()> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut flags =
            vec!["--prompts".to_owned(), text(&config.prompts), "--out".to_owned(), text(out)];
        flags.extend(["--images".to_owned(), config.images.to_string()]);
        flags.extend(models.iter().flat_map(|model| ["--model".to_owned(), text(model)]));
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let is_option =
            |setting: &&String| OPTIONS.iter().any(|(key, _)| settings::key(setting) == *key);
        let settings: Vec<String> =
            config.settings.iter().filter(|setting| !is_option(setting)).cloned().collect();
        self.call("eval", &config.preset, &settings, options, &flags)
    }

    fn call(
        &self,
        command: &str,
        preset: &str,
        settings: &[String],
        options: &Options<'_>,
        flags: &[&str],
    ) -> Result<()> {
        let log = self.folder.join(format!("{command}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut process = Command::new(std::env::current_exe()?);
        process.args([command, "--threads", "1", "--preset", preset]);
        process.args(["--device", options.device, "--precision", options.precision]);
        process.args(settings.iter().flat_map(|setting| ["--set", setting])).args(flags);
        process.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut child = process.spawn().context("cannot start another ng-train")?;
        let mut is_told = false;
        let ended = loop {
            if let Some(ended) = child.try_wait()? {
                break ended;
            }
            if interrupt::asked() && !is_told {
                is_told = true;
                cluster::ask_to_stop(&child);
            }
            thread::sleep(PAUSE);
        };
        if ended.success() {
            return Ok(());
        }
        if interrupt::asked() {
            bail!(Stopped);
        }
        let said = read_bounded(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().last().unwrap_or("it said nothing");
        bail!("{}: {command} failed ({ended}), see {}: {last}", self.label(), log.display())
    }

    /// What ends the run, as a setting.
    #[cfg(test)]
    pub(super) fn end(&self) -> &str {
        let is_end = |s: &&String| s.starts_with("iterations=") || s.starts_with("minutes=");
        self.settings.iter().rfind(is_end).expect("every run ends")
    }

    /// Iterations from one validation to the next.
    #[cfg(test)]
    pub(super) fn validates_every(&self) -> &str {
        let every = self.settings.iter().find_map(|s| s.strip_prefix("validate_every="));
        every.expect("every run has validations")
    }
}

/// Forward passes of an iteration of `run`, a backward pass being two.
pub(super) fn work(run: &AlignConfig) -> Result<f64> {
    let (pipeline, group) = (Pipeline::open(&run.model)?, &run.group);
    let grid = group.rollout.grid(&pipeline.scheduler, &group.rollout.latent_size(&pipeline)?);
    let algorithm = run.setting()?.open(grid);
    let [forward, training] = algorithm::nfe(&*algorithm, group.group_size, PERIOD)?;
    let n_images = group.prompts_per_iteration * group.group_size;
    Ok(n_images as f64 * growth::work(forward, training))
}
