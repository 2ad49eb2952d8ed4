//! What images are scored by.

use anyhow::Result;
use cluster::Group;
use flow::prompts::Prompt;
use image::RgbImage;
use serde_json::json;
use tch::Device;

use super::record::{self, Record};
use super::{check_on, stamp};
use crate::reward::{RewardConfig, Rewards};
use crate::run::progress::Progress;

/// Prompts whose scores are written together.
const PROMPTS_AT_ONCE: usize = 16;

/// A reward or a judge over the prompts of a comparison.
pub(super) struct Metric<'a> {
    pub(super) config: &'a RewardConfig,
    prompts: &'a [Prompt],
    /// Images a prompt.
    n_images: usize,
    /// Follows from its settings, the files that these name, and the prompts.
    pub(super) key: String,
    /// Opened where something is left to score.
    rewards: Option<Rewards>,
}

impl<'a> Metric<'a> {
    /// # Errors
    /// When a file that it names cannot be read.
    pub(super) fn new(
        config: &'a RewardConfig,
        prompts: &'a [Prompt],
        n_images: usize,
    ) -> Result<Self> {
        let kind = serde_json::to_value(&config.kind)?;
        let files = stamp::of_named(&kind)?;
        let key = record::key(&json!({ "kind": kind, "files": files, "prompts": prompts }));
        Ok(Self { config, prompts, n_images, key, rewards: None })
    }

    /// Opens it if one of `records` lacks scores; a network lives on `device`. Images have `size`, where
    /// all have one.
    ///
    /// # Errors
    /// When it does not open, or refuses a prompt.
    pub(super) fn open_for(
        &mut self,
        records: &[Record],
        threads: usize,
        device: Device,
        size: Option<[usize; 2]>,
    ) -> Result<()> {
        if records.iter().any(|record| !self.missing(&self.rows(record)).is_empty()) {
            let rewards = Rewards::open(std::slice::from_ref(self.config), threads, device)?;
            rewards.check(&self.prompts.iter().collect::<Vec<_>>(), size)?;
            self.rewards = Some(rewards);
        }
        Ok(())
    }

    /// Scores by a row a prompt, where all of them are there, and none of more images than are asked for.
    pub(super) fn scores(&self, record: &Record) -> Option<Vec<Vec<f32>>> {
        let mut rows = self.rows(record);
        let is_whole = self.missing(&rows).is_empty();
        for row in &mut rows {
            row.truncate(self.n_images);
        }
        is_whole.then_some(rows)
    }

    /// Scores the images of `record` that it has not scored, this rank's share of them, and keeps every few
    /// prompts. A failure ends the work on this record with a warning, unless the metric is required.
    ///
    /// # Errors
    /// When a required metric fails, an image cannot be read, or the scores cannot be written.
    pub(super) fn score(&self, record: &mut Record, contestant: &str, ranks: &Group) -> Result<()> {
        let (name, mut rows) = (&self.config.name, self.rows(record));
        let is_own = |prompt: &usize| prompt / PROMPTS_AT_ONCE % ranks.world() == ranks.rank();
        let total = (0..self.prompts.len()).filter(is_own).count();
        let missing: Vec<usize> = self.missing(&rows).into_iter().filter(is_own).collect();
        let Some(rewards) = self.rewards.as_ref().filter(|_| !missing.is_empty()) else {
            return Ok(());
        };
        let progress = Progress::new("score", total, total - missing.len());
        for chunk in missing.chunks(PROMPTS_AT_ONCE) {
            check_on(ranks)?;
            let images = self.images(record, chunk)?;
            let prompts: Vec<&Prompt> = chunk
                .iter()
                .flat_map(|&prompt| vec![&self.prompts[prompt]; self.n_images])
                .collect();
            let scores = rewards.score(&prompts, &images.iter().collect::<Vec<_>>())?;
            let outcome = &scores.outcomes[0];
            let Some(values) = &outcome.scores else {
                let why = outcome.error.as_deref().unwrap_or("no scores");
                progress.say(&format!("warning: {contestant} goes without {name}: {why}"));
                return Ok(());
            };
            for (&prompt, values) in chunk.iter().zip(values.chunks(self.n_images)) {
                rows[prompt] = values.iter().map(|&value| value as f32).collect();
            }
            record.keep(name, &self.key, &rows)?;
            progress.advance_by(chunk.len(), &format!("{contestant} by {name}"));
        }
        Ok(())
    }

    fn rows(&self, record: &Record) -> Vec<Vec<f32>> {
        record.rows(&self.config.name, &self.key, self.prompts.len())
    }

    /// Prompts without a score for each image.
    fn missing(&self, rows: &[Vec<f32>]) -> Vec<usize> {
        (0..rows.len()).filter(|&prompt| rows[prompt].len() < self.n_images).collect()
    }

    fn images(&self, record: &Record, prompts: &[usize]) -> Result<Vec<RgbImage>> {
        let all = |&prompt: &usize| (0..self.n_images).map(move |image| (prompt, image));
        prompts.iter().flat_map(all).map(|(prompt, image)| record.image(prompt, image)).collect()
    }
}
