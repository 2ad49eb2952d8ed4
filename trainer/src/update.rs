//! The updates of one iteration: anchors and steps drawn, the objective's gradient carried through the
//! network, the optimiser stepped.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use flow::checkpoint::{Entry, write_tensors};
use tch::{Kind, Tensor};

use crate::align::AlignConfig;
use crate::experience::Experience;
use crate::model::Model;
use crate::neighbor::{Objective, Transitions};
use crate::optimizer::AdamW;
use crate::parameters::entry;
use crate::seeds::{Use, family};

/// What the updates of an iteration did; means over its transitions unless said otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// J.
    pub(crate) objective: f64,
    /// Largest |log ρ| before the first update: 0 up to rounding, or something is wrong.
    pub(crate) log_ratio_first: f64,
    /// Largest |log ρ| of all updates.
    pub(crate) log_ratio_max: f64,
    /// Share of ratios above 1 + ε with a positive advantage, and below 1 − ε with a negative one:
    /// those the clip silences.
    pub(crate) clip_fraction: [f64; 2],
    /// Largest probability of the old surrogate policy: that of staying on the anchor.
    pub(crate) p_anchor: f64,
    /// Entropy of the old surrogate policy, nats.
    pub(crate) entropy: f64,
    /// Global gradient norm, last update.
    pub(crate) grad_norm: f64,
    /// Share of parameters whose gradient is below Adam's eps, last update.
    pub(crate) below_eps: f64,
    /// Optimiser steps made; 0 when every group was flat.
    pub(crate) n_updates: usize,
    /// Forward and backward passes, in images.
    pub(crate) n_passes: usize,
    /// Seconds.
    pub(crate) seconds: f64,
}

/// One trained transition: a group, its anchor (a member), a network call of the rollout.
#[derive(Clone, Copy)]
struct Item {
    group: usize,
    anchor: usize,
    call: usize,
}

/// Makes the updates of `iteration`.
pub(crate) fn run(
    config: &AlignConfig,
    model: &Model,
    optimizer: &mut AdamW,
    experience: &Experience,
    iteration: usize,
    mut recorder: Option<&mut Recorder>,
) -> Result<Outcome> {
    let started = Instant::now();
    let mut outcome = Outcome::default();
    let live: Vec<usize> =
        (0..experience.advantages.len()).filter(|&g| !experience.advantages[g].is_flat).collect();
    if live.is_empty() {
        return Ok(outcome);
    }
    let draws = Draws::new(config, experience);
    let per_update = config.anchors / config.updates;
    for update in 0..config.updates {
        let slots = update * per_update..(update + 1) * per_update;
        let items: Vec<Item> = live.iter().flat_map(|&g| draws.items(g, slots.clone())).collect();
        let mut statistics = Statistics::default();
        for chunk in items.chunks(config.rollout.batch) {
            let transitions = collect(config, experience, chunk);
            let groups: Vec<i64> = chunk.iter().map(|item| item.group as i64).collect();
            let groups = Tensor::from_slice(&groups).to_device(model.device());
            let condition = experience.condition.rows(&groups);
            let share = chunk.len() as f64 / items.len() as f64;
            model.engine.forward_backward(&transitions.x_in, &transitions.t_in, &condition, |v| {
                let objective = config.neighbor.objective(&transitions, v);
                statistics.add(config, &transitions, &objective, share);
                if let Some(recorder) = recorder.as_deref_mut() {
                    recorder.keep(experience, chunk, &transitions, v, &objective);
                }
                // The optimiser minimises.
                objective.gradient * -share
            });
        }
        if update == 0 {
            outcome.log_ratio_first = statistics.log_ratio_max;
            let limit = config.neighbor.clip / 10.0;
            ensure!(
                statistics.log_ratio_max <= limit,
                "iteration {}: |log ratio| is {:.1e} before the first update, above {limit:.0e}: the \
                 network does not repeat the rollout's velocities (lower rollout.batch so that rollout and \
                 update batches are alike, or use a wider type)",
                iteration + 1,
                statistics.log_ratio_max,
            );
        }
        let report = optimizer.step(&[model.engine.trained()], 1.0)?;
        (outcome.grad_norm, outcome.below_eps) = (report.grad_norm, report.below_eps);
        outcome.n_updates += 1;
        outcome.n_passes += items.len();
        statistics.into_mean(&mut outcome, config.updates as f64);
    }
    outcome.seconds = started.elapsed().as_secs_f64();
    Ok(outcome)
}

/// Anchors and steps of each group, drawn from the run's seed and the group's number.
struct Draws {
    anchors: Vec<Vec<usize>>,
    calls: Vec<Vec<usize>>,
}

impl Draws {
    fn new(config: &AlignConfig, experience: &Experience) -> Self {
        let transitions = experience.trajectory.transitions();
        let possible = &transitions[..transitions.len() - 1];
        let (of_anchors, of_steps) =
            (family(config.seed, Use::Anchors), family(config.seed, Use::Steps));
        let groups = (experience.first_group..).take(experience.advantages.len());
        let (anchors, calls) = groups
            .map(|group| {
                let steps = of_steps.choose(group, possible.len(), config.n_train_steps());
                let anchors = of_anchors.choose(group, config.group_size, config.anchors);
                (anchors, steps.into_iter().map(|step| possible[step]).collect())
            })
            .unzip();
        Self { anchors, calls }
    }

    fn items(&self, group: usize, slots: std::ops::Range<usize>) -> Vec<Item> {
        let calls = &self.calls[group];
        self.anchors[group][slots]
            .iter()
            .flat_map(|&anchor| calls.iter().map(move |&call| Item { group, anchor, call }))
            .collect()
    }
}

fn collect(config: &AlignConfig, experience: &Experience, items: &[Item]) -> Transitions {
    let (trajectory, g) = (&experience.trajectory, config.group_size as i64);
    let device = trajectory.x0.device();
    let row = |item: &Item| item.group as i64 * g + item.anchor as i64;
    let stack = |pick: &dyn Fn(&Item) -> Tensor| {
        Tensor::stack(&items.iter().map(pick).collect::<Vec<Tensor>>(), 0)
    };
    let times = |time: &dyn Fn(&Item) -> f64| {
        let times: Vec<f32> = items.iter().map(|item| time(item) as f32).collect();
        Tensor::from_slice(&times).to_device(device)
    };
    let advantages: Vec<f32> = items
        .iter()
        .flat_map(|item| experience.advantages[item.group].values.iter().map(|&a| a as f32))
        .collect();
    Transitions {
        x_in: stack(&|item| trajectory.calls[item.call].x_t.get(row(item))),
        v_old: stack(&|item| trajectory.calls[item.call].v.get(row(item))),
        t_in: times(&|item| trajectory.calls[item.call].t),
        t_next: times(&|item| trajectory.calls[item.call].t_next),
        candidates: stack(&|item| {
            trajectory.arrived(item.call).narrow(0, item.group as i64 * g, g)
        }),
        advantages: Tensor::from_slice(&advantages).reshape([-1, g]).to_device(device),
    }
}

/// Sums over the transitions of one update.
#[derive(Default)]
struct Statistics {
    objective: f64,
    log_ratio_max: f64,
    clip_fraction: [f64; 2],
    p_anchor: f64,
    entropy: f64,
}

impl Statistics {
    fn add(
        &mut self,
        config: &AlignConfig,
        transitions: &Transitions,
        objective: &Objective,
        share: f64,
    ) {
        let mean = |x: &Tensor| x.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let ratio = objective.log_ratio.exp();
        let (advantages, clip) = (&transitions.advantages, config.neighbor.clip);
        let high = ratio.gt(1.0 + clip).logical_and(&advantages.gt(0.0));
        let low = ratio.lt(1.0 - clip).logical_and(&advantages.lt(0.0));
        let policy = objective.log_policy.exp();
        let dims: &[i64] = &[1];
        let entropy = (&policy * &objective.log_policy).sum_dim_intlist(dims, false, Kind::Double);
        self.objective += share * mean(&objective.value);
        self.log_ratio_max =
            self.log_ratio_max.max(objective.log_ratio.abs().max().double_value(&[]));
        self.clip_fraction[0] += share * mean(&high);
        self.clip_fraction[1] += share * mean(&low);
        self.p_anchor += share * mean(&policy.amax(dims, false));
        self.entropy -= share * mean(&entropy);
    }

    fn into_mean(self, outcome: &mut Outcome, n_updates: f64) {
        outcome.objective += self.objective / n_updates;
        outcome.log_ratio_max = outcome.log_ratio_max.max(self.log_ratio_max);
        outcome.clip_fraction[0] += self.clip_fraction[0] / n_updates;
        outcome.clip_fraction[1] += self.clip_fraction[1] / n_updates;
        outcome.p_anchor += self.p_anchor / n_updates;
        outcome.entropy += self.entropy / n_updates;
    }
}

/// Keeps the tensors of the last update of an iteration, so that anyone can recompute it.
pub(crate) struct Recorder {
    path: PathBuf,
    config: String,
    tensors: Vec<(&'static str, Tensor)>,
}

impl Recorder {
    pub(crate) fn new(path: &Path, config: &AlignConfig) -> Self {
        let config = serde_json::to_string(config).unwrap_or_default();
        Self { path: path.to_owned(), config, tensors: Vec::new() }
    }

    fn keep(
        &mut self,
        experience: &Experience,
        items: &[Item],
        transitions: &Transitions,
        v_theta: &Tensor,
        objective: &Objective,
    ) {
        let rewards: Vec<Tensor> = items
            .iter()
            .map(|item| {
                let outcomes = &experience.scores[item.group].outcomes;
                let rows: Vec<Tensor> = outcomes
                    .iter()
                    .filter_map(|outcome| outcome.scores.as_deref().map(Tensor::from_slice))
                    .collect();
                Tensor::stack(&rows, 0)
            })
            .collect();
        self.tensors = vec![
            ("x_in", transitions.x_in.shallow_clone()),
            ("v_old", transitions.v_old.shallow_clone()),
            ("v_theta", v_theta.shallow_clone()),
            ("t_in", transitions.t_in.shallow_clone()),
            ("t_next", transitions.t_next.shallow_clone()),
            ("candidates", transitions.candidates.shallow_clone()),
            ("rewards", Tensor::stack(&rewards, 0)),
            ("advantages", transitions.advantages.shallow_clone()),
            ("log_rho", objective.log_ratio.shallow_clone()),
            ("objective", objective.value.shallow_clone()),
            ("gradient", objective.gradient.shallow_clone()),
        ];
    }

    /// Writes what was kept: `x_in`, `v_old`, `v_theta` `[M, S, C]`, `t_in`, `t_next` `[M]`, `candidates`
    /// `[M, G, S, C]`, `rewards` `[M, rewards, G]`, `advantages`, `log_rho` `[M, G]`, `objective` `[M]`
    /// and `gradient` `[M, S, C]` of its mean; the configuration as JSON in the metadata.
    pub(crate) fn write(&self) -> Result<()> {
        ensure!(
            !self.tensors.is_empty(),
            "--record-update: every group was flat, nothing to record"
        );
        let entries = self
            .tensors
            .iter()
            .map(|(name, tensor)| entry(name, tensor))
            .collect::<Result<Vec<Entry<'_>>>>()?;
        Ok(write_tensors(&self.path, &entries, &[("config", self.config.clone())])?)
    }
}
