//! Grids of times from noise to data.

mod config;
mod spacing;

pub use config::SchedulerConfig;
pub use spacing::Spacing;

/// How a linear grid is bent towards noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shift {
    /// `σ' = s·σ / (1 + (s − 1)·σ)`; s = 1 leaves the grid linear.
    Factor(f64),
    /// The same map with `s = exp(mu)`, FLUX's resolution-dependent form.
    Mu(f64),
}

impl Shift {
    /// s of the map, above 0 where it is valid.
    pub fn factor(self) -> f64 {
        match self {
            Self::Factor(factor) => factor,
            Self::Mu(mu) => mu.exp(),
        }
    }
}

/// What a scheduler asks of a grid beside its number of steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// The bend of the linear grid.
    pub shift: Shift,
    /// First time of the linear grid: 1, or a little less in DPM-Solver's.
    pub top: f64,
    /// Last time before 0: where given, the bent grid is stretched to it.
    pub terminal: Option<f64>,
    /// How times lie between the first and that last one.
    pub spacing: Spacing,
}

impl From<Shift> for Grid {
    /// FLUX's own grid.
    fn from(shift: Shift) -> Self {
        Self { shift, top: 1.0, terminal: None, spacing: Spacing::Shifted }
    }
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
    /// A value that no grid can have.
    #[error("invalid {field} = {value}: {expected}")]
    Invalid {
        /// Name of the entry.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A scheduler that this project does not implement.
    #[error("unsupported {field} = {value}: {supported}")]
    Unsupported {
        /// Name of the entry.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What is implemented.
        supported: &'static str,
    },
}

/// Times from noise to data: strictly decreasing, from at most 1 to exactly 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule(Vec<f64>);

impl Schedule {
    /// `n` steps from 1 to 0: linear `1, 1 − 1/n, …, 1/n`, bent, stretched and spaced as `grid` says, then 0.
    ///
    /// Source: `FluxPipeline` with `FlowMatchEulerDiscreteScheduler` of diffusers 0.42.
    ///
    /// # Errors
    /// When `n` is not within 1…1000, the shift is not positive, or times would not fall.
    pub fn new(n: usize, grid: impl Into<Grid>) -> Result<Self, ScheduleError> {
        Self::with_short_end(n, grid, n, 0)
    }

    /// The first `kept` times of [`Schedule::new`], then `rest` steps to 0 in place of the others,
    /// as even in linear time as those were.
    ///
    /// # Errors
    /// As [`Schedule::new`], when no step would be left to reach 0, and when the grid's spacing leaves no
    /// linear time to divide.
    pub fn with_short_end(
        n: usize,
        grid: impl Into<Grid>,
        kept: usize,
        rest: usize,
    ) -> Result<Self, ScheduleError> {
        if !(1..=1000).contains(&n) || kept > n || (kept < n && rest == 0) {
            return Err(ScheduleError::Steps(n));
        }
        let Grid { shift, top, terminal, spacing } = grid.into();
        let factor = shift.factor();
        if !(factor.is_finite() && factor > 0.0) {
            return Err(ScheduleError::Shift(factor));
        }
        if kept < n && (terminal.is_some() || spacing != Spacing::Shifted) {
            return Err(ScheduleError::Unsupported {
                field: "grid",
                value: spacing.field().unwrap_or("shift_terminal").to_owned(),
                supported: "only an evenly spaced one has a short end",
            });
        }
        let bend = |sigma: f64| factor * sigma / (1.0 + (factor - 1.0) * sigma);
        let linear = |i: usize, n: usize| (n - i) as f64 / n as f64;
        let mut times: Vec<f64> = (0..kept).map(|i| bend(top * linear(i, n))).collect();
        if let Some(terminal) = terminal {
            spacing::stretch(&mut times, terminal)?;
        }
        spacing.apply(&mut times);
        let left = top * linear(kept, n);
        times.extend((0..rest).map(|i| bend(left * linear(i, rest))));
        times.push(0.0);
        if times.windows(2).all(|pair| pair[0] > pair[1]) {
            return Ok(Self(times));
        }
        Err(ScheduleError::Invalid {
            field: "grid",
            value: format!("of {n} steps"),
            expected: "times that fall; take fewer steps or another scheduler_config.json",
        })
    }

    /// What is left of it after `k` steps, at most n − 1: it begins below 1.
    #[must_use]
    pub fn after(&self, k: usize) -> Self {
        Self(self.0[k.min(self.n_steps() - 1)..].to_vec())
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config(text: &str) -> SchedulerConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn flux_mu_follows_the_published_table() {
        let config = config(r#"{"use_dynamic_shifting": true, "shift": 3.0}"#);
        for (tokens, mu) in [(256, 0.5), (1024, 0.63), (2304, 0.8467), (4096, 1.15), (8192, 1.8433)]
        {
            let Shift::Mu(found) = config.grid(tokens).shift else { panic!("static shift") };
            assert!((found - mu).abs() < 1e-4, "{tokens}: {found}");
        }
    }

    #[test]
    fn a_static_shift_ignores_the_size() {
        let config = config(r#"{"shift": 3.0}"#);
        assert_eq!(config.grid(4096), Shift::Factor(3.0).into());
        let schedule = Schedule::new(2, config.grid(16)).unwrap();
        assert_eq!(schedule.times(), [1.0, 0.75, 0.0]);
    }

    /// `tests/fixtures/schedules/configs.json`, which diffusers wrote.
    #[test]
    fn the_grid_is_the_one_that_the_file_asks_for() {
        #[derive(serde::Deserialize)]
        struct Row {
            config: SchedulerConfig,
            tokens: usize,
            steps: usize,
            sigmas: Vec<f64>,
        }
        let rows = include_str!("../../tests/fixtures/schedules/configs.json");
        let rows: Vec<Row> = serde_json::from_str(rows).unwrap();
        assert!(rows.len() > 10);
        for Row { config, tokens, steps, sigmas } in rows {
            config.validate().unwrap();
            let schedule = Schedule::new(steps, config.grid(tokens)).unwrap();
            assert_eq!(schedule.times().len(), sigmas.len());
            for (found, expected) in schedule.times().iter().zip(&sigmas) {
                assert!((found - expected).abs() < 3e-7, "{config:?}: {schedule:?}, {sigmas:?}");
            }
        }
    }

    #[test]
    fn what_would_change_the_picture_is_refused_by_name() {
        for (text, named) in [
            (
                r#"{"_class_name": "FlowMatchHeunDiscreteScheduler"}"#,
                "FlowMatchHeunDiscreteScheduler",
            ),
            (r#"{"_class_name": "DPMSolverMultistepScheduler"}"#, "use_flow_sigmas"),
            (r#"{"stochastic_sampling": true}"#, "stochastic_sampling"),
            (r#"{"invert_sigmas": true}"#, "invert_sigmas"),
            (r#"{"use_karras_sigmas": true, "use_beta_sigmas": true}"#, "use_karras_sigmas"),
            (r#"{"num_train_timesteps": 500}"#, "num_train_timesteps"),
            (r#"{"time_shift_type": "cubic"}"#, "time_shift_type"),
            (r#"{"shift_terminal": 1.0}"#, "shift_terminal"),
            (r#"{"shift": 0}"#, "shift"),
            (r#"{"use_dynamic_shifting": true, "max_image_seq_len": 256}"#, "max_image_seq_len"),
        ] {
            let message = config(text).validate().unwrap_err().to_string();
            assert!(message.contains(named), "{text}: {message}");
        }
        config(r#"{"max_image_seq_len": 1, "base_shift": 9, "beta_end": 0.02}"#)
            .validate()
            .unwrap();
        let stretched = config(r#"{"shift_terminal": 0.1, "use_dynamic_shifting": true}"#);
        let message = Schedule::new(1, stretched.grid(64)).unwrap_err().to_string();
        assert!(message.contains("shift_terminal"), "{message}");
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
        let karras = Grid { spacing: Spacing::Karras, ..shift.into() };
        let message = Schedule::with_short_end(25, karras, 4, 3).unwrap_err().to_string();
        assert!(message.contains("use_karras_sigmas"), "{message}");
    }

    proptest! {
        #[test]
        fn times_fall_strictly_from_one_to_zero(
            n in 1usize..200, factor in 0.05f64..20.0, spacing in 0usize..4
        ) {
            use Spacing::{Beta, Exponential, Karras, Shifted};
            let spacing = [Shifted, Karras, Exponential, Beta][spacing];
            let grid = Grid { spacing, ..Shift::Factor(factor).into() };
            let schedule = Schedule::new(n, grid).unwrap();
            let times = schedule.times();
            prop_assert!((times[0] - 1.0).abs() < 1e-12);
            prop_assert_eq!(times[n], 0.0);
            prop_assert!(times.windows(2).all(|pair| pair[0] > pair[1]));
        }
    }
}
