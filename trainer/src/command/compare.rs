//! The paper's experiment as one command: methods side by side from one model, over several seeds, each for
//! the same time or at the same cost; a report with tables, curves and pictures.
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
use flow::pipeline::Pipeline;
use flow::usage::Usage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::growth::Cost;
use crate::algorithm;
use crate::data::prompts;
use crate::run::align::ALIGNED;
use crate::run::config::AlignConfig;
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::run::settings::{self, ALIGN_PRESETS, Source};
use crate::tensor::device;

mod growth;
mod interval;
mod report;

/// Iterations over whose passes the mean is taken: windows move.
const PERIOD: usize = 100;

/// Presets of `ng-train compare`.
pub const COMPARE_PRESETS: [(&str, &str); 7] = [
    ("signs", include_str!("../../presets/compare-signs.toml")),
    ("neighbor", include_str!("../../presets/compare-neighbor.toml")),
    ("rivals", include_str!("../../presets/compare-rivals.toml")),
    ("compressibility", include_str!("../../presets/compare-compressibility.toml")),
    ("rates", include_str!("../../presets/compare-rates.toml")),
    ("parts", include_str!("../../presets/compare-parts.toml")),
    ("emoji", include_str!("../../presets/compare-emoji.toml")),
];

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
    /// Minutes a run trains, unless `passes` are given.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Forward passes of the network that a run spends in rollouts and updates, a backward pass being two; its
    /// iterations follow. What else a machine does changes nothing of such a run, nor that a small network remembers a
    /// pass of the rollout for its update.
    #[serde(default)]
    pub passes: Option<f64>,
    /// Curves and tables of the reward come from held-out prompts, scored every so many iterations.
    #[serde(default = "validate_every")]
    pub validate_every: usize,
    /// So many of them, the first.
    #[serde(default = "count")]
    pub count: usize,
    /// Images a prompt on which models are scored in the end.
    #[serde(default = "images")]
    pub images: usize,
    /// The report counts the seeds that tell a difference of this size.
    #[serde(default = "difference")]
    pub difference: f64,
    /// A held-out metric by the reward's own model and the same by one that nothing trains on: what a run gains by the
    /// first and not by the second is told as hacked. None where it is empty.
    #[serde(default)]
    pub hacked: Vec<String>,
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
fn images() -> usize {
    1
}
fn difference() -> f64 {
    0.05
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
    /// `--device` of every run; where it leaves the choice, runs share the machine's GPUs.
    pub device: &'a str,
    /// `--precision` of every run.
    pub precision: &'a str,
}

impl Options<'_> {
    fn own_device(&self, number: usize) -> String {
        device::of_process(self.device, number % device::n_gpus().unwrap_or(0).max(1))
    }
}

/// Makes what is missing of the runs, then the report.
///
/// # Errors
/// When the configuration contradicts itself, a run fails, or the output cannot be written.
pub fn run(config: &CompareConfig, options: &Options<'_>) -> Result<()> {
    config.validate().map_err(|error| Usage(error.to_string()))?;
    let start: AlignConfig =
        settings::read(&Source::Preset(&config.preset), &ALIGN_PRESETS, &config.settings)?;
    let metrics = start.group.rewards.iter().chain(&start.judges);
    let metrics: Vec<&str> = metrics.map(|metric| metric.name.as_str()).collect();
    if let Some(unknown) = config.hacked.iter().find(|name| !metrics.contains(&name.as_str())) {
        bail!(Usage(format!("hacked: no metric {unknown:?}: {} are there", metrics.join(", "))));
    }
    prompts::read(&config.prompts).context("prompts")?;
    let tasks = config.tasks()?;
    let folder = config.output.join("runs");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for task in &tasks {
        task.claim(config)?;
    }
    let left: VecDeque<&Task<'_>> = tasks.iter().filter(|task| !task.is_done()).collect();
    let progress = Mutex::new(Progress::new("compare", tasks.len(), tasks.len() - left.len()));
    let queue = Mutex::new(left);
    let worker = &|number: usize| -> Result<()> {
        let own = Options { device: &options.own_device(number), ..*options };
        loop {
            let Some(task) = queue.lock().expect("no worker panics").pop_front() else {
                return Ok(());
            };
            interrupt::check()?;
            if let Err(error) = task.make(config, &start.model, &own) {
                // Others stop after what they are at.
                queue.lock().expect("no worker panics").clear();
                return Err(error);
            }
            progress.lock().expect("no worker panics").advance(&task.label());
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..options.jobs).map(|number| scope.spawn(move || worker(number))).collect();
        let ended = workers.into_iter().map(|worker| worker.join().expect("no worker panics"));
        // All are waited for before the first error is told.
        ended.collect::<Vec<Result<()>>>().into_iter().collect::<Result<()>>()
    })?;
    side_by_side(config, &tasks, &start.model, options)?;
    report::write(config, &tasks, &start.group.rewards[0].name)
}

/// One sheet of the model at the start and every run of the first table, from the first seed.
fn side_by_side(
    config: &CompareConfig,
    tasks: &[Task<'_>],
    start: &Path,
    options: &Options<'_>,
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
    evaluate(config, &tasks[0], &models, &out, options)
}

impl CompareConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.seeds.is_empty(), "seeds = []: at least one is needed");
        ensure!(self.validate_every > 0, "validate_every = 0: curves need validations");
        ensure!(self.count > 0, "count = 0: at least one prompt is needed");
        ensure!(self.images > 0, "images = 0: at least one a prompt is needed");
        let n_hacked = self.hacked.len();
        ensure!([0, 2].contains(&n_hacked), "hacked = {:?}: two metrics, or none", self.hacked);
        ensure!(self.difference > 0.0, "difference = {}: above 0", self.difference);
        for (name, length) in [("minutes", self.minutes), ("passes", self.passes)] {
            let length = length.unwrap_or(1.0);
            ensure!(length > 0.0 && length.is_finite(), "{name} = {length}: above 0");
        }
        ensure!(
            self.minutes.is_some() || self.passes.is_some(),
            "nothing ends a run: set minutes or passes"
        );
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
    ///
    /// # Errors
    /// When the settings of a run are none.
    fn tasks(&self) -> Result<Vec<Task<'_>>> {
        let mut names: Vec<&str> = Vec::new();
        let mut tasks = vec![Task::new(self, None, 0)?];
        for run in self.tables.iter().flat_map(|table| &table.runs) {
            if names.contains(&run.name.as_str()) {
                continue;
            }
            names.push(&run.name);
            for &seed in &self.seeds {
                let task = Task::new(self, Some(run), seed);
                tasks.push(task.with_context(|| format!("run {:?}", run.name))?);
            }
        }
        Ok(tasks)
    }

    /// What runs have spent alike at their end.
    fn clock(&self) -> Cost {
        if self.passes.is_some() { Cost::Work } else { Cost::Seconds }
    }
}

/// A run from one seed; without a run, the model that all start from.
struct Task<'a> {
    run: Option<&'a RunConfig>,
    seed: u64,
    folder: PathBuf,
    /// What ends it, as a setting.
    end: String,
    /// Images of an iteration.
    n_images: f64,
}

impl<'a> Task<'a> {
    fn new(config: &CompareConfig, run: Option<&'a RunConfig>, seed: u64) -> Result<Self> {
        let name = match run {
            Some(run) => format!("{}-seed{seed}", slug(&run.name)),
            None => "base".to_owned(),
        };
        let folder = config.output.join("runs").join(name);
        let mut task = Self { run, seed, folder, end: String::new(), n_images: 0.0 };
        let (preset, settings) = task.settings(config);
        let aligned = settings::align(&Source::Preset(preset), &settings)?.config;
        let group = &aligned.group;
        task.n_images = (group.prompts_per_iteration * group.group_size) as f64;
        task.end = match (config.passes, config.minutes) {
            (Some(passes), _) => {
                let n = passes / (task.n_images * work(&aligned)?);
                format!("iterations={:.0}", n.max(1.0))
            }
            (None, minutes) => format!("minutes={}", minutes.unwrap_or_default()),
        };
        Ok(task)
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
        let mut wanted = vec![preset.to_owned(), format!("{}", config.prompts.display())];
        if config.images > 1 {
            wanted.push(format!("images={}", config.images));
        }
        let wanted = [wanted, settings];
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
        settings.extend((!self.end.is_empty()).then(|| self.end.clone()));
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
    fn make(&self, config: &CompareConfig, start: &Path, options: &Options<'_>) -> Result<()> {
        if self.run.is_some() && !self.model(start).is_dir() {
            let (preset, mut settings) = self.settings(config);
            settings.push(format!("output={}", self.folder.display()));
            let resumed = self.folder.join("checkpoints").is_dir();
            let flags: &[&str] = if resumed { &["--resume"] } else { &[] };
            self.call("align", preset, &settings, options, flags)?;
        }
        evaluate(config, self, &[self.model(start)], &self.folder.join("eval"), options)
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

/// Forward passes an image of an iteration of `run`, a backward pass being two.
fn work(run: &AlignConfig) -> Result<f64> {
    let (pipeline, rollout) = (Pipeline::open(&run.model)?, &run.group.rollout);
    let grid = rollout.grid(&pipeline.scheduler, &rollout.latent_size(&pipeline)?);
    let algorithm = run.setting()?.open(grid);
    let [forward, training] = algorithm::nfe(&*algorithm, run.group.group_size, PERIOD)?;
    Ok(growth::work(forward, training))
}

/// Samples and scores `models` on the held-out prompts, all alike: by the comparison's preset.
fn evaluate(
    config: &CompareConfig,
    task: &Task<'_>,
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
    task.call("eval", &config.preset, &config.settings, options, &flags)
}

/// A name as a file's.
fn slug(name: &str) -> String {
    let letters =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    let joined: String = letters.collect();
    joined.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(preset: &str, more: &[&str]) -> Result<CompareConfig> {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/signs");
        let settings: Vec<String> = more.iter().map(|&setting| setting.to_owned()).collect();
        let mut config: CompareConfig =
            settings::read(&Source::Preset(preset), &COMPARE_PRESETS, &settings)?;
        config.settings.push(format!("model={}", model.display()));
        config.validate()?;
        Ok(config)
    }

    /// The end of each run.
    fn ends(preset: &str, more: &[&str]) -> Vec<String> {
        let config = config(preset, more).unwrap();
        let tasks = config.tasks().unwrap();
        tasks.into_iter().filter(|task| task.run.is_some()).map(|task| task.end).collect()
    }

    #[test]
    fn passes_become_iterations() {
        let runs = "tables=[{title='', runs=[{name='a'}, {name='b', settings=['anchors=2']}, \
                    {name='c', preset='signs-dance-grpo'}]}]";
        let seeds = "seeds=[7]";
        // 4 groups of 12 with 8 steps and, of 4 anchors, 4 that train; DanceGRPO's 25 and 14.
        let expected = ["iterations=100", "iterations=120", "iterations=18"];
        assert_eq!(ends("signs", &[runs, seeds, "passes=57600"]), expected);
        assert_eq!(ends("signs", &[runs, seeds, "minutes=3"]), ["minutes=3"; 3]);
    }

    #[test]
    fn every_run_of_the_presets_is_one() {
        assert_eq!(ends("signs", &["seeds=[0]"]), vec!["minutes=2.5"; 19]);
        assert_eq!(
            ends("neighbor", &["seeds=[0]"]),
            [100, 100, 100, 120, 133, 120, 120, 100, 120].map(|n| format!("iterations={n}"))
        );
        let rivals = ends("rivals", &["seeds=[0]"]);
        let of_first = [100, 120, 22, 63].map(|n| format!("iterations={n}"));
        assert_eq!((&rivals[..4], rivals.len()), (&of_first[..], 17));
        assert_eq!(ends("compressibility", &["seeds=[0]"]), rivals);
        assert_eq!(["rates", "emoji"].map(|preset| ends(preset, &["seeds=[0]"]).len()), [17, 4]);
    }

    #[test]
    fn a_comparison_without_sense_is_refused() {
        let said = |setting: &str| config("signs", &[setting]).unwrap_err().to_string();
        for (setting, word) in
            [("passes=0", "passes"), ("minutes=-1", "minutes"), ("images=0", "images")]
        {
            assert!(said(setting).contains(word), "{}", said(setting));
        }
    }
}
