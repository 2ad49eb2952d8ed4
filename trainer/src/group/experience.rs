//! What one iteration learns from: groups of trajectories, their images, rewards and advantages.

use std::ops::Range;
use std::thread;
use std::time::Instant;

use anyhow::{Error, Result, ensure};
use flow::latents::LatentSize;
use flow::panics::caught;
use flow::prompts::Prompt;
use flow::solver::Step;
use image::RgbImage;
use tch::{Kind, Tensor};

use super::GroupConfig;
use super::advantage::{Advantages, Scored};
use super::division::Division;
use super::rollout::{self, Rollout, Trajectory};
use super::scoring::{self, Scoring};
use super::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::network::model::Model;
use crate::reward::{RewardConfig, Rewards, Scores};

/// P groups of G members, of which this rank has rolled out its part.
pub(crate) struct Experience {
    /// Iterations before this one.
    pub(crate) iteration: usize,
    /// Number of the first group in the run.
    pub(crate) first_group: u64,
    /// Who has rolled out what.
    pub(crate) division: Division,
    /// Groups that this rank has a part of: of these it has all trajectories.
    held: Range<usize>,
    /// Of each of the P groups.
    pub(crate) prompts: Vec<Prompt>,
    /// G.
    pub(crate) group_size: usize,
    /// Shape of a latent.
    pub(crate) size: LatentSize,
    /// Conditions, one row a held group.
    condition: Condition,
    /// How the trajectories came about.
    pub(crate) rollout: Rollout,
    /// The trajectories of held groups as rows, G a group.
    pub(crate) trajectory: Trajectory,
    /// Scores of each of the P groups.
    pub(crate) scores: Vec<Scores>,
    /// Advantages of each of the P groups.
    pub(crate) advantages: Vec<Advantages>,
    /// Seconds of rollout, of decoding, and of waiting for rewards after both.
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

    /// Groups that this rank has a part of.
    pub(crate) fn held(&self) -> Range<usize> {
        self.held.clone()
    }

    /// Held groups whose rewards are not all flat.
    pub(crate) fn live(&self) -> Vec<usize> {
        self.held.clone().filter(|&group| !self.advantages[group].is_flat).collect()
    }

    /// The row of `all` on the way to `member` of `group`. `all` holds n ≤ G rows a held group, each on the
    /// way to as many members.
    pub(crate) fn row(&self, all: &Tensor, group: usize, member: usize) -> Tensor {
        let width = all.size()[0] as usize / self.held.len();
        let group = group - self.held.start;
        all.get((group * width + member * width / self.group_size) as i64)
    }

    /// The rows of `all`, which holds G a held group, that are of `group`.
    pub(crate) fn members(&self, all: &Tensor, group: usize) -> Tensor {
        let g = self.group_size as i64;
        all.narrow(0, (group - self.held.start) as i64 * g, g)
    }

    /// The conditions of `groups`, a row each.
    pub(crate) fn conditions(&self, groups: impl Iterator<Item = usize>) -> Condition {
        let rows: Vec<i64> = groups.map(|group| (group - self.held.start) as i64).collect();
        let device = self.condition.pooled.device();
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
pub(crate) trait Watch: Sync {
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

/// Rolls out a group for each prompt, decodes and scores it; each rank its part. Where a network call does not take
/// all groups, those that are decoded are scored while the next ones roll out.
pub(crate) fn gather(
    sources: &Sources<'_>,
    rollout: Rollout,
    prompts: &[&Prompt],
    iteration: usize,
) -> Result<Experience> {
    let Sources { config, model, rewards, size, watch } = sources;
    watch.enter(Stage::Rollout)?;
    model.engine.forget();
    let ranks = model.engine.trained().group();
    let division = Division::new(ranks, config, prompts.len())?;
    let held = division.groups();
    let texts: Vec<&str> = prompts[held.clone()].iter().map(|prompt| &*prompt.text).collect();
    let mut seconds = [0.0; 3];
    let guidance = config.rollout.guidance(&model.pipeline)?;
    let condition = timed(&mut seconds[0], || model.encode(&texts, guidance, size))?;
    let mut experience = Experience {
        iteration,
        first_group: (iteration * prompts.len()) as u64,
        division,
        held,
        prompts: prompts.iter().map(|&prompt| prompt.clone()).collect(),
        group_size: config.group_size,
        size: *size,
        condition,
        rollout,
        trajectory: Trajectory { calls: Vec::new(), x0: Tensor::new() },
        scores: Vec::new(),
        advantages: Vec::new(),
        seconds,
    };
    let scores = thread::scope(|scope| {
        let scoring = Scoring::start(scope, rewards, *watch);
        match experience.roll_out(sources, prompts, &scoring) {
            Ok(decoded) => {
                let scores = timed(&mut experience.seconds[2], || scoring.finish());
                Ok(decoded.and(scores))
            }
            Err(error) => {
                scoring.give_up();
                Err(error)
            }
        }
    })?;
    experience.scores = scoring::of_all(ranks, &division, scores)?;
    let advantages = |scores| config.advantage.of_group(config.group_size, &given(config, scores));
    experience.advantages = experience.scores.iter().map(advantages).collect();
    Ok(experience)
}

/// Adds what `work` takes to `seconds`.
fn timed<T>(seconds: &mut f64, work: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let done = work();
    *seconds += started.elapsed().as_secs_f64();
    done
}

impl Experience {
    /// Rolls out and decodes the held groups, as many at a time as a network call takes, and hands the own images to
    /// `scoring`. What decoding failed with, asking no other rank, is inside.
    fn roll_out<'a>(
        &mut self,
        sources: &Sources<'_>,
        prompts: &[&'a Prompt],
        scoring: &Scoring<'a>,
    ) -> Result<Result<()>> {
        let Sources { config, watch, .. } = sources;
        // Ranks that share groups go through all of theirs together.
        let at_once = if self.division.is_spread() {
            self.held.len()
        } else {
            (config.rollout.batch / self.group_size).max(1)
        };
        let mut parts = Vec::new();
        let mut decoded = Ok(());
        for first in self.held.clone().step_by(at_once) {
            let groups = first..(first + at_once).min(self.held.end);
            watch.enter(Stage::Rollout)?;
            let mut seconds = self.seconds;
            let part = timed(&mut seconds[0], || trajectory(sources, self, groups.clone()))?;
            let images = timed(&mut seconds[1], || caught(|| self.decode(sources, &part)));
            self.seconds = seconds;
            parts.push(part);
            decoded = images.map_err(Error::msg).flatten().map(|images| {
                let mut images = images.into_iter();
                groups.for_each(|group| {
                    let n = self.division.members(group).len();
                    scoring.add(prompts[group], images.by_ref().take(n).collect());
                });
            });
            if decoded.is_err() || scoring.has_failed() {
                break;
            }
        }
        sources.model.engine.attend()?;
        self.trajectory = Trajectory::joined(parts);
        watch.enter(Stage::Rewards)?;
        Ok(decoded)
    }

    /// For each network call of a rollout of `groups`, the rows of it that are known to train; in the whole iteration
    /// no more than an update takes at a time.
    fn foreseen(&self, config: &GroupConfig, groups: Range<usize>) -> Vec<Vec<i64>> {
        let mut calls = vec![Vec::new(); self.rollout.steps.len()];
        let mut n_before = 0;
        for group in self.held() {
            let foreseen = self.rollout.foreseen.get(group).map_or(&[][..], Vec::as_slice);
            n_before += foreseen.len();
            if n_before > config.rollout.batch {
                break;
            }
            if !groups.contains(&group) {
                continue;
            }
            for &(member, call) in foreseen {
                let row = (group - groups.start) * self.group_size + member;
                calls[call].push(row as i64);
            }
        }
        calls
    }

    /// The images of the own members among those of `trajectory`.
    fn decode(&self, sources: &Sources<'_>, trajectory: &Trajectory) -> Result<Vec<RgbImage>> {
        let Sources { model, size, watch, .. } = sources;
        watch.enter(Stage::Decoding)?;
        ensure!(
            trajectory.x0.isfinite().all().int64_value(&[]) == 1,
            "the rollout is not finite: the model has diverged"
        );
        if !self.division.is_spread() {
            return model.decode(&trajectory.x0, size);
        }
        let own = self.division.own_nodes(self.group_size);
        model.decode(&trajectory.x0.narrow(0, own.start as i64, own.len() as i64), size)
    }
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

/// Rolls out `groups`, which are held.
fn trajectory(
    sources: &Sources<'_>,
    experience: &Experience,
    groups: Range<usize>,
) -> Result<Trajectory> {
    let Sources { config, model, size, watch, .. } = sources;
    let Experience { rollout, division, .. } = experience;
    let condition = &experience.conditions(groups.clone());
    let (group_size, widths) = (config.group_size, rollout.widths(config.group_size));
    let numbers = || groups.clone().map(|group| experience.first_group + group as u64);
    let start = family(config.seed, Use::Neighbourhood);
    let eps: Vec<Vec<f32>> = numbers()
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
        let rows: Vec<Vec<f32>> = numbers()
            .flat_map(|group| (0..width as u64).map(move |row| (group, row)))
            .map(|(group, row)| {
                let call = group * rollout.steps.len() as u64 + index as u64;
                added.normal(call * group_size as u64 + row, size.len())
            })
            .collect();
        x + model.pack(&rows, size) * (step.noise * scale)
    };
    let mut network = Batched::new(model, condition, config.rollout.batch);
    let mut trained = experience.foreseen(config, groups.clone()).into_iter();
    let velocity = |x_t: &Tensor, t: f64| {
        let trained = trained.next().unwrap_or_default();
        if watch.is_stopped() {
            Ok(x_t.zeros_like())
        } else if division.is_spread() {
            network.shared(x_t, rollout.time(t), division)
        } else {
            network.velocity(x_t, rollout.time(t), &trained)
        }
    };
    rollout::solve(&rollout.steps, model.pack(&eps, size), velocity, disturb)
}

/// Solves from `eps` `[B, S, C]`, at most `batch` rows a network call.
///
/// # Errors
/// As [`Engine::velocity`](crate::network::engine::Engine::velocity).
pub(crate) fn solve_in_batches(
    model: &Model,
    plan: &[Step],
    eps: Tensor,
    condition: &Condition,
    batch: usize,
) -> Result<Trajectory> {
    let mut network = Batched::new(model, condition, batch);
    rollout::solve(plan, eps, |x_t, t| network.velocity(x_t, t, &[]), |_, x| x)
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
    /// as many neighbouring rows of `x_t`. The rows `trained` train before the weights change.
    fn velocity(&mut self, x_t: &Tensor, t: f64, trained: &[i64]) -> Result<Tensor> {
        let n_rows = x_t.size()[0];
        self.of_rows(x_t, t, 0..n_rows, trained)
    }

    /// The same of states of held groups, each rank computing its part.
    fn shared(&mut self, x_t: &Tensor, t: f64, division: &Division) -> Result<Tensor> {
        let width = x_t.size()[0] as usize / division.groups().len();
        let own = division.own_nodes(width);
        let v = self.of_rows(x_t, t, own.start as i64..own.end as i64, &[])?;
        let engine = &self.model.engine;
        engine.attend()?;
        division.gathered(engine.trained().group(), &v, width)
    }

    /// That of some `rows`, of which there are as many whenever `x_t` has as many.
    fn of_rows(
        &mut self,
        x_t: &Tensor,
        t: f64,
        rows: Range<i64>,
        trained: &[i64],
    ) -> Result<Tensor> {
        let (n_rows, n_own) = (x_t.size()[0], rows.end - rows.start);
        if n_rows != self.n_rows {
            let n_prompts = self.condition.pooled.size()[0];
            let prompts = Tensor::arange(n_prompts, (Kind::Int64, x_t.device()));
            let all = prompts.repeat_interleave_self_int(n_rows / n_prompts, 0, None);
            let parts = all.narrow(0, rows.start, n_own).split(self.batch, 0);
            self.parts = parts.iter().map(|part| self.condition.rows(part)).collect();
            self.n_rows = n_rows;
        }
        let x_t = x_t.narrow(0, rows.start, n_own);
        if n_own == 0 {
            return Ok(x_t.zeros_like());
        }
        let trained = if n_own <= self.batch { trained } else { &[] };
        let velocities = x_t
            .split(self.batch, 0)
            .iter()
            .zip(&self.parts)
            .map(|(x_t, condition)| {
                let times = Tensor::full([x_t.size()[0]], t, (Kind::Float, x_t.device()));
                self.model.engine.velocity_to_train(x_t, &times, condition, trained)
            })
            .collect::<Result<Vec<Tensor>>>()?;
        Ok(match &velocities[..] {
            [all] => all.shallow_clone(),
            parts => Tensor::cat(parts, 0),
        })
    }
}
