//! Neighbor GRPO: the softmax-distance surrogate policy and its clipped objective (paper Eq. 8 to 10).
//!
//! For one anchor and one transition, with D = x_θ − x_old, N numbers a latent and candidates c_i:
//!
//! ```text
//! ℓ_i     = (2/τ_eff)·⟨D, c_i − x_old⟩
//! q_i     = log_softmax_i(−‖c_i − x_old‖²/τ_eff)
//! log ρ_i = ℓ_i − logsumexp_k(q_k + ℓ_k)
//! J       = (1/G)·Σ_i min(A_i·ρ_i, A_i·clip(ρ_i, 1 − ε, 1 + ε))
//! ```
//!
//! This is Eq. 8 to 10 exactly: with both policies taking the one-step transition from the same state,
//! their ratio is an exponential tilt in D and every ‖D‖² cancels. Differencing two log-softmaxes
//! instead loses four digits in f32 (METHOD section 1).

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{Algorithm, Batch, Item, Objective, Ratio, numbers, part, stack};
use crate::align::AlignConfig;
use crate::engine::Condition;
use crate::experience::Experience;
use crate::model::Model;
use crate::rollout::{Rollout, Start};
use crate::seeds::{Use, family};

/// How squared distances are scaled before the softmax.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// Mean over the latent's numbers: τ_eff = τ·N.
    Mean,
    /// Sum, as Eq. 8 is printed: τ_eff = τ.
    Sum,
    /// The trust region of an SDE step: τ_eff = 2·η²·Δt·N with η = τ.
    SdeMatched,
}

/// What the surrogate chooses among.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Candidates {
    /// The states at which the group's rollouts arrived.
    Rollout,
    /// Those at which one-step transitions from the group's states arrive, as AR-CoPO has it.
    OneStep,
}

/// Settings of the surrogate.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NeighborConfig {
    /// Distance of the softmax.
    #[serde(default = "mean")]
    pub distance: Distance,
    /// Its temperature (η where `distance` is `sde-matched`).
    #[serde(default = "one")]
    pub tau: f64,
    /// Half-width ε of the ratio clip.
    #[serde(default = "clip")]
    pub clip: f64,
    /// What it chooses among.
    #[serde(default = "candidates")]
    pub candidates: Candidates,
}

fn mean() -> Distance {
    Distance::Mean
}
fn one() -> f64 {
    1.0
}
fn clip() -> f64 {
    1e-4
}
fn candidates() -> Candidates {
    Candidates::Rollout
}

impl Default for NeighborConfig {
    fn default() -> Self {
        Self { distance: mean(), tau: one(), clip: clip(), candidates: candidates() }
    }
}

/// Neighbor GRPO.
pub(crate) struct Neighbor<'a> {
    config: &'a AlignConfig,
    grid: Grid,
}

impl<'a> Neighbor<'a> {
    pub(crate) fn new(config: &'a AlignConfig, grid: Grid) -> Self {
        Self { config, grid }
    }

    fn transitions(&self, experience: &Experience, items: &[Item]) -> Transitions {
        let calls = &experience.trajectory.calls;
        let g = experience.group_size as i64;
        let row = |all: &Tensor, item: &Item| experience.row(all, item.group, item.member);
        let of_group = |all: &Tensor, item: &Item| all.narrow(0, item.group as i64 * g, g);
        let candidates = |item: &Item| {
            let call = &calls[item.call];
            match self.config.neighbor.candidates {
                Candidates::Rollout => of_group(experience.trajectory.arrived(item.call), item),
                Candidates::OneStep => {
                    let dt = call.step.t_next - call.step.t;
                    of_group(&call.x_t, item) + of_group(&call.v, item) * dt
                }
            }
        };
        let advantages: Vec<f32> = items
            .iter()
            .flat_map(|item| experience.advantages[item.group].values.iter().map(|&a| a as f32))
            .collect();
        let x_in = stack(items, |item| row(&calls[item.call].x_t, item));
        Transitions {
            v_old: stack(items, |item| row(&calls[item.call].v, item)),
            t_in: numbers(items, &x_in, |item| calls[item.call].step.t),
            t_next: numbers(items, &x_in, |item| calls[item.call].step.t_next),
            candidates: stack(items, candidates),
            advantages: Tensor::from_slice(&advantages).reshape([-1, g]).to_device(x_in.device()),
            x_in,
        }
    }
}

impl Algorithm for Neighbor<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        let steps = self.config.rollout.steps(self.grid)?;
        Ok(Rollout::apart(Start::Neighbourhood(self.config.sigma), steps))
    }

    /// Anchors and steps of each group are drawn from the run's seed and the group's number.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let config = self.config;
        let transitions = experience.trajectory.transitions();
        let possible = &transitions[..transitions.len() - 1];
        let (of_anchors, of_steps) =
            (family(config.seed, Use::Anchors), family(config.seed, Use::Steps));
        let drawn: Vec<(usize, Vec<usize>, Vec<usize>)> = experience
            .live()
            .into_iter()
            .map(|group| {
                let stream = experience.first_group + group as u64;
                let steps = of_steps.choose(stream, possible.len(), config.n_train_steps());
                let anchors = of_anchors.choose(stream, config.group_size, config.n_anchors());
                (group, anchors, steps.into_iter().map(|step| possible[step]).collect())
            })
            .collect();
        let n = config.n_updates();
        let items = |index: usize| {
            drawn.iter().flat_map(move |(group, anchors, calls)| {
                part(anchors, n, index).iter().flat_map(move |&member| {
                    let advantage = experience.advantages[*group].values[member];
                    calls.iter().map(move |&call| Item { group: *group, member, call, advantage })
                })
            })
        };
        (0..n).map(|index| items(index).collect()).collect()
    }

    fn batch<'b>(
        &'b self,
        _: &Model,
        experience: &Experience,
        items: &[Item],
        _: &Condition,
    ) -> Batch<'b> {
        let transitions = self.transitions(experience, items);
        let Transitions { x_in, v_old, t_in, t_next, candidates, advantages } = &transitions;
        let tensors = [
            ("x_in", x_in),
            ("v_old", v_old),
            ("t_in", t_in),
            ("t_next", t_next),
            ("candidates", candidates),
            ("advantages", advantages),
        ];
        Batch {
            tensors: tensors.map(|(name, tensor)| (name, tensor.shallow_clone())).into(),
            x_in: x_in.shallow_clone(),
            t_in: t_in.shallow_clone(),
            objective: Box::new(move |v| self.config.neighbor.objective(&transitions, v)),
        }
    }

    fn n_trained(&self, _: &Rollout) -> usize {
        self.config.n_anchors() * self.config.n_train_steps()
    }
}

/// M transitions of anchors with their groups, in f32. `N` numbers a latent, `G` members a group.
pub(crate) struct Transitions {
    /// Anchor's state before, `[M, S, C]`.
    pub(crate) x_in: Tensor,
    /// Velocity the rollout computed there, `[M, S, C]`.
    pub(crate) v_old: Tensor,
    /// Times before and after, `[M]`.
    pub(crate) t_in: Tensor,
    pub(crate) t_next: Tensor,
    /// Where the group arrived, `[M, G, S, C]`.
    pub(crate) candidates: Tensor,
    /// `[M, G]`.
    pub(crate) advantages: Tensor,
}

impl NeighborConfig {
    pub(crate) fn validate(&self, config: &AlignConfig) -> Result<()> {
        let (sigma, b, n) = (config.sigma, config.n_anchors(), config.n_updates());
        ensure!(sigma > 0.0 && sigma <= 1.0, "sigma = {sigma}: in (0, 1]");
        ensure!(b.is_multiple_of(n), "updates = {n} must divide anchors = {b}");
        ensure!(self.tau > 0.0, "neighbor.tau = {}: above 0", self.tau);
        ensure!(self.clip > 0.0 && self.clip < 1.0, "neighbor.clip = {}: in (0, 1)", self.clip);
        Ok(())
    }

    /// τ_eff of transitions that span `dt` `[M]` over latents of `n` numbers: `[M, 1]`.
    fn temperature(&self, dt: &Tensor, n: i64) -> Tensor {
        let dt = dt.abs().unsqueeze(1);
        match self.distance {
            Distance::Mean => dt.full_like(self.tau * n as f64),
            Distance::Sum => dt.full_like(self.tau),
            Distance::SdeMatched => dt * (2.0 * self.tau * self.tau * n as f64),
        }
    }

    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    pub(crate) fn objective(&self, transitions: &Transitions, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let Transitions { x_in, v_old, t_in, t_next, candidates, advantages } = transitions;
        let m = v.size()[0];
        let dt = t_next - t_in;
        let wide = dt.reshape([-1, 1, 1]);
        let x_old = x_in + v_old * &wide;
        let moved = ((&v - v_old) * &wide).reshape([m, -1, 1]); // D: [M, N, 1]
        let n = moved.size()[1];
        let away = (candidates - x_old.unsqueeze(1)).reshape([m, -1, n]); // [M, G, N]
        let tau = self.temperature(&dt, n);
        let tilt = away.bmm(&moved).squeeze_dim(2) * 2.0 / &tau;
        let dims: &[i64] = &[2];
        let log_policy = (-away.square().sum_dim_intlist(dims, false, Kind::Float) / &tau)
            .log_softmax(1, Kind::Float);
        let log_ratio = &tilt - (&log_policy + &tilt).logsumexp([1], true);
        let dims: &[i64] = &[1];
        let value =
            Ratio::clipped(&log_ratio, advantages, self.clip).mean_dim(dims, false, Kind::Float);
        value.mean(Kind::Float).backward();
        let mean = |x: Tensor| x.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let policy = log_policy.exp();
        let entropy = (&policy * &log_policy).sum_dim_intlist(dims, false, Kind::Double);
        let (log, advantages) = (log_ratio.detach(), advantages.shallow_clone());
        Objective {
            value: value.detach(),
            gradient: v.grad(),
            ratio: Some(Ratio { log, advantages, clip: self.clip }),
            means: vec![
                // Staying on the anchor is what is most probable.
                ("policy/p_anchor", mean(policy.amax(dims, false))),
                ("policy/entropy", -mean(entropy)),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use flow::noise::Noise;
    use flow::schedule::{Schedule, Shift};
    use flow::solver::{Solver, plan};

    use super::*;
    use crate::rollout;

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
            |x, t| (x * 2.0).sin() + x * (t - 0.3),
            |_, x| x,
        );
        let (call, arrived) = (&group.calls[3], group.arrived(3));
        let anchor = |x: &Tensor| x.narrow(0, 0, 1);
        let [t_in, t_next] =
            [call.step.t, call.step.t_next].map(|t| Tensor::from_slice(&[t as f32]));
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
}
