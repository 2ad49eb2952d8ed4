//! Groups: the prompts of an iteration, their trajectories, rewards and advantages.

use anyhow::{Context, Result, ensure};
use flow::latents::check_pixels;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::advantage::AdvantageConfig;
use self::rollout::{MAX_GUIDANCE, RolloutConfig};
use crate::reward::RewardConfig;

pub mod advantage;
pub(crate) mod division;
pub(crate) mod experience;
pub(crate) mod order;
pub(crate) mod ranks;
pub mod rollout;
pub(crate) mod scoring;
pub(crate) mod seeds;

/// How groups come about, and what their members are worth.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
pub struct GroupConfig {
    /// Everything random follows from it.
    #[serde(default)]
    pub seed: u64,
    /// Prompts, each with its group, an iteration.
    pub prompts_per_iteration: usize,
    /// Members of a group, G.
    #[serde(default = "group_size")]
    pub group_size: usize,
    /// Strength σ of the perturbation of the initial noise, in (0, 1] (Eq. 7); Neighbor GRPO's alone.
    #[serde(default = "sigma")]
    pub sigma: f64,
    /// How trajectories are solved.
    pub rollout: RolloutConfig,
    /// From rewards to advantages.
    #[serde(default)]
    pub advantage: AdvantageConfig,
    /// What is maximised: a weighted sum of advantages.
    pub rewards: Vec<RewardConfig>,
}

/// Largest values that are no slip of the hand.
const MAX_PROMPTS: usize = 100_000;
const MAX_GROUP: usize = 10_000;
const MAX_STEPS: usize = 10_000;

fn group_size() -> usize {
    12
}
fn sigma() -> f64 {
    0.3
}

impl GroupConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        let (n_prompts, group_size) = (self.prompts_per_iteration, self.group_size);
        ensure!(
            (1..=MAX_PROMPTS).contains(&n_prompts),
            "prompts_per_iteration = {n_prompts}: from 1 to {MAX_PROMPTS}"
        );
        ensure!(
            (2..=MAX_GROUP).contains(&group_size),
            "group_size = {group_size}: from 2 to {MAX_GROUP}"
        );
        let steps = self.rollout.steps;
        ensure!((2..=MAX_STEPS).contains(&steps), "rollout.steps = {steps}: from 2 to {MAX_STEPS}");
        let guidance = self.rollout.guidance.unwrap_or(0.0);
        let fits = (0.0..=MAX_GUIDANCE).contains(&guidance);
        ensure!(fits, "rollout.guidance = {guidance}: from 0 to {MAX_GUIDANCE}");
        let shift = self.rollout.shift.unwrap_or(1.0);
        ensure!(shift > 0.0 && shift <= 1e6, "rollout.shift = {shift}: above 0, at most 1e6");
        if let Some(size) = self.rollout.size {
            check_pixels(size[0], size[1]).with_context(|| format!("rollout.size = {size:?}"))?;
        }
        ensure!(self.rollout.batch > 0, "rollout.batch must be at least 1");
        let p = self.advantage.quasi_norm;
        ensure!(p > 0.0 && p <= 2.0, "advantage.quasi_norm = {p}: in (0, 2]");
        ensure!(!self.rewards.is_empty(), "no [[rewards]]: at least one is needed");
        Ok(())
    }
}
