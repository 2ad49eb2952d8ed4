//! The updates of one iteration: the objective's gradient carried through the network, the optimiser
//! stepped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cluster::{Group, Reduce};
use flow::checkpoint::{Entry, write_tensors};
use tch::{Kind, Tensor};

use crate::algorithm::{Algorithm, CLIPPED, Item, Objective, Ratio};
use crate::group::experience::{Experience, Sources};
use crate::group::ranks::{self, Exact};
use crate::network::optimizer::{AdamW, StepReport};
use crate::run::config::AlignConfig;
use crate::tensor::stored::entry;

/// What the updates of an iteration did, of all ranks.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Means over its transitions, by metric; what a method does not have is not there.
    pub(crate) means: BTreeMap<String, f64>,
    /// Largest |log ρ| before the first update: 0 up to rounding, or something is wrong.
    pub(crate) log_ratio_first: Option<f64>,
    /// Largest |log ρ| of all updates.
    pub(crate) log_ratio_max: Option<f64>,
    /// What the optimiser says of the last update.
    pub(crate) last_step: Option<StepReport>,
    /// Optimiser steps made; 0 when every group was flat.
    pub(crate) n_updates: usize,
    /// Passes in images: forward and backward, and forward alone.
    pub(crate) n_passes: usize,
    pub(crate) n_references: usize,
    /// Seconds.
    pub(crate) seconds: f64,
}

impl Outcome {
    /// The share of all terms that the clip silenced, of an algorithm that has one.
    pub(crate) fn clipped(&self) -> Option<f64> {
        CLIPPED.into_iter().map(|name| self.means.get(name)).sum()
    }
}

/// Makes the updates of an iteration. All ranks make as many; one that has nothing to learn in one adds
/// nothing to its gradient.
///
/// # Errors
/// When something diverges; when `is_stopped` says that nobody waits for it, unless a step was made.
pub(crate) fn run(
    config: &AlignConfig,
    algorithm: &dyn Algorithm,
    sources: &Sources<'_>,
    optimizer: &mut AdamW,
    experience: &Experience,
    mut recorder: Option<&mut Recorder>,
    is_stopped: &dyn Fn() -> bool,
) -> Result<Outcome> {
    let started = Instant::now();
    let mut outcome = Outcome::default();
    let model = sources.model;
    let ranks = model.engine.trained().group();
    let updates: Vec<Vec<Item>> =
        algorithm.updates(experience).iter().map(|items| own(experience, items)).collect();
    let totals = totals(ranks, &updates)?;
    let n_updates = totals.iter().filter(|&&total| total > 0).count();
    let made = updates.iter().zip(totals).filter(|(_, total)| *total > 0);
    for (update, (items, total)) in made.enumerate() {
        let mut statistics = Statistics::default();
        for chunk in items.chunks(config.group.rollout.batch) {
            ranks.check()?;
            ensure!(update > 0 || !is_stopped(), "stopped before the first step of the optimiser");
            let condition = experience.conditions(chunk.iter().map(|item| item.group));
            let batch = algorithm.batch(sources, experience, chunk, &condition)?;
            let share = chunk.len() as f64 / total as f64;
            let (objective, tensors) = (batch.objective, batch.tensors);
            model.engine.forward_backward(&batch.x_in, &batch.t_in, &condition, |v| {
                let objective = objective(v)?;
                statistics.add(&objective, share);
                if let Some(recorder) = recorder.as_deref_mut() {
                    recorder.keep(experience, chunk, tensors, v, &objective);
                }
                // The optimiser minimises.
                Ok(objective.gradient * -share)
            })?;
        }
        model.engine.attend()?;
        let statistics = statistics.of_all(ranks)?;
        if update == 0 {
            outcome.log_ratio_first = statistics.log_ratio_max;
            statistics.check_first(model.engine.kind())?;
        }
        let report = optimizer.step(&[model.engine.trained()], 1.0)?;
        outcome.last_step = Some(report);
        outcome.n_updates += 1;
        outcome.n_passes += total;
        outcome.n_references += total * algorithm.n_references();
        statistics.into_mean(&mut outcome, n_updates as f64);
    }
    model.engine.forget();
    outcome.seconds = started.elapsed().as_secs_f64();
    Ok(outcome)
}

/// Of `items`, group after group, what this rank learns from; another one that shares the group has the rest.
fn own(experience: &Experience, items: &[Item]) -> Vec<Item> {
    let groups = items.chunk_by(|a, b| a.group == b.group);
    groups.flat_map(|items| experience.division.part(items[0].group, items)).copied().collect()
}

/// Transitions of each update, of all ranks.
fn totals(ranks: &Group, updates: &[Vec<Item>]) -> Result<Vec<usize>> {
    let counts: Vec<i64> = updates.iter().map(|items| items.len() as i64).collect();
    let mut totals = Tensor::from_slice(&counts);
    ranks.all_reduce(&mut totals, Reduce::Sum).context("counting what trains")?;
    Ok(Vec::<i64>::try_from(&totals)?.into_iter().map(|total| total as usize).collect())
}

/// How many times as far bf16 may be off before the first update: its kernels round batches of other sizes apart, and
/// what stays within a clip's width does no harm.
const BF16_SLACK: f64 = 10.0;

/// Sums over the transitions of one update.
#[derive(Default)]
struct Statistics {
    means: BTreeMap<String, f64>,
    log_ratio_max: Option<f64>,
    tolerance: f64,
}

impl Statistics {
    fn add(&mut self, objective: &Objective, share: f64) {
        let mean = |x: &Tensor| x.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        let mut put = |name: &str, value: f64| {
            *self.means.entry(name.to_owned()).or_default() += share * value;
        };
        put("policy/objective", mean(&objective.value));
        for &(name, value) in &objective.means {
            put(name, value);
        }
        let Some(Ratio { log, silenced, tolerance, .. }) = &objective.ratio else { return };
        for (name, silenced) in CLIPPED.into_iter().zip(silenced) {
            put(name, mean(silenced));
        }
        let largest = log.abs().max().double_value(&[]);
        self.log_ratio_max = Some(self.log_ratio_max.unwrap_or(0.0).max(largest));
        self.tolerance = *tolerance;
    }

    /// Those of all ranks together.
    fn of_all(self, ranks: &Group) -> Result<Self> {
        if ranks.world() == 1 {
            return Ok(self);
        }
        let own: Vec<(&String, Exact)> =
            self.means.iter().map(|(name, &value)| (name, value.into())).collect();
        let own = serde_json::to_value((
            own,
            self.log_ratio_max.map(Exact::from),
            Exact::from(self.tolerance),
        ))?;
        let mut sum = Self::default();
        for told in ranks::all(ranks, &own)? {
            let (means, log_ratio_max, tolerance): (Vec<(String, Exact)>, Option<Exact>, Exact) =
                serde_json::from_value(told)?;
            for (name, value) in means {
                *sum.means.entry(name).or_default() += f64::from(value);
            }
            if let Some(largest) = log_ratio_max.map(f64::from) {
                let before = sum.log_ratio_max.unwrap_or(0.0);
                // `f64::max` would drop a ratio that is not a number.
                let largest = if largest.is_nan() { largest } else { largest.max(before) };
                sum.log_ratio_max = Some(largest);
            }
            sum.tolerance = sum.tolerance.max(f64::from(tolerance));
        }
        Ok(sum)
    }

    /// Before the first update nothing has changed since the rollout, and every ratio is 1.
    fn check_first(&self, kind: Kind) -> Result<()> {
        let slack = if kind == Kind::BFloat16 { BF16_SLACK } else { 1.0 };
        let (limit, largest) = (self.tolerance * slack, self.log_ratio_max.unwrap_or(0.0));
        ensure!(
            largest <= limit,
            "|log ratio| is {largest:.1e} before the first update, above {limit:.0e}: the network does \
             not repeat the rollout's velocities (lower rollout.batch so that rollout and update batches \
             are alike, or use a wider type)"
        );
        Ok(())
    }

    fn into_mean(self, outcome: &mut Outcome, n_updates: f64) {
        for (name, value) in self.means {
            *outcome.means.entry(name).or_default() += value / n_updates;
        }
        let largest = |a: f64, b: Option<f64>| Some(a.max(b.unwrap_or(0.0)));
        if let Some(found) = self.log_ratio_max {
            outcome.log_ratio_max = largest(found, outcome.log_ratio_max);
        }
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
        tensors: Vec<(&'static str, Tensor)>,
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
        self.tensors = tensors;
        self.tensors.extend([
            ("v_theta", v_theta.shallow_clone()),
            ("rewards", Tensor::stack(&rewards, 0)),
            ("objective", objective.value.shallow_clone()),
            ("gradient", objective.gradient.shallow_clone()),
        ]);
        if let Some(ratio) = &objective.ratio {
            self.tensors.push(("log_rho", ratio.log.shallow_clone()));
        }
    }

    /// Writes what was kept: `v_theta` `[M, S, C]`, `rewards` `[M, rewards, G]`, `objective` `[M]`, the
    /// `gradient` `[M, S, C]` of its mean, `log_rho` where there are ratios, and what the algorithm
    /// computes from. Of Neighbor GRPO that is `x_in`, `v_old` `[M, S, C]`, `t_in`, `t_next` `[M]`,
    /// `candidates` `[M, G, S, C]` and `advantages` `[M, G]`. The configuration is JSON in the metadata.
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

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};
    use std::thread::{self, ThreadId};
    use std::time::Duration;

    use flow::prompts::Prompt;

    use super::*;
    use crate::algorithm;
    use crate::algorithm::cases::follows_rewards;
    use crate::group::experience::{Sources, Stage, Watch, gather};
    use crate::reward::{Rewards, tiny};
    use crate::run::settings::{ALIGN_PRESETS, Source, read};
    use crate::tensor::device::Compute;

    const SETTINGS: [&str; 7] = [
        "rewards=[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]",
        "group_size=4",
        "updates=1",
        "rollout.steps=6",
        "rollout.size=[32, 32]",
        "optimizer.learning_rate=1e-5",
        "optimizer.eps=1e-12",
    ];

    fn config(more: &[&str]) -> AlignConfig {
        let model =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-flux/pipeline");
        let model = format!("model={}", model.display());
        let settings: Vec<String> =
            [&SETTINGS[..], more, &[&model]].concat().iter().map(|&s| s.to_owned()).collect();
        let config: AlignConfig =
            read(&Source::Preset("signs"), &ALIGN_PRESETS, &settings).unwrap();
        config.validate().unwrap();
        config
    }

    /// How far the present weights have gone where `items` want them: the sum of A·log ρ, or J where there
    /// are no ratios.
    fn progress(
        algorithm: &dyn Algorithm,
        sources: &Sources<'_>,
        experience: &Experience,
        items: &[Item],
    ) -> f64 {
        let condition = experience.conditions(items.iter().map(|item| item.group));
        let batch = algorithm.batch(sources, experience, items, &condition).unwrap();
        let v = sources.model.engine.velocity(&batch.x_in, &batch.t_in, &condition).unwrap();
        let is_advantages = |(name, _): &&(&str, Tensor)| *name == "advantages";
        let advantages = batch.tensors.iter().find(is_advantages).map(|(_, values)| values);
        let objective = (batch.objective)(&v).unwrap();
        let wanted = match objective.ratio {
            Some(Ratio { log, .. }) => log * advantages.unwrap(),
            None => objective.value,
        };
        wanted.sum(Kind::Double).double_value(&[])
    }

    /// Holds scores back until the second group rolls out.
    struct Gate {
        gatherer: ThreadId,
        rollouts: Mutex<usize>,
        changed: Condvar,
    }

    impl Watch for Gate {
        fn enter(&self, stage: Stage) -> Result<()> {
            *self.rollouts.lock().unwrap() += usize::from(stage == Stage::Rollout);
            self.changed.notify_all();
            Ok(())
        }

        fn is_stopped(&self) -> bool {
            if thread::current().id() == self.gatherer {
                return false;
            }
            // Once as it begins, and once a group.
            let (rollouts, patience) = (self.rollouts.lock().unwrap(), Duration::from_mins(2));
            let waited = self.changed.wait_timeout_while(rollouts, patience, |n| *n < 3).unwrap();
            waited.1.timed_out()
        }
    }

    #[test]
    fn a_group_is_scored_while_the_next_one_rolls_out() {
        let config = config(&["rollout.batch=4"]);
        let model = config.load(Compute::CPU, &Group::alone()).unwrap();
        let size = model.latent_size(config.group.rollout.size).unwrap();
        let grid = config.group.rollout.grid(&model.pipeline.scheduler, &size);
        let rollout = || config.setting().unwrap().open(grid).rollout(0).unwrap();
        let rewards = Rewards::open(&config.group.rewards, 1, tch::Device::Cpu).unwrap();
        let prompts = ["red \"CAT\"", "blue \"DOG\""].map(Prompt::new);
        let (gatherer, rollouts) = (thread::current().id(), Mutex::default());
        let watch = Gate { gatherer, rollouts, changed: Condvar::new() };
        let (group, model, rewards) = (&config.group, &model, &rewards);
        let sources = Sources { config: group, model, rewards, size, watch: &watch };
        let found = gather(&sources, rollout(), &prompts.each_ref(), 0).unwrap();
        let alone = Sources { watch: &(), ..sources };
        // A group a call: the images are those of either group alone.
        let first = gather(&alone, rollout(), &[&prompts[0]], 0).unwrap();
        assert_eq!(found.scores.len(), 2);
        let scores = |experience: &Experience| experience.scores[0].outcomes[0].scores.clone();
        assert_eq!(scores(&found), scores(&first));
        assert_ne!(found.scores[1].outcomes[0].scores, scores(&first));
    }

    /// After an update, what the objective wants has become more probable.
    #[test]
    fn every_algorithm_climbs() {
        let prompt = Prompt::new("red \"CAT\"");
        let others: [&[&str]; 5] = [
            // With one update their ratio is 1 whatever happens.
            &["algorithm=v-grpo", "updates=2"],
            &["algorithm=awm", "updates=2", "train_steps=3"],
            &["algorithm=dance-grpo", "sde.truncate=true", "anchors=2"],
            &["algorithm=flow-grpo", "sde.guard=true", "sde.kl=0.01"],
            &["algorithm=branch-grpo", "branch.fusion=probability", "branch.prune_width=extremes"],
        ];
        let (_weights, clip) = tiny::clip();
        // What follows a reward's gradient needs one that has it.
        let rewards = |name: &str| follows_rewards(name).then(|| clip.clone());
        let named: Vec<Vec<String>> = algorithm::all()
            .filter(|(name, _)| !["v-grpo", "awm"].contains(name))
            .map(|(name, _)| {
                [format!("algorithm={name}")].into_iter().chain(rewards(name)).collect()
            })
            .collect();
        let named: Vec<Vec<&str>> =
            named.iter().map(|settings| settings.iter().map(String::as_str).collect()).collect();
        for settings in named.iter().map(|settings| &settings[..]).chain(others) {
            let config = config(settings);
            let model = config.load(Compute::CPU, &Group::alone()).unwrap();
            let size = model.latent_size(config.group.rollout.size).unwrap();
            let grid = config.group.rollout.grid(&model.pipeline.scheduler, &size);
            let mut algorithm = config.setting().unwrap().open(grid);
            algorithm.begin(model.engine.trained());
            let rewards = Rewards::open(&config.group.rewards, 1, tch::Device::Cpu).unwrap();
            let (model, watch) = (&model, &());
            let (group, rewards) = (&config.group, &rewards);
            let sources = Sources { config: group, model, rewards, size, watch };
            let rollout = algorithm.rollout(0).unwrap();
            let n_trained = algorithm.n_trained(&rollout);
            let experience = gather(&sources, rollout, &[&prompt], 0).unwrap();
            let items = algorithm.updates(&experience).concat();
            assert_eq!(items.len(), n_trained, "{settings:?}");
            let mut optimizer = AdamW::new(config.optimizer.clone(), &[model.engine.trained()]);
            let before = progress(&*algorithm, &sources, &experience, &items);
            let outcome =
                run(&config, &*algorithm, &sources, &mut optimizer, &experience, None, &|| false)
                    .unwrap();
            let after = progress(&*algorithm, &sources, &experience, &items);
            let made = (outcome.n_updates, outcome.n_passes);
            assert_eq!(made, (config.training.updates.unwrap(), items.len()), "{settings:?}");
            assert!(after > before, "{settings:?}: {before:e} {after:e}");
            let name = &*config.training.algorithm;
            let has_ratio = !["diffusion-nft", "dgpo"].contains(&name) && !follows_rewards(name);
            assert_eq!(outcome.log_ratio_first.is_some(), has_ratio, "{settings:?}");
            if has_ratio {
                assert!(before.abs() < 1e-3 * after, "{settings:?}: {before:e} {after:e}");
            }
        }
    }
}
