//! What a run reads and checks before its model is loaded, so that a mistake is told at once.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use cluster::Group;
use flow::contents;
use flow::pipeline::Pipeline;
use flow::prompts::Prompt;
use tch::Device;

use super::config::AlignConfig;
use super::{interrupt, validation};
use crate::data::prompts;
use crate::group::rollout::RolloutConfig;
use crate::network::embeddings::Embeddings;
use crate::reward::{RewardConfig, Rewards};

/// The prompts of a run, and the images that it will make of them.
pub(crate) struct Ready {
    pub(crate) pipeline: Pipeline,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) sheet_prompts: Vec<Prompt>,
    /// Those of validations; none where there are no validations.
    pub(crate) held_out: Vec<Prompt>,
}

impl Ready {
    /// Reads prompts and configs; refuses files that are not there, a size that does not fit, and prompts without
    /// embeddings where those come from a cache.
    ///
    /// # Errors
    /// One line that names the setting.
    pub(crate) fn read(config: &AlignConfig) -> Result<Self> {
        config.check_files()?;
        let pipeline = Pipeline::open(&config.model).context("model")?;
        contents::of(&config.model).context("model")?;
        for rollout in [&config.group.rollout, config.validation.rollout(config)] {
            rollout.latent_size(&pipeline)?;
            rollout.guidance(&pipeline)?;
        }
        let training = prompts::read(&config.prompts).context("prompts")?;
        let sheet_prompts = prompts::read(&config.sheet_prompts).context("sheet_prompts")?;
        let mut held_out = match &config.validation.prompts {
            _ if config.validate_every == 0 => Vec::new(),
            Some(file) => prompts::read(file).context("validation.prompts")?,
            None => sheet_prompts.clone(),
        };
        held_out.truncate(config.validation.count);
        let all = training.iter().chain(&sheet_prompts).chain(&held_out);
        let all = all.map(|prompt| prompt.text.as_str());
        match &config.embeddings {
            Some(folder) => {
                let check = || Embeddings::of(folder, &config.model)?.check(all);
                check().context("embeddings")?;
            }
            None => prompts::tell_cut(&config.model, all.collect::<BTreeSet<_>>())?,
        }
        Ok(Self { pipeline, prompts: training, sheet_prompts, held_out })
    }

    /// The rewards, which can all score the training prompts, and whose waits end where the run is asked to stop or
    /// `ranks` are no longer together.
    ///
    /// # Errors
    /// When one does not open, or can never score one of them.
    pub(crate) fn rewards(
        &self,
        config: &AlignConfig,
        ranks: &Group,
        threads: usize,
        device: Device,
    ) -> Result<Rewards> {
        let mut rewards = Rewards::open(&config.group.rewards, threads, device)?;
        let alarm = ranks.alarm();
        rewards.stop_when(move || interrupt::asked() || alarm.rings());
        self.check(&rewards, &self.prompts, &config.group.rollout)?;
        Ok(rewards)
    }

    /// Refuses `prompts` that one of `rewards` can never score from the images of `rollout`.
    pub(crate) fn check(
        &self,
        rewards: &Rewards,
        prompts: &[Prompt],
        rollout: &RolloutConfig,
    ) -> Result<()> {
        let (size, factor) = (rollout.latent_size(&self.pipeline)?, self.pipeline.vae.factor());
        let pixels = [size.width * factor, size.height * factor];
        rewards.check(&prompts.iter().collect::<Vec<_>>(), Some(pixels))
    }

    /// Refuses prompts that a reward or a judge can never score, of those that are no networks with weights.
    ///
    /// # Errors
    /// As [`Ready::rewards`].
    pub(crate) fn check_light(&self, config: &AlignConfig) -> Result<()> {
        let check = |metrics: Vec<&RewardConfig>, prompts: &[Prompt], rollout| {
            let light: Vec<RewardConfig> =
                metrics.into_iter().filter(|metric| metric.kind.is_light()).cloned().collect();
            if light.is_empty() || prompts.is_empty() {
                return Ok(());
            }
            self.check(&Rewards::open(&light, 1, Device::Cpu)?, prompts, rollout)
        };
        check(config.group.rewards.iter().collect(), &self.prompts, &config.group.rollout)?;
        let held_out = validation::metrics(config).collect();
        check(held_out, &self.held_out, config.validation.rollout(config)).context("validation")
    }
}
