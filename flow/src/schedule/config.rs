//! `scheduler/scheduler_config.json`: the grid that it asks for.

use serde::Deserialize;

use super::{Grid, ScheduleError, Shift, Spacing};

/// The scheduler that FLUX samples with.
const EULER: &str = "FlowMatchEulerDiscreteScheduler";
/// A solver that has a grid of flow matching, too.
const MULTISTEP: &str = "DPMSolverMultistepScheduler";
/// Time steps of training; with another number networks would be told another time.
const TRAIN_STEPS: f64 = 1000.0;

/// `scheduler/scheduler_config.json` of a flow-matching pipeline: the entries that a grid depends on.
///
/// What is left out is as in diffusers; entries that it has beside these change no grid.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "they are diffusers' entries")]
pub struct SchedulerConfig {
    #[serde(rename = "_class_name")]
    class: String,
    num_train_timesteps: f64,
    shift: f64,
    use_dynamic_shifting: bool,
    base_shift: f64,
    max_shift: f64,
    base_image_seq_len: usize,
    max_image_seq_len: usize,
    time_shift_type: String,
    shift_terminal: f64,
    use_karras_sigmas: bool,
    use_exponential_sigmas: bool,
    use_beta_sigmas: bool,
    invert_sigmas: bool,
    stochastic_sampling: bool,
    // Of DPMSolverMultistepScheduler.
    use_flow_sigmas: bool,
    flow_shift: f64,
    prediction_type: String,
    final_sigmas_type: String,
    algorithm_type: String,
    use_lu_lambdas: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            class: EULER.into(),
            num_train_timesteps: TRAIN_STEPS,
            shift: 1.0,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            time_shift_type: "exponential".into(),
            shift_terminal: 0.0,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            invert_sigmas: false,
            stochastic_sampling: false,
            use_flow_sigmas: false,
            flow_shift: 1.0,
            prediction_type: "epsilon".into(),
            final_sigmas_type: "zero".into(),
            algorithm_type: "dpmsolver++".into(),
            use_lu_lambdas: false,
        }
    }
}

impl SchedulerConfig {
    /// The scheduler's class in diffusers.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// # Errors
    /// When the file asks for a grid that is not implemented, or its numbers are absurd.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        self.supported()?;
        let factor = if self.is_multistep() { self.flow_shift } else { self.shift };
        if !(factor.is_finite() && factor > 0.0) {
            return Err(ScheduleError::Shift(factor));
        }
        let invalid =
            |field, value: String, expected| Err(ScheduleError::Invalid { field, value, expected });
        if self.use_dynamic_shifting && self.max_image_seq_len <= self.base_image_seq_len {
            let value = self.max_image_seq_len.to_string();
            return invalid("max_image_seq_len", value, "more than base_image_seq_len");
        }
        if !(0.0..1.0).contains(&self.shift_terminal) {
            let value = self.shift_terminal.to_string();
            return invalid("shift_terminal", value, "a time from 0, which is none, to below 1");
        }
        Ok(())
    }

    /// Refuses what would lead to another picture.
    fn supported(&self) -> Result<(), ScheduleError> {
        let multistep = self.is_multistep();
        let asked = self.spacings().count();
        let entry = |text: &str| text.to_owned();
        let unsupported = [
            (
                self.class != EULER && !multistep,
                ("_class_name", entry(&self.class)),
                "FlowMatchEulerDiscreteScheduler is read, and DPMSolverMultistepScheduler with use_flow_sigmas",
            ),
            (
                self.num_train_timesteps != TRAIN_STEPS,
                ("num_train_timesteps", self.num_train_timesteps.to_string()),
                "only 1000 is implemented",
            ),
            (
                !["exponential", "linear"].contains(&&*self.time_shift_type),
                ("time_shift_type", entry(&self.time_shift_type)),
                "only exponential and linear are implemented",
            ),
            (
                asked > 1,
                ("use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas", entry("true")),
                "one of them at most",
            ),
            (
                self.invert_sigmas,
                ("invert_sigmas", entry("true")),
                "time runs from noise to data here",
            ),
            (
                self.stochastic_sampling,
                ("stochastic_sampling", entry("true")),
                "only deterministic sampling is implemented; set it to false",
            ),
            (
                multistep && !(self.use_flow_sigmas && self.prediction_type == "flow_prediction"),
                ("_class_name", entry(&self.class)),
                "it is read with use_flow_sigmas and prediction_type flow_prediction",
            ),
            (
                multistep && asked > 0,
                (self.spacing().field().unwrap_or_default(), entry("true")),
                "DPMSolverMultistepScheduler is read with its grid of flow matching alone",
            ),
            (
                multistep && self.use_lu_lambdas,
                ("use_lu_lambdas", entry("true")),
                "DPMSolverMultistepScheduler is read with its grid of flow matching alone",
            ),
            (
                multistep && self.final_sigmas_type != "zero",
                ("final_sigmas_type", entry(&self.final_sigmas_type)),
                "only zero is implemented",
            ),
            (
                multistep && self.algorithm_type.starts_with("sde"),
                ("algorithm_type", entry(&self.algorithm_type)),
                "only deterministic sampling is implemented",
            ),
        ];
        let first = unsupported.into_iter().find(|(is_asked, ..)| *is_asked);
        first.map_or(Ok(()), |(_, (field, value), supported)| {
            Err(ScheduleError::Unsupported { field, value, supported })
        })
    }

    fn is_multistep(&self) -> bool {
        self.class == MULTISTEP
    }

    fn spacings(&self) -> impl Iterator<Item = Spacing> {
        let asked = [
            (self.use_karras_sigmas, Spacing::Karras),
            (self.use_exponential_sigmas, Spacing::Exponential),
            (self.use_beta_sigmas, Spacing::Beta),
        ];
        asked.into_iter().filter_map(|(is_asked, spacing)| is_asked.then_some(spacing))
    }

    fn spacing(&self) -> Spacing {
        self.spacings().next().unwrap_or(Spacing::Shifted)
    }

    /// The grid for an image of `tokens` packed tokens. Source: `calculate_shift` and the schedulers of
    /// diffusers 0.42. Its DPMSolverMultistepScheduler rounds the times that networks are told down to
    /// 1/1000; here they are told the grid's.
    pub fn grid(&self, tokens: usize) -> Grid {
        let multistep = self.is_multistep();
        let shift = match (self.use_dynamic_shifting, &*self.time_shift_type) {
            (false, _) => Shift::Factor(if multistep { self.flow_shift } else { self.shift }),
            (true, "linear") => Shift::Factor(self.mu(tokens)),
            (true, _) => Shift::Mu(self.mu(tokens)),
        };
        if multistep {
            return Grid { top: 1.0 - 1.0 / TRAIN_STEPS, ..shift.into() };
        }
        let terminal = (self.shift_terminal > 0.0).then_some(self.shift_terminal);
        Grid { terminal, spacing: self.spacing(), ..shift.into() }
    }

    fn mu(&self, tokens: usize) -> f64 {
        let span = self.max_image_seq_len as f64 - self.base_image_seq_len as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        self.base_shift + (tokens as f64 - self.base_image_seq_len as f64) * slope
    }
}
