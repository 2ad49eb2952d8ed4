//! How times lie between the first and the last, where a scheduler changes it.
//!
//! Source: `FlowMatchEulerDiscreteScheduler` of diffusers 0.42: its `_convert_to_*` methods, with the
//! constants they have there, and `stretch_shift_to_terminal`.

use statrs::function::beta::beta_reg;

use super::ScheduleError;

/// Spacing of n times between the first and last bent ones, both of which stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// That of the bent grid.
    Shifted,
    /// Even in `σ^(1/7)`. Source: Karras et al., arXiv:2206.00364, Eq. 5.
    Karras,
    /// Even in `ln σ`.
    Exponential,
    /// Quantiles of a Beta(0.6, 0.6) distribution. Source: arXiv:2407.12173.
    Beta,
}

/// ρ of Karras' spacing.
const RHO: f64 = 7.0;
/// Both parameters of the Beta distribution.
const BETA: f64 = 0.6;

impl Spacing {
    /// The entry of scheduler_config.json that asks for it.
    pub fn field(self) -> Option<&'static str> {
        match self {
            Self::Shifted => None,
            Self::Karras => Some("use_karras_sigmas"),
            Self::Exponential => Some("use_exponential_sigmas"),
            Self::Beta => Some("use_beta_sigmas"),
        }
    }

    /// Moves the times between the first and the last of `times`.
    pub(super) fn apply(self, times: &mut [f64]) {
        let (Some(&first), Some(&last)) = (times.first(), times.last()) else { return };
        let steps = (times.len() - 1).max(1) as f64;
        let between = |share: f64| match self {
            Self::Shifted => None,
            Self::Karras => {
                let (from, to) = (first.powf(1.0 / RHO), last.powf(1.0 / RHO));
                Some((from + share * (to - from)).powf(RHO))
            }
            Self::Exponential => Some((first.ln() + share * (last.ln() - first.ln())).exp()),
            Self::Beta => Some(last + beta_quantile(1.0 - share) * (first - last)),
        };
        for (i, time) in times.iter_mut().enumerate() {
            *time = between(i as f64 / steps).unwrap_or(*time);
        }
    }
}

/// Stretches falling `times` so that the last is `terminal` and 1 stays where it is.
pub(super) fn stretch(times: &mut [f64], terminal: f64) -> Result<(), ScheduleError> {
    let last = times.last().copied().unwrap_or(1.0);
    if last >= 1.0 {
        return Err(ScheduleError::Invalid {
            field: "shift_terminal",
            value: terminal.to_string(),
            expected: "with it a grid needs two steps or more",
        });
    }
    let scale = (1.0 - last) / (1.0 - terminal);
    for time in times {
        *time = 1.0 - (1.0 - *time) / scale;
    }
    Ok(())
}

/// x with `P(X ≤ x) = p` for X of Beta(0.6, 0.6), by bisection down to the numbers' own spacing.
fn beta_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    if p <= low || p >= high {
        return p;
    }
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return middle;
        }
        if beta_reg(BETA, BETA, middle) < p { low = middle } else { high = middle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.stats.beta.ppf(p, 0.6, 0.6)`.
    #[test]
    fn quantiles_are_those_of_scipy() {
        for (p, expected) in QUANTILES {
            assert!((beta_quantile(p) - expected).abs() < 1e-9, "{p}: {}", beta_quantile(p));
        }
        assert_eq!((beta_quantile(0.0), beta_quantile(1.0)), (0.0, 1.0));
    }

    const QUANTILES: [(f64, f64); 4] = [
        (0.001, 1.855873851745199e-5),
        (0.1, 0.03958440558878085),
        (2.0 / 3.0, 0.7245867092223766),
        (0.999, 0.9999814412614826),
    ];
}
