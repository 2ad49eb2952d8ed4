//! What an iteration is told of signals, and signals of it.

use anyhow::{Result, ensure};
use cluster::Alarm;

use super::interrupt;
use crate::group::experience::{Stage, Watch};

/// What an iteration is told of signals.
pub(super) struct Watching {
    pub(super) iteration: usize,
    pub(super) seconds: [Option<f64>; 4],
    /// Several processes must stop at the same place, which is the end of an iteration.
    pub(super) is_alone: bool,
    /// Where they are no longer together, each stops as soon as it can.
    pub(super) alarm: Alarm,
}

impl Watch for Watching {
    fn enter(&self, stage: Stage) -> Result<()> {
        ensure!(!self.is_stopped(), "stopped before the next stage");
        let name = match stage {
            Stage::Rollout => "rollout",
            Stage::Decoding => "decoding",
            Stage::Rewards => "rewards",
            Stage::Update => "update",
        };
        let name = format!("the {name} of iteration {}", self.iteration + 1);
        interrupt::enter(name, self.seconds[stage as usize]);
        Ok(())
    }

    fn is_stopped(&self) -> bool {
        self.alarm.rings() || self.is_alone && interrupt::asked()
    }
}
