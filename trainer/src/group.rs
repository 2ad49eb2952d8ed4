//! Groups: the prompts of an iteration, their trajectories, rewards and advantages.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use self::advantage::AdvantageConfig;
use self::rollout::RolloutConfig;
use crate::reward::RewardConfig;

pub mod advantage;
pub(crate) mod experience;
pub(crate) mod order;
pub(crate) mod ranks;
pub mod rollout;
pub(crate) mod seeds;

/// How groups come about, and what their members are worth.
#[derive(Clone, Debug, Deserialize, Serialize)]
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

fn group_size() -> usize {
    12
}
fn sigma() -> f64 {
    0.3
}

impl GroupConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        ensure!(self.prompts_per_iteration > 0, "prompts_per_iteration must be at least 1");
        ensure!(self.group_size >= 2, "group_size = {}: at least 2", self.group_size);
        ensure!(self.rollout.steps >= 2, "rollout.steps = {}: at least 2", self.rollout.steps);
        ensure!(self.rollout.batch > 0, "rollout.batch must be at least 1");
        let p = self.advantage.quasi_norm;
        ensure!(p > 0.0 && p <= 2.0, "advantage.quasi_norm = {p}: in (0, 2]");
        ensure!(!self.rewards.is_empty(), "no [[rewards]]: at least one is needed");
        Ok(())
    }
}
