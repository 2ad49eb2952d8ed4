//! Grids of times from noise to data.

use serde::Deserialize;

/// How a linear grid is bent towards noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shift {
    /// `σ' = s·σ / (1 + (s − 1)·σ)`; s = 1 leaves the grid linear.
    Factor(f64),
    /// The same map with `s = exp(mu)`, FLUX's resolution-dependent form.
    Mu(f64),
}

/// A grid that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// Too few or too many steps.
    #[error("invalid number of steps {0}: from 1 to 1000 are possible")]
    Steps(usize),
    /// A shift that is not a positive number.
    #[error("invalid shift {0}: a positive number is needed (1 is no shift)")]
    Shift(f64),
    /// A scheduler that this project does not implement.
    #[error("unsupported {field} = {value} in scheduler_config.json")]
    Unsupported {
        /// Name of the entry.
        field: &'static str,
        /// What it holds.
        value: String,
    },
}

/// Times from noise to data: strictly decreasing, from at most 1 to exactly 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule(Vec<f64>);

impl Schedule {
    /// `n` steps from 1 to 0: linear `1, 1 − 1/n, …, 1/n`, bent by `shift`, then 0.
    ///
    /// Source: `FluxPipeline` with `FlowMatchEulerDiscreteScheduler` of diffusers 0.42.
    ///
    /// # Errors
    /// When `n` is not within 1…1000 or the shift is not positive.
    pub fn new(n: usize, shift: Shift) -> Result<Self, ScheduleError> {
        Self::with_short_end(n, shift, n, 0)
    }

    /// The first `kept` times of [`Schedule::new`], then `rest` steps to 0 in place of the others,
    /// as even in linear time as those were.
    ///
    /// # Errors
    /// As [`Schedule::new`], and when no step would be left to reach 0.
    pub fn with_short_end(
        n: usize,
        shift: Shift,
        kept: usize,
        rest: usize,
    ) -> Result<Self, ScheduleError> {
        if !(1..=1000).contains(&n) || kept > n || (kept < n && rest == 0) {
            return Err(ScheduleError::Steps(n));
        }
        let factor = match shift {
            Shift::Factor(factor) => factor,
            Shift::Mu(mu) => mu.exp(),
        };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(ScheduleError::Shift(factor));
        }
        let bend = |sigma: f64| factor * sigma / (1.0 + (factor - 1.0) * sigma);
        let mut times: Vec<f64> = (0..kept).map(|i| bend((n - i) as f64 / n as f64)).collect();
        let left = (n - kept) as f64 / n as f64;
        times.extend((0..rest).map(|i| bend(left * (rest - i) as f64 / rest as f64)));
        times.push(0.0);
        Ok(Self(times))
    }

    /// The n + 1 times.
    pub fn times(&self) -> &[f64] {
        &self.0
    }

    /// Steps n.
    pub fn n_steps(&self) -> usize {
        self.0.len() - 1
    }
}

/// `scheduler/scheduler_config.json` of a flow-matching pipeline.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct SchedulerConfig {
    /// Constant shift; unused when the shift is dynamic.
    #[serde(default = "one")]
    pub shift: f64,
    /// Whether the shift follows the number of image tokens.
    #[serde(default)]
    pub use_dynamic_shifting: bool,
    /// mu at `base_image_seq_len`.
    #[serde(default = "base_shift")]
    pub base_shift: f64,
    /// mu at `max_image_seq_len`.
    #[serde(default = "max_shift")]
    pub max_shift: f64,
    /// Image tokens of `base_shift`.
    #[serde(default = "base_len")]
    pub base_image_seq_len: usize,
    /// Image tokens of `max_shift`.
    #[serde(default = "max_len")]
    pub max_image_seq_len: usize,
    /// `exponential` is FLUX's.
    #[serde(default = "exponential")]
    pub time_shift_type: String,
    /// Rescales the grid to end there; not used by FLUX.
    #[serde(default)]
    pub shift_terminal: Option<f64>,
}

fn one() -> f64 {
    1.0
}
fn base_shift() -> f64 {
    0.5
}
fn max_shift() -> f64 {
    1.15
}
fn base_len() -> usize {
    256
}
fn max_len() -> usize {
    4096
}
fn exponential() -> String {
    "exponential".into()
}

impl SchedulerConfig {
    /// # Errors
    /// When the file asks for a form of shift that is not implemented, or its numbers are absurd.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        if !(self.shift.is_finite() && self.shift > 0.0) {
            return Err(ScheduleError::Shift(self.shift));
        }
        if self.use_dynamic_shifting && self.time_shift_type != "exponential" {
            let value = self.time_shift_type.clone();
            return Err(ScheduleError::Unsupported { field: "time_shift_type", value });
        }
        if let Some(terminal) = self.shift_terminal {
            let value = terminal.to_string();
            return Err(ScheduleError::Unsupported { field: "shift_terminal", value });
        }
        if self.max_image_seq_len <= self.base_image_seq_len {
            let value = self.max_image_seq_len.to_string();
            return Err(ScheduleError::Unsupported { field: "max_image_seq_len", value });
        }
        Ok(())
    }

    /// The shift for an image of `tokens` packed tokens. Source: `calculate_shift` of diffusers 0.42.
    pub fn shift(&self, tokens: usize) -> Shift {
        if !self.use_dynamic_shifting {
            return Shift::Factor(self.shift);
        }
        let span = (self.max_image_seq_len - self.base_image_seq_len) as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        Shift::Mu(self.base_shift + (tokens as f64 - self.base_image_seq_len as f64) * slope)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn flux_mu_follows_the_published_table() {
        let config: SchedulerConfig =
            serde_json::from_str(r#"{"use_dynamic_shifting": true, "shift": 3.0}"#).unwrap();
        for (tokens, mu) in [(256, 0.5), (1024, 0.63), (2304, 0.8467), (4096, 1.15), (8192, 1.8433)]
        {
            let Shift::Mu(found) = config.shift(tokens) else { panic!("static shift") };
            assert!((found - mu).abs() < 1e-4, "{tokens}: {found}");
        }
    }

    #[test]
    fn a_static_shift_ignores_the_size() {
        let config: SchedulerConfig = serde_json::from_str(r#"{"shift": 3.0}"#).unwrap();
        assert_eq!(config.shift(4096), Shift::Factor(3.0));
        let schedule = Schedule::new(2, config.shift(16)).unwrap();
        assert_eq!(schedule.times(), [1.0, 0.75, 0.0]);
    }

    #[test]
    fn absurd_grids_are_refused() {
        assert!(Schedule::new(0, Shift::Factor(1.0)).is_err());
        assert!(Schedule::new(1001, Shift::Factor(1.0)).is_err());
        assert!(Schedule::new(4, Shift::Factor(0.0)).is_err());
        assert!(Schedule::new(4, Shift::Mu(f64::NAN)).is_err());
    }

    #[test]
    fn a_short_end_keeps_the_beginning_and_reaches_zero() {
        let (long, shift) = (Schedule::new(25, Shift::Factor(3.0)).unwrap(), Shift::Factor(3.0));
        let short = Schedule::with_short_end(25, shift, 4, 3).unwrap();
        assert_eq!(short.times()[..4], long.times()[..4]);
        assert_eq!((short.n_steps(), short.times()[7]), (7, 0.0));
        for (kept, of_long) in [(4, 4), (5, 11), (6, 18)] {
            assert!((short.times()[kept] - long.times()[of_long]).abs() < 1e-12);
        }
        assert!(Schedule::with_short_end(25, shift, 4, 0).is_err());
    }

    proptest! {
        #[test]
        fn times_fall_strictly_from_one_to_zero(n in 1usize..200, factor in 0.05f64..20.0) {
            let schedule = Schedule::new(n, Shift::Factor(factor)).unwrap();
            let times = schedule.times();
            prop_assert!((times[0] - 1.0).abs() < 1e-12);
            prop_assert_eq!(times[n], 0.0);
            prop_assert!(times.windows(2).all(|pair| pair[0] > pair[1]));
        }
    }
}
