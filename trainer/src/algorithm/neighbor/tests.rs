//! The objective against the paper's equations.

use flow::noise::Noise;
use flow::schedule::{Schedule, Shift};
use flow::solver::{Solver, plan};

use super::*;
use crate::group::rollout;
use crate::run::config::AlignConfig;
use crate::run::settings::{ALIGN_PRESETS, Source, read};

const M: i64 = 2;
const G: i64 = 5;
const S: i64 = 3;
const C: i64 = 4;

fn normal(stream: u64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&Noise::new(11).normal(stream, n)).reshape(shape)
}

fn transitions() -> Transitions {
    let advantages = normal(3, &[M, G]);
    let dims: &[i64] = &[1];
    Transitions {
        x_in: normal(0, &[M, S, C]),
        v_old: normal(1, &[M, S, C]),
        t_in: Tensor::from_slice(&[0.9f32, 0.5]),
        t_next: Tensor::from_slice(&[0.7f32, 0.4]),
        candidates: normal(2, &[M, G, S, C]),
        advantages: &advantages - advantages.mean_dim(dims, true, Kind::Float),
    }
}

fn config(distance: Distance) -> NeighborConfig {
    NeighborConfig { distance, ..NeighborConfig::default() }
}

fn log_ratio(objective: &Objective) -> Tensor {
    objective.ratio.as_ref().unwrap().log.shallow_clone()
}

fn largest(x: &Tensor) -> f64 {
    x.abs().max().double_value(&[])
}

/// Eq. 8 and 10 as printed, in f64: a softmax of negative squared distances under each policy.
fn log_ratio_as_printed(transitions: &Transitions, v: &Tensor, tau: &Tensor) -> Tensor {
    let double = |x: &Tensor| x.to_kind(Kind::Double);
    let dt = double(&transitions.t_next) - double(&transitions.t_in);
    let policy = |v: &Tensor| {
        let x = double(&transitions.x_in) + double(v) * dt.reshape([-1, 1, 1]);
        let dims: &[i64] = &[2, 3];
        let distance = (double(&transitions.candidates) - x.unsqueeze(1)).square();
        let distance = distance.sum_dim_intlist(dims, false, Kind::Double);
        (-distance / double(tau)).log_softmax(1, Kind::Double)
    };
    policy(v) - policy(&transitions.v_old)
}

#[test]
fn the_ratio_is_one_at_the_old_velocity() {
    let transitions = transitions();
    for distance in [Distance::Mean, Distance::Sum, Distance::SdeMatched] {
        let found = config(distance).objective(&transitions, &transitions.v_old);
        assert!(largest(&log_ratio(&found)) < 1e-6, "{distance:?}");
    }
}

/// Algorithm 1 as printed takes the solver's arrival for the old policy's: no ratio of 1 from the second
/// step on.
#[test]
fn the_old_policy_steps_once_wherever_the_solver_arrived() {
    let steps = plan(Solver::Dpmpp2m, &Schedule::new(8, Shift::Factor(3.0)).unwrap());
    let group = rollout::solve(
        &steps,
        normal(5, &[G, S, C]),
        |x, t| Ok((x * 2.0).sin() + x * (t - 0.3)),
        |_, x| x,
    )
    .unwrap();
    let (call, arrived) = (&group.calls[3], group.arrived(3));
    let anchor = |x: &Tensor| x.narrow(0, 0, 1);
    let [t_in, t_next] = [call.step.t, call.step.t_next].map(|t| Tensor::from_slice(&[t as f32]));
    let by_arrival = (anchor(arrived) - anchor(&call.x_t)) / (&t_next - &t_in);
    let log_ratio_with = |v_old: Tensor| {
        let transitions = Transitions {
            x_in: anchor(&call.x_t),
            v_old,
            t_in: t_in.shallow_clone(),
            t_next: t_next.shallow_clone(),
            candidates: arrived.unsqueeze(0),
            advantages: normal(3, &[1, G]),
        };
        let found = config(Distance::Sum).objective(&transitions, &anchor(&call.v));
        largest(&log_ratio(&found))
    };
    assert!(log_ratio_with(anchor(&call.v)) < 1e-6);
    assert!(log_ratio_with(by_arrival) > 1e-3, "the solver is of first order");
}

#[test]
fn the_tilt_is_the_printed_ratio() {
    let transitions = transitions();
    let v = &transitions.v_old + normal(4, &[M, S, C]) * 0.3;
    let dt = &transitions.t_next - &transitions.t_in;
    for distance in [Distance::Mean, Distance::Sum, Distance::SdeMatched] {
        let config = config(distance);
        let tau = config.temperature(&dt, S * C);
        let printed = log_ratio_as_printed(&transitions, &v, &tau);
        let difference = largest(&(log_ratio(&config.objective(&transitions, &v)) - &printed));
        assert!(difference < 1e-5 * largest(&printed).max(1.0), "{distance:?}: {difference}");
        assert!(largest(&printed) > 1e-3, "{distance:?}: the case is not trivial");
    }
}

/// dJ/dx_θ = (2/τ_eff)·Σ A_i c_i/G at ρ = 1, and dx_θ/dv = dt.
#[test]
fn the_first_gradient_points_to_the_rewarded() {
    let transitions = transitions();
    for distance in [Distance::Mean, Distance::Sum, Distance::SdeMatched] {
        let config = config(distance);
        let dt = &transitions.t_next - &transitions.t_in;
        let tau = config.temperature(&dt, S * C).reshape([-1, 1, 1]);
        let weighted = transitions.advantages.reshape([M, G, 1, 1]) * &transitions.candidates;
        let dims: &[i64] = &[1];
        let pull = weighted.sum_dim_intlist(dims, false, Kind::Float) * 2.0 / tau / G as f64;
        let expected = pull * dt.reshape([-1, 1, 1]) / M as f64;
        let found = config.objective(&transitions, &transitions.v_old).gradient;
        assert!(largest(&(&found - &expected)) < 1e-5 * largest(&expected), "{distance:?}");
    }
}

#[test]
fn sum_and_mean_take_the_same_first_step() {
    let transitions = transitions();
    let step = |distance| {
        let gradient = config(distance).objective(&transitions, &transitions.v_old).gradient;
        let (m, v) = (&gradient * 0.1, gradient.square() * 0.001);
        (m / 0.1) / ((v / 0.001).sqrt() + 1e-12)
    };
    assert!(largest(&(step(Distance::Sum) - step(Distance::Mean))) < 1e-4);
}

#[test]
fn a_million_numbers_and_wild_ratios_stay_finite() {
    let n = 1_000_000;
    let away = normal(5, &[1, 2, 1, n]) * 0.6;
    let x_in = normal(6, &[1, 1, n]);
    let dt = Tensor::from_slice(&[-0.1f32]);
    let transitions = Transitions {
        v_old: x_in.zeros_like(),
        t_in: Tensor::from_slice(&[0.5f32]),
        t_next: Tensor::from_slice(&[0.4f32]),
        candidates: x_in.unsqueeze(1) + &away,
        advantages: Tensor::from_slice(&[1.0f32, -1.0]).reshape([1, 2]),
        x_in,
    };
    for direction in [1.0, -1.0] {
        let v = away.get(0).get(0).unsqueeze(0) * direction * 0.1 / dt.reshape([-1, 1, 1]);
        let found = config(Distance::Sum).objective(&transitions, &v);
        assert!(largest(&log_ratio(&found)) > 1e4, "{}", largest(&log_ratio(&found)));
        assert_eq!(found.gradient.isfinite().all().int64_value(&[]), 1);
        assert_eq!(found.value.isfinite().all().int64_value(&[]), 1);
    }
}

#[test]
fn flat_groups_give_no_gradient() {
    let mut transitions = transitions();
    transitions.advantages = transitions.advantages.zeros_like();
    let v = &transitions.v_old + 0.1;
    let found = config(Distance::Mean).objective(&transitions, &v);
    assert_eq!(largest(&found.gradient), 0.0);
}

#[test]
fn the_order_of_candidates_does_not_matter() {
    let mut transitions = transitions();
    let v = &transitions.v_old + normal(4, &[M, S, C]) * 0.1;
    let before = config(Distance::Mean).objective(&transitions, &v).value;
    let order = Tensor::from_slice(&[3i64, 0, 4, 2, 1]);
    transitions.candidates = transitions.candidates.index_select(1, &order);
    transitions.advantages = transitions.advantages.index_select(1, &order);
    let after = config(Distance::Mean).objective(&transitions, &v).value;
    assert!(largest(&(before - after)) < 1e-7);
}

/// A rise of J moves the anchor towards a candidate with a positive advantage.
#[test]
fn ascent_approaches_the_winner() {
    let transitions = transitions();
    let only = Tensor::from_slice(&[1.0f32, -0.25, -0.25, -0.25, -0.25]);
    let transitions = Transitions {
        advantages: only.reshape([1, G]).expand([M, G], false).contiguous(),
        ..transitions
    };
    let found = config(Distance::Mean).objective(&transitions, &transitions.v_old);
    let dt = (&transitions.t_next - &transitions.t_in).reshape([-1, 1, 1]);
    let distance = |v: &Tensor| {
        let x = &transitions.x_in + v * &dt;
        (transitions.candidates.select(1, 0) - x).square().sum(Kind::Double).double_value(&[])
    };
    let ahead = &transitions.v_old + found.gradient * 10.0;
    assert!(distance(&ahead) < distance(&transitions.v_old));
}

/// A velocity that does not change leads to the image along the line on which the candidate lies.
#[test]
fn straight_candidates_lie_where_a_constant_velocity_leads() {
    let steps = plan(Solver::Euler, &Schedule::new(5, Shift::Factor(3.0)).unwrap());
    let (x_in, v) = (normal(6, &[S, C]), normal(7, &[G, S, C]));
    for step in &steps {
        let found = straight(&x_in, &(&x_in - &v * step.t), step);
        let expected = &x_in + &v * (step.t_next - step.t);
        assert!(largest(&(found - expected)) < 1e-6, "t = {}", step.t);
    }
}

/// The network calls that train in 64 groups, each list in order.
fn calls(settings: &[&str]) -> Vec<Vec<usize>> {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let config: AlignConfig = read(&Source::Preset("neighbor"), &ALIGN_PRESETS, &settings).unwrap();
    let algorithm = config.setting().unwrap().open(Shift::Factor(3.0).into());
    let groups = (0..2).flat_map(|iteration| algorithm.rollout(iteration).unwrap().foreseen);
    let of_first_anchor = |group: Vec<(usize, usize)>| {
        let calls = group.iter().filter(|(anchor, _)| *anchor == group[0].0);
        let mut calls: Vec<usize> = calls.map(|(_, call)| *call).collect();
        calls.sort_unstable();
        calls
    };
    groups.map(of_first_anchor).collect()
}

/// Four of the seven transitions before the last one, which never trains; Heun's solver asks twice in each of them.
#[test]
fn the_last_steps_are_those_before_the_image() {
    let last = "neighbor.steps=last";
    for (solver, expected) in [("dpmpp-2m", [3, 4, 5, 6]), ("heun", [6, 8, 10, 12])] {
        let found = calls(&[last, &format!("rollout.solver={solver}")]);
        assert!(found.len() == 64 && found.iter().all(|calls| *calls == expected), "{found:?}");
    }
    let drawn = calls(&["neighbor.steps=drawn"]);
    let trained = |call: usize| drawn.iter().filter(|calls| calls.contains(&call)).count();
    assert!(drawn.iter().all(|calls| calls.len() == 4));
    assert!((0..7).all(|call| (10..64).contains(&trained(call))) && trained(7) == 0, "{drawn:?}");
}
