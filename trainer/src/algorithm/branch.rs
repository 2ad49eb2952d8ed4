//! BranchGRPO (arXiv 2509.06040): GRPO on an SDE whose trajectories are a tree.
//!
//! A group starts as one trajectory; each split turns every one into two, until there are G leaves, one
//! image each. A node's reward is fused from its leaves'; its advantage is relative to the nodes of its
//! depth; and an edge trains with the advantage of the node it leads to. The objective at an edge is that
//! of [`super::sde`]. Node j of a depth with n nodes is on the way to leaves j·G/n up to (j + 1)·G/n.

use anyhow::{Result, ensure};
use flow::schedule::Grid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::sde::Policy;
use super::{Algorithm, Batch, Item, Method, Published, Setting, part, published};
use crate::group::GroupConfig;
use crate::group::advantage::{Advantages, Scored};
use crate::group::experience::{Experience, Sources, given};
use crate::group::rollout::Rollout;
use crate::group::seeds::{Use, family};
use crate::network::condition::Condition;
use crate::tensor::parameters::Parameters;

/// How a node's reward comes from its children's.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fusion {
    /// Their mean.
    Mean,
    /// Weighted by a softmax of the edges' log-probabilities.
    Probability,
}

/// Which edges after the last split do not train.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Width {
    /// None.
    All,
    /// Of each branch, all but the share of edges with the highest advantage.
    Best,
    /// Of the whole tree, all but the share with the highest and the lowest.
    Extremes,
}

/// Settings of the tree; those of its steps are `[sde]`'s.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BranchConfig {
    /// Steps (from 0) after which every trajectory is two; 2 to the number of them is `group_size`.
    /// Without it, as many as that takes, every third of 20 steps.
    #[serde(default)]
    pub splits: Option<Vec<usize>>,
    /// Factor on the noise of those steps.
    #[serde(default = "split_noise")]
    pub split_noise: f64,
    /// From leaves to nodes.
    #[serde(default = "fusion")]
    pub fusion: Fusion,
    /// Depths (from 1, the first step's) whose edges do not train.
    #[serde(default)]
    pub prune_depths: Vec<usize>,
    /// Iterations after which those move by one towards noise, until the last split.
    #[serde(default = "prune_interval")]
    pub prune_interval: usize,
    /// Edges after the last split that do not train.
    #[serde(default = "prune_width")]
    pub prune_width: Width,
    /// Share of those that do.
    #[serde(default = "prune_share")]
    pub prune_share: f64,
}

fn split_noise() -> f64 {
    4.0
}
fn fusion() -> Fusion {
    Fusion::Mean
}
fn prune_interval() -> usize {
    30
}
fn prune_width() -> Width {
    Width::All
}
fn prune_share() -> f64 {
    0.5
}

impl Default for BranchConfig {
    fn default() -> Self {
        Self {
            splits: None,
            split_noise: split_noise(),
            fusion: fusion(),
            prune_depths: Vec::new(),
            prune_interval: prune_interval(),
            prune_width: prune_width(),
            prune_share: prune_share(),
        }
    }
}

impl BranchConfig {
    pub(super) const PUBLISHED: &[Published] = published!["branch-grpo"];
}

impl Method for BranchConfig {
    fn reads(&self) -> &'static [&'static str] {
        &[
            "advantage",
            "updates",
            "sde.noise",
            "sde.level",
            "sde.clip",
            "sde.divergence",
            "sde.kl",
            "sde.guard",
            "sde.truncate",
            "branch",
        ]
    }

    fn leaves_unread(&self, key: &str) -> Option<&'static str> {
        match key {
            "branch.prune_interval" if self.prune_depths.is_empty() => {
                Some("without branch.prune_depths nothing moves")
            }
            "branch.prune_share" if self.prune_width == Width::All => {
                Some("branch.prune_width = \"all\" prunes nothing")
            }
            _ => None,
        }
    }

    fn validate(&self, setting: &Setting<'_>) -> Result<()> {
        setting.methods.sde.validate(setting)?;
        let config = setting.group;
        let (splits, n_steps) = (self.splits(config), config.rollout.steps);
        ensure!(
            1usize.checked_shl(splits.len() as u32) == Some(config.group_size),
            "branch.splits has {} steps: 2 to their number must be group_size = {}",
            splits.len(),
            config.group_size
        );
        ensure!(
            splits.windows(2).all(|pair| pair[0] < pair[1])
                && splits.last().is_some_and(|&last| last + 1 < n_steps),
            "branch.splits = {splits:?}: rising, and below the last of rollout.steps = {n_steps}"
        );
        let is_noise = self.split_noise > 0.0 && self.split_noise.is_finite();
        ensure!(is_noise, "branch.split_noise = {}: above 0", self.split_noise);
        ensure!(self.prune_interval > 0, "branch.prune_interval must be at least 1");
        ensure!(
            self.prune_depths.iter().all(|depth| (1..=n_steps).contains(depth)),
            "branch.prune_depths = {:?}: from 1 to rollout.steps = {n_steps}",
            self.prune_depths
        );
        let share = self.prune_share;
        ensure!(share > 0.0 && share <= 1.0, "branch.prune_share = {share}: in (0, 1]");
        Ok(())
    }

    fn open<'a>(&'a self, setting: Setting<'a>, grid: Grid) -> Box<dyn Algorithm + 'a> {
        Box::new(Branch::new(self, setting, grid))
    }
}

/// `BranchGRPO`.
struct Branch<'a> {
    setting: Setting<'a>,
    config: &'a BranchConfig,
    policy: Policy<'a>,
    splits: Vec<usize>,
    last_split: usize,
}

/// An edge of a tree: the step it is, and the node it leads to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Edge {
    step: usize,
    child: usize,
    advantage: f64,
}

impl<'a> Branch<'a> {
    fn new(config: &'a BranchConfig, setting: Setting<'a>, grid: Grid) -> Self {
        let splits = config.splits(setting.group);
        let last_split = splits.last().copied().unwrap_or(0);
        Self { setting, config, policy: Policy::new(setting, grid), splits, last_split }
    }

    /// Advantages of the nodes at which each noisy step of `group` arrives.
    fn advantages(&self, experience: &Experience, group: usize) -> Vec<Advantages> {
        let g = experience.group_size;
        let widths = experience.rollout.widths(g);
        let arrivals: Vec<usize> = widths[1..].to_vec();
        let edges: Vec<Option<Vec<f64>>> = (0..arrivals.len())
            .map(|step| {
                let weighs = self.config.fusion == Fusion::Probability;
                let splits = experience.rollout.splits.contains(&step);
                (weighs && splits).then(|| self.log_probs(experience, group, step, arrivals[step]))
            })
            .collect();
        let rewards = given(self.setting.group, &experience.scores[group]);
        let fused: Vec<Vec<Vec<f64>>> =
            rewards.iter().map(|reward| fuse(reward.scores, &arrivals, &edges)).collect();
        let at = |step: usize| {
            let width = arrivals[step];
            // A mean over more leaves is less noisy, and so is the floor below which it is noise.
            let share = (width as f64 / g as f64).sqrt();
            let scored: Vec<Scored<'_>> = rewards
                .iter()
                .zip(&fused)
                .map(|(reward, fused)| Scored {
                    weight: reward.weight,
                    std_floor: reward.std_floor * share,
                    scores: &fused[step],
                })
                .collect();
            self.setting.group.advantage.of_group(width, &scored)
        };
        (0..arrivals.len()).map(at).collect()
    }

    /// Log-probability, up to a constant, of the edges to the `width` nodes after `step`.
    fn log_probs(
        &self,
        experience: &Experience,
        group: usize,
        step: usize,
        width: usize,
    ) -> Vec<f64> {
        let call = &experience.trajectory.calls[step];
        let precision = self.setting.methods.sde.noise.precision(&call.step);
        let arrived = experience.trajectory.arrived(step);
        let log_prob = |child: usize| {
            let member = child * experience.group_size / width;
            let row = |all: &Tensor| experience.row(all, group, member);
            let mean = row(&call.x_t) * call.step.x + row(&call.v) * call.step.v;
            let square = (row(arrived) - mean).square().mean(Kind::Double);
            -precision * square.double_value(&[])
        };
        (0..width).map(log_prob).collect()
    }

    /// Depths whose edges do not train in `iteration`.
    fn pruned(&self, iteration: usize) -> Vec<usize> {
        let branch = self.config;
        let first = branch.prune_depths.iter().min().copied().unwrap_or(0);
        let moved = (iteration / branch.prune_interval).min(first.saturating_sub(self.last_split));
        branch.prune_depths.iter().map(|depth| depth - moved).collect()
    }

    /// The edges of a tree that train.
    fn edges(&self, advantages: &[Advantages], iteration: usize) -> Vec<Edge> {
        let pruned = self.pruned(iteration);
        let edges = advantages.iter().enumerate().flat_map(|(step, nodes)| {
            let edge = move |(child, &advantage)| Edge { step, child, advantage };
            nodes.values.iter().enumerate().map(edge)
        });
        let deep: Vec<Edge> = edges.filter(|edge| !pruned.contains(&(edge.step + 1))).collect();
        self.config.narrow(deep, self.last_split)
    }
}

/// Rewards of the nodes after each step from those of the leaves; `widths` counts the nodes, `edges`
/// holds their edges' log-probabilities where children are weighted by them.
fn fuse(leaves: &[f64], widths: &[usize], edges: &[Option<Vec<f64>>]) -> Vec<Vec<f64>> {
    let mut fused = vec![Vec::new(); widths.len()];
    let mut below = leaves.to_vec();
    for step in (0..widths.len()).rev() {
        if below.len() > widths[step] {
            let weights = edges[step + 1].as_deref();
            below = (0..widths[step]).map(|node| fuse_pair(&below, weights, 2 * node)).collect();
        }
        fused[step].clone_from(&below);
    }
    fused
}

/// The reward of the parent of nodes `left` and `left + 1`.
fn fuse_pair(rewards: &[f64], log_probs: Option<&[f64]>, left: usize) -> f64 {
    let share = log_probs.map_or(0.5, |edges| 1.0 / (1.0 + (edges[left + 1] - edges[left]).exp()));
    share * rewards[left] + (1.0 - share) * rewards[left + 1]
}

impl BranchConfig {
    fn splits(&self, config: &GroupConfig) -> Vec<usize> {
        let every = (3 * config.rollout.steps / 20).max(1);
        let evenly =
            || (0..config.group_size.ilog2() as usize).map(|index| index * every).collect();
        self.splits.clone().unwrap_or_else(evenly)
    }

    /// Prunes what comes after the step `last` of the last split.
    fn narrow(&self, edges: Vec<Edge>, last: usize) -> Vec<Edge> {
        let (mut kept, mut late): (Vec<Edge>, Vec<Edge>) =
            edges.into_iter().partition(|edge| edge.step <= last);
        late.sort_by(|a, b| b.advantage.total_cmp(&a.advantage));
        match self.prune_width {
            Width::All => kept.extend(late),
            Width::Best => {
                let mut branches: Vec<usize> = late.iter().map(|edge| edge.child).collect();
                branches.sort_unstable();
                branches.dedup();
                for branch in branches {
                    let edges: Vec<Edge> =
                        late.iter().filter(|edge| edge.child == branch).copied().collect();
                    let n = ((edges.len() as f64 * self.prune_share) as usize).max(1);
                    kept.extend(&edges[..n]);
                }
            }
            Width::Extremes => {
                let n = ((late.len() as f64 * self.prune_share) as usize).clamp(0, late.len());
                kept.extend(&late[..n / 2]);
                kept.extend(&late[late.len() - (n - n / 2)..]);
            }
        }
        kept
    }
}

impl Algorithm for Branch<'_> {
    fn rollout(&self, _: usize) -> Result<Rollout> {
        let (splits, split_noise) = (self.splits.clone(), self.config.split_noise);
        Ok(Rollout { splits, split_noise, ..self.policy.all_noisy()? })
    }

    fn updates(&self, experience: &Experience) -> Vec<Vec<Item>> {
        let n = self.setting.n_updates;
        let widths = experience.rollout.widths(experience.group_size);
        let trees: Vec<Vec<Item>> = experience
            .live()
            .into_iter()
            .map(|group| {
                let advantages = self.advantages(experience, group);
                let edges = self.edges(&advantages, experience.iteration);
                let stream = experience.first_group + group as u64;
                let order = family(self.setting.group.seed, Use::Branches);
                let order = order.choose(stream, edges.len(), edges.len());
                let item = |Edge { step, child, advantage }| {
                    let member = child * experience.group_size / widths[step + 1];
                    Item { group, member, call: step, advantage, draw: 0 }
                };
                order.into_iter().map(|index| item(edges[index])).collect()
            })
            .collect();
        (0..n)
            .map(|index| trees.iter().flat_map(|tree| part(tree, n, index)).copied().collect())
            .collect()
    }

    fn batch<'b>(
        &'b self,
        sources: &'b Sources<'_>,
        experience: &'b Experience,
        items: &'b [Item],
        condition: &Condition,
    ) -> Result<Batch<'b>> {
        self.policy.batch(sources, experience, items, condition)
    }

    fn n_trained(&self, rollout: &Rollout) -> usize {
        let widths = rollout.widths(self.setting.group.group_size);
        let nodes = |&width: &usize| Advantages { values: vec![0.0; width], is_flat: false };
        self.edges(&widths[1..].iter().map(nodes).collect::<Vec<Advantages>>(), 0).len()
    }

    fn n_references(&self) -> usize {
        self.policy.n_references()
    }

    fn begin(&mut self, trained: &Parameters) {
        self.policy.begin(trained);
    }
}

#[cfg(test)]
mod tests {
    use flow::schedule::Shift;

    use super::*;
    use crate::algorithm::cases::cases;
    use crate::group::advantage::AdvantageConfig;
    use crate::run::config::AlignConfig;
    use crate::run::settings::{ALIGN_PRESETS, Source, read};

    #[test]
    fn rewards_fuse_from_leaves_to_root_and_depths_compare() {
        for case in cases().tree {
            let edges: Vec<Option<Vec<f64>>> = case
                .log_probs
                .iter()
                .map(|edges| edges.clone().filter(|_| case.weighted))
                .collect();
            let found = fuse(&case.leaves, &case.arrivals, &edges);
            let compare: AdvantageConfig = toml::from_str("rescale = false").unwrap();
            for ((found, fused), advantages) in found.iter().zip(&case.fused).zip(&case.advantages)
            {
                let scored = Scored { weight: 1.0, std_floor: 1e-6, scores: found };
                let values = compare.of_group(found.len(), &[scored]).values;
                assert_eq!((found.len(), values.len()), (fused.len(), advantages.len()));
                let pairs = found.iter().zip(fused).chain(values.iter().zip(advantages));
                for (found, expected) in pairs {
                    assert!((found - expected).abs() < 1e-12, "{found} {expected}");
                }
            }
        }
    }

    fn config(settings: &[&str]) -> AlignConfig {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        read(&Source::Preset("branch-grpo"), &ALIGN_PRESETS, &settings).unwrap()
    }

    fn opened(config: &AlignConfig) -> Branch<'_> {
        Branch::new(&config.methods.branch, config.setting().unwrap(), Shift::Factor(3.0).into())
    }

    /// A tree of the preset's shape whose leaf i has advantage i.
    fn advantages(branch: &Branch<'_>) -> Vec<Advantages> {
        let widths = branch.rollout(0).unwrap().widths(16);
        let values = |&n: &usize| (0..n).map(|node| node as f64 * 16.0 / n as f64).collect();
        widths[1..].iter().map(|n| Advantages { values: values(n), is_flat: false }).collect()
    }

    #[test]
    fn every_edge_trains_unless_its_depth_is_pruned() {
        let whole = config(&[]);
        let branch = opened(&whole);
        assert_eq!(branch.splits, [0, 3, 6, 9]);
        // 2 nodes three times, 4, 8, and 16 ten times; the step to the image does not train.
        assert_eq!(branch.edges(&advantages(&branch), 0).len(), 3 * (2 + 4 + 8) + 16 * 10);
        let deep = config(&["branch.prune_depths=[15,16,17]"]);
        let branch = opened(&deep);
        assert_eq!(branch.pruned(29), [15, 16, 17]);
        assert_eq!(branch.pruned(60), [13, 14, 15]);
        assert_eq!(branch.pruned(100_000), [9, 10, 11]);
        assert_eq!(branch.edges(&advantages(&branch), 0).len(), 202 - 3 * 16);
    }

    #[test]
    fn width_is_pruned_after_the_last_split() {
        let late = |width: &str| {
            let config = config(&[width]);
            let branch = opened(&config);
            let edges = branch.edges(&advantages(&branch), 0);
            edges.into_iter().filter(|edge| edge.step > 9).collect::<Vec<Edge>>()
        };
        assert_eq!(late("branch.prune_width=all").len(), 9 * 16);
        let best = late("branch.prune_width=best");
        assert!((0..16).all(|leaf| best.iter().filter(|edge| edge.child == leaf).count() == 4));
        let extremes = late("branch.prune_width=extremes");
        assert_eq!(extremes.len(), 72);
        assert!(extremes.iter().all(|edge| !(4..12).contains(&edge.child)));
    }
}
