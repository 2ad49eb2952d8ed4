//! The paper's experiment as one command: methods side by side from one model, over several seeds, each for
//! the same time; a report with tables, curves and pictures.
//!
//! Every run is a process of its own, `ng-train align` and then `ng-train eval`, so that anyone can repeat
//! one by its command line. What is finished is not run again.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{read_bounded, write_atomically};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::run::align::ALIGNED;
use crate::run::config::AlignConfig;
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::run::settings::{self, ALIGN_PRESETS, Source};

mod growth;
mod report;

/// Presets of `ng-train compare`.
pub const COMPARE_PRESETS: [(&str, &str); 1] =
    [("signs", include_str!("../../presets/compare-signs.toml"))];

/// A comparison.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CompareConfig {
    /// Folder for the runs and the report.
    pub output: PathBuf,
    /// Preset of the runs that name none; rewards, judges and the first model are its.
    pub preset: String,
    /// Held-out prompts.
    pub prompts: PathBuf,
    /// Every run is made from each of these.
    pub seeds: Vec<u64>,
    /// Minutes a run trains.
    pub minutes: f64,
    /// Curves and tables of the reward come from held-out prompts, scored every so many iterations.
    #[serde(default = "validate_every")]
    pub validate_every: usize,
    /// So many of them, the first.
    #[serde(default = "count")]
    pub count: usize,
    /// Settings of all runs, KEY=VALUE.
    #[serde(default)]
    pub settings: Vec<String>,
    /// What is laid side by side.
    pub tables: Vec<TableConfig>,
}

fn validate_every() -> usize {
    5
}
fn count() -> usize {
    24
}

/// Runs that are laid side by side.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// Heading; its files are named after it.
    pub title: String,
    /// The first is what others are compared with. A name that stands in several tables is one run.
    pub runs: Vec<RunConfig>,
}

/// One way to align.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What people call it.
    pub name: String,
    /// Its preset, if it is not that of the comparison.
    #[serde(default)]
    pub preset: Option<String>,
    /// What differs from the preset, KEY=VALUE.
    #[serde(default)]
    pub settings: Vec<String>,
}

/// How a comparison was asked for, beside its configuration.
pub struct Options<'a> {
    /// Runs at a time, one thread each.
    pub jobs: usize,
    /// `--device` of every run.
    pub device: &'a str,
}

/// Makes what is missing of the runs, then the report.
///
/// # Errors
/// When the configuration contradicts itself, a run fails, or the output cannot be written.
pub fn run(config: &CompareConfig, options: &Options<'_>) -> Result<()> {
    config.validate()?;
    let start: AlignConfig =
        settings::read(&Source::Preset(&config.preset), &ALIGN_PRESETS, &config.settings)?;
    let tasks = config.tasks();
    let folder = config.output.join("runs");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for task in &tasks {
        task.claim(config)?;
    }
    let left: VecDeque<&Task<'_>> = tasks.iter().filter(|task| !task.is_done()).collect();
    let progress = Mutex::new(Progress::new("compare", tasks.len(), tasks.len() - left.len()));
    let queue = Mutex::new(left);
    let worker = || -> Result<()> {
        loop {
            let Some(task) = queue.lock().expect("no worker panics").pop_front() else {
                return Ok(());
            };
            interrupt::check()?;
            if let Err(error) = task.make(config, &start.model, options.device) {
                // Others stop after what they are at.
                queue.lock().expect("no worker panics").clear();
                return Err(error);
            }
            progress.lock().expect("no worker panics").advance(&task.label());
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs).map(|_| scope.spawn(worker)).collect();
        let ended = workers.into_iter().map(|worker| worker.join().expect("no worker panics"));
        // All are waited for before the first error is told.
        ended.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
    })?;
    side_by_side(config, &tasks, &start.model, options.device)?;
    report::write(config, &tasks, &start.group.rewards[0].name)
}

/// One sheet of the model at the start and every run of the first table, from the first seed.
fn side_by_side(
    config: &CompareConfig,
    tasks: &[Task<'_>],
    start: &Path,
    device: &str,
) -> Result<()> {
    let out = config.output.join("side-by-side");
    if out.join("side-by-side.png").is_file() {
        return Ok(());
    }
    let shown = |task: &&Task<'_>| {
        task.run
            .is_none_or(|run| config.tables[0].runs.contains(run) && task.seed == config.seeds[0])
    };
    let models: Vec<PathBuf> = tasks.iter().filter(shown).map(|task| task.model(start)).collect();
    evaluate(config, &tasks[0], &models, &out, device)
}

impl CompareConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.seeds.is_empty(), "seeds = []: at least one is needed");
        ensure!(self.validate_every > 0, "validate_every = 0: curves need validations");
        ensure!(self.count > 0, "count = 0: at least one prompt is needed");
        ensure!(self.minutes > 0.0, "minutes = {}: above 0", self.minutes);
        ensure!(!self.tables.is_empty(), "no [[tables]]: at least one is needed");
        let mut known: BTreeMap<String, &RunConfig> = BTreeMap::new();
        for table in &self.tables {
            ensure!(!table.runs.is_empty(), "table {:?} has no runs", table.title);
            for run in &table.runs {
                let first = known.entry(slug(&run.name)).or_insert(run);
                ensure!(*first == run, "two runs are named like {:?} and differ", run.name);
            }
        }
        Ok(())
    }

    /// Every run of every seed once: the base first, then in the order of the tables.
    fn tasks(&self) -> Vec<Task<'_>> {
        let mut names: Vec<&str> = Vec::new();
        let mut tasks = vec![Task::new(self, None, 0)];
        for run in self.tables.iter().flat_map(|table| &table.runs) {
            if !names.contains(&run.name.as_str()) {
                names.push(&run.name);
                tasks.extend(self.seeds.iter().map(|&seed| Task::new(self, Some(run), seed)));
            }
        }
        tasks
    }
}

/// A run from one seed; without a run, the model that all start from.
struct Task<'a> {
    run: Option<&'a RunConfig>,
    seed: u64,
    folder: PathBuf,
}

impl<'a> Task<'a> {
    fn new(config: &CompareConfig, run: Option<&'a RunConfig>, seed: u64) -> Self {
        let name = match run {
            Some(run) => format!("{}-seed{seed}", slug(&run.name)),
            None => "base".to_owned(),
        };
        Self { run, seed, folder: config.output.join("runs").join(name) }
    }

    fn label(&self) -> String {
        self.run.map_or("base".to_owned(), |run| format!("{} (seed {})", run.name, self.seed))
    }

    /// Scores of the finished model.
    fn eval(&self) -> PathBuf {
        self.folder.join("eval/eval.json")
    }

    fn is_done(&self) -> bool {
        self.eval().is_file()
    }

    /// Makes the folder and notes what it is for; refuses one that was made for something else.
    fn claim(&self, config: &CompareConfig) -> Result<()> {
        fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))?;
        let (preset, settings) = self.settings(config);
        let wanted = [vec![preset.to_owned(), format!("{}", config.prompts.display())], settings];
        let wanted = wanted.concat().join("\n") + "\n";
        let note = self.folder.join("settings.txt");
        match read_bounded(&note) {
            Ok(found) => ensure!(
                found == wanted.as_bytes(),
                "{} holds a run with other settings: remove it or choose another output",
                self.folder.display()
            ),
            Err(_) => write_atomically(&note, wanted.as_bytes())?,
        }
        Ok(())
    }

    /// Preset and settings of the run.
    fn settings<'b>(&'b self, config: &'b CompareConfig) -> (&'b str, Vec<String>) {
        let preset = self.run.and_then(|run| run.preset.as_ref()).unwrap_or(&config.preset);
        let own = self.run.map_or(&[][..], |run| &run.settings);
        let mut settings: Vec<String> = config.settings.iter().chain(own).cloned().collect();
        settings.push(format!("seed={}", self.seed));
        settings.push(format!("minutes={}", config.minutes));
        if self.run.is_some() {
            settings.push(format!("validate_every={}", config.validate_every));
            settings.push(format!("validation={}", Self::validation(config)));
        }
        (preset, settings)
    }

    /// The held-out prompts of every run: those of the comparison, and nothing follows from them.
    fn validation(config: &CompareConfig) -> toml::Value {
        let mut table = toml::Table::new();
        table.insert("prompts".to_owned(), config.prompts.to_string_lossy().into_owned().into());
        table.insert("count".to_owned(), toml::Value::Integer(config.count as i64));
        table.insert("best".to_owned(), String::new().into());
        table.into()
    }

    /// Trains, where there is a run, and scores.
    fn make(&self, config: &CompareConfig, start: &Path, device: &str) -> Result<()> {
        if self.run.is_some() && !self.model(start).is_dir() {
            let (preset, mut settings) = self.settings(config);
            settings.push(format!("output={}", self.folder.display()));
            let resumed = self.folder.join("checkpoints").is_dir();
            let flags: &[&str] = if resumed { &["--resume"] } else { &[] };
            self.call("align", preset, &settings, device, flags)?;
        }
        evaluate(config, self, &[self.model(start)], &self.folder.join("eval"), device)
    }

    /// What is scored: the finished model, or that at the start.
    fn model(&self, start: &Path) -> PathBuf {
        self.run.map_or(start.to_owned(), |_| self.folder.join(ALIGNED))
    }

    fn call(
        &self,
        command: &str,
        preset: &str,
        settings: &[String],
        device: &str,
        flags: &[&str],
    ) -> Result<()> {
        let log = self.folder.join(format!("{command}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut process = Command::new(std::env::current_exe()?);
        process.args([command, "--threads", "1", "--device", device, "--preset", preset]);
        process.args(settings.iter().flat_map(|setting| ["--set", setting])).args(flags);
        process.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let ended = process.status().context("cannot start another ng-train")?;
        interrupt::check()?;
        if ended.success() {
            return Ok(());
        }
        let said = read_bounded(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().last().unwrap_or("it said nothing");
        bail!("{}: {command} failed ({ended}), see {}: {last}", self.label(), log.display())
    }
}

/// Samples and scores `models` on the held-out prompts, all alike: by the comparison's preset.
fn evaluate(
    config: &CompareConfig,
    task: &Task<'_>,
    models: &[PathBuf],
    out: &Path,
    device: &str,
) -> Result<()> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut flags =
        vec!["--prompts".to_owned(), text(&config.prompts), "--out".to_owned(), text(out)];
    flags.extend(models.iter().flat_map(|model| ["--model".to_owned(), text(model)]));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    task.call("eval", &config.preset, &config.settings, device, &flags)
}

/// A name as a file's.
fn slug(name: &str) -> String {
    let letters =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    let joined: String = letters.collect();
    joined.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}
