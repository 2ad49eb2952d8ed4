//! Aligning a model: roll out, reward, advantage, update, log, save.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::MAX_SHARD_BYTES;
use flow::latents::LatentSize;
use flow::models::transformer::GUIDANCE;
use flow::prompts::Prompt;
use flow::schedule::{Grid, Schedule, SchedulerConfig, Shift};
use flow::solver::{self, DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS, Solver, Step};
use serde::{Deserialize, Serialize};

use crate::advantage::AdvantageConfig;
use crate::algorithm::branch::BranchConfig;
use crate::algorithm::neighbor::{Distance, NeighborConfig};
use crate::algorithm::nft::NftConfig;
use crate::algorithm::sde::SdeConfig;
use crate::algorithm::{self, Algorithm, Method};
use crate::device::Compute;
use crate::embeddings::Embeddings;
use crate::engine::segments;
use crate::experience::{self, Experience, Sources};
use crate::interrupt;
use crate::lora::{Adapters, LoraConfig};
use crate::model::{Loading, Model};
use crate::optimizer::{AdamW, OptimizerConfig};
use crate::order::Order;
use crate::parameters::Storage;
use crate::progress::Progress;
use crate::prompts;
use crate::report::Report;
use crate::reward::{RewardConfig, Rewards};
use crate::seeds::{Use, family};
use crate::state;
use crate::update::{self, Recorder};

/// One run.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AlignConfig {
    /// Pipeline folder to start from.
    pub model: PathBuf,
    /// Folder for checkpoints, metrics and pictures.
    pub output: PathBuf,
    /// Training prompts: `.txt`, `.json`, `.jsonl` or `.parquet`.
    pub prompts: PathBuf,
    /// Prompts of the sample sheets; the first few are drawn.
    pub sheet_prompts: PathBuf,
    /// Everything random follows from it.
    #[serde(default)]
    pub seed: u64,
    /// One of [`algorithm::ALGORITHMS`]: what learns, with its published settings.
    #[serde(default = "neighbor")]
    pub algorithm: String,
    /// Iterations of the whole run.
    pub iterations: usize,
    /// Ends the run, as if that were its last iteration, once it has taken so long.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Prompts, each with its group, an iteration.
    pub prompts_per_iteration: usize,
    /// Members of a group, G.
    #[serde(default = "group_size")]
    pub group_size: usize,
    /// Strength σ of the perturbation of the initial noise, in (0, 1] (Eq. 7); Neighbor GRPO's alone.
    #[serde(default = "sigma")]
    pub sigma: f64,
    /// Members of a group that train, B: 4 anchors of Neighbor GRPO, everybody of the others. Where an
    /// SDE method trains fewer, they are the best and the worst.
    #[serde(default)]
    pub anchors: Option<usize>,
    /// Optimiser steps an iteration; B of them is Algorithm 1. Steps of Neighbor GRPO over one group share its
    /// rewards' noise: where much is clipped, take fewer, or a lower rate.
    #[serde(default)]
    pub updates: Option<usize>,
    /// Trained transitions of a member, K; without it, the fraction below.
    #[serde(default)]
    pub train_steps: Option<usize>,
    /// K as a fraction of all transitions but the last.
    #[serde(default = "timestep_fraction")]
    pub timestep_fraction: f64,
    /// Trains low-rank adapters in place of all weights, where given.
    #[serde(default)]
    pub lora: Option<LoraConfig>,
    /// Text embeddings made by `ng-train embed`; the text encoders then stay on disk.
    #[serde(default)]
    pub embeddings: Option<PathBuf>,
    /// Whether weights that do not train stay on disk and are read block by block, for models larger
    /// than memory.
    #[serde(default)]
    pub stream: bool,
    /// How trajectories are solved.
    pub rollout: RolloutConfig,
    /// The surrogate policy of Neighbor GRPO.
    #[serde(default)]
    pub neighbor: NeighborConfig,
    /// The stochastic steps of DanceGRPO, Flow-GRPO, MixGRPO and BranchGRPO.
    #[serde(default)]
    pub sde: SdeConfig,
    /// The tree of BranchGRPO.
    #[serde(default)]
    pub branch: BranchConfig,
    /// The contrast of DiffusionNFT.
    #[serde(default)]
    pub nft: NftConfig,
    /// From rewards to advantages.
    #[serde(default)]
    pub advantage: AdvantageConfig,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// What is maximised: a weighted sum of advantages.
    pub rewards: Vec<RewardConfig>,
    /// What `ng-train eval` reports beside the rewards; nothing trains on it.
    #[serde(default)]
    pub judges: Vec<RewardConfig>,
    /// A checkpoint, a sheet and a curve every so many iterations.
    #[serde(default = "save_every")]
    pub save_every: usize,
    /// Most GB (10⁹ bytes) of weights in one file.
    #[serde(default = "shard_gb")]
    pub shard_gb: f64,
    /// Whether backward recomputes each block, so that memory does not grow with depth.
    #[serde(default)]
    pub recompute: bool,
}

/// How trajectories are solved.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// `dpmpp-2m`, `euler` or `heun`.
    #[serde(default = "default_solver")]
    pub solver: String,
    /// Steps T.
    #[serde(default = "steps")]
    pub steps: usize,
    /// Constant shift of the time grid; without it, the checkpoint's scheduler decides.
    #[serde(default)]
    pub shift: Option<f64>,
    /// Guidance scale, for a model that embeds one.
    #[serde(default = "guidance")]
    pub guidance: f64,
    /// Width and height in pixels; without it, the model's own.
    #[serde(default)]
    pub size: Option<[usize; 2]>,
    /// Images a network call takes at most.
    #[serde(default = "rollout_batch")]
    pub batch: usize,
}

/// Anchors of Neighbor GRPO (paper Table 1).
const ANCHORS: usize = 4;

fn neighbor() -> String {
    "neighbor".to_owned()
}
fn group_size() -> usize {
    12
}
fn sigma() -> f64 {
    0.3
}
fn timestep_fraction() -> f64 {
    0.6
}
fn save_every() -> usize {
    50
}
fn shard_gb() -> f64 {
    MAX_SHARD_BYTES as f64 / 1e9
}
fn default_solver() -> String {
    DEFAULT_SOLVER.name().to_owned()
}
fn steps() -> usize {
    DEFAULT_STEPS
}
fn guidance() -> f64 {
    GUIDANCE
}
fn rollout_batch() -> usize {
    64
}

impl RolloutConfig {
    /// The time grid for images of `size` under `scheduler`.
    pub(crate) fn grid(&self, scheduler: &SchedulerConfig, size: &LatentSize) -> Grid {
        let own = |factor| Shift::Factor(factor).into();
        self.shift.map_or_else(|| scheduler.grid(size.tokens()), own)
    }

    /// The solver's table of steps, on `grid`.
    pub(crate) fn steps(&self, grid: Grid) -> Result<Vec<Step>> {
        let Some(solver) = Solver::by_name(&self.solver) else {
            let known: Vec<&str> = SOLVERS.iter().map(|(name, _)| *name).collect();
            bail!("unknown solver {:?}: {} are possible", self.solver, known.join(", "));
        };
        Ok(solver::plan(solver, &Schedule::new(self.steps, grid)?))
    }

    /// The table of steps for images of `size` under `scheduler`.
    pub(crate) fn plan(&self, scheduler: &SchedulerConfig, size: &LatentSize) -> Result<Vec<Step>> {
        self.steps(self.grid(scheduler, size))
    }
}

impl AlignConfig {
    /// What [`AlignConfig::algorithm`] does; [`AlignConfig::validate`] has seen that it exists.
    pub(crate) fn method(&self) -> Method {
        algorithm::named(&self.algorithm).map_or(Method::Neighbor, |(method, _)| method)
    }

    /// B.
    pub(crate) fn n_anchors(&self) -> usize {
        self.anchors.unwrap_or(match self.method() {
            Method::Neighbor => ANCHORS,
            Method::Sde | Method::Branch | Method::Nft => self.group_size,
        })
    }

    /// Optimiser steps an iteration.
    pub(crate) fn n_updates(&self) -> usize {
        self.updates.unwrap_or_else(|| self.n_anchors())
    }

    /// K.
    pub(crate) fn n_train_steps(&self) -> usize {
        let possible = self.rollout.steps - 1;
        self.train_steps.unwrap_or((possible as f64 * self.timestep_fraction) as usize)
    }

    pub(crate) fn max_shard_bytes(&self) -> usize {
        (self.shard_gb * 1e9) as usize
    }

    /// The model, ready to train.
    pub(crate) fn load(&self, compute: Compute) -> Result<Model> {
        let storage = match (&self.lora, self.stream) {
            (None, _) => Storage::Trainable,
            (Some(_), false) => Storage::Frozen,
            (Some(_), true) => Storage::Streamed,
        };
        let stream_text = self.stream || self.embeddings.is_some();
        let loading = Loading { compute, storage, stream_text };
        let mut model = Model::load(&self.model, loading)?;
        model.embeddings = self.embeddings.as_deref().map(Embeddings::open).transpose()?;
        if let Some(lora) = &self.lora {
            let (segments, noise) =
                (segments(&model.pipeline.transformer), family(self.seed, Use::Weights));
            model.engine.adapt(Adapters::new(lora, &segments, noise, compute)?);
        }
        model.engine.train();
        model.engine.recompute = self.recompute || self.stream;
        // Without the mean over an image's numbers a ratio feels the last bits of each.
        model.engine.rounds_alike =
            self.method() == Method::Neighbor && self.neighbor.distance == Distance::Sum;
        Ok(model)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        ensure!(
            !self.stream || self.lora.is_some(),
            "stream = true: only adapters train beside weights that stay on disk; add [lora]"
        );
        ensure!(self.iterations > 0, "iterations = 0: nothing to do");
        ensure!(self.prompts_per_iteration > 0, "prompts_per_iteration must be at least 1");
        ensure!(self.group_size >= 2, "group_size = {}: at least 2", self.group_size);
        ensure!(self.rollout.steps >= 2, "rollout.steps = {}: at least 2", self.rollout.steps);
        ensure!(self.rollout.batch > 0, "rollout.batch must be at least 1");
        let (k, possible) = (self.n_train_steps(), self.rollout.steps - 1);
        ensure!((1..=possible).contains(&k), "train_steps = {k}: from 1 to {possible}");
        let p = self.advantage.quasi_norm;
        ensure!(p > 0.0 && p <= 2.0, "advantage.quasi_norm = {p}: in (0, 2]");
        let minutes = self.minutes.unwrap_or(1.0);
        ensure!(minutes > 0.0, "minutes = {minutes}: above 0");
        ensure!(self.shard_gb > 0.0, "shard_gb = {}: above 0", self.shard_gb);
        ensure!(self.save_every > 0, "save_every must be at least 1");
        ensure!(!self.rewards.is_empty(), "no [[rewards]]: at least one is needed");
        let (b, n) = (self.n_anchors(), self.n_updates());
        ensure!(
            (1..=self.group_size).contains(&b),
            "anchors = {b}: from 1 to group_size = {}",
            self.group_size
        );
        ensure!((1..=b).contains(&n), "updates = {n}: from 1 to anchors = {b}");
        match algorithm::named(&self.algorithm)?.0 {
            Method::Neighbor => self.neighbor.validate(self),
            Method::Sde => self.sde.validate(self.rollout.steps),
            Method::Branch => {
                self.sde.validate(self.rollout.steps)?;
                self.branch.validate(self)
            }
            Method::Nft => self.nft.validate(),
        }
    }
}

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
}

/// Name of the finished model's folder in the output folder.
pub const ALIGNED: &str = "aligned";

/// Trains as `config` says.
///
/// # Errors
/// When the configuration, a file or a reward is at fault, when the ratio is not 1 before an update, or
/// when the loss diverges.
pub fn run(config: &AlignConfig, options: &Options) -> Result<()> {
    config.validate()?;
    let aligned = config.output.join(ALIGNED);
    let found = state::newest(&config.output)?;
    ensure!(
        options.resume || (found.is_none() && !aligned.exists()),
        "{} holds a run already: continue it with --resume, or choose another output",
        config.output.display()
    );
    ensure!(
        !options.resume || found.is_some(),
        "--resume: no checkpoint in {}",
        config.output.display()
    );
    let train_prompts = prompts::read(&config.prompts)?;
    let mut rewards = Rewards::open(&config.rewards, options.threads, options.compute.device)?;
    rewards.stop_when(interrupt::asked);
    rewards.check(&train_prompts)?;
    let model = config.load(options.compute)?;
    let size = model.latent_size(config.rollout.size)?;
    let grid = config.rollout.grid(&model.pipeline.scheduler, &size);
    let mut algorithm = algorithm::open(config, grid);
    algorithm.begin(model.engine.trained());
    let mut optimizer = AdamW::new(config.optimizer.clone(), &[model.engine.trained()]);
    let mut start = 0;
    if let Some(position) = &found {
        state::restore(position, config, &mut optimizer, &model, algorithm.behaviour())?;
        start = position.iteration;
        let total = config.iterations;
        ensure!(
            start < total || !aligned.exists(),
            "all {total} iterations are done: raise iterations to go on"
        );
    }
    if config.method() == Method::Neighbor && config.neighbor.distance == Distance::Sum {
        eprintln!(
            "warning: neighbor.distance = \"sum\": only the first update of an iteration carries a \
             signal, later ones are clipped"
        );
    }
    let plan = config.rollout.steps(grid)?;
    let mut run = Run {
        config,
        options,
        report: Report::open(config, found.as_ref(), &model, &size, &plan)?,
        order: Order::new(train_prompts.len(), config.seed),
        prompts: train_prompts,
        rewards,
        algorithm,
        model,
        optimizer,
        size,
    };
    run.iterate(start)
}

struct Run<'a> {
    config: &'a AlignConfig,
    options: &'a Options,
    prompts: Vec<Prompt>,
    order: Order,
    rewards: Rewards,
    algorithm: Box<dyn Algorithm + 'a>,
    model: Model,
    optimizer: AdamW,
    size: LatentSize,
    report: Report,
}

impl Run<'_> {
    fn iterate(&mut self, start: usize) -> Result<()> {
        let total = self.config.iterations;
        let progress = Progress::new("align", total, start);
        for iteration in start..total {
            let line = self.once(iteration, iteration == start, &progress)?;
            progress.advance(&line);
            let done = iteration + 1;
            let is_late = self.config.minutes.is_some_and(|m| self.report.wall() >= 60.0 * m);
            let is_last = done == total || is_late;
            let stop = interrupt::asked() && !is_last;
            if stop || is_last || done.is_multiple_of(self.config.save_every) {
                self.save(done)?;
                self.report.draw(done, &self.model)?;
            }
            if is_last {
                break;
            }
            if stop {
                progress.say(&format!(
                    "stopped after iteration {done} of {total}: the same command with --resume continues"
                ));
                bail!(Stopped);
            }
        }
        self.publish()
    }

    fn once(&mut self, iteration: usize, is_first: bool, progress: &Progress) -> Result<String> {
        let started = Instant::now();
        let numbered = || format!("iteration {}", iteration + 1);
        let experience = self.gather(iteration).with_context(numbered)?;
        for fault in experience.faults(self.config) {
            progress.say(&format!("warning: {}: {fault}", numbered()));
        }
        let mut recorder = self
            .options
            .record_update
            .as_deref()
            .filter(|_| is_first)
            .map(|path| Recorder::new(path, self.config));
        let outcome = update::run(
            self.config,
            &*self.algorithm,
            &self.model,
            &mut self.optimizer,
            &experience,
            recorder.as_mut(),
        )
        .with_context(numbered)?;
        self.algorithm.finish(self.model.engine.trained(), self.optimizer.n_steps());
        if let Some(recorder) = recorder {
            recorder.write()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        self.report.log(iteration + 1, self.config, &experience, &outcome, seconds)
    }

    fn gather(&mut self, iteration: usize) -> Result<Experience> {
        let n = self.config.prompts_per_iteration;
        let first = (iteration * n) as u64;
        let picked: Vec<&Prompt> =
            (0..n as u64).map(|i| &self.prompts[self.order.at(first + i)]).collect();
        let Self { config, model, rewards, size, .. } = self;
        let sources = Sources { config, model, rewards, size: *size };
        let rollout = self.algorithm.rollout(iteration)?;
        let (behaviour, trained) = (self.algorithm.behaviour(), model.engine.trained());
        if let Some(copies) = behaviour {
            copies.exchange(trained);
        }
        let experience = experience::gather(&sources, rollout, &picked, iteration);
        if let Some(copies) = behaviour {
            copies.exchange(trained);
        }
        experience
    }

    fn save(&mut self, done: usize) -> Result<()> {
        let config = self.config;
        state::save(config, done, &self.model, &self.optimizer, self.algorithm.behaviour())
            .with_context(|| format!("cannot save after iteration {done}"))
    }

    /// Puts the finished model where people look for it.
    fn publish(&self) -> Result<()> {
        let folder = self.config.output.join(ALIGNED);
        if let Some(averaged) = self.optimizer.averaged() {
            self.model.engine.trained().assign(averaged);
        }
        crate::save::trained(
            &self.model,
            None,
            &folder,
            self.config.max_shard_bytes(),
            |folder| crate::reference::write(&self.model, folder),
        )?;
        println!("{}", folder.display());
        Ok(())
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
