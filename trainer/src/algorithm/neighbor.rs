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

#[cfg(test)]
mod tests;

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use flow::solver::Step;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{
    Algorithm, Batch, Bound, Item, Method, Objective, Published, Setting, numbers, part, published,
    stack,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{self, Rollout, Start};
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;

/// How squared distances are scaled before the softmax.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
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
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Candidates {
    /// The states at which the group's rollouts arrived.
    Rollout,
    /// Those at which one-step transitions from the group's states arrive, as AR-CoPO has it.
    OneStep,
    /// Those at which straight lines from the anchor's state to the group's images arrive.
    Straight,
}

/// Which transitions of a trajectory train.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Steps {
    /// Any, drawn for each group.
    Drawn,
    /// The last ones.
    Last,
}

/// Settings of the surrogate.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
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
    /// Which K transitions train.
    #[serde(default = "drawn_steps")]
    pub steps: Steps,
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
fn drawn_steps() -> Steps {
    Steps::Drawn
}

impl Default for NeighborConfig {
    fn default() -> Self {
        Self {
            distance: mean(),
            tau: one(),
            clip: clip(),
            candidates: candidates(),
            steps: drawn_steps(),
        }
    }
}

/// Anchors unless told otherwise (paper Table 1).
const ANCHORS: usize = 4;

impl NeighborConfig {
    pub(super) const PUBLISHED: &[Published] = published![
        "neighbor",
        "neighbor-plus",
        "neighbor-paper-literal",
        "neighbor-sde-matched",
        "neighbor-ar-copo"
    ];
}

impl Method for NeighborConfig {
    fn n_anchors(&self, group_size: usize) -> usize {
        ANCHORS.min(group_size)
    }

    fn reads(&self) -> &'static [&'static str] {
        &[
            "advantage",
            "sigma",
            "anchors",
            "updates",
            "train_steps",
            "timestep_fraction",
            "rollout.solver",
            "neighbor",
        ]
    }

    fn validate(&self, setting: &Setting<'_>) -> Result<()> {
        let (sigma, b, n) = (setting.group.sigma, setting.n_anchors, setting.n_updates);
        ensure!(sigma > 0.0 && sigma <= 1.0, "sigma = {sigma}: in (0, 1]");
        ensure!(b.is_multiple_of(n), "updates = {n} must divide anchors = {b}");
        let is_width = self.tau > 0.0 && self.tau.is_finite();
        ensure!(is_width, "neighbor.tau = {}: above 0", self.tau);
        ensure!(self.clip > 0.0 && self.clip < 1.0, "neighbor.clip = {}: in (0, 1)", self.clip);
        Ok(())
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Neighbor { setting, config: self, grid })
    }

    /// Without the mean over an image's numbers.
    fn feels_rounding(&self) -> bool {
        self.distance == Distance::Sum
    }

    fn warning(&self) -> Option<&'static str> {
        (self.distance == Distance::Sum).then_some(
            "neighbor.distance = \"sum\": only the first update of an iteration carries a signal, \
             later ones are clipped",
        )
    }
}

/// Neighbor GRPO.
struct Neighbor<'a> {
    setting: Setting<'a>,
    config: &'a NeighborConfig,
    grid: Grid,
}

impl Neighbor<'_> {
    /// Anchors of the group with the number `stream` in the run, and those of `possible` that train, drawn from the
    /// run's seed.
    fn drawn(&self, stream: u64, possible: &[usize]) -> [Vec<usize>; 2] {
        let Setting { group: config, n_anchors, n_train_steps, .. } = self.setting;
        let steps = match self.config.steps {
            Steps::Drawn => {
                family(config.seed, Use::Steps).choose(stream, possible.len(), n_train_steps)
            }
            Steps::Last => (possible.len() - n_train_steps..possible.len()).collect(),
        };
        let anchors = family(config.seed, Use::Anchors);
        let anchors = anchors.choose(stream, config.group_size, n_anchors);
        [anchors, steps.into_iter().map(|step| possible[step]).collect()]
    }

    fn transitions(&self, experience: &Experience, items: &[Item]) -> Transitions {
        let calls = &experience.trajectory.calls;
        let g = experience.group_size as i64;
        let row = |all: &Tensor, item: &Item| experience.row(all, item.group, item.member);
        let of_group = |all: &Tensor, item: &Item| experience.members(all, item.group);
        let candidates = |item: &Item| {
            let call = &calls[item.call];
            match self.config.candidates {
                Candidates::Rollout => of_group(experience.trajectory.arrived(item.call), item),
                Candidates::OneStep => {
                    let dt = call.step.t_next - call.step.t;
                    of_group(&call.x_t, item) + of_group(&call.v, item) * dt
                }
                Candidates::Straight => {
                    let images = of_group(&experience.trajectory.x0, item);
                    straight(&row(&call.x_t, item), &images, &call.step)
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
    fn rollout(&self, iteration: usize) -> Result<Rollout> {
        let Setting { group, n_updates, .. } = self.setting;
        let rollout =
            Rollout::apart(Start::Neighbourhood(group.sigma), group.rollout.steps(self.grid)?);
        let transitions = rollout::transitions(&rollout.steps);
        let possible = &transitions[..transitions.len() - 1];
        let n = group.prompts_per_iteration;
        let first_update = |index: usize| {
            let [anchors, calls] = self.drawn((iteration * n + index) as u64, possible);
            let of_anchor = |&anchor| calls.iter().map(move |&call| (anchor, call));
            part(&anchors, n_updates, 0).iter().flat_map(of_anchor).collect()
        };
        let foreseen = (0..n).map(first_update).collect();
        Ok(Rollout { foreseen, ..rollout })
    }

    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let n_updates = self.setting.n_updates;
        let transitions = experience.trajectory.transitions();
        let possible = &transitions[..transitions.len() - 1];
        let drawn: Vec<(usize, [Vec<usize>; 2])> = experience
            .live()
            .into_iter()
            .map(|group| (group, self.drawn(experience.first_group + group as u64, possible)))
            .collect();
        let items = |index: usize| {
            drawn.iter().flat_map(move |(group, [anchors, calls])| {
                part(anchors, n_updates, index).iter().flat_map(move |&member| {
                    let advantage = experience.advantages[*group].values[member];
                    calls.iter().map(move |&call| Item {
                        group: *group,
                        member,
                        call,
                        advantage,
                        draw: 0,
                    })
                })
            })
        };
        (0..n_updates).map(|index| items(index).collect()).collect()
    }

    fn batch<'b>(
        &'b self,
        _: &'b Sources<'_>,
        experience: &'b Experience,
        items: &'b [Item],
        _: &Condition,
    ) -> Result<Batch<'b>> {
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
        Ok(Batch {
            tensors: tensors.map(|(name, tensor)| (name, tensor.shallow_clone())).into(),
            x_in: x_in.shallow_clone(),
            t_in: t_in.shallow_clone(),
            objective: Box::new(move |v| Ok(self.config.objective(&transitions, v))),
        })
    }

    fn n_trained(&self, _: &Rollout) -> usize {
        self.setting.n_anchors * self.setting.n_train_steps
    }
}

/// Where the straight lines from `x_in` `[S, C]` to `images` `[G, S, C]`, which lie at t = 0, are after `step`.
fn straight(x_in: &Tensor, images: &Tensor, step: &Step) -> Tensor {
    x_in + (images - x_in) * (1.0 - step.t_next / step.t)
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
        let (value, ratio) = Bound::Clip(self.clip).objective(&log_ratio, advantages);
        let value = value.mean_dim(dims, false, Kind::Float);
        value.mean(Kind::Float).backward();
        let mean = |x: Tensor| x.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let policy = log_policy.exp();
        let entropy = (&policy * &log_policy).sum_dim_intlist(dims, false, Kind::Double);
        Objective {
            value: value.detach(),
            gradient: v.grad(),
            ratio: Some(ratio),
            means: vec![
                // Staying on the anchor is what is most probable.
                ("policy/p_anchor", mean(policy.amax(dims, false))),
                ("policy/entropy", -mean(entropy)),
            ],
        }
    }
}
