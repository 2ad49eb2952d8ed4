//! Solvers as tables of numbers.
//!
//! Every step used here is affine in the state, the velocity and what the previous step left behind,
//! with coefficients that depend on the schedule alone. [`plan`] computes them in f64 ahead of time;
//! a program applies them to its own tensors with [`Step::terms`] or to buffers with [`Step::apply`].

use crate::path;
use crate::schedule::Schedule;

/// The methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Solver {
    /// First order, also known as DDIM; one network call a step.
    Euler,
    /// Second order by a corrector; two calls a step, one in the last.
    Heun,
    /// DPM-Solver++ 2M (Lu et al. 2022) with the half-logSNR λ = log((1 − t)/t); one call a step.
    Dpmpp2m,
}

/// The name a person types and a file records.
pub const SOLVERS: [(&str, Solver); 3] =
    [("dpmpp-2m", Solver::Dpmpp2m), ("euler", Solver::Euler), ("heun", Solver::Heun)];

/// What programs sample with unless told otherwise (paper Table 1).
pub const DEFAULT_SOLVER: Solver = Solver::Dpmpp2m;
/// Steps T of [`DEFAULT_SOLVER`] (paper Table 1).
pub const DEFAULT_STEPS: usize = 8;

impl Solver {
    /// The solver called `name` in [`SOLVERS`].
    pub fn by_name(name: &str) -> Option<Self> {
        SOLVERS.iter().find(|(known, _)| *known == name).map(|&(_, solver)| solver)
    }

    /// Its name in [`SOLVERS`].
    pub fn name(self) -> &'static str {
        SOLVERS.iter().find(|(_, solver)| *solver == self).expect("every solver is listed").0
    }
}

/// One network call and the update that follows it:
/// `x ← x·x_t + v·v_t + v_prev·v_{prev} + x0_prev·x0_{prev} + noise·N(0, I)`, where `prev` is the call
/// before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// Time at which the network is called.
    pub t: f64,
    /// Time of the state after the update.
    pub t_next: f64,
    /// Coefficient of the state.
    pub x: f64,
    /// Coefficient of the velocity just computed.
    pub v: f64,
    /// Coefficient of the velocity of the previous call.
    pub v_prev: f64,
    /// Coefficient of the data prediction of the previous call.
    pub x0_prev: f64,
    /// Standard deviation of the noise that a stochastic step adds; 0 in every plan of an ODE.
    pub noise: f64,
}

/// What a step leaves to the next.
#[derive(Clone, Debug)]
pub struct History<T> {
    /// Velocity v of the previous call.
    pub v: T,
    /// Its data prediction `x_t − t·v`.
    pub x0: T,
}

/// What a step adds up, in this order, so that every program rounds alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// The state.
    X,
    /// The velocity just computed.
    V,
    /// The velocity of the previous call.
    VPrev,
    /// The data prediction of the previous call.
    X0Prev,
}

impl Step {
    /// The terms with a coefficient other than zero, noise left out.
    pub fn terms(&self) -> impl Iterator<Item = (Term, f64)> {
        [
            (Term::X, self.x),
            (Term::V, self.v),
            (Term::VPrev, self.v_prev),
            (Term::X0Prev, self.x0_prev),
        ]
        .into_iter()
        .filter(|&(_, coefficient)| coefficient != 0.0)
    }

    /// The next state without noise, and the history for the step after. All buffers are equally long; a step that
    /// uses history must get one.
    pub fn apply(
        &self,
        x_t: &[f32],
        v_t: Vec<f32>,
        history: Option<&History<Vec<f32>>>,
    ) -> (Vec<f32>, History<Vec<f32>>) {
        let mut next = vec![0.0f32; x_t.len()];
        for (term, coefficient) in self.terms() {
            let source = match (term, history) {
                (Term::X, _) => x_t,
                (Term::V, _) => &v_t,
                (Term::VPrev, Some(past)) => &past.v,
                (Term::X0Prev, Some(past)) => &past.x0,
                _ => panic!("a step from t = {} needs the step before it", self.t),
            };
            let coefficient = coefficient as f32;
            next.iter_mut().zip(source).for_each(|(sum, value)| *sum += coefficient * value);
        }
        let [of_x, of_v] = path::x0_from_v(self.t).map(|c| c as f32);
        let x0 = x_t.iter().zip(&v_t).map(|(x, v)| of_x * x + of_v * v).collect();
        (next, History { v: v_t, x0 })
    }
}

/// The table of `solver` on `schedule`: one [`Step`] a network call.
pub fn plan(solver: Solver, schedule: &Schedule) -> Vec<Step> {
    let times = schedule.times();
    let mut steps = Vec::with_capacity(times.len());
    for (index, pair) in times.windows(2).enumerate() {
        let (t, t_next) = (pair[0], pair[1]);
        match solver {
            Solver::Euler => steps.push(euler(t, t_next)),
            Solver::Heun => steps.extend(heun(t, t_next)),
            Solver::Dpmpp2m => {
                let t_prev = index.checked_sub(1).map(|before| times[before]);
                steps.push(dpmpp_2m(t_prev, t, t_next));
            }
        }
    }
    steps
}

/// `x_next = x + (t_next − t)·v` (paper Eq. 2), the one-step transition that training differentiates.
pub fn euler(t: f64, t_next: f64) -> Step {
    Step { t, t_next, x: 1.0, v: t_next - t, ..Step::default() }
}

/// Predictor by Euler, corrector by the mean of both velocities; the step to t = 0 is Euler, since the
/// network is not trained there.
fn heun(t: f64, t_next: f64) -> Vec<Step> {
    let predictor = euler(t, t_next);
    if t_next == 0.0 {
        return vec![predictor];
    }
    let half = (t_next - t) / 2.0;
    let corrector =
        Step { t: t_next, t_next, x: 1.0, v: half, v_prev: half - (t_next - t), ..Step::default() };
    vec![predictor, corrector]
}

/// DPM-Solver++ 2M in closed form for flow matching: with r = t_next/t and
/// c = (λ_next − λ)/(2(λ − λ_prev)), `x_next = r·x + (1 − r)·(x0 + c·(x0 − x0_prev))`.
///
/// The first step, the step after a start at t = 1 and the step to t = 0 are of first order (c = 0).
/// Source: `DPMSolverMultistepScheduler` (midpoint, flow sigmas) of diffusers 0.42.
pub(crate) fn dpmpp_2m(t_prev: Option<f64>, t: f64, t_next: f64) -> Step {
    let (r, c) = dpmpp_2m_ratio(t_prev, t, t_next);
    let [of_x, of_v] = path::x0_from_v(t);
    let fresh = (1.0 - r) * (1.0 + c);
    let (x, v, x0_prev) = (r + fresh * of_x, fresh * of_v, -(1.0 - r) * c);
    Step { t, t_next, x, v, x0_prev, ..Step::default() }
}

fn dpmpp_2m_ratio(t_prev: Option<f64>, t: f64, t_next: f64) -> (f64, f64) {
    let r = t_next / t;
    let first_order = t_next == 0.0 || t_prev.is_none_or(|t_prev| t_prev >= 1.0);
    let c = match t_prev {
        Some(t_prev) if !first_order => {
            let lambda = path::log_snr(t);
            (path::log_snr(t_next) - lambda) / (2.0 * (lambda - path::log_snr(t_prev)))
        }
        _ => 0.0,
    };
    (r, c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::schedule::Shift;

    /// Exact velocity for data N(mean, std²).
    fn gaussian_velocity(x: f64, t: f64, mean: f64, std: f64) -> f64 {
        let variance = (1.0 - t).powi(2) * std * std + t * t;
        (t - (1.0 - t) * std * std) / variance * (x - (1.0 - t) * mean) - mean
    }

    fn solve(steps: &[Step], x: f64, velocity: impl Fn(f64, f64) -> f64) -> f64 {
        let (mut x, mut past): (f64, Option<(f64, f64)>) = (x, None);
        for step in steps {
            let v = velocity(x, step.t);
            let (v_prev, x0_prev) = past.unwrap_or_default();
            let [a, b] = path::x0_from_v(step.t);
            past = Some((v, a * x + b * v));
            x = step.x * x + step.v * v + step.v_prev * v_prev + step.x0_prev * x0_prev;
        }
        x
    }

    #[test]
    fn closed_form_gives_the_golden_coefficients() {
        let golden: [&[(f64, f64)]; 2] = [
            &[(0.904531, 0.0), (0.839674, 0.0), (0.675229, 0.5), (0.0, 0.0)],
            &[
                (0.956724, 0.0),
                (0.945446, 0.0),
                (0.929044, 0.34686),
                (0.903804, 0.434533),
                (0.861827, 0.5),
                (0.783486, 0.57533),
                (0.606229, 0.720753),
                (0.0, 0.0),
            ],
        ];
        for pairs in golden {
            let schedule = Schedule::new(pairs.len(), Shift::Mu(1.15)).unwrap();
            let times = schedule.times();
            for (i, &(r, c)) in pairs.iter().enumerate() {
                let before = i.checked_sub(1).map(|b| times[b]);
                let found = dpmpp_2m_ratio(before, times[i], times[i + 1]);
                assert!((found.0 - r).abs() < 1e-6 && (found.1 - c).abs() < 1e-6, "{i}: {found:?}");
            }
        }
    }

    #[test]
    fn scalar_oracle_of_the_golden_table() {
        let velocity = |x: f64, t: f64| gaussian_velocity(x, t, 0.5, 0.2);
        let end = |solver, n| {
            let schedule = Schedule::new(n, Shift::Mu(1.15)).unwrap();
            solve(&plan(solver, &schedule), 1.0, velocity)
        };
        for (solver, n, expected) in [
            (Solver::Euler, 4, 0.536_999),
            (Solver::Dpmpp2m, 4, 0.537_096),
            (Solver::Euler, 8, 0.578_543),
            (Solver::Dpmpp2m, 8, 0.579_862),
        ] {
            assert!((end(solver, n) - expected).abs() < 1e-6, "{solver:?} {n}: {}", end(solver, n));
        }
    }

    /// Slope of log error against log n between n and 2n, on the interval [0.1, 0.9] where the method
    /// has its full order (the ends of a whole plan are of first order by construction).
    fn order(solver: Solver, n: usize) -> f64 {
        let velocity = |x: f64, t: f64| gaussian_velocity(x, t, 0.5, 0.2);
        let error = |n: usize| {
            let times: Vec<f64> = (0..=n).map(|i| 0.9 - 0.8 * i as f64 / n as f64).collect();
            let exact = {
                let std = |t: f64| ((1.0 - t).powi(2) * 0.04 + t * t).sqrt();
                0.9 * 0.5 + (1.0 - 0.1 * 0.5) * std(0.1) / std(0.9)
            };
            let mut steps = Vec::new();
            for i in 0..n {
                let before = i.checked_sub(1).map(|b| times[b]);
                match solver {
                    Solver::Euler => steps.push(euler(times[i], times[i + 1])),
                    Solver::Heun => steps.extend(heun(times[i], times[i + 1])),
                    Solver::Dpmpp2m => steps.push(dpmpp_2m(before, times[i], times[i + 1])),
                }
            }
            (solve(&steps, 1.0, velocity) - exact).abs()
        };
        (error(n) / error(2 * n)).log2()
    }

    #[test]
    fn each_method_has_its_order() {
        for (solver, expected) in
            [(Solver::Euler, 1.0), (Solver::Heun, 2.0), (Solver::Dpmpp2m, 2.0)]
        {
            let slope = order(solver, 256);
            assert!((slope - expected).abs() < 0.1, "{solver:?}: {slope}");
        }
    }

    #[test]
    fn buffers_and_scalars_agree() {
        let schedule = Schedule::new(6, Shift::Factor(3.0)).unwrap();
        let velocity = |x: f64, t: f64| gaussian_velocity(x, t, -0.3, 0.5);
        for (_, solver) in SOLVERS {
            let steps = plan(solver, &schedule);
            let (mut x, mut history) = (vec![0.7f32], None);
            for step in &steps {
                let v = vec![velocity(f64::from(x[0]), step.t) as f32];
                let (next, left) = step.apply(&x, v, history.as_ref());
                (x, history) = (next, Some(left));
            }
            assert!((f64::from(x[0]) - solve(&steps, 0.7, velocity)).abs() < 1e-5, "{solver:?}");
        }
    }

    #[test]
    fn names_are_read_back() {
        for (name, solver) in SOLVERS {
            assert_eq!(Solver::by_name(name), Some(solver));
            assert_eq!(solver.name(), name);
        }
        assert_eq!(Solver::by_name("ddim2"), None);
    }

    proptest! {
        /// A network that always answers v keeps to the straight line, whatever the method.
        #[test]
        fn a_constant_velocity_is_integrated_exactly(
            n in 1usize..40, factor in 0.2f64..8.0, x0 in -2.0f64..2.0, eps in -2.0f64..2.0,
        ) {
            let schedule = Schedule::new(n, Shift::Factor(factor)).unwrap();
            for (_, solver) in SOLVERS {
                let steps = plan(solver, &schedule);
                let end = solve(&steps, eps, |_, _| eps - x0);
                prop_assert!((end - x0).abs() < 1e-9);
                prop_assert_eq!(steps.last().unwrap().t_next, 0.0);
            }
        }
    }
}
