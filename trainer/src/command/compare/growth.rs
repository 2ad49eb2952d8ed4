//! How the reward of a run grew against what it cost.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::run::metrics::{self, Record};

/// Iterations whose mean reward stands for the last of them: prompts change from one to the next.
const WINDOW: usize = 8;

/// What a reward can be held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cost {
    Iterations,
    /// Network passes an image: forward in the rollout, forward and backward in the updates.
    Passes,
    /// Without the time of rewards.
    Seconds,
}

/// One run's reward after each iteration.
#[derive(Debug)]
pub(super) struct Growth {
    points: Vec<Point>,
}

#[derive(Clone, Copy, Debug)]
struct Point {
    reward: f64,
    /// Passes an image of this iteration: in the rollout, in the updates.
    passes: [f64; 2],
    /// So far.
    iterations: f64,
    total_passes: f64,
    seconds: f64,
}

impl Growth {
    /// Of the run in `folder`, by the reward called `reward`.
    ///
    /// # Errors
    /// When its metrics cannot be read or lack something.
    pub(super) fn read(folder: &Path, reward: &str) -> Result<Self> {
        let path = folder.join(metrics::FILE);
        let records = metrics::read_jsonl(&path)?;
        Self::new(&records, reward).with_context(|| path.display().to_string())
    }

    fn new(records: &[Record], reward: &str) -> Result<Self> {
        ensure!(!records.is_empty(), "no iteration in it");
        let value = |record: &Record, name: &str| {
            let value = record.values.get(name).copied().flatten();
            value.with_context(|| format!("no {name} in iteration {}", record.step))
        };
        let name = format!("reward/{reward}");
        let mut points: Vec<Point> = Vec::with_capacity(records.len());
        for (index, record) in records.iter().enumerate() {
            let recent = &records[(index + 1).saturating_sub(WINDOW)..=index];
            let sum = recent.iter().map(|record| value(record, &name)).sum::<Result<f64>>()?;
            let passes = [value(record, "nfe/rollout")?, value(record, "nfe/update")?];
            let seconds = value(record, "seconds/iteration")? - value(record, "seconds/reward")?;
            let before = points.last().map_or([0.0; 2], |p| [p.total_passes, p.seconds]);
            points.push(Point {
                reward: sum / recent.len() as f64,
                passes,
                iterations: (index + 1) as f64,
                total_passes: before[0] + passes[0] + passes[1],
                seconds: before[1] + seconds,
            });
        }
        Ok(Self { points })
    }

    /// Cost and reward after each iteration with a full window.
    pub(super) fn points(&self, cost: Cost) -> impl Iterator<Item = (f64, f64)> + Clone {
        let first = (WINDOW - 1).min(self.points.len() - 1);
        self.points[first..].iter().map(move |point| (point.cost(cost), point.reward))
    }

    /// Mean reward of the first and of the last iterations.
    pub(super) fn ends(&self) -> [f64; 2] {
        let mut points = self.points(Cost::Iterations);
        let first = points.next().map_or(f64::NAN, |point| point.1);
        [first, points.last().map_or(first, |point| point.1)]
    }

    /// Cost of the whole run.
    pub(super) fn total(&self, cost: Cost) -> f64 {
        self.points.last().map_or(0.0, |point| point.cost(cost))
    }

    /// Passes an image of an iteration, on average: in the rollout, in the updates.
    pub(super) fn passes(&self) -> [f64; 2] {
        [0, 1].map(|i| {
            self.points.iter().map(|p| p.passes[i]).sum::<f64>() / self.points.len() as f64
        })
    }

    /// Seconds of the median iteration, without rewards.
    pub(super) fn seconds(&self) -> f64 {
        let mut before = 0.0;
        let mut all: Vec<f64> = Vec::new();
        for point in &self.points {
            all.push(point.seconds - before);
            before = point.seconds;
        }
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    }

    /// Reward once `limit` is spent.
    pub(super) fn at(&self, cost: Cost, limit: f64) -> Option<f64> {
        self.points(cost).take_while(|point| point.0 <= limit).last().map(|point| point.1)
    }

    /// Cost at which the reward first is `level` or more.
    pub(super) fn reaches(&self, cost: Cost, level: f64) -> Option<f64> {
        self.points(cost).find(|point| point.1 >= level).map(|point| point.0)
    }
}

impl Point {
    fn cost(&self, cost: Cost) -> f64 {
        match cost {
            Cost::Iterations => self.iterations,
            Cost::Passes => self.total_passes,
            Cost::Seconds => self.seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rewards 0, 1, 2, …; 3 seconds an iteration of which 1 rewards; 8 and 2 passes.
    fn growth(n: usize) -> Growth {
        let record = |i: usize| {
            let values = [
                ("reward/ocr", i as f64),
                ("nfe/rollout", 8.0),
                ("nfe/update", 2.0),
                ("seconds/iteration", 3.0),
                ("seconds/reward", 1.0),
            ];
            let values = values.map(|(name, value)| (name.to_owned(), Some(value))).into();
            Record { step: i as u64 + 1, wall: 0.0, values }
        };
        Growth::new(&(0..n).map(record).collect::<Vec<_>>(), "ocr").unwrap()
    }

    #[test]
    fn costs_add_up_without_rewards() {
        let growth = growth(20);
        assert_eq!(growth.total(Cost::Iterations), 20.0);
        assert_eq!(growth.total(Cost::Passes), 200.0);
        assert_eq!(growth.total(Cost::Seconds), 40.0);
        assert_eq!((growth.passes(), growth.seconds()), ([8.0, 2.0], 2.0));
    }

    #[test]
    fn a_reward_is_the_mean_of_its_window() {
        let growth = growth(20);
        // Of 0 to 7, and of 12 to 19.
        assert_eq!(growth.ends(), [3.5, 15.5]);
        assert_eq!(growth.at(Cost::Seconds, 17.0), Some(3.5));
        assert_eq!(growth.at(Cost::Seconds, 15.0), None);
        assert_eq!(growth.reaches(Cost::Passes, 4.0), Some(90.0));
        assert_eq!(growth.reaches(Cost::Passes, 99.0), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = Growth::new(&[Record { step: 4, wall: 0.0, values: [].into() }], "ocr");
        assert!(error.unwrap_err().to_string().contains("reward/ocr in iteration 4"));
    }
}
