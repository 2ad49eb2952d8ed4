//! The reward's own gradient, through the image and one pass of the network: ReFL (arXiv 2304.05977) and DRaFT-LV
//! (arXiv 2309.17400), for rewards that are networks.
//!
//! From a state x_t the network predicts the image, which is decoded by D and scored:
//!
//! ```text
//! x̂0 = x_t − t·v_θ
//! J  = min(Σ_k w_k·r_k(D(x̂0)), c),   dJ/dv = −t·dJ/dx̂0
//! ```
//!
//! ReFL takes a late state of the image's own trajectory, drawn anew for each image. DRaFT-LV noises the finished image
//! to the time of its last step, several times: the same slope with less variance. Nothing of a group is compared; its
//! members are images of one prompt.

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::forward::Noised;
use super::{
    Algorithm, Batch, Item, Method, Objective, Published, Setting, numbers, part, published, stack,
};
use crate::group::experience::{Experience, Sources};
use crate::group::rollout::{Rollout, Start};
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;

/// The state from which an image is predicted.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// A late one of its trajectory.
    Trajectory,
    /// The finished image, noised to the time of the last step.
    Noised,
}

/// Settings of direct gradients.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DirectConfig {
    /// The state from which an image is predicted.
    #[serde(default = "from")]
    pub from: From,
    /// Share of a trajectory's steps, its last ones, of which one is drawn.
    #[serde(default = "late")]
    pub late: f64,
    /// Draws of each image: of steps, or of noise.
    #[serde(default = "draws")]
    pub draws: usize,
    /// c: an image whose weighted rewards sum up to more teaches nothing more.
    #[serde(default)]
    pub ceiling: Option<f64>,
}

fn from() -> From {
    From::Trajectory
}
fn late() -> f64 {
    0.25
}
fn draws() -> usize {
    1
}

impl Default for DirectConfig {
    fn default() -> Self {
        Self { from: from(), late: late(), draws: draws(), ceiling: None }
    }
}

/// Most draws that are no slip of the hand.
const MAX_DRAWS: usize = 1000;

impl DirectConfig {
    pub(super) const PUBLISHED: &[Published] = published!["refl", "draft-lv"];
}

impl Method for DirectConfig {
    fn reads(&self) -> &'static [&'static str] {
        &["updates", "rollout.solver", "direct"]
    }

    fn leaves_unread(&self, key: &str) -> Option<&'static str> {
        let is_noised = self.from == From::Noised;
        (is_noised && key == "direct.late")
            .then_some("direct.from = \"noised\" takes the last step")
    }

    fn validate(&self, setting: &Setting<'_>) -> Result<()> {
        let Self { late, draws, ceiling, .. } = *self;
        ensure!(late > 0.0 && late <= 1.0, "direct.late = {late}: above 0, at most 1");
        ensure!((1..=MAX_DRAWS).contains(&draws), "direct.draws = {draws}: from 1 to {MAX_DRAWS}");
        ensure!(
            ceiling.is_none_or(f64::is_finite),
            "direct.ceiling = {ceiling:?}: a finite number"
        );
        let trained = || setting.group.rewards.iter().filter(|reward| reward.weight != 0.0);
        ensure!(trained().next().is_some(), "rewards: one with a weight is needed");
        for reward in trained() {
            ensure!(
                reward.kind.is_network(),
                "reward {:?} has no gradient to follow: kinds hpsv2, pickscore, clip, image-reward and aesthetic \
                 have one; give it weight = 0, or choose an algorithm that compares images",
                reward.name
            );
        }
        Ok(())
    }

    fn follows_rewards(&self) -> bool {
        true
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Direct { setting, config: self, grid })
    }
}

/// Learning from gradients of rewards.
struct Direct<'a> {
    setting: Setting<'a>,
    config: &'a DirectConfig,
    grid: Grid,
}

impl Direct<'_> {
    /// Network calls of which one is drawn, of `n` in all.
    fn possible(&self, n: usize) -> Vec<usize> {
        let n_late = match self.config.from {
            From::Trajectory => (n as f64 * self.config.late).round().max(1.0) as usize,
            From::Noised => 1,
        };
        (n - n_late..n).collect()
    }

    /// J of one predicted image `[1, S, C]` of `group`, and its gradient.
    fn reward(
        &self,
        sources: &Sources<'_>,
        experience: &Experience,
        group: usize,
        x0: &Tensor,
    ) -> Result<(f64, Tensor)> {
        let mut value = 0.0;
        let gradient = sources.model.decode_back(x0, &experience.size, |pixels| {
            let image = pixels / 2.0 + 0.5;
            // What lies outside of an image's range is cut off and has no slope.
            let is_inside = image.ge(0.0).logical_and(&image.le(1.0));
            let (sum, slope) =
                sources.rewards.gradient(&experience.prompts[group], &image.clamp(0.0, 1.0))?;
            let ceiling = self.config.ceiling.unwrap_or(f64::INFINITY);
            value = sum.min(ceiling);
            let follows = if sum < ceiling { 0.5 } else { 0.0 };
            Ok(slope * is_inside * follows)
        })?;
        Ok((value, gradient))
    }
}

impl Algorithm for Direct<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        Ok(Rollout::apart(Start::Independent, self.setting.group.rollout.steps(self.grid)?))
    }

    /// Every image trains, those of groups whose rewards are alike, too.
    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let Setting { group: config, n_updates, .. } = self.setting;
        let possible = self.possible(experience.trajectory.calls.len());
        let steps = family(config.seed, Use::Steps);
        let everybody: Vec<usize> = (0..experience.group_size).collect();
        let n_draws = self.config.draws as u64;
        let item = |group: usize, member: usize, draw: u64| {
            let stream = experience.stream(group, member) * n_draws + draw;
            let call = possible[steps.choose(stream, possible.len(), 1)[0]];
            let advantage = experience.advantages[group].values[member];
            Item { group, member, call, advantage, draw }
        };
        let of_update = |update: usize| {
            let mut items = Vec::new();
            for group in experience.held() {
                for &member in part(&everybody, n_updates, update) {
                    items.extend((0..n_draws).map(|draw| item(group, member, draw)));
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
        _: &Condition,
    ) -> Result<Batch<'b>> {
        let calls = &experience.trajectory.calls;
        let (x_in, t_in) = match self.config.from {
            From::Trajectory => {
                let state =
                    |item: &Item| experience.row(&calls[item.call].x_t, item.group, item.member);
                let x_in = stack(items, state);
                let t_in = numbers(items, &x_in, |item| calls[item.call].step.t);
                (x_in, t_in)
            }
            From::Noised => {
                let Noised { x_t, t, .. } =
                    Noised::new(&self.setting, sources.model, experience, items, false);
                (x_t, t)
            }
        };
        let (x, t) = (x_in.shallow_clone(), t_in.reshape([-1, 1, 1]));
        let objective = move |v: &Tensor| {
            let x0 = &x - v * &t;
            let mut values = Vec::with_capacity(items.len());
            let mut slopes = Vec::with_capacity(items.len());
            // One after the other: an image's way back through the decoder holds much memory.
            for (item, x0) in items.iter().zip(x0.split(1, 0)) {
                let (value, slope) = self.reward(sources, experience, item.group, &x0)?;
                values.push(value as f32);
                slopes.push(slope);
            }
            let n = items.len() as f64;
            let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / n;
            Ok(Objective {
                value: Tensor::from_slice(&values).to_device(v.device()),
                gradient: Tensor::cat(&slopes, 0).to_kind(Kind::Float) * &t * (-1.0 / n),
                ratio: None,
                means: vec![("policy/reward", mean)],
            })
        };
        Ok(Batch {
            tensors: vec![("x_in", x_in.shallow_clone()), ("t_in", t_in.shallow_clone())],
            x_in,
            t_in,
            objective: Box::new(objective),
        })
    }

    fn n_trained(&self, _: &Rollout) -> usize {
        self.setting.group.group_size * self.config.draws
    }
}
