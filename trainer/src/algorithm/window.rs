//! Which steps of a rollout are noisy: MixGRPO's moving window.

use std::ops::Range;

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::group::seeds::{Use, family};

/// How the window moves.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// By `stride` every `interval` iterations, from noise to data and over again.
    Progressive,
    /// Anywhere, anew each iteration.
    Random,
    /// As progressive, the interval falling from `interval` to `interval_min` on the way.
    Decay,
    /// As progressive, the interval times exp(−`rate`·(start − `threshold`)) beyond the threshold.
    ExpDecay,
}

/// A window of noisy steps; only they train. Source: `grpo_states.py` of MixGRPO.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WindowConfig {
    /// How it moves.
    pub strategy: Strategy,
    /// Steps in it.
    pub size: usize,
    /// Steps it moves at a time; 0 leaves it at the beginning.
    #[serde(default = "stride")]
    pub stride: usize,
    /// Iterations it stays.
    #[serde(default = "interval")]
    pub interval: usize,
    /// Least of them, under `decay`.
    #[serde(default = "interval_min")]
    pub interval_min: usize,
    /// Start beyond which the interval shrinks, under `exp-decay`.
    #[serde(default = "threshold")]
    pub threshold: usize,
    /// By how much a step, under `exp-decay`.
    #[serde(default = "rate")]
    pub rate: f64,
    /// Share of all steps, from noise on, that it keeps within; never the last two.
    #[serde(default = "within")]
    pub within: f64,
}

fn stride() -> usize {
    1
}
fn interval() -> usize {
    25
}
fn interval_min() -> usize {
    1
}
fn threshold() -> usize {
    13
}
fn rate() -> f64 {
    0.1
}
fn within() -> f64 {
    1.0
}

impl WindowConfig {
    /// Why `name`, a setting of the window, is not read.
    pub(super) fn leaves_unread(&self, name: &str) -> Option<&'static str> {
        let is_read = match name {
            "stride" | "interval" => self.strategy != Strategy::Random,
            "interval_min" => self.strategy == Strategy::Decay,
            "threshold" | "rate" => self.strategy == Strategy::ExpDecay,
            _ => true,
        };
        (!is_read).then_some("sde.window.strategy does not read it")
    }

    /// In rollouts of `n_steps`.
    pub(crate) fn validate(&self, n_steps: usize) -> Result<()> {
        let Self { size, interval, interval_min, within, rate, .. } = *self;
        ensure!(within > 0.0 && within <= 1.0, "sde.window.within = {within}: in (0, 1]");
        let end = self.end(n_steps);
        ensure!(
            (1..=end).contains(&size),
            "sde.window.size = {size}: from 1 to {end}, within which it stays of rollout.steps = {n_steps}"
        );
        ensure!(
            (1..=interval).contains(&interval_min),
            "sde.window.interval_min = {interval_min}: from 1 to interval = {interval}"
        );
        ensure!(rate >= 0.0 && rate.is_finite(), "sde.window.rate = {rate}: at least 0");
        Ok(())
    }

    /// Steps of the window in `iteration` (from 0) of `n_steps`; at the end of its way it is shorter.
    pub(crate) fn at(&self, iteration: usize, n_steps: usize, seed: u64) -> Range<usize> {
        let end = self.end(n_steps);
        let start = match self.strategy {
            Strategy::Random => {
                let u = family(seed, Use::Windows).uniform(iteration as u64, 1)[0];
                let n_starts = end.saturating_sub(self.size) + 1;
                (u * n_starts as f64) as usize
            }
            _ => self.start(iteration, end),
        };
        start..(start + self.size).min(end)
    }

    /// The step that no window reaches.
    pub(crate) fn end(&self, n_steps: usize) -> usize {
        let within = (n_steps as f64 * self.within) as usize;
        within.min(n_steps.saturating_sub(2)).max(1)
    }

    fn start(&self, iteration: usize, end: usize) -> usize {
        let (mut start, mut stayed) = (0, 0);
        for _ in 0..iteration {
            stayed += 1;
            if stayed >= self.stay(start, end) {
                (start, stayed) = (start + self.stride, 0);
            }
            if start >= end {
                (start, stayed) = (0, 0);
            }
        }
        start
    }

    fn stay(&self, start: usize, end: usize) -> usize {
        let most = self.interval as f64;
        match self.strategy {
            Strategy::Progressive | Strategy::Random => self.interval,
            Strategy::Decay => {
                let progress = start as f64 / end as f64;
                let stay = most * (1.0 - progress) + self.interval_min as f64 * progress;
                (stay as usize).max(self.interval_min)
            }
            Strategy::ExpDecay => {
                let beyond = start.saturating_sub(self.threshold) as f64;
                (most * (-self.rate * beyond).exp()).ceil() as usize
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::cases::cases;

    #[test]
    fn windows_move_as_published() {
        for case in cases().windows {
            let end = case.n_steps - 2;
            for (iteration, &start) in case.starts.iter().enumerate() {
                let expected = start..(start + case.settings.size).min(end);
                let found = case.settings.at(iteration, case.n_steps, 0);
                assert_eq!(found, expected, "{:?}, {iteration}", case.settings.strategy);
            }
        }
    }

    #[test]
    fn random_windows_cover_their_share_and_follow_from_the_seed() {
        let fast: WindowConfig =
            toml::from_str("strategy = 'random'\nsize = 3\nwithin = 0.5").unwrap();
        let starts = |seed| (0..200).map(|i| fast.at(i, 10, seed).start).collect::<Vec<usize>>();
        let found = starts(1);
        for start in 0..3 {
            assert!(found.iter().filter(|&&found| found == start).count() > 40);
        }
        assert!(found.iter().all(|&start| start < 3));
        assert_eq!(found, starts(1));
        assert_ne!(found, starts(2));
    }
}
