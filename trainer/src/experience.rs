//! What one iteration learns from: groups of trajectories, their images, rewards and advantages.

use std::time::Instant;

use anyhow::{Result, ensure};
use flow::latents::LatentSize;
use flow::solver::Step;
use image::RgbImage;
use tch::{Kind, Tensor};

use crate::advantage::{Advantages, Scored};
use crate::align::AlignConfig;
use crate::engine::Condition;
use crate::model::Model;
use crate::reward::{RewardConfig, Rewards, Scores};
use crate::rollout::{self, Trajectory};
use crate::seeds::{Use, family};
use flow::prompts::Prompt;

/// P groups of G members.
pub(crate) struct Experience {
    /// Conditions, one row a prompt.
    pub(crate) condition: Condition,
    /// All P·G trajectories as rows, group by group.
    pub(crate) trajectory: Trajectory,
    /// Number of the first group in the run.
    pub(crate) first_group: u64,
    /// Scores of each group.
    pub(crate) scores: Vec<Scores>,
    /// Advantages of each group.
    pub(crate) advantages: Vec<Advantages>,
    /// Seconds of rollout, decoding and rewards.
    pub(crate) seconds: [f64; 3],
}

impl Experience {
    /// What failed while the groups were scored, a line a reward that did not end the run.
    pub(crate) fn faults(&self, config: &AlignConfig) -> Vec<String> {
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
}

/// Rolls out a group for each prompt, decodes and scores it.
pub(crate) fn gather(
    config: &AlignConfig,
    model: &Model,
    rewards: &Rewards,
    plan: &[Step],
    size: &LatentSize,
    prompts: &[&Prompt],
    first_group: u64,
) -> Result<Experience> {
    let started = Instant::now();
    let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    let condition = model.encode(&texts, config.rollout.guidance, size)?;
    let noise = family(config.seed, Use::Neighbourhood);
    let eps: Vec<Vec<f32>> = (first_group..)
        .take(prompts.len())
        .flat_map(|group| {
            rollout::neighbourhood(noise, group, config.group_size, config.sigma, size)
        })
        .collect();
    let members: Vec<i64> =
        (0..prompts.len() as i64).flat_map(|p| vec![p; config.group_size]).collect();
    let trajectory = solve_in_batches(
        model,
        plan,
        model.pack(&eps, size),
        &condition.rows(&Tensor::from_slice(&members).to_device(model.device())),
        config.rollout.batch,
    );
    let rolled = started.elapsed().as_secs_f64();
    ensure!(
        trajectory.x0.isfinite().all().int64_value(&[]) == 1,
        "the rollout is not finite: the model has diverged"
    );
    let images = model.decode(&trajectory.x0, size)?;
    let decoded = started.elapsed().as_secs_f64();
    let groups = images.chunks(config.group_size).zip(prompts);
    let scores = groups
        .map(|(images, prompt)| {
            let images: Vec<&RgbImage> = images.iter().collect();
            rewards.score(&vec![*prompt; images.len()], &images)
        })
        .collect::<Result<Vec<Scores>>>()?;
    let scored = started.elapsed().as_secs_f64();
    let advantages = scores.iter().map(|scores| advantages(config, scores)).collect();
    Ok(Experience {
        condition,
        trajectory,
        first_group,
        scores,
        advantages,
        seconds: [rolled, decoded - rolled, scored - decoded],
    })
}

/// Solves from `eps` `[B, S, C]`, at most `batch` rows a network call.
pub(crate) fn solve_in_batches(
    model: &Model,
    plan: &[Step],
    eps: Tensor,
    condition: &Condition,
    batch: usize,
) -> Trajectory {
    let rows = Tensor::arange(eps.size()[0], (Kind::Int64, model.device()));
    let parts: Vec<Condition> =
        rows.split(batch as i64, 0).iter().map(|part| condition.rows(part)).collect();
    rollout::solve(plan, eps, |x_t, t| {
        let velocities: Vec<Tensor> = x_t
            .split(batch as i64, 0)
            .iter()
            .zip(&parts)
            .map(|(x_t, condition)| {
                let times = Tensor::full([x_t.size()[0]], t, (Kind::Float, x_t.device()));
                model.engine.velocity(x_t, &times, condition)
            })
            .collect();
        if velocities.len() == 1 {
            velocities[0].shallow_clone()
        } else {
            Tensor::cat(&velocities, 0)
        }
    })
}

fn advantages(config: &AlignConfig, scores: &Scores) -> Advantages {
    let given: Vec<Scored<'_>> = config
        .rewards
        .iter()
        .zip(&scores.outcomes)
        .filter_map(|(reward, outcome)| {
            let (weight, std_floor) = (reward.weight, reward.std_floor);
            Some(Scored { weight, std_floor, scores: outcome.scores.as_deref()? })
        })
        .collect();
    config.advantage.of_group(config.group_size, &given)
}
