//! Solving the flow from noise, keeping what training needs.

use flow::latents::LatentSize;
use flow::noise::Noise;
use flow::path;
use flow::solver::{History, Step, Term};
use tch::Tensor;

/// States and velocities along one solve, in f32.
pub(crate) struct Trajectory {
    /// Where each network call happened: time, time after the update, state, velocity.
    pub(crate) calls: Vec<Call>,
    /// The state at t = 0, `[B, S, C]`.
    pub(crate) x0: Tensor,
}

/// One network call.
pub(crate) struct Call {
    pub(crate) t: f64,
    pub(crate) t_next: f64,
    /// State before, `[B, S, C]`.
    pub(crate) x_t: Tensor,
    /// Velocity there, `[B, S, C]`.
    pub(crate) v: Tensor,
}

impl Trajectory {
    /// Indices of the calls that begin a transition (a corrector's call does not), in order.
    pub(crate) fn transitions(&self) -> Vec<usize> {
        (0..self.calls.len()).filter(|&i| self.calls[i].t_next < self.calls[i].t).collect()
    }

    /// The state where the transition that `call` begins ended.
    pub(crate) fn arrived(&self, call: usize) -> &Tensor {
        self.calls[call + 1..]
            .iter()
            .find(|next| next.t_next < next.t)
            .map_or(&self.x0, |next| &next.x_t)
    }
}

/// Applies `plan` from `eps` `[B, S, C]`; `velocity(x_t, t)` is the network.
pub(crate) fn solve(
    plan: &[Step],
    eps: Tensor,
    mut velocity: impl FnMut(&Tensor, f64) -> Tensor,
) -> Trajectory {
    let (mut x_t, mut history): (Tensor, Option<History<Tensor>>) = (eps, None);
    let mut calls = Vec::with_capacity(plan.len());
    for step in plan {
        let v = velocity(&x_t, step.t);
        let next = advance(step, &x_t, &v, history.as_ref());
        let [of_x, of_v] = path::x0_from_v(step.t);
        history = Some(History { v: v.shallow_clone(), x0: &x_t * of_x + &v * of_v });
        calls.push(Call { t: step.t, t_next: step.t_next, x_t, v });
        x_t = next;
    }
    Trajectory { calls, x0: x_t }
}

/// The same sum in the same order as [`Step::apply`], so that both round alike.
fn advance(step: &Step, x_t: &Tensor, v: &Tensor, history: Option<&History<Tensor>>) -> Tensor {
    let terms = step.terms().map(|(term, coefficient)| {
        let source = match (term, history) {
            (Term::X, _) => x_t,
            (Term::V, _) => v,
            (Term::VPrev, Some(past)) => &past.v,
            (Term::X0Prev, Some(past)) => &past.x0,
            _ => panic!("a step from t = {} needs the step before it", step.t),
        };
        source * coefficient
    });
    terms.reduce(|sum, term| sum + term).expect("a step has a term")
}

/// The noises of one group around a shared one (paper Eq. 7): `√(1 − σ²)·eps* + σ·δ_i`, i < G, each an
/// unpacked `[Z·h·w]`. `group` numbers the groups of a run.
pub(crate) fn neighbourhood(
    noise: Noise,
    group: u64,
    group_size: usize,
    sigma: f64,
    size: &LatentSize,
) -> Vec<Vec<f32>> {
    let stream = group * (group_size as u64 + 1);
    let shared = noise.normal(stream, size.len());
    let (keep, spread) = ((1.0 - sigma * sigma).sqrt() as f32, sigma as f32);
    (1..=group_size as u64)
        .map(|i| {
            let delta = noise.normal(stream + i, size.len());
            shared.iter().zip(delta).map(|(e, d)| keep * e + spread * d).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use flow::schedule::{Schedule, Shift};
    use flow::solver::{SOLVERS, plan};
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn tensors_and_buffers_give_the_same_bits() {
        let eps = Noise::new(3).normal(0, 500);
        let field = |x: f32, t: f64| (x * 1.3 - t as f32) * 0.7;
        for (_, solver) in SOLVERS {
            let steps = plan(solver, &Schedule::new(7, Shift::Factor(3.0)).unwrap());
            let tensors = solve(&steps, Tensor::from_slice(&eps), |x, t| {
                let x = Vec::<f32>::try_from(x).unwrap();
                Tensor::from_slice(&x.iter().map(|&x| field(x, t)).collect::<Vec<f32>>())
            });
            let (mut x, mut history) = (eps.clone(), None);
            for step in &steps {
                let v = x.iter().map(|&x| field(x, step.t)).collect();
                let (next, left) = step.apply(&x, v, history.as_ref());
                (x, history) = (next, Some(left));
            }
            assert_eq!(Vec::<f32>::try_from(&tensors.x0).unwrap(), x, "{solver:?}");
        }
    }

    #[test]
    fn transitions_skip_correctors() {
        let schedule = Schedule::new(3, Shift::Factor(1.0)).unwrap();
        let steps = plan(flow::solver::Solver::Heun, &schedule);
        let trajectory =
            solve(&steps, Tensor::ones([1], (Kind::Float, Device::Cpu)), |x, _| x * 0.5);
        let transitions = trajectory.transitions();
        assert_eq!(transitions, [0, 2, 4]);
        assert_eq!(trajectory.arrived(0), &trajectory.calls[2].x_t);
        assert_eq!(trajectory.arrived(4), &trajectory.x0);
    }

    #[test]
    fn neighbours_are_normal_and_correlated() {
        let size = LatentSize { channels: 16, height: 40, width: 40 };
        let members = neighbourhood(Noise::new(9), 4, 3, 0.3, &size);
        let dot = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>() / a.len() as f64
        };
        for i in 0..3 {
            assert!((dot(&members[i], &members[i]) - 1.0).abs() < 0.03);
            for j in 0..i {
                assert!((dot(&members[i], &members[j]) - 0.91).abs() < 0.03);
            }
        }
        assert_ne!(members, neighbourhood(Noise::new(9), 5, 3, 0.3, &size));
    }
}
