//! Aligning a model: roll out, reward, advantage, update, log, save.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use cluster::{Group, Reduce};
use flow::checksums::Checksums;
use flow::latents::LatentSize;
use flow::log;
use flow::panics::caught;
use flow::prompts::Prompt;

use super::config::AlignConfig;
use super::lock::Lock;
use super::progress::Progress;
use super::ready::Ready;
use super::report::Report;
use super::resume::Held;
use super::state::{self, Course, Moment, Restored};
use super::update::{self, Recorder};
use super::validation::Validation;
use super::watching::Watching;
use super::{agreement, interrupt, record};
use crate::algorithm::Algorithm;
use crate::group::experience::{self, Experience, Sources, Stage, Watch};
use crate::group::order::Order;
use crate::group::ranks;
use crate::network::model::Model;
use crate::network::optimizer::AdamW;
use crate::network::reference;
use crate::network::save::{self, Target};
use crate::network::shards::Shards;
use crate::reward::Rewards;
use crate::tensor::device::Compute;
use tch::Tensor;

/// How a run was asked for, beside its configuration.
pub struct Options {
    /// Continue from the newest checkpoint of the output folder.
    pub resume: bool,
    /// Where to store one update's tensors.
    pub record_update: Option<PathBuf>,
    /// Worker threads of rewards.
    pub threads: usize,
    /// Where tensors live, and what networks compute in.
    pub compute: Compute,
    /// The processes that share the work.
    pub ranks: Group,
}

/// Name of the finished model's folder in the output folder.
pub const ALIGNED: &str = "aligned";

/// Trains as `config` says.
///
/// # Errors
/// When the configuration, a file or a reward is at fault, when the ratio is not 1 before an update, or
/// when the loss diverges.
pub fn run(config: &AlignConfig, options: &Options) -> Result<()> {
    let outcome = train(config, options);
    // Ranks stop together: none of them waits for another then.
    if let Err(error) = outcome.as_ref()
        && !error.is::<Stopped>()
    {
        options.ranks.abort(&format!("{error:#}"));
    }
    outcome
}

fn train(config: &AlignConfig, options: &Options) -> Result<()> {
    config.validate()?;
    let ranks = &options.ranks;
    let aligned = config.output.join(ALIGNED);
    let _lock = claim(config, options, &aligned)?;
    let found = state::newest(&config.output, ranks)?;
    let held = Held::of(config, options)?;
    if let Some(last) = found.as_ref().filter(|it| it.iteration >= config.iterations)
        && ranks::of_first(ranks, || Ok(is_whole(&aligned)))?
    {
        state::check(last, &held)?;
        say_done(config, ranks, &aligned);
        return Ok(());
    }
    let (threads, device) = (options.threads, options.compute.device);
    let ready = Ready::read(config)?;
    agreement::of_files(ranks, config, &held, &ready)?;
    let rewards = ready.rewards(config, ranks, threads, device)?;
    let mut validation = Validation::open(config, &ready, &rewards, threads, device)?;
    let model = config.load(options.compute, ranks)?;
    let size = config.group.rollout.latent_size(&model.pipeline)?;
    let grid = config.group.rollout.grid(&model.pipeline.scheduler, &size);
    let mut algorithm = config.setting()?.open(grid);
    algorithm.begin(model.engine.trained());
    let mut optimizer = AdamW::new(config.optimizer.clone(), &[model.engine.trained()]);
    let mut start = 0;
    let mut restored = Restored::default();
    if let Some(position) = &found {
        restored = state::restore(position, &held, &mut optimizer, &model, algorithm.kept())?;
        algorithm.resume(model.engine.trained());
        start = position.iteration;
    }
    if let Some(validation) = &mut validation {
        validation.go_on(restored.course.validation.clone());
    }
    let train_prompts = ready.prompts;
    agreement::of_position(start, &model)?;
    let plan = config.group.rollout.steps(grid)?;
    if ranks.is_first() {
        introduce(config, options, &model, train_prompts.len(), &restored.changed)?;
    }
    let sheet_prompts = &ready.sheet_prompts;
    let report = || Report::open(config, sheet_prompts, found.as_ref(), &model, &size, &plan);
    let report = ranks.is_first().then(report).transpose()?;
    model.engine.attend()?;
    let mut run = Run {
        config,
        held,
        options,
        report,
        validation,
        order: Order::new(train_prompts.len(), config.group.seed),
        prompts: train_prompts,
        rewards,
        algorithm,
        model,
        optimizer,
        size,
        saved: start,
        newest: found.map(|position| position.folder),
        seconds: [None; 4],
        course: restored.course,
        validated: None,
    };
    if ranks.is_first() {
        record::append(config, options, start)?;
    }
    run.iterate(start)
}

/// Takes the output folder for this run, free of what killed ones left there.
fn claim(config: &AlignConfig, options: &Options, aligned: &Path) -> Result<Option<Lock>> {
    let ranks = &options.ranks;
    // The others write nothing but their logs.
    let lock = ranks.is_first().then(|| Lock::hold(&config.output)).transpose()?;
    ensure!(
        options.resume || !(state::is_begun(&config.output)? || aligned.exists()),
        "{} holds a run already: continue it with --resume, or choose another output",
        config.output.display()
    );
    if ranks.is_first() {
        state::remove_leftovers(&config.output)?;
    }
    Ok(lock)
}

fn say_done(config: &AlignConfig, ranks: &Group, aligned: &Path) {
    if ranks.is_first() {
        println!("{}", aligned.display());
        let n = config.iterations;
        log::note(&format!("all {n} iterations are done: raise iterations to go on"));
    }
}

/// Says what is going to run, and what has changed since it was stopped.
fn introduce(
    config: &AlignConfig,
    options: &Options,
    model: &Model,
    n_prompts: usize,
    changed: &[String],
) -> Result<()> {
    for line in changed {
        log::warn(&format!("from here on, {line}"));
    }
    config.setting()?.warning().into_iter().for_each(log::warn);
    log::note(&record::banner(config, options, model, n_prompts)?);
    Ok(())
}

struct Run<'a> {
    config: &'a AlignConfig,
    held: Held,
    options: &'a Options,
    prompts: Vec<Prompt>,
    order: Order,
    rewards: Rewards,
    algorithm: Box<dyn Algorithm + 'a>,
    model: Model,
    optimizer: AdamW,
    size: LatentSize,
    /// The first rank's.
    report: Option<Report>,
    validation: Option<Validation<'a>>,
    /// Iterations of the newest checkpoint, and its folder.
    saved: usize,
    newest: Option<PathBuf>,
    /// What each stage took in the last iteration.
    seconds: [Option<f64>; 4],
    course: Course,
    /// What the last validation took.
    validated: Option<f64>,
}

/// Whether the finished model in `folder` is what it was when it was finished.
fn is_whole(folder: &Path) -> bool {
    Checksums::open(folder).is_ok_and(|list| list.is_some_and(|list| list.check_all().is_ok()))
}

impl Run<'_> {
    fn iterate(&mut self, start: usize) -> Result<()> {
        let total = self.config.iterations;
        let progress = Progress::new("align", total, start);
        // Before the first iteration, and where a stop came before it.
        self.validate(start, start == total, &progress)?;
        for iteration in start..total {
            if self.is_over(&progress) {
                if iteration > self.saved {
                    self.save(iteration)?;
                }
                break;
            }
            let steps = self.optimizer.n_steps();
            let line = match self.once(iteration, iteration == start, &progress) {
                Ok(line) => line,
                Err(error) => return Err(self.end(iteration, steps, error, &progress)),
            };
            progress.advance(&line);
            let done = iteration + 1;
            let [is_late, is_asked] = self.ends()?;
            let is_last = done == total || is_late;
            let is_better =
                (!is_asked || is_last) && self.validate(done, is_last, &progress)? && done > 0;
            let is_idle = !is_last && self.course.is_idle(self.config.stop_after_idle);
            let stop = (is_asked || is_idle) && !is_last;
            let is_due = stop || is_last || done.is_multiple_of(self.config.save_every);
            if is_due || is_better {
                self.save(done)?;
                if let Some(report) = self.report.as_mut().filter(|_| is_due && !stop) {
                    interrupt::enter(format!("the sheet after iteration {done}"), None);
                    report.draw(done, &self.model)?;
                }
                self.model.engine.attend()?;
            }
            ensure!(
                !is_idle,
                "nothing was learnt in {} iterations, the last being {done}: the rewards of every group are \
                 alike, or spread less than their std_floor (look at the samples and at reward_std in \
                 metrics.jsonl; stop_after_idle = 0 goes on all the same)",
                self.course.idle
            );
            if is_last {
                break;
            }
            if stop {
                self.say_stopped(&progress);
                bail!(Stopped);
            }
        }
        self.publish()
    }

    /// Whether validations say that the run should end; says so.
    fn is_over(&self, progress: &Progress) -> bool {
        let said = self.validation.as_ref().and_then(Validation::is_over);
        if let Some(line) = &said {
            progress.say(line);
        }
        said.is_some()
    }

    /// Validates where it is time to, `done` iterations being done; whether the model is better than ever. Where
    /// that fails or is stopped, those iterations are saved.
    fn validate(&mut self, done: usize, is_last: bool, progress: &Progress) -> Result<bool> {
        let Self { model, optimizer, .. } = self;
        let Some(validation) = &mut self.validation else { return Ok(false) };
        if !validation.is_due(done, is_last) {
            return Ok(false);
        }
        interrupt::enter(format!("the validation after iteration {done}"), self.validated);
        let found = match validation.run(done, model, optimizer) {
            Ok(found) => found,
            Err(error) => {
                let error = error.context(format!("validation after iteration {done}"));
                return Err(self.end(done, self.optimizer.n_steps(), error, progress));
            }
        };
        self.validated = Some(found.seconds);
        for fault in &found.faults {
            progress.say(&format!("warning: {fault}"));
        }
        if let Some(report) = &mut self.report {
            progress.say(&report.validated(done, &found)?);
        }
        Ok(found.is_better)
    }

    /// After an iteration that failed or was stopped: saves what was whole before it.
    fn end(
        &mut self,
        done: usize,
        steps: i64,
        error: anyhow::Error,
        progress: &Progress,
    ) -> anyhow::Error {
        let error = match self.options.ranks.check() {
            // It may have failed for no other reason.
            Err(fault) if !error.is::<cluster::Error>() => {
                anyhow::Error::new(fault).context(format!("{error:#}"))
            }
            _ => error,
        };
        // Where several processes share a run, only together can they save and stop: none goes before all have.
        let cause = error.downcast_ref::<cluster::Error>();
        let is_shared = matches!(cause, Some(cluster::Error::Shared { .. }));
        let is_together = self.options.ranks.world() == 1 || is_shared;
        let is_whole = self.optimizer.n_steps() == steps;
        let mut finish = || {
            if is_whole && done > self.saved {
                self.save(done)?;
            }
            self.any([interrupt::asked()])
        };
        match if is_together { finish() } else { Ok([false]) } {
            Err(second) => return anyhow!("{error:#}; and then {second:#}"),
            Ok([true]) => {
                self.say_stopped(progress);
                return Stopped.into();
            }
            Ok([false]) => {}
        }
        match self.saved {
            0 => error,
            saved => {
                anyhow!("{error:#}; saved after iteration {saved}: --resume goes on from there")
            }
        }
    }

    fn say_stopped(&self, progress: &Progress) {
        let total = self.config.iterations;
        progress.say(&match self.saved {
            0 => "stopped before an iteration was whole: nothing is saved".to_owned(),
            saved => format!(
                "stopped after iteration {saved} of {total}: the same command with --resume continues"
            ),
        });
    }

    /// Whether the time is over, and whether somebody asked to stop; the same on all ranks.
    fn ends(&self) -> Result<[bool; 2]> {
        let wall = self.report.as_ref().map_or(0.0, Report::wall);
        let is_late = self.config.minutes.is_some_and(|m| wall >= 60.0 * m);
        self.any([is_late, interrupt::asked()])
    }

    /// Whether it is so on any rank, of each; the same on all ranks.
    fn any<const N: usize>(&self, signs: [bool; N]) -> Result<[bool; N]> {
        let mut signs = Tensor::from_slice(&signs.map(i64::from));
        self.options.ranks.all_reduce(&mut signs, Reduce::Max)?;
        Ok(std::array::from_fn(|index| signs.int64_value(&[index as i64]) > 0))
    }

    fn once(&mut self, iteration: usize, is_first: bool, progress: &Progress) -> Result<String> {
        let started = Instant::now();
        let numbered = || format!("iteration {}", iteration + 1);
        let ranks = &self.options.ranks;
        let (is_alone, alarm) = (ranks.world() == 1, ranks.alarm());
        let watch = Watching { iteration, seconds: self.seconds, is_alone, alarm };
        let experience = self.gather(iteration, &watch).with_context(numbered)?;
        let faults =
            if self.report.is_some() { experience.faults(&self.config.group) } else { vec![] };
        for fault in faults {
            progress.say(&format!("warning: {}: {fault}", numbered()));
        }
        self.course
            .starvation
            .see(&self.config.group, &experience.scores)
            .with_context(numbered)?;
        watch.enter(Stage::Update).with_context(numbered)?;
        let mut recorder = self
            .options
            .record_update
            .as_deref()
            .filter(|_| is_first && self.report.is_some())
            .map(|path| Recorder::new(path, self.config));
        let Self { config, model, rewards, size, .. } = self;
        let group = &config.group;
        let sources = Sources { config: group, model, rewards, size: *size, watch: &watch };
        let outcome = caught(|| {
            update::run(
                config,
                &*self.algorithm,
                &sources,
                &mut self.optimizer,
                &experience,
                recorder.as_mut(),
                &|| watch.is_stopped(),
            )
        });
        let outcome = outcome.map_err(Error::msg).flatten().with_context(numbered)?;
        let [rollout, decode, reward] = experience.seconds;
        self.seconds = [rollout, decode, reward, outcome.seconds].map(Some);
        self.course.idle = if outcome.n_updates == 0 { self.course.idle + 1 } else { 0 };
        self.algorithm.finish(self.model.engine.trained(), self.optimizer.n_steps())?;
        if let Some(recorder) = recorder {
            recorder.write()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        match &mut self.report {
            Some(report) => report.log(iteration + 1, self.config, &experience, &outcome, seconds),
            None => Ok(format!("{seconds:.3} s")),
        }
    }

    fn gather(&mut self, iteration: usize, watch: &Watching) -> Result<Experience> {
        let n = self.config.group.prompts_per_iteration;
        let first = (iteration * n) as u64;
        let picked: Vec<&Prompt> =
            (0..n as u64).map(|i| &self.prompts[self.order.at(first + i)]).collect();
        let Self { config, model, rewards, size, .. } = self;
        let sources = Sources { config: &config.group, model, rewards, size: *size, watch };
        let rollout = self.algorithm.rollout(iteration)?;
        let (behaviour, trained) = (self.algorithm.behaviour(), model.engine.trained());
        if let Some(copies) = behaviour {
            copies.exchange(trained);
        }
        let experience = caught(|| experience::gather(&sources, rollout, &picked, iteration));
        if let Some(copies) = behaviour {
            copies.exchange(trained);
        }
        experience.map_err(Error::msg).flatten()
    }

    fn save(&mut self, done: usize) -> Result<()> {
        self.report.iter().try_for_each(Report::sync)?;
        interrupt::enter(format!("saving iteration {done}"), None);
        let standing = self.validation.as_ref().map(|validation| &validation.standing);
        self.course.validation = standing.cloned();
        let moment = Moment {
            config: self.config,
            held: &self.held,
            course: &self.course,
            done,
            model: &self.model,
            optimizer: &self.optimizer,
            kept: self.algorithm.kept(),
        };
        let folder = moment
            .save(self.newest.as_deref())
            .with_context(|| format!("cannot save after iteration {done}"))?;
        (self.saved, self.newest) = (done, Some(folder));
        Ok(())
    }

    /// Puts the finished model where people look for it: what the last checkpoint holds, read a tensor at a
    /// time.
    fn publish(&self) -> Result<()> {
        let folder = self.config.output.join(ALIGNED);
        interrupt::enter("writing the finished model".to_owned(), None);
        if let Some(averaged) = self.optimizer.averaged() {
            self.model.engine.trained().assign(averaged)?;
        }
        if let Some(last) = self.newest.as_deref().filter(|_| self.options.ranks.is_first()) {
            let (dir, max_shard_bytes) = (&*folder, self.config.max_shard_bytes());
            let target = Target { dir, max_shard_bytes, before: Some(last) };
            save::trained(&Shards::open(last)?, &self.model.pipeline.dir, target, |folder| {
                reference::write(&self.model, folder)
            })?;
            println!("{}", folder.display());
        }
        self.model.engine.attend()
    }
}

/// The run was asked to stop and saved its state; the program ends with code 130.
#[derive(Debug)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Stopped {}
