//! What one iteration learns from: groups of trajectories, their images, rewards and advantages.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Error, Result, ensure};
use cluster::Group;
use flow::latents::LatentSize;
use flow::panics::caught;
use flow::prompts::Prompt;
use flow::solver::Step;
use image::RgbImage;
use tch::{Kind, Tensor};

use super::GroupConfig;
use super::advantage::{Advantages, Scored};
use super::ranks::{self, Exact};
use super::rollout::{self, Rollout, Trajectory};
use super::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::network::model::Model;
use crate::reward::{Outcome, RewardConfig, Rewards, Scores};

/// P groups of G members, of which this rank has rolled out its own.
pub(crate) struct Experience {
    /// Iterations before this one.
    pub(crate) iteration: usize,
    /// Number of the first group in the run.
    pub(crate) first_group: u64,
    /// Groups of this rank.
    pub(crate) own: Range<usize>,
    /// G.
    pub(crate) group_size: usize,
    /// Shape of a latent.
    pub(crate) size: LatentSize,
    /// Conditions, one row an own group.
    condition: Condition,
    /// How the trajectories came about.
    pub(crate) rollout: Rollout,
    /// The trajectories of own groups as rows, G a group.
    pub(crate) trajectory: Trajectory,
    /// Scores of each of the P groups.
    pub(crate) scores: Vec<Scores>,
    /// Advantages of each of the P groups.
    pub(crate) advantages: Vec<Advantages>,
    /// Seconds of rollout, decoding and rewards.
    pub(crate) seconds: [f64; 3],
}

impl Experience {
    /// What failed while the groups were scored, a line a reward that did not end the run.
    pub(crate) fn faults(&self, config: &GroupConfig) -> Vec<String> {
        let n_groups = self.scores.len();
        let line = |(index, reward): (usize, &RewardConfig)| {
            let outcomes = || self.scores.iter().map(move |scores| &scores.outcomes[index]);
            let last = outcomes().filter_map(|outcome| outcome.error.as_deref()).next_back()?;
            let n_failures: u32 = outcomes().map(|outcome| outcome.failures).sum();
            let n_without = outcomes().filter(|outcome| outcome.scores.is_none()).count();
            let name = &reward.name;
            Some(format!(
                "reward {name:?}: failed attempts: {n_failures}, groups that go without it: \
                 {n_without} of {n_groups}; the last failure: {last}"
            ))
        };
        config.rewards.iter().enumerate().filter_map(line).collect()
    }

    /// Own groups whose rewards are not all flat.
    pub(crate) fn live(&self) -> Vec<usize> {
        self.own.clone().filter(|&group| !self.advantages[group].is_flat).collect()
    }

    /// The row of `all` on the way to `member` of `group`. `all` holds n ≤ G rows an own group, each on the
    /// way to as many members.
    pub(crate) fn row(&self, all: &Tensor, group: usize, member: usize) -> Tensor {
        let width = all.size()[0] as usize / self.own.len();
        let group = group - self.own.start;
        all.get((group * width + member * width / self.group_size) as i64)
    }

    /// The rows of `all`, which holds G an own group, that are of `group`.
    pub(crate) fn members(&self, all: &Tensor, group: usize) -> Tensor {
        let g = self.group_size as i64;
        all.narrow(0, (group - self.own.start) as i64 * g, g)
    }

    /// The conditions of `groups`, a row each.
    pub(crate) fn conditions(&self, groups: impl Iterator<Item = usize>) -> Condition {
        let rows: Vec<i64> = groups.map(|group| (group - self.own.start) as i64).collect();
        let device = self.trajectory.x0.device();
        self.condition.rows(&Tensor::from_slice(&rows).to_device(device))
    }

    /// A number that no other member of the run has.
    pub(crate) fn stream(&self, group: usize, member: usize) -> u64 {
        (self.first_group + group as u64) * self.group_size as u64 + member as u64
    }
}

/// What an iteration's groups are gathered with.
pub(crate) struct Sources<'a> {
    pub(crate) config: &'a GroupConfig,
    pub(crate) model: &'a Model,
    pub(crate) rewards: &'a Rewards,
    pub(crate) size: LatentSize,
    pub(crate) watch: &'a dyn Watch,
}

/// Who looks on while groups are gathered, and may end it.
pub(crate) trait Watch {
    /// The next stage begins.
    ///
    /// # Errors
    /// When there should be none.
    fn enter(&self, stage: Stage) -> Result<()>;

    /// Whether what is gathered will not be used.
    fn is_stopped(&self) -> bool;
}

/// Nobody.
impl Watch for () {
    fn enter(&self, _stage: Stage) -> Result<()> {
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        false
    }
}

/// What takes time in an iteration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Rollout,
    Decoding,
    Rewards,
    Update,
}

/// Rolls out a group for each prompt, decodes and scores it; each rank its own.
pub(crate) fn gather(
    sources: &Sources<'_>,
    rollout: Rollout,
    prompts: &[&Prompt],
    iteration: usize,
) -> Result<Experience> {
    let Sources { config, model, size, watch, .. } = sources;
    watch.enter(Stage::Rollout)?;
    let started = Instant::now();
    let ranks = model.engine.trained().group();
    let first_group = (iteration * prompts.len()) as u64;
    let own = ranks::own(ranks, prompts.len())?;
    let prompts = &prompts[own.clone()];
    let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    let condition = model.encode(&texts, config.rollout.guidance, size)?;
    let trajectory = roll_out(sources, &rollout, &condition, first_group + own.start as u64);
    let rolled = started.elapsed().as_secs_f64();
    let scored = caught(|| score(sources, &trajectory, prompts)).map_err(Error::msg).flatten();
    let (scores, decoded) = scored.map_or_else(|error| (Err(error), 0.0), |(s, t)| (Ok(s), t));
    let scored = started.elapsed().as_secs_f64() - rolled - decoded;
    let scores = of_all(ranks, scores)?;
    let advantages = scores
        .iter()
        .map(|scores| config.advantage.of_group(config.group_size, &given(config, scores)))
        .collect();
    Ok(Experience {
        iteration,
        first_group,
        own,
        group_size: config.group_size,
        size: *size,
        condition,
        rollout,
        trajectory,
        scores,
        advantages,
        seconds: [rolled, decoded, scored],
    })
}

/// Decodes and scores the own groups, asking no other rank; with the seconds that decoding took.
fn score(
    sources: &Sources<'_>,
    trajectory: &Trajectory,
    prompts: &[&Prompt],
) -> Result<(Vec<Scores>, f64)> {
    let Sources { config, model, rewards, size, watch } = sources;
    watch.enter(Stage::Decoding)?;
    let started = Instant::now();
    ensure!(
        trajectory.x0.isfinite().all().int64_value(&[]) == 1,
        "the rollout is not finite: the model has diverged"
    );
    let images = model.decode(&trajectory.x0, size)?;
    let decoded = started.elapsed().as_secs_f64();
    watch.enter(Stage::Rewards)?;
    let groups = images.chunks(config.group_size).zip(prompts);
    let scores = groups.map(|(images, prompt)| {
        ensure!(!watch.is_stopped(), "stopped between two groups");
        let images: Vec<&RgbImage> = images.iter().collect();
        rewards.score(&vec![*prompt; images.len()], &images)
    });
    Ok((scores.collect::<Result<_>>()?, decoded))
}

/// What a rank says of one reward of one group: scores, failures, retries, seconds, why the last one failed.
type Told = (Option<Vec<Exact>>, u32, u32, Exact, Option<String>);

/// The scores of all ranks' groups, in order; or what one of them failed with, on all.
fn of_all(group: &Group, own: Result<Vec<Scores>>) -> Result<Vec<Scores>> {
    if group.world() == 1 {
        return own;
    }
    let told = |outcome: Outcome| -> Told {
        let Outcome { scores, failures, retries, seconds, error } = outcome;
        let scores = scores.map(|scores| scores.into_iter().map(Exact::from).collect());
        (scores, failures, retries, seconds.into(), error)
    };
    let heard = |(scores, failures, retries, seconds, error): Told| {
        let scores = scores.map(|scores| scores.into_iter().map(f64::from).collect());
        Outcome { scores, failures, retries, seconds: seconds.into(), error }
    };
    let own: Result<Vec<Vec<Told>>, String> = match own {
        Ok(own) => {
            Ok(own.into_iter().map(|it| it.outcomes.into_iter().map(told).collect()).collect())
        }
        Err(error) => Err(format!("{error:#}")),
    };
    let mut all = Vec::new();
    for (rank, part) in ranks::all(group, &own)?.into_iter().enumerate() {
        let failed = |why| cluster::Error::Shared { what: format!("rank {rank}: {why}") };
        all.extend(part.map_err(failed)?);
    }
    let scores =
        |outcomes: Vec<Told>| Scores { outcomes: outcomes.into_iter().map(heard).collect() };
    Ok(all.into_iter().map(scores).collect())
}

/// The rewards of a group that did not fail.
pub(crate) fn given<'a>(config: &GroupConfig, scores: &'a Scores) -> Vec<Scored<'a>> {
    config
        .rewards
        .iter()
        .zip(&scores.outcomes)
        .filter_map(|(reward, outcome)| {
            let (weight, std_floor) = (reward.weight, reward.std_floor);
            Some(Scored { weight, std_floor, scores: outcome.scores.as_deref()? })
        })
        .collect()
}

fn roll_out(
    sources: &Sources<'_>,
    rollout: &Rollout,
    condition: &Condition,
    first_group: u64,
) -> Trajectory {
    let Sources { config, model, size, watch, .. } = sources;
    let (group_size, widths) = (config.group_size, rollout.widths(config.group_size));
    let groups = || (first_group..).take(condition.pooled.size()[0] as usize);
    let start = family(config.seed, Use::Neighbourhood);
    let eps: Vec<Vec<f32>> = groups()
        .flat_map(|group| rollout.start.noises(start, group, group_size, widths[0], size))
        .collect();
    let added = family(config.seed, Use::Transitions);
    let disturb = |index: usize, mut x: Tensor| {
        let (step, mut width, mut scale) = (&rollout.steps[index], widths[index], 1.0);
        if step.noise == 0.0 {
            return x;
        }
        if rollout.splits.contains(&index) {
            (width, scale) = (2 * width, rollout.split_noise);
            x = x.repeat_interleave_self_int(2, 0, None);
        }
        let rows: Vec<Vec<f32>> = groups()
            .flat_map(|group| (0..width as u64).map(move |row| (group, row)))
            .map(|(group, row)| {
                let call = group * rollout.steps.len() as u64 + index as u64;
                added.normal(call * group_size as u64 + row, size.len())
            })
            .collect();
        x + model.pack(&rows, size) * (step.noise * scale)
    };
    let mut network = Batched::new(model, condition, config.rollout.batch);
    let velocity = |x_t: &Tensor, t: f64| {
        if watch.is_stopped() { x_t.zeros_like() } else { network.velocity(x_t, rollout.time(t)) }
    };
    rollout::solve(&rollout.steps, model.pack(&eps, size), velocity, disturb)
}

/// Solves from `eps` `[B, S, C]`, at most `batch` rows a network call.
pub(crate) fn solve_in_batches(
    model: &Model,
    plan: &[Step],
    eps: Tensor,
    condition: &Condition,
    batch: usize,
) -> Trajectory {
    let mut network = Batched::new(model, condition, batch);
    rollout::solve(plan, eps, |x_t, t| network.velocity(x_t, t), |_, x| x)
}

/// The network a few rows at a time.
struct Batched<'a> {
    model: &'a Model,
    condition: &'a Condition,
    batch: i64,
    /// Conditions of each batch, for as many rows as the last call had.
    parts: Vec<Condition>,
    n_rows: i64,
}

impl<'a> Batched<'a> {
    fn new(model: &'a Model, condition: &'a Condition, batch: usize) -> Self {
        Self { model, condition, batch: batch as i64, parts: Vec::new(), n_rows: 0 }
    }

    /// Velocity of `x_t` `[B, S, C]` at `t`; B is a multiple of the conditions' rows, each of which is for
    /// as many neighbouring rows of `x_t`.
    fn velocity(&mut self, x_t: &Tensor, t: f64) -> Tensor {
        let n_rows = x_t.size()[0];
        if n_rows != self.n_rows {
            let n_prompts = self.condition.pooled.size()[0];
            let prompts = Tensor::arange(n_prompts, (Kind::Int64, x_t.device()));
            let rows = prompts.repeat_interleave_self_int(n_rows / n_prompts, 0, None);
            let parts = rows.split(self.batch, 0);
            self.parts = parts.iter().map(|part| self.condition.rows(part)).collect();
            self.n_rows = n_rows;
        }
        let velocities: Vec<Tensor> = x_t
            .split(self.batch, 0)
            .iter()
            .zip(&self.parts)
            .map(|(x_t, condition)| {
                let times = Tensor::full([x_t.size()[0]], t, (Kind::Float, x_t.device()));
                self.model.engine.velocity(x_t, &times, condition)
            })
            .collect();
        if velocities.len() == 1 {
            velocities[0].shallow_clone()
        } else {
            Tensor::cat(&velocities, 0)
        }
    }
}
