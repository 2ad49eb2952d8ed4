//! DiffusionNFT (arXiv 2509.16117): contrast between better and worse images on the forward process.
//!
//! Images come from a policy of the past, v_old, by any ODE solver. For an image x0 with advantage A, noise
//! eps and a time t of the grid, x_t = (1 − t)·x0 + t·eps and
//!
//! ```text
//! v⁺ = b·v_θ + (1 − b)·v_old,   v⁻ = (1 + b)·v_old − b·v_θ,   r = (clip(A, ±c)/c + 1)/2
//! ℓ± = mean((x_t − t·v± − x0)²/w±),   w± = mean |x_t − t·v± − x0|, not differentiated
//! J  = −(c/b)·(r·ℓ⁺ + (1 − r)·ℓ⁻) − β·mean((v_θ − v_ref)²)
//! ```
//!
//! After an iteration v_old moves towards v_θ. There is no probability and no ratio.

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::forward::Noised;
use super::{
    Algorithm, Batch, Copies, Item, Method, Objective, Published, Setting, copies, drawn,
    mean_of_each, numbers, published,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{Rollout, Start};
use crate::network::condition::Condition;
use crate::tensor::parameters::Parameters;

/// Settings of the contrast.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NftConfig {
    /// b: how far v⁺ and v⁻ lie from v_old, in v_θ − v_old.
    #[serde(default = "mix")]
    pub mix: f64,
    /// c: the advantage that counts as wholly good.
    #[serde(default = "limit")]
    pub limit: f64,
    /// Weight β of the distance from the weights that the run started from; above 0, it keeps them.
    #[serde(default = "kl")]
    pub kl: f64,
    /// Share of v_old that an iteration keeps, for each optimiser step made beyond `decay_from`.
    #[serde(default = "decay_rate")]
    pub decay_rate: f64,
    /// Optimiser steps during which v_old is the newest policy.
    #[serde(default)]
    pub decay_from: i64,
    /// Largest share of v_old that an iteration keeps.
    #[serde(default = "decay_max")]
    pub decay_max: f64,
}

fn mix() -> f64 {
    1.0
}
fn limit() -> f64 {
    5.0
}
fn kl() -> f64 {
    1e-4
}
fn decay_rate() -> f64 {
    0.001
}
fn decay_max() -> f64 {
    0.5
}

impl Default for NftConfig {
    fn default() -> Self {
        Self {
            mix: mix(),
            limit: limit(),
            kl: kl(),
            decay_rate: decay_rate(),
            decay_from: 0,
            decay_max: decay_max(),
        }
    }
}

/// Least weight w of an error.
const LEAST_WEIGHT: f64 = 1e-5;

impl NftConfig {
    pub(super) const PUBLISHED: &[Published] = published!["diffusion-nft"];
}

impl Method for NftConfig {
    fn reads(&self) -> &'static [&'static str] {
        &["advantage", "updates", "train_steps", "timestep_fraction", "rollout.solver", "nft"]
    }

    fn validate(&self, _: &Setting<'_>) -> Result<()> {
        let Self { mix, limit, kl, decay_rate, decay_max, .. } = *self;
        ensure!(mix > 0.0 && mix.is_finite(), "nft.mix = {mix}: above 0");
        ensure!(limit > 0.0 && limit.is_finite(), "nft.limit = {limit}: above 0");
        ensure!(kl >= 0.0, "nft.kl = {kl}: at least 0");
        ensure!(decay_rate >= 0.0, "nft.decay_rate = {decay_rate}: at least 0");
        ensure!((0.0..1.0).contains(&decay_max), "nft.decay_max = {decay_max}: from 0, below 1");
        Ok(())
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Nft { setting, config: self, grid, old: None, reference: None })
    }
}

/// `DiffusionNFT`.
struct Nft<'a> {
    setting: Setting<'a>,
    config: &'a NftConfig,
    grid: Grid,
    /// The weights of `v_old`, and those that the run started from.
    old: Option<Copies>,
    reference: Option<Copies>,
}

impl Algorithm for Nft<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        Ok(Rollout::apart(Start::Independent, self.setting.group.rollout.steps(self.grid)?))
    }

    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let calls = experience.trajectory.transitions();
        let everybody = |_| (0..experience.group_size).collect();
        drawn(&self.setting, experience, &calls, self.setting.n_train_steps, everybody)
    }

    fn batch<'b>(
        &'b self,
        sources: &'b Sources<'_>,
        experience: &'b Experience,
        items: &'b [Item],
        condition: &Condition,
    ) -> Result<Batch<'b>> {
        let model = sources.model;
        let Noised { x0, x_t, t, .. } = Noised::new(&self.setting, model, experience, items, false);
        let velocity = |copies: &Copies| copies.velocity(model, &x_t, &t, condition);
        let contrast = Contrast {
            x0,
            x_t: x_t.shallow_clone(),
            t: t.shallow_clone(),
            v_old: velocity(self.old.as_ref().expect("the run has begun"))?,
            v_reference: self.reference.as_ref().map(velocity).transpose()?,
            advantages: numbers(items, &x_t, |item| item.advantage),
        };
        let tensors = [
            ("x0", &contrast.x0),
            ("x_in", &x_t),
            ("t_in", &t),
            ("v_old", &contrast.v_old),
            ("advantages", &contrast.advantages),
        ];
        Ok(Batch {
            tensors: tensors.map(|(name, tensor)| (name, tensor.shallow_clone())).into(),
            x_in: x_t,
            t_in: t,
            objective: Box::new(move |v| Ok(self.config.objective(&contrast, v))),
        })
    }

    fn n_trained(&self, _: &Rollout) -> usize {
        self.setting.group.group_size * self.setting.n_train_steps
    }

    fn n_references(&self) -> usize {
        1 + usize::from(self.config.kl > 0.0)
    }

    fn begin(&mut self, trained: &Parameters) {
        self.old = Some(Copies::of(trained));
        self.reference = (self.config.kl > 0.0).then(|| Copies::of(trained));
    }

    fn behaviour(&self) -> Option<&Copies> {
        self.old.as_ref()
    }

    fn finish(&self, trained: &Parameters, n_steps: i64) -> Result<()> {
        let decay = self.config.decay(n_steps);
        self.old.as_ref().map_or(Ok(()), |old| old.follow(trained, decay))
    }
}

/// M noised images, in f32.
struct Contrast {
    /// Images and their noised states, `[M, S, C]`.
    x0: Tensor,
    x_t: Tensor,
    /// Times `[M]`.
    t: Tensor,
    /// Velocity of the policy that made the images, `[M, S, C]`.
    v_old: Tensor,
    /// Velocity of the reference, where there is one, `[M, S, C]`.
    v_reference: Option<Tensor>,
    /// `[M]`.
    advantages: Tensor,
}

impl NftConfig {
    /// Share of v_old that the iteration keeps after which `n_steps` optimiser steps are made.
    fn decay(&self, n_steps: i64) -> f64 {
        copies::kept(self.decay_rate, n_steps - self.decay_from, self.decay_max)
    }

    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    fn objective(&self, contrast: &Contrast, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let Contrast { x0, x_t, t, v_old, v_reference, advantages } = contrast;
        let wide = t.reshape([-1, 1, 1]);
        let error = |v: Tensor| {
            let away = x_t - &wide * v - x0;
            let weight = mean_of_each(&away.detach().abs()).clamp_min(LEAST_WEIGHT);
            mean_of_each(&away.square()) / weight
        };
        let positive = error(&v * self.mix + v_old * (1.0 - self.mix));
        let negative = error(v_old * (1.0 + self.mix) - &v * self.mix);
        let r = (advantages / self.limit).clamp(-1.0, 1.0) * 0.5 + 0.5;
        let mut value = (&negative + r * (positive - &negative)) * (-self.limit / self.mix);
        let scalar = |x: Tensor| x.mean(Kind::Double).double_value(&[]);
        let mut means = vec![("policy/from_old", scalar((v.detach() - v_old).square()))];
        if let Some(v_reference) = v_reference {
            let divergence = mean_of_each(&(&v - v_reference).square());
            means.push(("policy/kl", scalar(divergence.detach())));
            value -= divergence * self.kl;
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
    fn the_contrast_is_that_of_the_paper() {
        for case in cases().nft {
            let contrast = Contrast {
                x0: latents(&case.x0),
                x_t: latents(&case.x_t),
                t: vector(&case.t),
                v_old: latents(&case.v_old),
                v_reference: Some(latents(&case.v_reference)),
                advantages: vector(&case.advantages),
            };
            let found = case.settings.objective(&contrast, &latents(&case.v));
            check(&found, &case.value, &case.gradient, &format!("mix {}", case.settings.mix));
            assert!(found.ratio.is_none());
        }
    }

    #[test]
    fn the_old_policy_lags_more_the_longer_a_run_is() {
        let pick = NftConfig::default();
        assert_eq!([0, 100, 499, 2000].map(|n| pick.decay(n)), [0.0, 0.1, 0.499, 0.5]);
        let ocr = NftConfig { decay_rate: 0.0075, decay_from: 75, decay_max: 0.999, ..pick };
        assert_eq!([10, 75, 175, 9000].map(|n| ocr.decay(n)), [0.0, 0.0, 0.75, 0.999]);
    }
}
