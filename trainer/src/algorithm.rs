//! Algorithms behind one loop. Each says how it rolls out, what of that trains, and its objective at one
//! transition; rewards, advantages, optimiser, checkpoints and metrics are everybody's.
//!
//! `algorithm = "…"` in a preset names one of [`ALGORITHMS`]: a method, and the settings its authors
//! publish, which everything a preset says itself goes before.

pub mod branch;
#[cfg(test)]
mod cases;
mod copies;
pub mod neighbor;
pub mod nft;
pub mod sde;
pub mod window;

use anyhow::{Result, anyhow};
use flow::schedule::Grid;
use tch::Tensor;

pub(crate) use self::copies::Copies;
use crate::align::AlignConfig;
use crate::engine::Condition;
use crate::experience::Experience;
use crate::model::Model;
use crate::parameters::Parameters;
use crate::rollout::Rollout;
use crate::seeds::{Use, family};

/// What distinguishes algorithms that settings cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Neighbor GRPO: [`neighbor`].
    Neighbor,
    /// GRPO on transitions of an SDE: [`sde`].
    Sde,
    /// The same on a tree of trajectories: [`branch`].
    Branch,
    /// Forward-process contrast: [`nft`].
    Nft,
}

macro_rules! algorithms {
    ($($name:literal: $method:ident),* $(,)?) => {
        [$(($name, Method::$method, include_str!(concat!("../algorithms/", $name, ".toml")))),*]
    };
}

/// Name, method and published settings of every algorithm.
pub const ALGORITHMS: [(&str, Method, &str); 12] = algorithms![
    "neighbor": Neighbor,
    "neighbor-paper-literal": Neighbor,
    "neighbor-sde-matched": Neighbor,
    "neighbor-ar-copo": Neighbor,
    "dance-grpo": Sde,
    "flow-grpo": Sde,
    "flow-grpo-fast": Sde,
    "mix-grpo": Sde,
    "mix-grpo-flash": Sde,
    "mix-grpo-flash-star": Sde,
    "branch-grpo": Branch,
    "diffusion-nft": Nft,
];

/// The method and the published settings of the algorithm called `name`.
///
/// # Errors
/// When there is none; lists those there are.
pub fn named(name: &str) -> Result<(Method, &'static str)> {
    let found = ALGORITHMS.iter().find(|(known, ..)| *known == name);
    found.map(|&(_, method, settings)| (method, settings)).ok_or_else(|| {
        let known: Vec<&str> = ALGORITHMS.iter().map(|(known, ..)| *known).collect();
        anyhow!("unknown algorithm {name:?}: {} are possible", known.join(", "))
    })
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
}

/// M transitions, ready for the network.
pub(crate) struct Batch<'a> {
    /// States `[M, S, C]`.
    pub(crate) x_in: Tensor,
    /// Times `[M]`, as the network is told them.
    pub(crate) t_in: Tensor,
    /// The objective at a velocity `[M, S, C]`.
    pub(crate) objective: Box<dyn FnOnce(&Tensor) -> Objective + 'a>,
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
    /// Advantages, of the same shape.
    pub(crate) advantages: Tensor,
    /// Half-width ε of the clip.
    pub(crate) clip: f64,
}

/// Limit of |log ρ| before it is exponentiated; it guards against overflow and nothing else.
pub(crate) const MAX_LOG_RATIO: f64 = 10.0;

impl Ratio {
    /// `min(A·ρ, A·clip(ρ, 1 − ε, 1 + ε))`, element by element.
    pub(crate) fn clipped(log_ratio: &Tensor, advantages: &Tensor, clip: f64) -> Tensor {
        let ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        let clipped = ratio.clamp(1.0 - clip, 1.0 + clip);
        (advantages * &ratio).minimum(&(advantages * clipped))
    }
}

/// How groups are made and learnt from.
pub(crate) trait Algorithm {
    /// How `iteration` (from 0) rolls out.
    fn rollout(&self, iteration: usize) -> Result<Rollout>;

    /// What trains, a list an optimiser step; nothing where every group is flat.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>>;

    /// `items` ready for the network; `condition` has their rows.
    fn batch<'a>(
        &'a self,
        model: &Model,
        experience: &Experience,
        items: &[Item],
        condition: &Condition,
    ) -> Batch<'a>;

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

    /// What rolls out, where it is not the weights that train.
    fn behaviour(&self) -> Option<&Copies> {
        None
    }

    /// Ends an iteration, after which the optimiser has made `n_steps` in all.
    fn finish(&self, trained: &Parameters, n_steps: i64) {
        let _ = (trained, n_steps);
    }
}

/// The algorithm of `config`, on time grids bent by `shift`.
pub(crate) fn open(config: &AlignConfig, grid: Grid) -> Box<dyn Algorithm + '_> {
    match config.method() {
        Method::Neighbor => Box::new(neighbor::Neighbor::new(config, grid)),
        Method::Sde => Box::new(sde::Policy::new(config, grid)),
        Method::Branch => Box::new(branch::Branch::new(config, grid)),
        Method::Nft => Box::new(nft::Nft::new(config, grid)),
    }
}

/// Network passes an image, mean of the run: forward alone, in rollout and updates; forward and backward.
///
/// # Errors
/// When the solver is unknown or the grid cannot be made.
pub(crate) fn nfe(config: &AlignConfig, grid: Grid) -> Result<[f64; 2]> {
    let algorithm = open(config, grid);
    let (group_size, mut sum) = (config.group_size as f64, [0.0; 2]);
    for iteration in 0..config.iterations {
        let rollout = algorithm.rollout(iteration)?;
        let trained = algorithm.n_trained(&rollout) as f64 / group_size;
        sum[0] += rollout.nfe(config.group_size) + algorithm.n_references() as f64 * trained;
        sum[1] += trained;
    }
    Ok(sum.map(|total| total / config.iterations as f64))
}

/// The `index`-th of `n` parts of `all`, as even as can be.
pub(crate) fn part<T>(all: &[T], n: usize, index: usize) -> &[T] {
    &all[all.len() * index / n..all.len() * (index + 1) / n]
}

/// For each optimiser step, its part of the `members` of every live group, each with `k` of `calls` drawn for
/// it.
pub(crate) fn drawn(
    config: &AlignConfig,
    experience: &Experience,
    calls: &[usize],
    k: usize,
    members: impl Fn(usize) -> Vec<usize>,
) -> Vec<Vec<Item>> {
    let (n, steps) = (config.n_updates(), family(config.seed, Use::Steps));
    let items = |group: usize, member: usize| {
        let chosen = steps.choose(experience.stream(group, member), calls.len(), k);
        let advantage = experience.advantages[group].values[member];
        chosen.into_iter().map(move |index| Item { group, member, call: calls[index], advantage })
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

/// `number` of each item in f32, `[M]`, where `like` is.
pub(crate) fn numbers(items: &[Item], like: &Tensor, number: impl Fn(&Item) -> f64) -> Tensor {
    let numbers: Vec<f32> = items.iter().map(|item| number(item) as f32).collect();
    Tensor::from_slice(&numbers).to_device(like.device())
}
