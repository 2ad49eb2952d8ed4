//! Steps that add noise, so that a transition has a probability: what GRPO on flows trains with.
//!
//! With g the diffusion coefficient and dt = t_next − t < 0, the reverse SDE that keeps the path's
//! marginals (Flow-GRPO Eq. 9, DanceGRPO Eq. 7) is stepped by Euler–Maruyama:
//!
//! ```text
//! mean = x·(1 + g²·dt/(2t)) + v·(1 + g²·(1 − t)/(2t))·dt,   std = g·√(−dt)
//! ```

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::path;
use crate::schedule::Schedule;
use crate::solver::{Step, dpmpp_2m, euler};

/// Where noise comes from, with its level a.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sde {
    /// g = a, as DanceGRPO has it.
    Constant,
    /// g = a·√(t/(1 − t)), as Flow-GRPO has it; at t = 1 the next time stands in under the root.
    Flow,
    /// Flow-CPS: std = t_next·sin(a·π/2), and as much less of the predicted noise, so that the noise in
    /// x_t stays t. Source: arXiv 2509.05952.
    Cps,
}

impl Sde {
    /// The step from `t` to `t_next` at level `a`; `t_second` is the schedule's time after 1.
    pub fn step(self, a: f64, t: f64, t_next: f64, t_second: f64) -> Step {
        match self {
            Self::Constant => euler_maruyama(a, t, t_next),
            Self::Flow => {
                let under = if t >= 1.0 { t_second } else { t };
                euler_maruyama(a * (t / (1.0 - under)).sqrt(), t, t_next)
            }
            Self::Cps => {
                let noise = t_next * (a * std::f64::consts::FRAC_PI_2).sin();
                let kept = (t_next * t_next - noise * noise).max(0.0).sqrt();
                let ([x0_x, x0_v], [eps_x, eps_v]) = (path::x0_from_v(t), path::eps_from_v(t));
                let (x, v) =
                    ((1.0 - t_next) * x0_x + kept * eps_x, (1.0 - t_next) * x0_v + kept * eps_v);
                Step { t, t_next, x, v, noise, ..Step::default() }
            }
        }
    }

    /// The factor κ of a log-probability a dimension, `−κ·(x_next − mean)²` up to a constant: 1/(2·std²);
    /// 1 for Flow-CPS, whose definition drops it.
    pub fn precision(self, step: &Step) -> f64 {
        match self {
            Self::Cps => 1.0,
            Self::Constant | Self::Flow => 0.5 / (step.noise * step.noise),
        }
    }
}

fn euler_maruyama(g: f64, t: f64, t_next: f64) -> Step {
    let dt = t_next - t;
    let drift = g * g / (2.0 * t);
    let (x, v) = (1.0 + drift * dt, (1.0 + drift * (1.0 - t)) * dt);
    Step { t, t_next, x, v, noise: g * (-dt).sqrt(), ..Step::default() }
}

/// SDE steps at the indices `window`, ODE steps elsewhere: Euler, or DPM-Solver++ 2M for those after the
/// window where `high_order_after`.
///
/// The step to t = 0 is always the ODE's: noise there would only blur the image.
pub fn plan(
    schedule: &Schedule,
    (sde, a): (Sde, f64),
    window: &Range<usize>,
    high_order_after: bool,
) -> Vec<Step> {
    let times = schedule.times();
    let pairs = times.windows(2).enumerate();
    pairs
        .map(|(index, pair)| {
            let (t, t_next) = (pair[0], pair[1]);
            if t_next > 0.0 && window.contains(&index) {
                sde.step(a, t, t_next, times[1])
            } else if high_order_after && index >= window.end {
                dpmpp_2m(index.checked_sub(1).map(|before| times[before]), t, t_next)
            } else {
                euler(t, t_next)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schedule::Shift;
    use crate::solver::{self, Solver};

    const ALL: [Sde; 3] = [Sde::Constant, Sde::Flow, Sde::Cps];

    /// Mean and standard deviation at t = 0 for data N(0.5, 0.2²), carried exactly: on it the velocity
    /// is affine in x.
    fn moments(steps: &[Step]) -> [f64; 2] {
        let (m, s) = (0.5, 0.2);
        let (mut mean, mut variance) = (0.0, 1.0);
        for step in steps {
            let t = step.t;
            let slope = (t - (1.0 - t) * s * s) / ((1.0 - t).powi(2) * s * s + t * t);
            let v = slope * (mean - (1.0 - t) * m) - m;
            mean = step.x * mean + step.v * v;
            variance = (step.x + step.v * slope).powi(2) * variance + step.noise.powi(2);
        }
        [mean, variance.sqrt()]
    }

    #[test]
    fn noise_keeps_the_distribution() {
        for sde in [Sde::Constant, Sde::Flow] {
            for a in [0.1, 0.3, 0.7, 1.0] {
                let error = |n: usize| {
                    let schedule = Schedule::new(n, Shift::Factor(1.0)).unwrap();
                    let [mean, std] = moments(&plan(&schedule, (sde, a), &(0..n), false));
                    (mean - 0.5).abs() + (std - 0.2).abs()
                };
                let (coarse, fine) = (error(320), error(1000));
                assert!(coarse < 5e-3, "{sde:?} {a}: {coarse}");
                assert!(fine < 0.5 * coarse || fine < 1e-4, "{sde:?} {a}: {coarse} {fine}");
            }
        }
    }

    /// Numbers of `fixtures/sde/make.py`, which writes the steps as their authors do: a score, a drift,
    /// a Gaussian.
    #[test]
    fn steps_are_those_of_the_papers() {
        #[derive(serde::Deserialize)]
        struct Case {
            sde: Sde,
            a: f64,
            t: f64,
            t_next: f64,
            t_second: f64,
            x: Vec<f64>,
            v: Vec<f64>,
            mean: Vec<f64>,
            std: f64,
            v_other: Vec<f64>,
            eps: Vec<f64>,
            log_ratio: f64,
        }
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("fixtures/sde/case.json")).unwrap();
        assert!(ALL.iter().all(|sde| cases.iter().filter(|case| case.sde == *sde).count() > 2));
        for case in cases {
            let step = case.sde.step(case.a, case.t, case.t_next, case.t_second);
            let mean = |v: &[f64]| -> Vec<f64> {
                case.x.iter().zip(v).map(|(x, v)| step.x * x + step.v * v).collect()
            };
            let (old, other) = (mean(&case.v), mean(&case.v_other));
            for (found, expected) in old.iter().zip(&case.mean) {
                assert!((found - expected).abs() < 1e-12, "{:?} at {}", case.sde, case.t);
            }
            assert!((step.noise - case.std).abs() < 1e-12, "{:?} at {}", case.sde, case.t);
            let log_prob = |mean: &[f64]| {
                let square = |((old, mean), eps): ((&f64, &f64), &f64)| {
                    (old + case.std * eps - mean).powi(2)
                };
                let sum: f64 = old.iter().zip(mean).zip(&case.eps).map(square).sum();
                -case.sde.precision(&step) * sum / mean.len() as f64
            };
            let log_ratio = log_prob(&other) - log_prob(&old);
            assert!((log_ratio - case.log_ratio).abs() < 1e-9, "{:?} at {}", case.sde, case.t);
        }
    }

    #[test]
    fn a_window_is_noisy_and_the_rest_is_the_ode() {
        let schedule = Schedule::new(8, Shift::Factor(3.0)).unwrap();
        let ode = solver::plan(Solver::Euler, &schedule);
        let steps = plan(&schedule, (Sde::Flow, 0.7), &(2..5), false);
        for (index, (step, ode)) in steps.iter().zip(&ode).enumerate() {
            assert_eq!(step.noise > 0.0, (2..5).contains(&index), "{index}");
            assert!(step.noise > 0.0 || step == ode, "{index}");
        }
        let fast = plan(&schedule, (Sde::Flow, 0.7), &(2..5), true);
        assert_eq!(fast[..5], steps[..5]);
        assert_eq!(fast[5..], solver::plan(Solver::Dpmpp2m, &schedule)[5..]);
        assert!(fast[5].x0_prev != 0.0);
        let whole = plan(&schedule, (Sde::Constant, 0.3), &(0..8), false);
        assert_eq!(whole[7], ode[7]);
    }

    proptest! {
        #[test]
        fn without_noise_every_step_is_the_odes(
            t in 0.01f64..1.0, part in 0.0f64..0.99, t_second in 0.5f64..0.99,
        ) {
            let t_next = t * part;
            for sde in ALL {
                let (step, ode) = (sde.step(0.0, t, t_next, t_second), euler(t, t_next));
                prop_assert!((step.x - ode.x).abs() < 1e-12 && (step.v - ode.v).abs() < 1e-12);
                prop_assert_eq!(step.noise, 0.0);
            }
        }

        /// With the true data and noise predicted, Flow-CPS leaves 1 − t of the data and t of the noise.
        #[test]
        fn cps_preserves_the_coefficients(
            t in 0.1f64..1.0, part in 0.1f64..0.99, a in 0.0f64..1.0,
        ) {
            let t_next = t * part;
            let step = Sde::Cps.step(a, t, t_next, 0.9);
            // x = (1 − t)·x0 + t·eps, v = eps − x0.
            let of_x0 = step.x * (1.0 - t) - step.v;
            let of_eps = step.x * t + step.v;
            prop_assert!((of_x0 - (1.0 - t_next)).abs() < 1e-9);
            prop_assert!((of_eps.hypot(step.noise) - t_next).abs() < 1e-9);
        }
    }
}
