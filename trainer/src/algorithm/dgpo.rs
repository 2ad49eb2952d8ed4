//! DGPO (arXiv 2510.08425, ICLR 2026): the better members of a group are preferred to the worse ones, all at once.
//!
//! Images come from any ODE solver. For an image x0 with advantage A, noise eps that its group shares and a time t of
//! the grid, x_t = (1 − t)·x0 + t·eps and L = mean((v_θ − (eps − x0))²). With L_ref of the reference's velocity,
//!
//! ```text
//! w = σ( Σ_i β·A_i·(L_i − L_ref,i) / G ),   over the G members of the group at t, not differentiated
//! J = −w·A·L − γ·mean((v_θ − v_start)²)
//! ```
//!
//! which is the gradient of log σ(−Σ …), the likelihood that the group is ordered as its advantages are, over β. As in
//! the authors' release, L of a member is silenced where exp(L_lag − L) has left 1 ± ε as A asks for; weights that lag
//! behind are the reference, or those that the run started from. Images come from the weights that train, as the release's
//! do for its first 200 steps; after them it draws from the reference.

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use flow::solver::Step;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::forward::Noised;
use super::{
    Algorithm, Batch, CLIPPED, Copies, Item, Method, Objective, Published, Setting, copies,
    mean_of_each, numbers, part, published,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{Rollout, Start};
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::network::model::Model;
use crate::tensor::parameters::Parameters;

/// What a group's likelihood is held against.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reference {
    /// Weights that lag behind.
    Lag,
    /// The weights that the run started from.
    Start,
}

/// Settings of DGPO.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DgpoConfig {
    /// β: how sharply a preference that is met loses its weight; less with a reference that does not move.
    #[serde(default = "beta")]
    pub beta: f64,
    /// Half-width ε of the clip, held against the weights that lag behind.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Weight γ of the distance from the weights that the run started from.
    #[serde(default = "kl")]
    pub kl: f64,
    /// What a group's likelihood is held against.
    #[serde(default = "reference")]
    pub reference: Reference,
    /// Least time t that is learnt from.
    #[serde(default = "t_min")]
    pub t_min: f64,
    /// Share of the weights that lag behind which an iteration keeps, for each optimiser step made.
    #[serde(default = "lag_rate")]
    pub lag_rate: f64,
    /// Largest share of them that an iteration keeps.
    #[serde(default = "lag_max")]
    pub lag_max: f64,
}

fn beta() -> f64 {
    2000.0
}
fn clip() -> f64 {
    1e-5
}
fn kl() -> f64 {
    1e-3
}
fn reference() -> Reference {
    Reference::Lag
}
/// 0.3 under a shift of 3.
fn t_min() -> f64 {
    0.5625
}
fn lag_rate() -> f64 {
    0.001
}
fn lag_max() -> f64 {
    0.3
}

impl Default for DgpoConfig {
    fn default() -> Self {
        Self {
            beta: beta(),
            clip: clip(),
            kl: kl(),
            reference: reference(),
            t_min: t_min(),
            lag_rate: lag_rate(),
            lag_max: lag_max(),
        }
    }
}

impl DgpoConfig {
    pub(super) const PUBLISHED: &[Published] = published!["dgpo"];

    /// Whether the weights that the run started from are kept.
    fn keeps_start(&self) -> bool {
        self.kl > 0.0 || self.reference == Reference::Start
    }

    /// Whether a transition from `step` is learnt from.
    fn is_possible(&self, step: &Step) -> bool {
        step.t_next < step.t && step.t >= self.t_min
    }
}

impl Method for DgpoConfig {
    fn reads(&self) -> &'static [&'static str] {
        &["advantage", "updates", "train_steps", "timestep_fraction", "rollout.solver", "dgpo"]
    }

    fn validate(&self, _: &Setting<'_>) -> Result<()> {
        let Self { beta, clip, kl, t_min, lag_rate, lag_max, .. } = *self;
        ensure!(beta > 0.0 && beta.is_finite(), "dgpo.beta = {beta}: above 0");
        ensure!(clip > 0.0 && clip <= 1.0, "dgpo.clip = {clip}: in (0, 1]");
        ensure!(kl >= 0.0 && kl.is_finite(), "dgpo.kl = {kl}: at least 0");
        ensure!((0.0..1.0).contains(&t_min), "dgpo.t_min = {t_min}: from 0, below 1");
        ensure!(lag_rate >= 0.0, "dgpo.lag_rate = {lag_rate}: at least 0");
        ensure!((0.0..1.0).contains(&lag_max), "dgpo.lag_max = {lag_max}: from 0, below 1");
        Ok(())
    }

    /// β multiplies differences of errors.
    fn feels_rounding(&self) -> bool {
        true
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Dgpo { setting, config: self, grid, lag: None, start: None })
    }
}

/// DGPO.
struct Dgpo<'a> {
    setting: Setting<'a>,
    config: &'a DgpoConfig,
    grid: Grid,
    /// Weights that lag behind, and those that the run started from.
    lag: Option<Copies>,
    start: Option<Copies>,
}

impl Dgpo<'_> {
    /// Whether the members of a group at one time may not all be in one batch.
    fn is_split(&self, experience: &Experience) -> bool {
        let Setting { group, n_updates, .. } = self.setting;
        experience.division.is_spread()
            || n_updates > 1
            || !group.rollout.batch.is_multiple_of(group.group_size)
    }

    fn lag(&self) -> &Copies {
        self.lag.as_ref().expect("the run has begun")
    }

    fn reference(&self) -> &Copies {
        match self.config.reference {
            Reference::Lag => self.lag(),
            Reference::Start => self.start.as_ref().expect("the run has begun"),
        }
    }

    /// w of each of `items`, `[M]`, with the members of their groups that are not among them.
    fn weights(&self, model: &Model, experience: &Experience, items: &[Item]) -> Result<Tensor> {
        let mut sets: Vec<(usize, usize)> =
            items.iter().map(|item| (item.group, item.call)).collect();
        sets.dedup();
        let member = |&(group, call): &(usize, usize)| {
            let values = &experience.advantages[group].values;
            let item = move |(member, &advantage)| Item { group, member, call, advantage, draw: 0 };
            values.iter().enumerate().map(item)
        };
        let all: Vec<Item> = sets.iter().flat_map(member).collect();
        let Noised { x_t, t, target, .. } =
            Noised::new(&self.setting, model, experience, &all, true);
        let condition = &experience.conditions(all.iter().map(|item| item.group));
        let now = model.engine.velocity(&x_t, &t, condition)?;
        let reference = self.reference().velocity(model, &x_t, &t, condition)?;
        let advantages = numbers(&all, &x_t, |item| item.advantage);
        let apart = error(&now, &target) - error(&reference, &target);
        let weights = self.config.weights(&(apart * advantages), experience.group_size);
        let row = |item: &Item| {
            let set = sets.iter().position(|set| *set == (item.group, item.call));
            (set.expect("one of its own") * experience.group_size + item.member) as i64
        };
        let rows: Vec<i64> = items.iter().map(row).collect();
        Ok(weights.index_select(0, &Tensor::from_slice(&rows).to_device(weights.device())))
    }
}

impl Algorithm for Dgpo<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        Ok(Rollout::apart(Start::Independent, self.setting.group.rollout.steps(self.grid)?))
    }

    /// Times are the same for a whole group.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let Setting { group: config, n_updates, n_train_steps, .. } = self.setting;
        let calls = &experience.trajectory.calls;
        let possible: Vec<usize> =
            (0..calls.len()).filter(|&call| self.config.is_possible(&calls[call].step)).collect();
        let steps = family(config.seed, Use::Steps);
        let everybody: Vec<usize> = (0..experience.group_size).collect();
        let of_update = |update: usize| {
            let mut items = Vec::new();
            for group in experience.live() {
                let values = &experience.advantages[group].values;
                let stream = experience.stream(group, 0);
                for index in steps.choose(stream, possible.len(), n_train_steps.min(possible.len()))
                {
                    let call = possible[index];
                    let members = part(&everybody, n_updates, update).iter();
                    items.extend(members.map(|&member| Item {
                        group,
                        member,
                        call,
                        advantage: values[member],
                        draw: 0,
                    }));
                }
            }
            items
        };
        (0..n_updates).map(of_update).collect()
    }

    fn batch<'b>(
        &'b self,
        sources: &'b Sources<'_>,
        experience: &'b Experience,
        items: &'b [Item],
        condition: &Condition,
    ) -> Result<Batch<'b>> {
        let model = sources.model;
        let noised = Noised::new(&self.setting, model, experience, items, true);
        let velocity = |copies: &Copies| copies.velocity(model, &noised.x_t, &noised.t, condition);
        let images = Images {
            v_lag: velocity(self.lag())?,
            v_start: self.start.as_ref().map(velocity).transpose()?,
            weights: if self.is_split(experience) {
                Some(self.weights(model, experience, items)?)
            } else {
                None
            },
            advantages: numbers(items, &noised.t, |item| item.advantage),
            target: noised.target,
        };
        let tensors = [
            ("x_in", &noised.x_t),
            ("t_in", &noised.t),
            ("target", &images.target),
            ("v_lag", &images.v_lag),
            ("advantages", &images.advantages),
        ];
        let group_size = experience.group_size;
        Ok(Batch {
            tensors: tensors.map(|(name, tensor)| (name, tensor.shallow_clone())).into(),
            x_in: noised.x_t,
            t_in: noised.t,
            objective: Box::new(move |v| Ok(self.config.objective(&images, group_size, v))),
        })
    }

    fn n_trained(&self, rollout: &Rollout) -> usize {
        let possible = rollout.steps.iter().filter(|step| self.config.is_possible(step)).count();
        self.setting.group.group_size * self.setting.n_train_steps.min(possible)
    }

    fn n_references(&self) -> usize {
        1 + usize::from(self.config.keeps_start())
    }

    fn begin(&mut self, trained: &Parameters) {
        self.lag = Some(Copies::of(trained));
        self.start = self.config.keeps_start().then(|| Copies::of(trained));
    }

    fn kept(&self) -> Option<&Copies> {
        self.lag.as_ref()
    }

    fn finish(&self, trained: &Parameters, n_steps: i64) -> Result<()> {
        let kept = copies::kept(self.config.lag_rate, n_steps, self.config.lag_max);
        self.lag().follow(trained, kept)
    }
}

/// M noised images, in f32.
struct Images {
    /// Velocity that leads from the image to its noise, `[M, S, C]`.
    target: Tensor,
    /// Velocities of other weights, `[M, S, C]`.
    v_lag: Tensor,
    v_start: Option<Tensor>,
    /// `[M]`.
    advantages: Tensor,
    /// w, `[M]`, where the images are not those of whole groups, one after the other.
    weights: Option<Tensor>,
}

/// The mean squared error of each velocity `[M, S, C]`, `[M]`.
fn error(v: &Tensor, target: &Tensor) -> Tensor {
    mean_of_each(&(v - target).square())
}

impl DgpoConfig {
    /// w of each member, `[M]`, from A·(L − L_ref) of whole groups, one after the other.
    fn weights(&self, apart: &Tensor, group_size: usize) -> Tensor {
        let g = group_size as i64;
        let sums = (apart * (self.beta / group_size as f64)).reshape([-1, g]).sum_dim_intlist(
            1,
            true,
            Kind::Float,
        );
        sums.sigmoid().expand([-1, g], false).reshape([-1])
    }

    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    fn objective(&self, images: &Images, group_size: usize, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let Images { target, v_lag, v_start, advantages, weights } = images;
        let (now, of_lag) = (error(&v, target), error(v_lag, target));
        let of_reference = match (self.reference, v_start) {
            (Reference::Start, Some(v_start)) => error(v_start, target),
            _ => of_lag.shallow_clone(),
        };
        let apart = (now.detach() - of_reference) * advantages;
        let weights = match weights {
            Some(weights) => weights.shallow_clone(),
            None => self.weights(&apart, group_size),
        };
        let ratio = (&of_lag - now.detach()).exp();
        let is_better = advantages.gt(0.0);
        let silenced = [
            ratio.gt(1.0 + self.clip).logical_and(&is_better),
            ratio.lt(1.0 - self.clip).logical_and(&is_better.logical_not()),
        ];
        let kept = now.detach().where_self(&silenced[0].logical_or(&silenced[1]), &now);
        let mut value = -(&weights * advantages) * kept;
        let mean = |x: &Tensor| x.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let mut means =
            vec![("policy/matching", mean(&now.detach())), ("policy/preference", mean(&weights))];
        means.extend(CLIPPED.into_iter().zip(silenced.each_ref().map(mean)));
        if let Some(v_start) = v_start.as_ref().filter(|_| self.kl > 0.0) {
            let away = error(&v, v_start);
            means.push(("policy/kl", mean(&away.detach())));
            value -= away * self.kl;
        }
        value.mean(Kind::Float).backward();
        Objective { value: value.detach(), gradient: v.grad(), ratio: None, means }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::cases::{cases, check, latents, vector};

    #[test]
    fn the_objective_is_that_of_the_paper() {
        for case in cases().dgpo {
            let images = |weights: Option<Tensor>| Images {
                target: latents(&case.target),
                v_lag: latents(&case.v_lag),
                v_start: Some(latents(&case.v_start)),
                advantages: vector(&case.advantages),
                weights,
            };
            let found = case.settings.objective(&images(None), case.group_size, &latents(&case.v));
            check(&found, &case.value, &case.gradient, &format!("{:?}", case.settings));
            let weights = Some(vector(&case.weights));
            let given =
                case.settings.objective(&images(weights), case.group_size, &latents(&case.v));
            check(&given, &case.value, &case.gradient, "with weights");
        }
    }
}
