//! From rewards to advantages within a group (paper Eq. 3 and 11, METHOD section 2).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AdvantageConfig {
    /// p of the quasi-norm, in (0, 2]: below 2, groups without a clear winner weigh less (Eq. 11).
    #[serde(default = "quasi_norm")]
    pub quasi_norm: f64,
    /// Whether the sum over rewards is divided by that norm; without, it is Eq. 3's, as the methods have
    /// it that Neighbor GRPO is compared with.
    #[serde(default = "rescale")]
    pub rescale: bool,
    /// Advantages are limited to ± this and re-centred; absent, they are not.
    #[serde(default)]
    pub limit: Option<f64>,
}

fn quasi_norm() -> f64 {
    0.8
}
fn rescale() -> bool {
    true
}
impl Default for AdvantageConfig {
    fn default() -> Self {
        Self { quasi_norm: quasi_norm(), rescale: rescale(), limit: None }
    }
}

/// One reward of a group.
#[derive(Clone, Copy, Debug)]
pub struct Scored<'a> {
    /// Factor on its advantages.
    pub weight: f64,
    /// Where the scores spread less than this, they give no advantages; in the reward's own unit.
    pub std_floor: f64,
    /// One a member.
    pub scores: &'a [f64],
}

/// Advantages of one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One a member; they add up to 0.
    pub values: Vec<f64>,
    /// Whether every reward was flat, so that all values are 0.
    pub is_flat: bool,
}

impl AdvantageConfig {
    /// Each reward is standardised within the group, then the *advantages* are added with their
    /// weights, and the sum is divided once by its p-norm and multiplied by √G, so that p = 2 gives
    /// Eq. 3 of a single reward up to the form of its standard deviation. Without `rescale` the sum
    /// stays as it is.
    ///
    /// A reward that failed is simply not among `rewards`.
    pub fn of_group(&self, group_size: usize, rewards: &[Scored<'_>]) -> Advantages {
        let mut sum = vec![0.0; group_size];
        for reward in rewards {
            for (total, a) in sum.iter_mut().zip(reward.standardised()) {
                *total += reward.weight * a;
            }
        }
        let p = self.quasi_norm;
        let norm = sum.iter().map(|a| a.abs().powf(p)).sum::<f64>().powf(1.0 / p);
        if norm == 0.0 {
            return Advantages { values: sum, is_flat: true };
        }
        let scale = if self.rescale { (group_size as f64).sqrt() / norm } else { 1.0 };
        let mut values: Vec<f64> = sum.iter().map(|a| a * scale).collect();
        if let Some(limit) = self.limit {
            for a in &mut values {
                *a = a.clamp(-limit, limit);
            }
            centre(&mut values);
        }
        Advantages { values, is_flat: false }
    }
}

impl Scored<'_> {
    /// Eq. 3 with the unbiased standard deviation; zeros below the floor.
    fn standardised(&self) -> Vec<f64> {
        let mut centred = self.scores.to_vec();
        centre(&mut centred);
        let square: f64 = centred.iter().map(|x| x * x).sum();
        let std = (square / (centred.len().max(2) - 1) as f64).sqrt();
        if std < self.std_floor {
            return vec![0.0; centred.len()];
        }
        centred.iter().map(|x| x / std).collect()
    }
}

fn centre(values: &mut [f64]) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    for x in values {
        *x -= mean;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(weight: f64, scores: &[f64]) -> Scored<'_> {
        Scored { weight, std_floor: 1e-6, scores }
    }

    fn config(quasi_norm: f64) -> AdvantageConfig {
        AdvantageConfig { quasi_norm, ..AdvantageConfig::default() }
    }

    fn norm(values: &[f64], p: f64) -> f64 {
        values.iter().map(|a| a.abs().powf(p)).sum::<f64>().powf(1.0 / p)
    }

    #[test]
    fn p_2_is_the_population_z_score() {
        let rewards = [1.0, 4.0, 2.0, 5.0];
        let found = config(2.0).of_group(4, &[scored(1.0, &rewards)]).values;
        let std = (2.5f64).sqrt();
        for (a, r) in found.iter().zip(rewards) {
            assert!((a - (r - 3.0) / std).abs() < 1e-12);
        }
    }

    #[test]
    fn a_single_winner_outweighs_an_even_split() {
        let flat = config(0.8).of_group(4, &[scored(1.0, &[1.0, 1.0, 0.0, 0.0])]).values;
        let winner = config(0.8).of_group(4, &[scored(1.0, &[0.0, 0.0, 0.0, 1.0])]).values;
        assert!(norm(&winner, 2.0) > norm(&flat, 2.0));
        assert!((norm(&winner, 0.8) - 2.0).abs() < 1e-12);
        assert!((norm(&flat, 0.8) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn order_and_sign_survive() {
        let values = config(0.5).of_group(4, &[scored(1.0, &[0.1, 0.9, 0.4, 0.2])]).values;
        assert!(values[1] > values[2] && values[2] > values[3] && values[3] > values[0]);
        let flipped = config(0.5).of_group(4, &[scored(-1.0, &[0.1, 0.9, 0.4, 0.2])]).values;
        for (a, b) in values.iter().zip(flipped) {
            assert!((a + b).abs() < 1e-12);
        }
    }

    #[test]
    fn scales_of_rewards_do_not_matter_and_weights_do() {
        let (a, b) = ([0.0, 1.0, 2.0], [0.0, 3.0, 0.0]);
        let thousand: Vec<f64> = b.iter().map(|x| 1000.0 * x).collect();
        let one = config(2.0).of_group(3, &[scored(1.0, &a), scored(1.0, &b)]);
        assert_eq!(one, config(2.0).of_group(3, &[scored(1.0, &a), scored(1.0, &thousand)]));
        assert_ne!(one, config(2.0).of_group(3, &[scored(1.0, &a), scored(2.0, &b)]));
    }

    #[test]
    fn without_rescaling_advantages_of_rewards_add_up() {
        let (a, b) = ([0.0, 1.0, 2.0], [3.0, 0.0, 3.0]);
        let plain = AdvantageConfig { rescale: false, ..AdvantageConfig::default() };
        let found = plain.of_group(3, &[scored(1.0, &a), scored(0.5, &b)]).values;
        let third = 1.0 / 3.0f64.sqrt();
        for (found, expected) in found.iter().zip([-1.0 + 0.5 * third, -third, 1.0 + 0.5 * third]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn flat_groups_have_no_advantages() {
        for rewards in [[0.5; 3], [0.5, 0.5 + 1e-9, 0.5]] {
            let flat = config(0.8).of_group(3, &[scored(1.0, &rewards)]);
            assert!(flat.is_flat);
            assert_eq!(flat.values, [0.0; 3]);
        }
        assert!(config(0.8).of_group(3, &[]).is_flat);
    }

    #[test]
    fn limited_advantages_still_add_up_to_zero() {
        let limited = AdvantageConfig { limit: Some(0.7), ..config(2.0) };
        let values = limited.of_group(5, &[scored(1.0, &[0.0, 0.1, 0.2, 0.3, 9.0])]).values;
        assert!(values.iter().sum::<f64>().abs() < 1e-12);
        assert!(values.iter().all(|a| a.abs() < 1.4));
    }
}
