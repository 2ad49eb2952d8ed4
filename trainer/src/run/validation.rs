//! Held-out prompts, drawn while a run goes on from the same noise every time, and scored by its rewards and by
//! judges that train nothing.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Error, Result, bail, ensure};
use cluster::Group;
use flow::latents::LatentSize;
use flow::prompts::Prompt;
use flow::solver::Step;
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::Device;

use super::config::AlignConfig;
use super::interrupt;
use super::ready::Ready;
use super::report::sample;
use crate::algorithm::Copies;
use crate::group::ranks::{self, Exact};
use crate::group::rollout::RolloutConfig;
use crate::network::model::Model;
use crate::network::optimizer::AdamW;
use crate::reward::{RewardConfig, RewardKind, Rewards};

/// How a run is watched on prompts that it does not train on.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Held-out prompts; those of the sheets where it is left out.
    #[serde(default)]
    pub prompts: Option<PathBuf>,
    /// Prompts that are drawn, the first of the file, an image each; image i starts from the noise of seed i, as in
    /// `ng-train eval`.
    #[serde(default = "count")]
    pub count: usize,
    /// Name of the reward or judge whose best checkpoint stays beside the newest, as `best` in the output folder:
    /// the last judge unless told otherwise, none where it is empty.
    #[serde(default)]
    pub best: Option<String>,
    /// How they are drawn; as the run's own rollouts where it is left out.
    #[serde(default)]
    pub rollout: Option<RolloutConfig>,
    /// Ends the run, as if that were its last iteration, after so many validations in a row without a better mean of
    /// `best`; 0 never.
    #[serde(default)]
    pub patience: usize,
}

fn count() -> usize {
    24
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { prompts: None, count: count(), best: None, rollout: None, patience: 0 }
    }
}

/// Rewards and judges that score single images, the rewards first.
pub(super) fn metrics(config: &AlignConfig) -> impl Iterator<Item = &RewardConfig> {
    config.group.rewards.iter().chain(&config.judges).filter(|reward| is_of_one(reward))
}

/// A share of the group's others that one beats needs a group.
fn is_of_one(reward: &RewardConfig) -> bool {
    !matches!(reward.kind, RewardKind::Pairwise { .. })
}

impl ValidationConfig {
    /// How held-out prompts of a run of `config` are drawn.
    pub(super) fn rollout<'a>(&'a self, config: &'a AlignConfig) -> &'a RolloutConfig {
        self.rollout.as_ref().unwrap_or(&config.group.rollout)
    }

    fn best<'a>(&'a self, config: &'a AlignConfig) -> Option<&'a str> {
        let judge = || Some(config.judges.iter().rfind(|reward| is_of_one(reward))?.name.as_str());
        match &self.best {
            Some(name) => Some(name.as_str()).filter(|name| !name.is_empty()),
            None => judge(),
        }
    }

    /// Refuses what cannot be done with the rewards and judges of `config`.
    pub(crate) fn validate(&self, config: &AlignConfig) -> Result<()> {
        if config.validate_every == 0 {
            return Ok(());
        }
        ensure!(self.count > 0, "validation.count = 0: at least 1");
        self.rollout(config).validate().context("validation")?;
        let names: Vec<&str> = metrics(config).map(|metric| metric.name.as_str()).collect();
        ensure!(
            !names.is_empty(),
            "validate_every = {}: no reward and no judge scores a single image; add [[judges]]",
            config.validate_every
        );
        for (index, name) in names.iter().enumerate() {
            ensure!(
                !names[..index].contains(name),
                "validate_every: two rewards or judges are named {name:?}"
            );
        }
        match self.best(config) {
            Some(best) => ensure!(
                names.contains(&best),
                "validation.best = {best:?}: no reward or judge of that name; there is {}",
                names.join(", ")
            ),
            None => ensure!(
                self.patience == 0,
                "validation.patience = {}: by which reward or judge? set validation.best",
                self.patience
            ),
        }
        Ok(())
    }
}

/// How a run stands by its validations; a checkpoint holds it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Standing {
    /// A name for the metric and the prompts that it is about.
    of: String,
    /// Iterations done at the last validation.
    last: Option<usize>,
    /// Iterations done at the best one, and its mean.
    best: Option<(usize, Exact)>,
    /// Validations since then.
    since: usize,
}

impl Standing {
    /// Iterations done at the best validation, but for that of the model at the start.
    pub(crate) fn best(&self) -> Option<usize> {
        self.best.map(|(done, _)| done).filter(|&done| done > 0)
    }

    /// Takes note of a validation; whether it is the best so far.
    fn see(&mut self, done: usize, mean: Option<f64>) -> bool {
        self.last = Some(done);
        let Some(mean) = mean else { return false };
        let is_better = self.best.is_none_or(|(_, best)| mean > f64::from(best));
        if is_better {
            (self.best, self.since) = (Some((done, mean.into())), 0);
        } else {
            self.since += 1;
        }
        is_better
    }
}

/// What one validation found.
pub(crate) struct Validated {
    /// Mean of each metric that did not fail, as `validation/NAME`.
    pub(crate) means: Vec<(String, f64)>,
    /// Whether the one to be best by is better than ever; the start counts as the first.
    pub(crate) is_better: bool,
    /// What failed, a line each.
    pub(crate) faults: Vec<String>,
    /// What it took.
    pub(crate) seconds: f64,
}

/// The validations of one run.
pub(crate) struct Validation<'a> {
    config: &'a AlignConfig,
    prompts: Vec<Prompt>,
    names: Vec<&'a str>,
    metrics: Rewards,
    guidance: f64,
    /// Images a network call takes at most.
    batch: usize,
    size: LatentSize,
    plan: Vec<Step>,
    pub(crate) standing: Standing,
}

/// Scores of a batch of prompts by metric, where that did not fail.
type Judged = Vec<Option<Vec<Exact>>>;

/// The number of a batch's first prompt, and its scores.
type Told = (usize, Judged);

/// Scores of a rank's batches, and what failed.
type Own = (Vec<Told>, Vec<String>);

/// What every rank's `own` came to, together.
///
/// # Errors
/// On all ranks where one failed, or cannot be reached.
fn of_all(ranks: &Group, own: Result<Own>) -> Result<Own> {
    if ranks.world() == 1 {
        return own;
    }
    let (mut all, mut faults) = Own::default();
    for (told, said) in ranks::shared(ranks, &own)? {
        all.extend(told);
        faults.extend(said);
    }
    Ok((all, faults))
}

impl<'a> Validation<'a> {
    /// That of `config`, unless there is none; what is not among the open `rewards` lives on `device`.
    ///
    /// # Errors
    /// When a metric does not open or can never score one of the prompts.
    pub(crate) fn open(
        config: &'a AlignConfig,
        ready: &Ready,
        rewards: &Rewards,
        threads: usize,
        device: Device,
    ) -> Result<Option<Self>> {
        if config.validate_every == 0 {
            return Ok(None);
        }
        let prompts = ready.held_out.clone();
        let configs: Vec<RewardConfig> = metrics(config).cloned().collect();
        let metrics = rewards.open_beside(&configs, threads, device).context("validation")?;
        let rollout = config.validation.rollout(config);
        ready.check(&metrics, &prompts, rollout).context("validation")?;
        let about = (config.validation.best(config), &prompts);
        let mut about = serde_json::to_vec(&about)?;
        if let Some(own) = &config.validation.rollout {
            about.extend(serde_json::to_vec(own)?);
        }
        let of = format!("{:x}", Sha256::digest(about));
        let names = self::metrics(config).map(|metric| metric.name.as_str()).collect();
        let size = rollout.latent_size(&ready.pipeline)?;
        Ok(Some(Self {
            config,
            prompts,
            names,
            metrics,
            guidance: rollout.guidance(&ready.pipeline)?,
            batch: rollout.batch,
            size,
            plan: rollout.plan(&ready.pipeline.scheduler, &size)?,
            standing: Standing { of, ..Standing::default() },
        }))
    }

    /// Goes on from `standing` where that is about the same.
    pub(crate) fn go_on(&mut self, standing: Option<Standing>) {
        if let Some(standing) = standing.filter(|standing| standing.of == self.standing.of) {
            self.standing = standing;
        }
    }

    /// Whether there should be one now that `done` iterations are.
    pub(crate) fn is_due(&self, done: usize, is_last: bool) -> bool {
        let is_time = done.is_multiple_of(self.config.validate_every) || is_last;
        is_time && self.standing.last != Some(done)
    }

    /// What is to be said where so many validations brought nothing that the run should end.
    pub(crate) fn is_over(&self) -> Option<String> {
        let Standing { since, best, .. } = self.standing;
        let patience = self.config.validation.patience;
        let (name, (done, mean)) = (self.config.validation.best(self.config)?, best?);
        (patience > 0 && since >= patience).then(|| {
            format!(
                "no better {name} in {since} validations: the run ends here; the best is {:.3} after iteration {done}",
                f64::from(mean)
            )
        })
    }

    /// Draws the prompts with the weights that would be saved, and scores them. All ranks take part and find the
    /// same.
    ///
    /// # Errors
    /// When a required metric fails; when the run, which is alone, is asked to stop.
    pub(crate) fn run(
        &mut self,
        done: usize,
        model: &Model,
        optimizer: &AdamW,
    ) -> Result<Validated> {
        let started = Instant::now();
        let trained = model.engine.trained();
        let saved = optimizer.averaged().map(|parts| Copies::given(trained, parts)).transpose()?;
        let exchange = || {
            if let Some(saved) = &saved {
                saved.exchange(trained);
            }
        };
        exchange();
        let told = flow::panics::caught(|| self.own(model));
        exchange();
        let own = told.map_err(Error::msg).flatten()?;
        let (mut all, mut faults) = of_all(trained.group(), own)?;
        all.sort_by_key(|(first, _)| *first);
        let mean = |index: usize| {
            let rows: Option<Vec<&Vec<Exact>>> =
                all.iter().map(|(_, scores)| scores[index].as_ref()).collect();
            let sum: f64 = rows?.into_iter().flatten().map(|&score| f64::from(score)).sum();
            Some(sum / self.prompts.len() as f64)
        };
        let means: Vec<Option<f64>> = (0..self.names.len()).map(mean).collect();
        let best = self.config.validation.best(self.config);
        let best = self.names.iter().position(|name| Some(*name) == best);
        let is_better = self.standing.see(done, best.and_then(|index| means[index]));
        let named = self.names.iter().zip(means);
        let means = named.filter_map(|(name, mean)| Some((format!("validation/{name}"), mean?)));
        faults.dedup();
        let seconds = started.elapsed().as_secs_f64();
        Ok(Validated { means: means.collect(), is_better, faults, seconds })
    }

    /// This rank's batches of prompts: every world-th. What judging them failed with, asking no other rank, is inside.
    fn own(&self, model: &Model) -> Result<Result<Own>> {
        let group = model.engine.trained().group();
        let Self { guidance, size, plan, .. } = self;
        let each = self.batch.min(self.prompts.len().div_ceil(group.world()));
        let mut own = Ok(Own::default());
        let batches = self.prompts.chunks(each).enumerate().skip(group.rank());
        for (index, batch) in batches.step_by(group.world()) {
            if group.world() == 1 && interrupt::asked() {
                bail!("stopped between two batches of the validation");
            }
            let texts: Vec<&str> = batch.iter().map(|prompt| &*prompt.text).collect();
            let first = index * each;
            let images = sample(model, &texts, first as u64, plan, size, *guidance, batch.len())?;
            let judged = flow::panics::caught(|| self.judge(batch, &images));
            own = own.and_then(|(mut told, mut faults)| {
                let (scores, said) = judged.map_err(Error::msg).flatten()?;
                told.push((first, scores));
                faults.extend(said);
                Ok((told, faults))
            });
            if own.is_err() {
                break;
            }
        }
        model.engine.attend()?;
        Ok(own)
    }

    /// Scores of `images` by metric, where that did not fail, and what did.
    fn judge(&self, prompts: &[Prompt], images: &[RgbImage]) -> Result<(Judged, Vec<String>)> {
        let images: Vec<&RgbImage> = images.iter().collect();
        let scores = self.metrics.score(&prompts.iter().collect::<Vec<_>>(), &images)?;
        let mut faults = Vec::new();
        for (name, outcome) in self.names.iter().zip(&scores.outcomes) {
            if let Some(error) = outcome.error.as_ref().filter(|_| outcome.scores.is_none()) {
                faults.push(format!("validation goes without {name:?}: {error}"));
            }
        }
        let exact = |scores: Vec<f64>| scores.into_iter().map(Exact::from).collect();
        let scores = scores.outcomes.into_iter().map(|outcome| outcome.scores.map(exact));
        Ok((scores.collect(), faults))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::settings::{ALIGN_PRESETS, Source, read};

    #[test]
    fn the_best_is_the_first_of_equals_and_patience_counts_from_it() {
        let mut standing = Standing::default();
        let seen: Vec<bool> = [(0, 0.5), (10, 0.5), (20, 0.7), (30, 0.7), (40, 0.1)]
            .map(|(done, mean)| standing.see(done, Some(mean)))
            .to_vec();
        assert_eq!(seen, [true, false, true, false, false]);
        assert_eq!((standing.best(), standing.since, standing.last), (Some(20), 2, Some(40)));
        assert!(!standing.see(50, None));
        assert_eq!((standing.since, standing.last), (2, Some(50)));
        let text = serde_json::to_string(&standing).unwrap();
        let again: Standing = serde_json::from_str(&text).unwrap();
        assert_eq!(f64::from(again.best.unwrap().1).to_bits(), 0.7f64.to_bits());
    }

    #[test]
    fn what_cannot_be_judged_is_refused() {
        let refused = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
            let config: AlignConfig =
                read(&Source::Preset("signs"), &ALIGN_PRESETS, &settings).unwrap();
            config.validate().unwrap_err().to_string()
        };
        let none = refused(&["validation.best=beauty"]);
        assert!(none.contains("there is ocr, colour, exact, judge_exact"), "{none}");
        let unsaid = refused(&["judges=[]", "validation.patience=3"]);
        assert!(unsaid.contains("set validation.best"), "{unsaid}");
        assert!(refused(&["validation.count=0"]).contains("at least 1"));
        let twice = refused(&["judges.0.name=ocr", "validation.best=ocr"]);
        assert!(twice.contains("two rewards or judges are named \"ocr\""), "{twice}");
    }
}
