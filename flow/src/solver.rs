//! Solvers as tables of numbers.
//!
//! Every step used here is affine in the state, the velocity and what the previous step left behind,
//! with coefficients that depend on the schedule alone. [`plan`] computes them in f64 ahead of time;
//! a program applies them to its own tensors with [`Step::terms`] or to buffers with [`Walk`].

use crate::path;
use crate::schedule::Schedule;

mod unipc;

/// The methods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Solver {
    /// First order, also known as DDIM; one network call a step.
    Euler,
    /// Second order by a corrector; two calls a step, one in the last.
    Heun,
    /// DPM-Solver++ 2M (Lu et al. 2022) with the half-logSNR λ = log((1 − t)/t); one call a step.
    Dpmpp2m,
    /// The same with λ = −log t, as k-diffusion, ComfyUI and stable-diffusion.cpp have it.
    Dpmpp2mK,
    /// UniPC (Zhao et al. 2023) with a predictor of order 2 and a corrector of order 3,
    /// B(h) = e^h − 1; one call a step.
    UniPc,
}

/// The name a person types and a file records.
pub const SOLVERS: [(&str, Solver); 5] = [
    ("dpmpp-2m", Solver::Dpmpp2m),
    ("dpmpp-2m-k", Solver::Dpmpp2mK),
    ("euler", Solver::Euler),
    ("heun", Solver::Heun),
    ("unipc", Solver::UniPc),
];

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
/// `x ← x·x_t + v·v_t + v_prev·v_{prev} + x0_prev·x0_{prev} + x0_prev2·x0_{prev2} + noise·N(0, I)`,
/// where `prev` is the call before and `prev2` the one before that.
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
    /// Coefficient of the data prediction of the call before that.
    pub x0_prev2: f64,
    /// Standard deviation of the noise that a stochastic step adds; 0 in every plan of an ODE.
    pub noise: f64,
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
    /// The data prediction of the call before that.
    X0Prev2,
}

impl Step {
    /// The terms with a coefficient other than zero, noise left out.
    pub fn terms(&self) -> impl Iterator<Item = (Term, f64)> {
        [
            (Term::X, self.x),
            (Term::V, self.v),
            (Term::VPrev, self.v_prev),
            (Term::X0Prev, self.x0_prev),
            (Term::X0Prev2, self.x0_prev2),
        ]
        .into_iter()
        .filter(|&(_, coefficient)| coefficient != 0.0)
    }
}

/// A state in buffers on its way from noise to data, and what the calls before left. Nothing is
/// allocated after the first two steps.
#[derive(Clone, Debug)]
pub struct Walk {
    x: Vec<f32>,
    next: Vec<f32>,
    /// Of the call before.
    v: Vec<f32>,
    /// Of the call before.
    x0: Vec<f32>,
    /// Of the call before that.
    x0_prev: Vec<f32>,
}

impl Walk {
    /// Starts at `x`.
    pub fn new(x: Vec<f32>) -> Self {
        let next = vec![0.0; x.len()];
        Self { x, next, v: Vec::new(), x0: Vec::new(), x0_prev: Vec::new() }
    }

    /// The state.
    pub fn x(&self) -> &[f32] {
        &self.x
    }

    /// The data prediction of the last call; empty before the first.
    pub fn x0(&self) -> &[f32] {
        &self.x0
    }

    /// The state, at the end.
    pub fn into_x(self) -> Vec<f32> {
        self.x
    }

    /// Takes `step` with the velocity `v` of its call, as long as the state; noise is left out.
    ///
    /// # Panics
    /// When the step needs a call that there was not.
    pub fn advance(&mut self, step: &Step, v: &[f32]) {
        self.next.fill(0.0);
        for (term, coefficient) in step.terms() {
            let source: &[f32] = match term {
                Term::X => &self.x,
                Term::V => v,
                Term::VPrev => &self.v,
                Term::X0Prev => &self.x0,
                Term::X0Prev2 => &self.x0_prev,
            };
            assert_eq!(source.len(), self.next.len(), "the step from t = {} needs more", step.t);
            let coefficient = coefficient as f32;
            self.next.iter_mut().zip(source).for_each(|(sum, value)| *sum += coefficient * value);
        }
        let [of_x, of_v] = path::x0_from_v(step.t).map(|c| c as f32);
        std::mem::swap(&mut self.x0, &mut self.x0_prev);
        self.x0.clear();
        self.x0.extend(self.x.iter().zip(v).map(|(x, v)| of_x * x + of_v * v));
        self.v.clear();
        self.v.extend_from_slice(v);
        std::mem::swap(&mut self.x, &mut self.next);
    }
}

/// The table of `solver` on `schedule`: one [`Step`] a network call.
pub fn plan(solver: Solver, schedule: &Schedule) -> Vec<Step> {
    let times = schedule.times();
    let mut steps = Vec::with_capacity(times.len());
    for (index, pair) in times.windows(2).enumerate() {
        let (t, t_next) = (pair[0], pair[1]);
        let before = |n: usize| index.checked_sub(n).map(|at| times[at]);
        match solver {
            Solver::Euler => steps.push(euler(t, t_next)),
            Solver::Heun => steps.extend(heun(t, t_next)),
            Solver::Dpmpp2m => steps.push(dpmpp_2m(before(1), t, t_next)),
            Solver::Dpmpp2mK => steps.push(dpmpp_2m_k(before(1), t, t_next)),
            Solver::UniPc => steps.push(unipc_2([before(2), before(1)], t, t_next)),
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
    // λ of a start at t = 1 is infinite, and the step after it is of first order.
    multistep(t, t_next, dpmpp_2m_ratio(t_prev.filter(|&t| t < 1.0), t, t_next, path::log_snr))
}

/// The same with λ = −log t, which is finite at t = 1. Source: `sample_dpmpp_2m` of k-diffusion.
fn dpmpp_2m_k(t_prev: Option<f64>, t: f64, t_next: f64) -> Step {
    multistep(t, t_next, dpmpp_2m_ratio(t_prev, t, t_next, |t| -t.ln()))
}

/// UniPC as a sum of the state and of the last three data predictions.
fn unipc_2(before: [Option<f64>; 2], t: f64, t_next: f64) -> Step {
    let [x, x0, x0_prev, x0_prev2] = unipc::weights(before, t, t_next);
    let [of_x, of_v] = path::x0_from_v(t);
    Step { t, t_next, x: x + x0 * of_x, v: x0 * of_v, x0_prev, x0_prev2, ..Step::default() }
}

fn multistep(t: f64, t_next: f64, (r, c): (f64, f64)) -> Step {
    let [of_x, of_v] = path::x0_from_v(t);
    let fresh = (1.0 - r) * (1.0 + c);
    let (x, v, x0_prev) = (r + fresh * of_x, fresh * of_v, -(1.0 - r) * c);
    Step { t, t_next, x, v, x0_prev, ..Step::default() }
}

/// r and c; c is 0 in the first step and in the step to t = 0.
fn dpmpp_2m_ratio(
    t_prev: Option<f64>,
    t: f64,
    t_next: f64,
    lambda: impl Fn(f64) -> f64,
) -> (f64, f64) {
    let c = match t_prev {
        Some(t_prev) if t_next > 0.0 => {
            (lambda(t_next) - lambda(t)) / (2.0 * (lambda(t) - lambda(t_prev)))
        }
        _ => 0.0,
    };
    (t_next / t, c)
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
        let (mut x, [mut v_prev, mut x0_prev, mut x0_prev2]) = (x, [0.0; 3]);
        for step in steps {
            let v = velocity(x, step.t);
            let [a, b] = path::x0_from_v(step.t);
            let x0 = a * x + b * v;
            x = step.x * x
                + step.v * v
                + step.v_prev * v_prev
                + step.x0_prev * x0_prev
                + step.x0_prev2 * x0_prev2;
            [v_prev, x0_prev, x0_prev2] = [v, x0, x0_prev];
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
                let before = before.filter(|&t| t < 1.0);
                let found = dpmpp_2m_ratio(before, times[i], times[i + 1], path::log_snr);
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
            // UniPCMultistepScheduler of diffusers 0.42.1, and sample_dpmpp_2m of k-diffusion, in f64.
            (Solver::UniPc, 4, 0.537_142_1),
            (Solver::UniPc, 8, 0.580_029_6),
            (Solver::Dpmpp2mK, 4, 0.537_247_0),
            (Solver::Dpmpp2mK, 8, 0.580_437_4),
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
                let before = |n| i.checked_sub(n).map(|b: usize| times[b]);
                let (t, t_next) = (times[i], times[i + 1]);
                match solver {
                    Solver::Euler => steps.push(euler(t, t_next)),
                    Solver::Heun => steps.extend(heun(t, t_next)),
                    Solver::Dpmpp2m => steps.push(dpmpp_2m(before(1), t, t_next)),
                    Solver::Dpmpp2mK => steps.push(dpmpp_2m_k(before(1), t, t_next)),
                    Solver::UniPc => steps.push(unipc_2([before(2), before(1)], t, t_next)),
                }
            }
            (solve(&steps, 1.0, velocity) - exact).abs()
        };
        (error(n) / error(2 * n)).log2()
    }

    #[test]
    fn each_method_has_its_order() {
        for (solver, expected) in [
            (Solver::Euler, 1.0),
            (Solver::Heun, 2.0),
            (Solver::Dpmpp2m, 2.0),
            (Solver::Dpmpp2mK, 2.0),
            (Solver::UniPc, 3.0),
        ] {
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
            let mut walk = Walk::new(vec![0.7f32]);
            for step in &steps {
                let v = [velocity(f64::from(walk.x()[0]), step.t) as f32];
                walk.advance(step, &v);
            }
            assert!(
                (f64::from(walk.x()[0]) - solve(&steps, 0.7, velocity)).abs() < 1e-5,
                "{solver:?}"
            );
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
