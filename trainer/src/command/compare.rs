//! The paper's experiment as one command: methods side by side from one model, over several seeds, each for
//! the same time or at the same cost; a report with tables, curves and pictures.
//!
//! Every run is a process of its own, `ng-train align` and then `ng-train eval`, so that anyone can repeat
//! one by its command line. What is finished is not run again.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flow::log;
use flow::usage::Usage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::task::Task;
use crate::data::prompts;
use crate::run::align::Stopped;
use crate::run::config::AlignConfig;
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::run::settings::{self, ALIGN_PRESETS, Source};
use crate::run::validation::ValidationConfig;
use crate::tensor::device;

mod growth;
mod interval;
mod report;
mod task;

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
    /// Curves and tables of the reward come from held-out prompts, scored every so many iterations of the preset, and of
    /// other runs after as many forward passes.
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
    /// Leaves out further seeds of a run whose ends are apart from those of its table's first run after three or more: by
    /// twice the 95 % interval of their mean difference by seed in the reward, since that is looked at seed by seed.
    #[serde(default)]
    pub stop_apart: bool,
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
    let tasks = config.tasks(&start)?;
    let reward = &start.group.rewards[0].name;
    let folder = config.output.join("runs");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for task in &tasks {
        task.claim(config, &start)?;
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
            if interrupt::asked() {
                bail!(Stopped);
            }
            if config.stop_apart && is_apart(config, &tasks, task, reward)? {
                let label = format!("{}: apart already", task.label());
                progress.lock().expect("no worker panics").advance(&label);
                continue;
            }
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
    })
    .inspect_err(|error| {
        if error.is::<Stopped>() {
            log::note(
                "stopped: what is finished stays, and the same command goes on with the rest",
            );
        }
    })?;
    side_by_side(config, &tasks, &start.model, options)?;
    report::write(config, &tasks, reward)
}

/// Whether the seeds of `task`'s run that are done set it apart from the first run of every table it stands in.
fn is_apart(
    config: &CompareConfig,
    tasks: &[Task<'_>],
    task: &Task<'_>,
    reward: &str,
) -> Result<bool> {
    let Some(run) = task.run else { return Ok(false) };
    let end = |run: &RunConfig, seed: u64| -> Result<Option<f64>> {
        let found = tasks.iter().find(|task| task.run == Some(run) && task.seed == seed);
        let Some(found) = found.filter(|task| task.is_done()) else { return Ok(None) };
        Ok(found.scores()?.into_iter().find(|(name, _)| name == reward).map(|(_, mean)| mean))
    };
    for table in config.tables.iter().filter(|table| table.runs.contains(run)) {
        let mut differences = Vec::new();
        for &seed in &config.seeds {
            if let (Some(own), Some(first)) = (end(run, seed)?, end(&table.runs[0], seed)?) {
                differences.push(own - first);
            }
        }
        if !interval::is_apart(&differences) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One sheet of the model at the start and every run of the first table, from the first seed.
fn side_by_side(
    config: &CompareConfig,
    tasks: &[Task<'_>],
    start: &Path,
    options: &Options<'_>,
) -> Result<()> {
    let out = config.output.join("side-by-side");
    let shown = |task: &&Task<'_>| {
        task.run
            .is_none_or(|run| config.tables[0].runs.contains(run) && task.seed == config.seeds[0])
    };
    let models: Vec<PathBuf> = tasks.iter().filter(shown).map(|task| task.model(start)).collect();
    tasks[0].evaluate(config, &models, &out, options)
}

impl CompareConfig {
    pub(super) fn validate(&self) -> Result<()> {
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

    /// Every run of every seed once: the base first, then seed by seed in the order of the tables.
    ///
    /// # Errors
    /// When the settings of a run are none.
    fn tasks(&self, start: &AlignConfig) -> Result<Vec<Task<'_>>> {
        let mut runs: Vec<&RunConfig> = Vec::new();
        for run in self.tables.iter().flat_map(|table| &table.runs) {
            if !runs.contains(&run) {
                runs.push(run);
            }
        }
        let pace = self.validate_every as f64 * task::work(start)?;
        let mut tasks = vec![Task::new(self, start, pace, None, 0)?];
        for &seed in &self.seeds {
            for run in &runs {
                let task = Task::new(self, start, pace, Some(run), seed);
                tasks.push(task.with_context(|| format!("run {:?}", run.name))?);
            }
        }
        Ok(tasks)
    }

    /// The held-out prompts of every run: those of the comparison, drawn as its preset `start` draws, and nothing
    /// follows from them.
    fn validation(&self, start: &AlignConfig) -> Result<toml::Value> {
        let validation = ValidationConfig {
            prompts: Some(self.prompts.clone()),
            count: self.count,
            best: Some(String::new()),
            rollout: Some(start.group.rollout.clone()),
            ..ValidationConfig::default()
        };
        Ok(toml::Value::try_from(validation)?)
    }
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

    /// Of each run.
    fn of_runs(preset: &str, more: &[&str], what: impl Fn(&Task<'_>) -> String) -> Vec<String> {
        let config = config(preset, more).unwrap();
        let start = Source::Preset(&config.preset);
        let start = settings::read(&start, &ALIGN_PRESETS, &config.settings).unwrap();
        let tasks = config.tasks(&start).unwrap();
        tasks.iter().filter(|task| task.run.is_some()).map(what).collect()
    }

    /// The end of each run.
    fn ends(preset: &str, more: &[&str]) -> Vec<String> {
        of_runs(preset, more, |task| task.end().to_owned())
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
        let every = of_runs("signs", &[runs, seeds, "minutes=3", "validate_every=10"], |task| {
            task.validates_every().to_owned()
        });
        assert_eq!(every, ["10", "12", "2"]);
    }

    #[test]
    fn a_run_that_is_apart_needs_no_more_seeds() {
        let home = tempfile::tempdir().unwrap();
        let runs = |more: &str| format!("{{title='', runs=[{{name='a'}}, {{name='b'}}{more}]}}");
        let output = format!("output={}", home.path().display());
        let tables = format!("tables=[{}]", runs(", {name='c'}"));
        let mut config = config("signs", &[&output, &tables, "seeds=[4, 5, 6, 7]"]).unwrap();
        let start = Source::Preset(&config.preset);
        let start = settings::read(&start, &ALIGN_PRESETS, &config.settings).unwrap();
        let write = |name: &str, seed: u64, mean: f64| {
            let eval = home.path().join(format!("runs/{name}-seed{seed}/eval"));
            fs::create_dir_all(&eval).unwrap();
            let text = format!(r#"[{{"means": [["exact", 0.5], ["ocr", {mean}]]}}]"#);
            fs::write(eval.join("eval.json"), text).unwrap();
        };
        let is_apart = |config: &CompareConfig, name: &str| {
            let tasks = config.tasks(&start).unwrap();
            let is_next = |task: &&Task<'_>| task.seed == 7 && task.run.unwrap().name == name;
            super::is_apart(config, &tasks, tasks.iter().skip(1).find(is_next).unwrap(), "ocr")
                .unwrap()
        };
        for seed in [4, 5] {
            let noise = seed as f64 / 100.0;
            write("a", seed, noise);
            write("b", seed, 0.5 + noise + noise / 10.0);
            write("c", seed, 4.0 * noise - 0.05);
        }
        assert!(!is_apart(&config, "b"), "two seeds are too few");
        for (name, mean) in [("a", 0.06), ("b", 0.566), ("c", 0.19)] {
            write(name, 6, mean);
        }
        assert_eq!(["a", "b", "c"].map(|name| is_apart(&config, name)), [false, true, false]);
        // Another table's first run is still needed.
        let other = settings::read::<CompareConfig>(
            &Source::Preset("signs"),
            &COMPARE_PRESETS,
            &["tables=[{title='', runs=[{name='b'}, {name='c'}]}]".to_owned()],
        );
        config.tables.extend(other.unwrap().tables);
        assert!(!is_apart(&config, "b"));
    }

    #[test]
    fn every_run_of_the_presets_is_one() {
        assert_eq!(ends("signs", &["seeds=[0]"]), vec!["minutes=2.5"; 19]);
        assert_eq!(
            ends("neighbor", &["seeds=[0]"]),
            [100, 100, 100, 120, 133, 120, 120, 100, 120].map(|n| format!("iterations={n}"))
        );
        let rivals = ends("rivals", &["seeds=[0]"]);
        let of_first = [120, 100, 100, 38].map(|n| format!("iterations={n}"));
        assert_eq!((&rivals[..4], rivals.len()), (&of_first[..], 17));
        assert_eq!(ends("compressibility", &["seeds=[0]"]), rivals);
        assert_eq!(["rates", "emoji"].map(|preset| ends(preset, &["seeds=[0]"]).len()), [7, 4]);
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
