//! GRPO on the transitions of an SDE: DanceGRPO, Flow-GRPO and MixGRPO, which differ in settings alone.
//!
//! A noisy step of the rollout is a draw from N(mean, std²) with mean = c_x·x + c_v·v. With N numbers a
//! latent, x' the state it led to, e = x' − mean_old and D = mean_θ − mean_old = c_v·(v_θ − v_old):
//!
//! ```text
//! log ρ = (κ/N)·(2·⟨e, D⟩ − ‖D‖²),   κ = 1/(2·std²)
//! J     = min(A·ρ, A·clip(ρ, 1 − ε, 1 + ε)) − β·‖mean_θ − mean_ref‖²/(2·g²·N)
//! ```
//!
//! The ratio is that of log-probabilities averaged over dimensions, as in all three; written in D it is
//! exactly 1 where the network repeats the rollout's velocity. g is the diffusion coefficient, std/√|dt|
//! (std itself for Flow-CPS).
//! GRPO-Guard (arXiv 2510.22319) takes `log ρ = ⟨e, D⟩/(N·std)` and J/|dt|, which removes the ratio's
//! bias below 1 and evens out the steps. Flow-DPPO (arXiv 2606.11025) has no clip: where
//! κ·‖D‖²/N > δ, terms with A > 0 and ρ > 1, or A < 0 and ρ < 1, are dropped, the others stay.

use anyhow::{Result, ensure};
use flow::schedule::{Grid, Schedule};
use flow::sde::{Sde, plan};
use flow::solver::Step;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::window::WindowConfig;
use super::{
    Algorithm, Batch, Bound, Copies, Item, Method, Objective, Published, Setting, drawn,
    mean_of_each, numbers, published, stack,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{Rollout, Start};
use crate::network::condition::Condition;
use crate::tensor::parameters::Parameters;

/// Settings of methods that train on an SDE.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SdeConfig {
    /// Where the noise comes from: `constant` (DanceGRPO), `flow` (Flow-GRPO) or `cps` (Flow-CPS).
    #[serde(default = "noise")]
    #[schemars(schema_with = "noises")]
    pub noise: Sde,
    /// Its level: η, or a.
    #[serde(default = "level")]
    pub level: f64,
    /// Whether a group starts from one initial noise.
    #[serde(default)]
    pub same_start: bool,
    /// Half-width ε of the ratio clip.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Largest divergence δ from the policy that rolled out, in place of the clip: beyond it, only terms that
    /// lead back to that policy count.
    #[serde(default)]
    pub divergence: Option<f64>,
    /// Weight β of the divergence from the weights that the run started from; above 0, it keeps them.
    #[serde(default)]
    pub kl: f64,
    /// Whether ratios are normalised as GRPO-Guard has it.
    #[serde(default)]
    pub guard: bool,
    /// Whether the network is told times cut to thousandths, as DanceGRPO's checkpoints were.
    #[serde(default)]
    pub truncate: bool,
    /// Noisy steps; without it all are but the last, and `timestep_fraction` of them train.
    #[serde(default)]
    pub window: Option<WindowConfig>,
    /// Steps after the window, as a share of those there would be, by DPM-Solver++ 2M.
    #[serde(default)]
    pub compress: Option<f64>,
}

fn noises(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": [Sde::Constant, Sde::Flow, Sde::Cps] })
}
fn noise() -> Sde {
    Sde::Flow
}
fn level() -> f64 {
    0.7
}
fn clip() -> f64 {
    1e-4
}

impl Default for SdeConfig {
    fn default() -> Self {
        Self {
            noise: noise(),
            level: level(),
            same_start: false,
            clip: clip(),
            divergence: None,
            kl: 0.0,
            guard: false,
            truncate: false,
            window: None,
            compress: None,
        }
    }
}

impl SdeConfig {
    pub(super) const PUBLISHED: &[Published] = published![
        "dance-grpo",
        "flow-grpo",
        "flow-grpo-fast",
        "flow-dppo",
        "mix-grpo",
        "mix-grpo-flash",
        "mix-grpo-flash-star"
    ];
}

impl Method for SdeConfig {
    fn reads(&self) -> &'static [&'static str] {
        &["advantage", "anchors", "updates", "train_steps", "timestep_fraction", "sde"]
    }

    fn leaves_unread(&self, key: &str) -> Option<&'static str> {
        if key == "sde.clip" && self.divergence.is_some() {
            return Some("sde.divergence stands in place of the clip");
        }
        let window = self.window.as_ref()?;
        match key {
            "train_steps" | "timestep_fraction" => Some("the steps of sde.window train"),
            _ => window.leaves_unread(key.strip_prefix("sde.window.")?),
        }
    }

    fn validate(&self, setting: &Setting<'_>) -> Result<()> {
        let Self { level, clip, kl, compress, .. } = *self;
        ensure!(level > 0.0 && level.is_finite(), "sde.level = {level}: above 0");
        ensure!(self.noise != Sde::Cps || level < 1.0, "sde.level = {level}: below 1 with cps");
        ensure!(clip > 0.0 && clip < 1.0, "sde.clip = {clip}: in (0, 1)");
        ensure!(kl >= 0.0 && kl.is_finite(), "sde.kl = {kl}: at least 0");
        if let Some(limit) = self.divergence {
            ensure!(limit > 0.0 && limit.is_finite(), "sde.divergence = {limit}: above 0");
            ensure!(!self.guard, "sde.guard normalises a clipped ratio: not with sde.divergence");
        }
        if let Some(share) = compress {
            ensure!(share > 0.0 && share <= 1.0, "sde.compress = {share}: in (0, 1]");
            ensure!(
                self.window.is_some(),
                "sde.compress: only steps after a window; add [sde.window]"
            );
        }
        if let Some(window) = &self.window {
            let n_steps = setting.group.rollout.steps;
            ensure!(n_steps >= 3, "rollout.steps = {n_steps}: a window needs at least 3");
            window.validate(n_steps)?;
        }
        Ok(())
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Policy::new(setting, grid))
    }
}

/// GRPO on an SDE.
pub(super) struct Policy<'a> {
    setting: Setting<'a>,
    config: &'a SdeConfig,
    grid: Grid,
    reference: Option<Copies>,
}

impl<'a> Policy<'a> {
    pub(super) fn new(setting: Setting<'a>, grid: Grid) -> Self {
        Self { setting, config: &setting.methods.sde, grid, reference: None }
    }

    /// [`Rollout::time`] and all noisy steps of a whole grid, from shared noise: what a tree grows on.
    pub(super) fn all_noisy(&self) -> Result<Rollout> {
        let sde = self.config;
        let schedule = Schedule::new(self.setting.group.rollout.steps, self.grid)?;
        let steps = plan(&schedule, (sde.noise, sde.level), &(0..schedule.n_steps()), false);
        Ok(Rollout { truncate: sde.truncate, ..Rollout::apart(Start::Shared, steps) })
    }

    /// Members that train: all, or the best and the worst where there are fewer.
    fn members(&self, experience: &Experience, group: usize) -> Vec<usize> {
        let (n, kept) = (experience.group_size, self.setting.n_anchors);
        let mut members: Vec<usize> = (0..n).collect();
        if kept < n {
            let values = &experience.advantages[group].values;
            members.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
            members.drain(kept.div_ceil(2)..n - kept / 2);
        }
        members
    }
}

/// Indices of the steps of `rollout` that have a probability.
fn noisy(rollout: &Rollout) -> Vec<usize> {
    (0..rollout.steps.len()).filter(|&index| rollout.steps[index].noise > 0.0).collect()
}

impl Algorithm for Policy<'_> {
    fn rollout(&self, iteration: usize) -> Result<Rollout> {
        let (sde, group) = (self.config, self.setting.group);
        let n = group.rollout.steps;
        let window = sde.window.as_ref().map(|window| window.at(iteration, n, group.seed));
        let kept = window.as_ref().map_or(n, |window| window.end);
        let schedule = match sde.compress {
            // The last window's step counts among those that are compressed, and so do both ends.
            Some(share) => {
                let rest = ((n + 1 - kept) as f64 * share) as usize;
                Schedule::with_short_end(n, self.grid, kept, rest.saturating_sub(1).max(1))?
            }
            None => Schedule::new(n, self.grid)?,
        };
        let window = window.unwrap_or(0..n);
        let steps = plan(&schedule, (sde.noise, sde.level), &window, sde.compress.is_some());
        let start = if sde.same_start { Start::Shared } else { Start::Independent };
        Ok(Rollout { truncate: sde.truncate, ..Rollout::apart(start, steps) })
    }

    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let k = self.n_trained(&experience.rollout) / self.setting.n_anchors;
        let members = |group: usize| self.members(experience, group);
        drawn(&self.setting, experience, &noisy(&experience.rollout), k, members)
    }

    fn batch<'b>(
        &'b self,
        sources: &'b Sources<'_>,
        experience: &'b Experience,
        items: &'b [Item],
        condition: &Condition,
    ) -> Result<Batch<'b>> {
        let model = sources.model;
        let calls = &experience.trajectory.calls;
        let row = |all: &Tensor, item: &Item| experience.row(all, item.group, item.member);
        let x_in = stack(items, |item| row(&calls[item.call].x_t, item));
        let v_old = stack(items, |item| row(&calls[item.call].v, item));
        let x_next = stack(items, |item| row(experience.trajectory.arrived(item.call), item));
        let steps: Vec<Step> = items.iter().map(|item| calls[item.call].step).collect();
        let t_in = numbers(items, &x_in, |item| experience.rollout.time(calls[item.call].step.t));
        let advantages = numbers(items, &x_in, |item| item.advantage);
        let velocity = |copies: &Copies| copies.velocity(model, &x_in, &t_in, condition);
        let v_reference = self.reference.as_ref().map(velocity).transpose()?;
        let tensors = vec![
            ("x_in", x_in.shallow_clone()),
            ("v_old", v_old.shallow_clone()),
            ("x_next", x_next.shallow_clone()),
            ("t_in", t_in.shallow_clone()),
            ("advantages", advantages.shallow_clone()),
        ];
        let transitions = Transitions {
            x_in: x_in.shallow_clone(),
            v_old,
            x_next,
            steps,
            advantages,
            v_reference,
        };
        let objective = Box::new(move |v: &Tensor| Ok(self.config.objective(&transitions, v)));
        Ok(Batch { x_in, t_in, objective, tensors })
    }

    fn n_trained(&self, rollout: &Rollout) -> usize {
        let noisy = noisy(rollout).len();
        let k = match self.config.window {
            Some(_) => noisy,
            None => self.setting.n_train_steps.min(noisy),
        };
        self.setting.n_anchors * k
    }

    fn n_references(&self) -> usize {
        usize::from(self.config.kl > 0.0)
    }

    fn begin(&mut self, trained: &Parameters) {
        self.reference = (self.config.kl > 0.0).then(|| Copies::of(trained));
    }
}

/// M noisy transitions, in f32.
struct Transitions {
    /// State before, `[M, S, C]`.
    x_in: Tensor,
    /// Velocity the rollout computed there, `[M, S, C]`.
    v_old: Tensor,
    /// State after, `[M, S, C]`.
    x_next: Tensor,
    /// The step taken.
    steps: Vec<Step>,
    /// `[M]`.
    advantages: Tensor,
    /// Velocity of the reference, where there is one, `[M, S, C]`.
    v_reference: Option<Tensor>,
}

impl SdeConfig {
    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    fn objective(&self, transitions: &Transitions, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let Transitions { x_in, v_old, x_next, steps, advantages, v_reference } = transitions;
        let column = |number: &dyn Fn(&Step) -> f64| {
            let numbers: Vec<f32> = steps.iter().map(|step| number(step) as f32).collect();
            Tensor::from_slice(&numbers).to_device(v.device())
        };
        let wide = |number: &dyn Fn(&Step) -> f64| column(number).reshape([-1, 1, 1]);
        let of_v = wide(&|step| step.v);
        let moved = (&v - v_old) * &of_v; // D
        let drawn = x_next - (x_in * wide(&|step| step.x) + v_old * &of_v); // e
        let log_ratio = if self.guard {
            mean_of_each(&(&drawn * &moved)) / column(&|step| step.noise)
        } else {
            mean_of_each(&((&drawn * 2.0 - &moved) * &moved))
                * column(&|step| self.noise.precision(step))
        };
        // The divergence of two Gaussians of one width, a number.
        let divergence =
            mean_of_each(&moved.detach().square()) * column(&|step| self.noise.precision(step));
        let bound = match self.divergence {
            Some(limit) => Bound::Divergence(limit, &divergence),
            None => Bound::Clip(self.clip),
        };
        let (mut value, ratio) = bound.objective(&log_ratio, advantages);
        if self.guard {
            value /= column(&|step| step.t - step.t_next);
        }
        let mut means = Vec::new();
        if let Some(v_reference) = v_reference {
            let g_square = |step: &Step| match self.noise {
                Sde::Cps => step.noise.powi(2),
                Sde::Constant | Sde::Flow => step.noise.powi(2) / (step.t - step.t_next),
            };
            let away = mean_of_each(&((&v - v_reference) * &of_v).square());
            let divergence = away / column(&|step| 2.0 * g_square(step));
            means.push(("policy/kl", divergence.mean(Kind::Double).double_value(&[])));
            value -= divergence * self.kl;
        }
        value.mean(Kind::Float).backward();
        Objective { value: value.detach(), gradient: v.grad(), ratio: Some(ratio), means }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithm::cases::{SdeCase, cases, check, difference, latents, vector};

    fn transitions(case: &SdeCase) -> Transitions {
        let step = |(&t, &t_next): (&f64, &f64)| {
            case.settings.noise.step(case.settings.level, t, t_next, case.t_second)
        };
        Transitions {
            x_in: latents(&case.x_in),
            v_old: latents(&case.v_old),
            x_next: latents(&case.x_next),
            steps: case.t.iter().zip(&case.t_next).map(step).collect(),
            advantages: vector(&case.advantages),
            v_reference: (case.settings.kl > 0.0).then(|| latents(&case.v_reference)),
        }
    }

    fn log_ratio(objective: &Objective) -> Tensor {
        objective.ratio.as_ref().unwrap().log.shallow_clone()
    }

    #[test]
    fn objectives_are_those_of_the_papers() {
        for case in cases().sde {
            let found = case.settings.objective(&transitions(&case), &latents(&case.v));
            let of_ratio = difference(&log_ratio(&found), &case.log_ratio);
            assert!(of_ratio < 1e-5, "{:?}: {of_ratio:.1e}", case.settings);
            check(&found, &case.value, &case.gradient, &format!("{:?}", case.settings.noise));
        }
    }

    #[test]
    fn the_ratio_is_one_at_the_old_velocity_and_rises_with_the_objective() {
        for case in cases().sde.iter().filter(|case| case.settings.kl == 0.0) {
            let (transitions, v_old) = (transitions(case), latents(&case.v_old));
            let at_old = case.settings.objective(&transitions, &v_old);
            assert_eq!(log_ratio(&at_old).abs().max().double_value(&[]), 0.0);
            let ahead = &v_old + &at_old.gradient * 1e-3;
            let moved = log_ratio(&case.settings.objective(&transitions, &ahead));
            let with_advantage = moved * vector(&case.advantages);
            assert!(with_advantage.min().double_value(&[]) > 0.0, "{:?}", case.settings);
        }
    }
}
