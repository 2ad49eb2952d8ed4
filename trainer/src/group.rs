//! Groups: the prompts of an iteration, their trajectories, rewards and advantages.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::advantage::AdvantageConfig;
use self::rollout::RolloutConfig;
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
        self.rollout.validate()?;
        let p = self.advantage.quasi_norm;
        ensure!(p > 0.0 && p <= 2.0, "advantage.quasi_norm = {p}: in (0, 2]");
        let limit = self.advantage.limit.unwrap_or(1.0);
        ensure!(limit > 0.0 && limit.is_finite(), "advantage.limit = {limit}: above 0");
        ensure!(!self.rewards.is_empty(), "no [[rewards]]: at least one is needed");
        Ok(())
    }
}
