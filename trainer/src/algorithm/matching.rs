//! GRPO whose likelihood is how well the network denoises the final image: V-GRPO (arXiv 2604.23380) and
//! AWM (arXiv 2509.25050), which differ in settings alone.
//!
//! Images come from any ODE solver. For an image x0 with advantage A, noise eps and a time t of the grid,
//! x_t = (1 − t)·x0 + t·eps, and with the error e = v_θ − (eps − x0) of the velocity
//!
//! ```text
//! L   = mean((t·e)²)/mean|t·e|, the denominator not differentiated      (loss = "adaptive", V-GRPO)
//! L   = t/p·((mean(e²) + 1e-10)^p − 1e-10^p), p = 1/4                  (loss = "huber", AWM's release)
//! L   = mean(e²)                                                       (loss = "plain", AWM's paper)
//! ρ   = exp(L_old − L_θ)
//! J   = min(A'·ρ, A'·clip(ρ, 1 − ε, 1 + ε)) − β·mean((v_θ − v_ref)²) − γ·mean((v_θ − v_lag)²)
//! ```
//!
//! with A' = c·tanh(A/c) where `squash` is `tanh`, clip(A, ±c)/c where it is `clip`. t·e is the error of the
//! predicted image, x̂0 − x0, up to its sign. V-GRPO writes ρ of the mean of L over a sample's times; here each
//! time has its own, as AWM has it: the same gradient at ρ = 1.

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::forward::Noised;
use super::{
    Algorithm, Batch, Bound, Copies, Item, Method, Objective, Published, Setting, copies,
    mean_of_each, numbers, part, published,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{Rollout, Start};
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::tensor::parameters::Parameters;

/// How an error of the velocity is measured.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// The predicted image's squared error over its absolute one.
    Adaptive,
    /// The fourth root of the velocity's squared error, times t.
    Huber,
    /// The velocity's squared error.
    Plain,
}

/// How an advantage is limited.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Squash {
    /// c·tanh(A/c).
    Tanh,
    /// clip(A, ±c)/c.
    Clip,
}

/// Settings of GRPO by matching.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MatchingConfig {
    /// How an error of the velocity is measured.
    #[serde(default = "loss")]
    pub loss: Loss,
    /// Whether members of a group share the noise of a time, which takes its variance out of their comparison.
    #[serde(default = "shared_noise")]
    pub shared_noise: bool,
    /// How an advantage is limited.
    #[serde(default = "squash")]
    pub squash: Squash,
    /// c: the advantage at which it is.
    #[serde(default = "limit")]
    pub limit: f64,
    /// Half-width ε of the ratio clip.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Weight β of the distance from the weights that the run started from; above 0, it keeps them.
    #[serde(default)]
    pub kl: f64,
    /// Weight γ of the distance from weights that lag behind; above 0, it keeps them.
    #[serde(default)]
    pub lag_kl: f64,
    /// Share of those weights that an iteration keeps, for each optimiser step made.
    #[serde(default = "lag_rate")]
    pub lag_rate: f64,
    /// Largest share of them that an iteration keeps.
    #[serde(default = "lag_max")]
    pub lag_max: f64,
}

fn loss() -> Loss {
    Loss::Adaptive
}
fn shared_noise() -> bool {
    true
}
fn squash() -> Squash {
    Squash::Tanh
}
fn limit() -> f64 {
    3.0
}
fn clip() -> f64 {
    1e-2
}
fn lag_rate() -> f64 {
    0.001
}
fn lag_max() -> f64 {
    0.3
}

impl Default for MatchingConfig {
    fn default() -> Self {
        Self {
            loss: loss(),
            shared_noise: shared_noise(),
            squash: squash(),
            limit: limit(),
            clip: clip(),
            kl: 0.0,
            lag_kl: 0.0,
            lag_rate: lag_rate(),
            lag_max: lag_max(),
        }
    }
}

/// Power p of the Huber-like loss, and what keeps its slope finite at 0.
const POWER: f64 = 0.25;
const LEAST_ERROR: f64 = 1e-10;

impl MatchingConfig {
    pub(super) const PUBLISHED: &[Published] = published!["v-grpo", "awm"];
}

impl Method for MatchingConfig {
    fn reads(&self) -> &'static [&'static str] {
        &["advantage", "updates", "train_steps", "timestep_fraction", "rollout.solver", "matching"]
    }

    fn leaves_unread(&self, key: &str) -> Option<&'static str> {
        let is_of_lag = key == "matching.lag_rate" || key == "matching.lag_max";
        (is_of_lag && self.lag_kl == 0.0).then_some("matching.lag_kl = 0 keeps no weights that lag")
    }

    fn validate(&self, _: &Setting<'_>) -> Result<()> {
        let Self { limit, clip, kl, lag_kl, lag_rate, lag_max, .. } = *self;
        ensure!(limit > 0.0 && limit.is_finite(), "matching.limit = {limit}: above 0");
        ensure!(clip > 0.0 && clip <= 1.0, "matching.clip = {clip}: in (0, 1]");
        ensure!(kl >= 0.0 && kl.is_finite(), "matching.kl = {kl}: at least 0");
        ensure!(lag_kl >= 0.0 && lag_kl.is_finite(), "matching.lag_kl = {lag_kl}: at least 0");
        ensure!(lag_rate >= 0.0, "matching.lag_rate = {lag_rate}: at least 0");
        ensure!((0.0..1.0).contains(&lag_max), "matching.lag_max = {lag_max}: from 0, below 1");
        Ok(())
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Matching { setting, config: self, grid, old: None, lag: None, reference: None })
    }
}

/// GRPO by matching.
struct Matching<'a> {
    setting: Setting<'a>,
    config: &'a MatchingConfig,
    grid: Grid,
    /// The weights that rolled out, where more than one update is made of an iteration.
    old: Option<Copies>,
    /// Weights that lag behind, and those that the run started from.
    lag: Option<Copies>,
    reference: Option<Copies>,
}

impl Algorithm for Matching<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        Ok(Rollout::apart(Start::Independent, self.setting.group.rollout.steps(self.grid)?))
    }

    /// Times are stratified: one of each of K equal parts of the grid, the same for a whole group.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let Setting { group: config, n_updates, n_train_steps, .. } = self.setting;
        let transitions = experience.trajectory.transitions();
        let possible = &transitions[..transitions.len() - 1];
        let steps = family(config.seed, Use::Steps);
        let everybody: Vec<usize> = (0..experience.group_size).collect();
        let of_group = |group: usize| -> Vec<usize> {
            let stream = (experience.first_group + group as u64) * n_train_steps as u64;
            let of_part = |index: usize| {
                let calls = part(possible, n_train_steps, index);
                calls[steps.choose(stream + index as u64, calls.len(), 1)[0]]
            };
            (0..n_train_steps).map(of_part).collect()
        };
        let live: Vec<(usize, Vec<usize>)> =
            experience.live().into_iter().map(|group| (group, of_group(group))).collect();
        let of_update = |update: usize| {
            let mut items = Vec::new();
            for (group, calls) in &live {
                let values = &experience.advantages[*group].values;
                for &call in calls {
                    items.extend(part(&everybody, n_updates, update).iter().map(|&member| {
                        let advantage = values[member];
                        Item { group: *group, member, call, advantage, draw: 0 }
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
        let is_shared = self.config.shared_noise;
        let noised = Noised::new(&self.setting, model, experience, items, is_shared);
        let velocity = |copies: &Option<Copies>| {
            let velocity =
                |copies: &Copies| copies.velocity(model, &noised.x_t, &noised.t, condition);
            copies.as_ref().map(velocity).transpose()
        };
        let images = Images {
            v_old: velocity(&self.old)?,
            v_lag: velocity(&self.lag)?,
            v_reference: velocity(&self.reference)?,
            advantages: numbers(items, &noised.t, |item| self.config.squashed(item.advantage)),
            target: noised.target,
            t: noised.t.shallow_clone(),
        };
        let tensors = [
            ("x_in", &noised.x_t),
            ("t_in", &images.t),
            ("target", &images.target),
            ("advantages", &images.advantages),
        ];
        Ok(Batch {
            tensors: tensors.map(|(name, tensor)| (name, tensor.shallow_clone())).into(),
            x_in: noised.x_t,
            t_in: noised.t,
            objective: Box::new(move |v| Ok(self.config.objective(&images, v))),
        })
    }

    fn n_trained(&self, _: &Rollout) -> usize {
        self.setting.group.group_size * self.setting.n_train_steps
    }

    fn n_references(&self) -> usize {
        let MatchingConfig { kl, lag_kl, .. } = *self.config;
        [self.setting.n_updates > 1, kl > 0.0, lag_kl > 0.0].map(usize::from).iter().sum()
    }

    fn begin(&mut self, trained: &Parameters) {
        let MatchingConfig { kl, lag_kl, .. } = *self.config;
        self.old = (self.setting.n_updates > 1).then(|| Copies::of(trained));
        self.lag = (lag_kl > 0.0).then(|| Copies::of(trained));
        self.reference = (kl > 0.0).then(|| Copies::of(trained));
    }

    fn resume(&mut self, trained: &Parameters) {
        self.old = self.old.take().map(|_| Copies::of(trained));
    }

    fn kept(&self) -> Option<&Copies> {
        self.lag.as_ref()
    }

    fn finish(&self, trained: &Parameters, n_steps: i64) -> Result<()> {
        if let Some(old) = &self.old {
            old.follow(trained, 0.0)?;
        }
        if let Some(lag) = &self.lag {
            lag.follow(trained, copies::kept(self.config.lag_rate, n_steps, self.config.lag_max))?;
        }
        Ok(())
    }
}

/// M noised images, in f32.
struct Images {
    /// Times `[M]`.
    t: Tensor,
    /// Velocity that leads from the image to its noise, `[M, S, C]`.
    target: Tensor,
    /// Velocities of other weights, `[M, S, C]`; without `v_old` it is that of the present ones.
    v_old: Option<Tensor>,
    v_lag: Option<Tensor>,
    v_reference: Option<Tensor>,
    /// A' `[M]`.
    advantages: Tensor,
}

impl MatchingConfig {
    /// A'.
    fn squashed(&self, advantage: f64) -> f64 {
        let share = advantage / self.limit;
        match self.squash {
            Squash::Tanh => self.limit * share.tanh(),
            Squash::Clip => share.clamp(-1.0, 1.0),
        }
    }

    /// L of each image at the velocity `v`, `[M]`.
    fn loss(&self, images: &Images, v: &Tensor) -> Tensor {
        let e = v - &images.target;
        match self.loss {
            Loss::Plain => mean_of_each(&e.square()),
            Loss::Huber => {
                let root = (mean_of_each(&e.square()) + LEAST_ERROR).pow_tensor_scalar(POWER);
                (root - LEAST_ERROR.powf(POWER)) * &images.t / POWER
            }
            Loss::Adaptive => {
                let of_image = e * images.t.reshape([-1, 1, 1]);
                mean_of_each(&of_image.square()) / mean_of_each(&of_image.detach().abs())
            }
        }
    }

    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    fn objective(&self, images: &Images, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let now = self.loss(images, &v);
        let old = images.v_old.as_ref().map_or_else(|| now.detach(), |v| self.loss(images, v));
        let log_ratio = old - &now;
        let (mut value, ratio) = Bound::Clip(self.clip).objective(&log_ratio, &images.advantages);
        let scalar = |x: &Tensor| x.mean(Kind::Double).double_value(&[]);
        let mut means = vec![("policy/matching", scalar(&now.detach()))];
        for (name, weight, other) in [
            ("policy/kl", self.kl, &images.v_reference),
            ("policy/lag_kl", self.lag_kl, &images.v_lag),
        ] {
            let Some(other) = other else { continue };
            let away = mean_of_each(&(&v - other).square());
            means.push((name, scalar(&away.detach())));
            value -= away * weight;
        }
        value.mean(Kind::Float).backward();
        Objective { value: value.detach(), gradient: v.grad(), ratio: Some(ratio), means }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::cases::{cases, check, difference, latents, vector};

    #[test]
    fn the_objective_is_that_of_the_papers() {
        for case in cases().matching {
            let squashed = |&a: &f64| case.settings.squashed(a);
            let images = Images {
                t: vector(&case.t),
                target: latents(&case.target),
                v_old: Some(latents(&case.v_old)),
                v_lag: (case.settings.lag_kl > 0.0).then(|| latents(&case.v_lag)),
                v_reference: (case.settings.kl > 0.0).then(|| latents(&case.v_reference)),
                advantages: vector(&case.advantages.iter().map(squashed).collect::<Vec<f64>>()),
            };
            let found = case.settings.objective(&images, &latents(&case.v));
            let what = format!("{:?}", case.settings.loss);
            let log = found.ratio.as_ref().unwrap().log.shallow_clone();
            assert!(difference(&log, &case.log_ratio) < 1e-4, "{what}");
            check(&found, &case.value, &case.gradient, &what);
        }
    }
}
