//! Algorithms behind one loop. Each says how it rolls out, what of that trains, and its objective at one
//! transition; rewards, advantages, optimiser, checkpoints and metrics are everybody's.
//!
//! `algorithm = "…"` in a preset names one of [`all`]: a method, and the settings its authors publish, which
//! everything a preset says itself goes before.

pub mod branch;
#[cfg(test)]
pub(crate) mod cases;
mod copies;
pub mod dgpo;
pub mod direct;
mod forward;
pub mod matching;
pub mod neighbor;
pub mod nft;
pub mod sde;
pub mod window;

use anyhow::{Result, anyhow, ensure};
use flow::schedule::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub(crate) use self::copies::Copies;
use crate::group::GroupConfig;
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::Rollout;
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::tensor::parameters::Parameters;

/// Name and published settings of an algorithm.
pub type Published = (&'static str, &'static str);

/// [`Published`] settings by name, from the folder of the algorithms.
macro_rules! published {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../algorithms/", $name, ".toml")))),*]
    };
}
use published;

macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident: $config:ty),* $(,)?) => {
        /// The settings of every method.
        #[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
        pub struct Methods {
            $($(#[$doc])* #[serde(default)] pub(crate) $name: $config,)*
        }

        /// What every method is published as.
        const PUBLISHED: &[(&str, &[Published])] = &[$((stringify!($name), <$config>::PUBLISHED)),*];

        impl Methods {
            fn get(&self, name: &str) -> &dyn Method {
                match name {
                    $(stringify!($name) => &self.$name,)*
                    _ => unreachable!("{name} is a method"),
                }
            }
        }
    };
}

// A method is a line here, and its file.
methods! {
    /// The surrogate policy of Neighbor GRPO.
    neighbor: neighbor::NeighborConfig,
    /// The stochastic steps of DanceGRPO, Flow-GRPO, MixGRPO and BranchGRPO.
    sde: sde::SdeConfig,
    /// The tree of BranchGRPO.
    branch: branch::BranchConfig,
    /// The contrast of DiffusionNFT.
    nft: nft::NftConfig,
    /// The matching of V-GRPO and AWM.
    matching: matching::MatchingConfig,
    /// The group preferences of DGPO.
    dgpo: dgpo::DgpoConfig,
    /// The rewards' own gradients, of ReFL and DRaFT-LV.
    direct: direct::DirectConfig,
}

/// What learns where no algorithm is named.
pub(crate) const DEFAULT: &str = "neighbor";

/// Settings, and tables of them, that some algorithms read and others do not, beside the tables of the methods.
pub(crate) const DIFFERING: [&str; 7] = [
    "advantage",
    "sigma",
    "anchors",
    "updates",
    "train_steps",
    "timestep_fraction",
    "rollout.solver",
];

/// Name and published settings of every algorithm.
pub fn all() -> impl Iterator<Item = Published> {
    PUBLISHED.iter().flat_map(|(_, published)| *published).copied()
}

/// The published settings of the algorithm called `name`.
///
/// # Errors
/// When there is none; lists those there are.
pub fn named(name: &str) -> Result<&'static str> {
    all().find(|(known, _)| *known == name).map(|(_, settings)| settings).ok_or_else(|| {
        let known: Vec<&str> = all().map(|(known, _)| known).collect();
        anyhow!("unknown algorithm {name:?}: {} are possible", known.join(", "))
    })
}

/// What learns, and what of a group it learns from.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
pub struct TrainingConfig {
    /// What learns, with its authors' settings; `ng-train config list` has the names.
    #[serde(default = "neighbor")]
    pub algorithm: String,
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
}

fn neighbor() -> String {
    DEFAULT.to_owned()
}
fn timestep_fraction() -> f64 {
    0.6
}

/// What an algorithm is made with, beside its own settings.
#[derive(Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) group: &'a GroupConfig,
    pub(crate) methods: &'a Methods,
    method: &'a dyn Method,
    /// Members of a group that train, B.
    pub(crate) n_anchors: usize,
    /// Optimiser steps an iteration.
    pub(crate) n_updates: usize,
    /// Trained transitions of a member, K.
    pub(crate) n_train_steps: usize,
    /// Whether K is given as such, and not as a fraction.
    counts_steps: bool,
}

impl<'a> Setting<'a> {
    /// # Errors
    /// When the algorithm is unknown.
    pub(crate) fn new(
        group: &'a GroupConfig,
        training: &TrainingConfig,
        methods: &'a Methods,
    ) -> Result<Self> {
        named(&training.algorithm)?;
        let is_of = |(_, published): &&(&str, &[Published])| {
            published.iter().any(|(name, _)| *name == training.algorithm)
        };
        let (name, _) = PUBLISHED.iter().find(is_of).expect("it is published");
        let method = methods.get(name);
        let n_anchors = training.anchors.unwrap_or_else(|| method.n_anchors(group.group_size));
        let possible = (group.rollout.steps - 1) as f64;
        let k = training.train_steps;
        Ok(Self {
            group,
            methods,
            method,
            n_anchors,
            n_updates: training.updates.unwrap_or(n_anchors),
            n_train_steps: k.unwrap_or((possible * training.timestep_fraction) as usize),
            counts_steps: k.is_some(),
        })
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let (k, possible) = (self.n_train_steps, self.group.rollout.steps - 1);
        let is_possible = (1..=possible).contains(&k);
        ensure!(is_possible || !self.counts_steps, "train_steps = {k}: from 1 to {possible}");
        ensure!(
            is_possible,
            "timestep_fraction: {k} of the {possible} transitions of rollout.steps would train; set train_steps"
        );
        let (b, n, g) = (self.n_anchors, self.n_updates, self.group.group_size);
        ensure!((1..=g).contains(&b), "anchors = {b}: from 1 to group_size = {g}");
        ensure!((1..=b).contains(&n), "updates = {n}: from 1 to anchors = {b}");
        self.method.validate(self)
    }

    /// Why the algorithm does not read the setting `key`; nothing where it does, or where no algorithm differs
    /// from another.
    pub(crate) fn ignores(&self, key: &str) -> Option<&'static str> {
        let is_at = |place: &str| {
            key.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let tables = PUBLISHED.iter().map(|(table, _)| *table);
        if !DIFFERING.into_iter().chain(tables).any(is_at) {
            return None;
        }
        if !self.method.reads().iter().any(|place| is_at(place)) {
            return Some("the algorithm does not read it");
        }
        if key == "timestep_fraction" && self.counts_steps {
            return Some("train_steps says how many transitions train");
        }
        self.method.leaves_unread(key)
    }

    /// The algorithm, on the time grids of `grid`.
    pub(crate) fn open(self, grid: Grid) -> Box<dyn Algorithm + 'a> {
        self.method.open(self, grid)
    }

    /// [`Method::feels_rounding`].
    pub(crate) fn feels_rounding(&self) -> bool {
        self.method.feels_rounding()
    }

    /// [`Method::warning`].
    pub(crate) fn warning(&self) -> Option<&'static str> {
        self.method.warning()
    }

    /// [`Method::follows_rewards`].
    pub(crate) fn follows_rewards(&self) -> bool {
        self.method.follows_rewards()
    }
}

/// The settings that distinguish algorithms of one kind. Their constant `PUBLISHED` names those algorithms.
pub(crate) trait Method {
    /// B of a group of `group_size`, unless told otherwise.
    fn n_anchors(&self, group_size: usize) -> usize {
        group_size
    }

    /// Of [`DIFFERING`] and the tables of the methods, the keys that it reads, or the beginnings of theirs.
    fn reads(&self) -> &'static [&'static str];

    /// Why `key`, one of those, is not read as the others stand.
    fn leaves_unread(&self, key: &str) -> Option<&'static str> {
        let _ = key;
        None
    }

    /// Refuses settings that are out of range, or contradict `setting`.
    fn validate(&self, setting: &Setting<'_>) -> Result<()>;

    /// The algorithm of these settings, on the time grids of `grid`.
    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a>;

    /// Whether ratios feel the last bits of a velocity, so that rollouts must round as updates do.
    fn feels_rounding(&self) -> bool {
        false
    }

    /// Whether gradients go back from the rewards, one image at a time, through the decoder.
    fn follows_rewards(&self) -> bool {
        false
    }

    /// What a person should know who chose this.
    fn warning(&self) -> Option<&'static str> {
        None
    }
}

/// One transition that trains.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) group: usize,
    /// The member on whose way it lies.
    pub(crate) member: usize,
    /// Network call of the rollout that began it.
    pub(crate) call: usize,
    pub(crate) advantage: f64,
    /// Number of its noise, where an image is noised several times.
    pub(crate) draw: u64,
}

/// The objective as a function of velocities `[M, S, C]`.
type Aim<'a> = Box<dyn FnOnce(&Tensor) -> Result<Objective> + 'a>;

/// M transitions, ready for the network.
pub(crate) struct Batch<'a> {
    /// States `[M, S, C]`.
    pub(crate) x_in: Tensor,
    /// Times `[M]`, as the network is told them.
    pub(crate) t_in: Tensor,
    pub(crate) objective: Aim<'a>,
    /// What the objective is computed from, by name, for those who want to check it.
    pub(crate) tensors: Vec<(&'static str, Tensor)>,
}

/// The objective at one velocity.
pub(crate) struct Objective {
    /// J of each transition, `[M]`, to be maximised.
    pub(crate) value: Tensor,
    /// d(mean of J)/dv, `[M, S, C]`.
    pub(crate) gradient: Tensor,
    /// Probability ratios, where the method has any.
    pub(crate) ratio: Option<Ratio>,
    /// Means over the transitions of what else is worth a curve, by metric.
    pub(crate) means: Vec<(&'static str, f64)>,
}

/// Ratios of new to old probabilities.
pub(crate) struct Ratio {
    /// log ρ, of any shape.
    pub(crate) log: Tensor,
    /// Terms whose ratio has gone too far up, and too far down: their gradient is silenced.
    pub(crate) silenced: [Tensor; 2],
    /// Largest |log ρ| where nothing has changed since the rollout, up to rounding.
    pub(crate) tolerance: f64,
}

/// Metrics: shares of the terms that the clip silences, by its upper and its lower end.
pub(crate) const CLIPPED: [&str; 2] = ["policy/clip_fraction_high", "policy/clip_fraction_low"];

/// Limit of |log ρ| before it is exponentiated; it guards against overflow and nothing else.
pub(crate) const MAX_LOG_RATIO: f64 = 10.0;

/// How far a policy may go from the one that rolled out.
pub(crate) enum Bound<'a> {
    /// Half-width ε of the ratio's clip.
    Clip(f64),
    /// Largest divergence δ, and that of each term: beyond it only what leads back counts (Flow-DPPO).
    Divergence(f64, &'a Tensor),
}

impl Bound<'_> {
    /// A·ρ, element by element, its gradient silenced where ρ leads beyond the bound: under a clip,
    /// `min(A·ρ, A·clip(ρ, 1 − ε, 1 + ε))`.
    pub(crate) fn objective(&self, log_ratio: &Tensor, advantages: &Tensor) -> (Tensor, Ratio) {
        let ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        let (up, down) = match *self {
            Bound::Clip(clip) => (ratio.gt(1.0 + clip), ratio.lt(1.0 - clip)),
            Bound::Divergence(limit, divergence) => {
                let is_far = divergence.gt(limit);
                (ratio.gt(1.0).logical_and(&is_far), ratio.lt(1.0).logical_and(&is_far))
            }
        };
        let silenced = [up.logical_and(&advantages.gt(0.0)), down.logical_and(&advantages.lt(0.0))];
        let kept = match *self {
            Bound::Clip(clip) => {
                let clipped = ratio.clamp(1.0 - clip, 1.0 + clip);
                (advantages * &ratio).minimum(&(advantages * clipped))
            }
            Bound::Divergence(..) => {
                let is_silenced = silenced[0].logical_or(&silenced[1]);
                advantages * ratio.detach().where_self(&is_silenced, &ratio)
            }
        };
        let tolerance = match *self {
            Bound::Clip(clip) => clip / 10.0,
            Bound::Divergence(limit, _) => limit,
        };
        (kept, Ratio { log: log_ratio.detach(), silenced, tolerance })
    }
}

/// How groups are made and learnt from.
pub(crate) trait Algorithm {
    /// How `iteration` (from 0) rolls out.
    fn rollout(&self, iteration: usize) -> Result<Rollout>;

    /// What trains, a list an optimiser step; nothing where every group is flat.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>>;

    /// `items` ready for the network of `sources`; `condition` has their rows.
    ///
    /// # Errors
    /// When other weights' velocities cannot be had.
    fn batch<'a>(
        &'a self,
        sources: &'a Sources<'_>,
        experience: &'a Experience,
        items: &'a [Item],
        condition: &Condition,
    ) -> Result<Batch<'a>>;

    /// Transitions of a group that train where rewards are not flat, after `rollout`.
    fn n_trained(&self, rollout: &Rollout) -> usize;

    /// Network calls without gradients that [`Algorithm::batch`] makes for each of them.
    fn n_references(&self) -> usize {
        0
    }

    /// Starts a run from the weights `trained`.
    fn begin(&mut self, trained: &Parameters) {
        let _ = trained;
    }

    /// Goes on with a run whose weights are `trained` now.
    fn resume(&mut self, trained: &Parameters) {
        let _ = trained;
    }

    /// What rolls out, where it is not the weights that train.
    fn behaviour(&self) -> Option<&Copies> {
        None
    }

    /// What a checkpoint holds beside the weights that train.
    fn kept(&self) -> Option<&Copies> {
        self.behaviour()
    }

    /// Ends an iteration, after which the optimiser has made `n_steps` in all.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    fn finish(&self, trained: &Parameters, n_steps: i64) -> Result<()> {
        let _ = (trained, n_steps);
        Ok(())
    }
}

/// Network passes an image in groups of `group_size`, mean of `iterations`: forward alone, in rollout and
/// updates; forward and backward.
///
/// # Errors
/// When the solver is unknown or the grid cannot be made.
pub(crate) fn nfe(
    algorithm: &dyn Algorithm,
    group_size: usize,
    iterations: usize,
) -> Result<[f64; 2]> {
    let mut sum = [0.0; 2];
    for iteration in 0..iterations {
        let rollout = algorithm.rollout(iteration)?;
        let trained = algorithm.n_trained(&rollout) as f64 / group_size as f64;
        sum[0] += rollout.nfe(group_size) + algorithm.n_references() as f64 * trained;
        sum[1] += trained;
    }
    Ok(sum.map(|total| total / iterations as f64))
}

/// The `index`-th of `n` parts of `all`, as even as can be.
pub(crate) fn part<T>(all: &[T], n: usize, index: usize) -> &[T] {
    &all[all.len() * index / n..all.len() * (index + 1) / n]
}

/// For each optimiser step, its part of the `members` of every live group, each with `k` of `calls` drawn for
/// it.
pub(crate) fn drawn(
    setting: &Setting<'_>,
    experience: &Experience,
    calls: &[usize],
    k: usize,
    members: impl Fn(usize) -> Vec<usize>,
) -> Vec<Vec<Item>> {
    let (n, steps) = (setting.n_updates, family(setting.group.seed, Use::Steps));
    let items = |group: usize, member: usize| {
        let chosen = steps.choose(experience.stream(group, member), calls.len(), k);
        let advantage = experience.advantages[group].values[member];
        let item =
            move |index: usize| Item { group, member, call: calls[index], advantage, draw: 0 };
        chosen.into_iter().map(item)
    };
    let groups: Vec<(usize, Vec<usize>)> =
        experience.live().into_iter().map(|group| (group, members(group))).collect();
    let of_update = |index: usize| -> Vec<Item> {
        let of_group = |(group, members): &(usize, Vec<usize>)| -> Vec<Item> {
            part(members, n, index).iter().flat_map(|&member| items(*group, member)).collect()
        };
        groups.iter().flat_map(of_group).collect()
    };
    (0..n).map(of_update).collect()
}

/// `pick` of each item, stacked.
pub(crate) fn stack(items: &[Item], pick: impl Fn(&Item) -> Tensor) -> Tensor {
    Tensor::stack(&items.iter().map(pick).collect::<Vec<Tensor>>(), 0)
}

/// The mean of each transition's numbers `[M, S, C]`, `[M]`, in f32.
pub(crate) fn mean_of_each(x: &Tensor) -> Tensor {
    let dims: &[i64] = &[1, 2];
    x.mean_dim(dims, false, Kind::Float)
}

/// `number` of each item in f32, `[M]`, where `like` is.
pub(crate) fn numbers(items: &[Item], like: &Tensor, number: impl Fn(&Item) -> f64) -> Tensor {
    let numbers: Vec<f32> = items.iter().map(|item| number(item) as f32).collect();
    Tensor::from_slice(&numbers).to_device(like.device())
}
