//! A run whose rewards are gone trains nothing, and must not look as if it did.

use anyhow::Result;
use cluster::Error;
use serde::{Deserialize, Serialize};

use crate::group::GroupConfig;
use crate::reward::Scores;

/// Iterations in a row without any score.
const MAX_IN_A_ROW: usize = 3;
/// Most groups without any score, as a share, once so many iterations were seen.
const MAX_SHARE: f64 = 0.05;
const SEEN: usize = 20;

/// Counts groups that no reward has scored.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Starvation {
    in_a_row: usize,
    iterations: usize,
    groups: usize,
    lost: usize,
}

impl Starvation {
    /// Takes note of an iteration's groups.
    ///
    /// # Errors
    /// When too many went without any reward that trains.
    pub(crate) fn see(&mut self, config: &GroupConfig, scores: &[Scores]) -> Result<()> {
        let is_lost = |scores: &&Scores| {
            let mut given = config.rewards.iter().zip(&scores.outcomes);
            !given.any(|(reward, outcome)| reward.weight != 0.0 && outcome.scores.is_some())
        };
        let lost = scores.iter().filter(is_lost).count();
        self.in_a_row = if lost == scores.len() { self.in_a_row + 1 } else { 0 };
        self.iterations += 1;
        self.groups += scores.len();
        self.lost += lost;
        // All ranks count all groups.
        let shared = |what| Err(Error::Shared { what }.into());
        if self.in_a_row >= MAX_IN_A_ROW {
            return shared(format!(
                "no reward has scored any group for {MAX_IN_A_ROW} iterations: nothing is learned"
            ));
        }
        let share = self.lost as f64 / self.groups.max(1) as f64;
        if self.iterations >= SEEN && share > MAX_SHARE {
            return shared(format!(
                "{} of {} groups were scored by no reward, more than {:.0} %: see to the rewards' servers",
                self.lost,
                self.groups,
                100.0 * MAX_SHARE
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::Outcome;

    fn config() -> GroupConfig {
        let reward = "[[rewards]]\nkind = 'constant'\nvalue = 1\nname = ";
        let rewards = format!("{reward}'a'\nweight = 1\n{reward}'b'\nweight = 0\n");
        toml::from_str(&format!("prompts_per_iteration = 2\n{rewards}[rollout]\n")).unwrap()
    }

    fn scores(given: [bool; 2]) -> Scores {
        let outcome = |is_given: bool| Outcome {
            scores: is_given.then(|| vec![1.0]),
            failures: 0,
            retries: 0,
            seconds: 0.0,
            error: None,
        };
        Scores { outcomes: given.map(outcome).to_vec() }
    }

    #[test]
    fn three_iterations_without_any_score_are_the_end() {
        let (mut seen, config) = (Starvation::default(), config());
        // The second reward trains nothing.
        let gone = || [scores([false, true]), scores([false, false])];
        seen.see(&config, &gone()).unwrap();
        seen.see(&config, &gone()).unwrap();
        seen.see(&config, &[scores([true, false]), scores([false, false])]).unwrap();
        seen.see(&config, &gone()).unwrap();
        seen.see(&config, &gone()).unwrap();
        let said = seen.see(&config, &gone()).unwrap_err().to_string();
        assert!(said.contains("for 3 iterations"), "{said}");
    }

    #[test]
    fn one_group_in_twenty_may_be_lost() {
        for (n_lost, is_fine) in [(2, true), (3, false)] {
            let (mut seen, config) = (Starvation::default(), config());
            let mut results = (0..20).map(|iteration| {
                let lost = scores([iteration >= n_lost, false]);
                seen.see(&config, &[lost, scores([true, true])])
            });
            assert_eq!(results.by_ref().all(|result| result.is_ok()), is_fine, "{n_lost}");
        }
    }
}
