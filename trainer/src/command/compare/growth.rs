//! How the reward of held-out prompts grew against what a run cost.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::run::metrics::{self, Record};

/// What a reward can be held against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cost {
    Iterations,
    /// Forward passes of the network over an image, of which a forward and backward one is [three](work).
    Work,
    /// Iterations of the median length, without the time of rewards and of validations: what else the machine does
    /// for a while is not the method's.
    Seconds,
}

impl Cost {
    /// What it is counted in.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Iterations => "iterations",
            Self::Work => "forward passes",
            Self::Seconds => "s",
        }
    }
}

/// Forward passes that `forward` ones and `training` ones, forward and backward, come to.
pub(super) fn work(forward: f64, training: f64) -> f64 {
    forward + 3.0 * training
}

/// One run's reward at each validation, and what its iterations cost.
#[derive(Debug)]
pub(super) struct Growth {
    /// Forward passes so far, before the first iteration and after each.
    spent: Vec<f64>,
    /// Of the median iteration, without rewards.
    seconds: f64,
    /// Passes an image of an iteration, on average: in the rollout, in the updates.
    passes: [f64; 2],
    /// Iterations done, and the reward then.
    validations: Vec<(usize, f64)>,
}

impl Growth {
    /// Of the run in `folder`, by the reward called `reward`; `n_images` an iteration.
    ///
    /// # Errors
    /// When its metrics cannot be read or lack something.
    pub(super) fn read(folder: &Path, reward: &str, n_images: f64) -> Result<Self> {
        let read = |file| metrics::read_jsonl(&folder.join(file));
        let (training, held_out) = (read(metrics::FILE)?, read(metrics::VALIDATION)?);
        let found = Self::new(&training, &held_out, reward, n_images);
        found.with_context(|| folder.display().to_string())
    }

    fn new(training: &[Record], held_out: &[Record], reward: &str, n_images: f64) -> Result<Self> {
        ensure!(!training.is_empty(), "no iteration in {}", metrics::FILE);
        let value = |record: &Record, name: &str| {
            let value = record.values.get(name).copied().flatten();
            value.with_context(|| format!("no {name} after {} iterations", record.step))
        };
        let (mut spent, mut totals, mut seconds) = (vec![0.0], [0.0; 2], Vec::new());
        for record in training {
            let passes = [value(record, "nfe/rollout")?, value(record, "nfe/update")?];
            seconds.push(value(record, "seconds/iteration")? - value(record, "seconds/reward")?);
            spent.push(spent[spent.len() - 1] + n_images * work(passes[0], passes[1]));
            totals = [0, 1].map(|i| totals[i] + passes[i]);
        }
        let name = format!("validation/{reward}");
        let validation = |record: &Record| {
            let done = record.step as usize;
            ensure!(
                done < spent.len(),
                "a validation after {done} iterations, of {}",
                spent.len() - 1
            );
            Ok((done, value(record, &name)?))
        };
        let validations = held_out.iter().map(validation).collect::<Result<Vec<_>>>()?;
        ensure!(!validations.is_empty(), "no validation in {}", metrics::VALIDATION);
        let passes = totals.map(|total| total / training.len() as f64);
        seconds.sort_by(f64::total_cmp);
        Ok(Self { spent, seconds: seconds[seconds.len() / 2], passes, validations })
    }

    fn cost(&self, cost: Cost, done: usize) -> f64 {
        match cost {
            Cost::Iterations => done as f64,
            Cost::Work => self.spent[done],
            Cost::Seconds => self.seconds * done as f64,
        }
    }

    /// Cost and reward of each validation.
    fn points(&self, cost: Cost) -> impl Iterator<Item = (f64, f64)> + Clone {
        self.validations.iter().map(move |&(done, reward)| (self.cost(cost, done), reward))
    }

    /// Reward at the first and the last validation.
    pub(super) fn ends(&self) -> [f64; 2] {
        [self.validations[0].1, self.validations[self.validations.len() - 1].1]
    }

    /// Cost of the whole run.
    pub(super) fn total(&self, cost: Cost) -> f64 {
        self.cost(cost, self.spent.len() - 1)
    }

    /// Passes an image of an iteration, on average: in the rollout, in the updates.
    pub(super) fn passes(&self) -> [f64; 2] {
        self.passes
    }

    /// Seconds of the median iteration, without rewards.
    pub(super) fn seconds(&self) -> f64 {
        self.seconds
    }

    /// Reward once `limit` is spent, on the straight line between two validations.
    pub(super) fn at(&self, cost: Cost, limit: f64) -> Option<f64> {
        self.stretches(cost)
            .find_map(|[from, to]| (from.0..=to.0).contains(&limit).then(|| along(limit, from, to)))
    }

    /// Mean reward until `limit` is spent: the area under the curve, by its length.
    pub(super) fn mean_until(&self, cost: Cost, limit: f64) -> Option<f64> {
        let end = self.at(cost, limit)?;
        let parts = self.stretches(cost).filter(|[from, _]| from.0 < limit).map(|[from, to]| {
            let to = if to.0 > limit { (limit, end) } else { to };
            (to.0 - from.0) * (from.1 + to.1) / 2.0
        });
        Some(if limit > 0.0 { parts.sum::<f64>() / limit } else { end })
    }

    /// Cost at which the reward first is `level` or more, on the straight line between two validations.
    pub(super) fn reaches(&self, cost: Cost, level: f64) -> Option<f64> {
        self.stretches(cost).find(|[_, to]| to.1 >= level).map(|[from, to]| {
            let turned = |(x, y): (f64, f64)| (y, x);
            if from.1 >= level { from.0 } else { along(level, turned(from), turned(to)) }
        })
    }

    /// From each validation to the next; the first stretch has no length.
    fn stretches(&self, cost: Cost) -> impl Iterator<Item = [(f64, f64); 2]> {
        let before = self.points(cost).take(1).chain(self.points(cost));
        before.zip(self.points(cost)).map(|(from, to)| [from, to])
    }
}

/// The value at `x` of the line through both points.
fn along(x: f64, from: (f64, f64), to: (f64, f64)) -> f64 {
    let share = if to.0 > from.0 { (x - from.0) / (to.0 - from.0) } else { 1.0 };
    from.1 + share * (to.1 - from.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: usize, values: &[(&str, f64)]) -> Record {
        let values = values.iter().map(|&(name, value)| (name.to_owned(), Some(value))).collect();
        Record { step: step as u64, wall: 0.0, values }
    }

    /// 3 seconds an iteration of which 1 rewards; 8 and 2 passes an image, 4 images; held out 0 before, 1, 2, …
    /// after 5, 10, ….
    fn growth(n: usize) -> Growth {
        let costs = [
            ("nfe/rollout", 8.0),
            ("nfe/update", 2.0),
            ("seconds/iteration", 3.0),
            ("seconds/reward", 1.0),
        ];
        let training: Vec<Record> = (1..=n).map(|step| record(step, &costs)).collect();
        let held_out: Vec<Record> = (0..=n / 5)
            .map(|index| record(5 * index, &[("validation/ocr", index as f64)]))
            .collect();
        Growth::new(&training, &held_out, "ocr", 4.0).unwrap()
    }

    #[test]
    fn costs_add_up_without_rewards() {
        let growth = growth(20);
        assert_eq!(growth.total(Cost::Iterations), 20.0);
        assert_eq!(growth.total(Cost::Work), 1120.0);
        assert_eq!(growth.total(Cost::Seconds), 40.0);
        assert_eq!((growth.passes(), growth.seconds()), ([8.0, 2.0], 2.0));
    }

    #[test]
    fn a_reward_is_that_of_held_out_prompts() {
        let growth = growth(20);
        assert_eq!(growth.ends(), [0.0, 4.0]);
        assert_eq!(growth.at(Cost::Seconds, 0.0), Some(0.0));
        assert_eq!(growth.at(Cost::Seconds, 15.0), Some(1.5));
        assert_eq!(growth.at(Cost::Iterations, 20.0), Some(4.0));
        assert_eq!(growth.at(Cost::Seconds, 41.0), None);
        assert_eq!(growth.mean_until(Cost::Seconds, 40.0), Some(2.0));
        assert_eq!(growth.mean_until(Cost::Seconds, 15.0), Some(0.75));
        assert_eq!(growth.mean_until(Cost::Seconds, 0.0), Some(0.0));
        assert_eq!(growth.mean_until(Cost::Seconds, 41.0), None);
        assert_eq!(growth.reaches(Cost::Work, 0.0), Some(0.0));
        assert_eq!(growth.reaches(Cost::Work, 2.5), Some(700.0));
        assert_eq!(growth.reaches(Cost::Work, 99.0), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let said = |training: &[Record], held_out: &[Record]| {
            Growth::new(training, held_out, "ocr", 4.0).unwrap_err().to_string()
        };
        assert!(said(&[record(4, &[])], &[]).contains("nfe/rollout after 4 iterations"));
        assert!(said(&[], &[]).contains("metrics.jsonl"));
        let whole = growth(5);
        assert_eq!(whole.validations, [(0, 0.0), (5, 1.0)]);
    }
}
