//! What is known of one contestant, on disk: its images and their scores.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flow::checkpoint::{read_bounded, write_atomically};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::picture;

/// What the images follow from.
const SETTINGS: &str = "settings.json";
const SCORES: &str = "scores.json";

/// A folder of images, one for each prompt and seed, that all follow from one settings file.
pub(super) struct Record {
    folder: PathBuf,
    /// By the metric's name.
    scores: BTreeMap<String, Scores>,
}

/// Scores by one metric.
#[derive(Default, Deserialize, Serialize)]
struct Scores {
    /// [`key`] of the metric.
    key: String,
    /// A row a prompt, a score an image; empty until it is scored. Numbers of this type survive being
    /// written as decimals, so that ties stay ties.
    rows: Vec<Vec<f32>>,
}

/// A short name for `settings`.
pub(super) fn key(settings: &serde_json::Value) -> String {
    let mut key = format!("{:x}", Sha256::digest(settings.to_string()));
    key.truncate(12);
    key
}

impl Record {
    /// The record of `settings` in the folder `out`, empty at first; `name` is for people.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn open(out: &Path, name: &str, settings: &serde_json::Value) -> Result<Self> {
        let readable = name.replace(|letter: char| !letter.is_alphanumeric(), "-");
        let folder = out.join(format!("{readable}-{}", key(settings)));
        let path = folder.join(SCORES);
        let scores = if path.exists() {
            serde_json::from_slice(&read_bounded(&path)?)
                .with_context(|| format!("{}: remove it to score again", path.display()))?
        } else {
            BTreeMap::new()
        };
        write_atomically(&folder.join(SETTINGS), &serde_json::to_vec_pretty(settings)?)?;
        Ok(Self { folder, scores })
    }

    fn path(&self, prompt: usize, image: usize) -> PathBuf {
        self.folder.join(format!("{prompt:05}-{image}.png"))
    }

    pub(super) fn has(&self, prompt: usize, image: usize) -> bool {
        self.path(prompt, image).is_file()
    }

    pub(super) fn save(&self, prompt: usize, image: usize, pixels: &RgbImage) -> Result<()> {
        picture::save(&self.path(prompt, image), pixels)
    }

    pub(super) fn image(&self, prompt: usize, image: usize) -> Result<RgbImage> {
        let path = self.path(prompt, image);
        let pixels = image::open(&path);
        Ok(pixels
            .with_context(|| format!("{}: remove it to draw it again", path.display()))?
            .into())
    }

    /// Scores of every prompt by the metric `name` with `key`, a row each; a row that holds no `n` scores
    /// is still to come.
    pub(super) fn rows(&self, name: &str, key: &str, n_prompts: usize) -> Vec<Vec<f32>> {
        let known = self.scores.get(name).filter(|scores| scores.key == key);
        let mut rows = known.map(|scores| scores.rows.clone()).unwrap_or_default();
        rows.resize(n_prompts, Vec::new());
        rows
    }

    /// Keeps what [`Record::rows`] gave and more was added to.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn keep(&mut self, name: &str, key: &str, rows: &[Vec<f32>]) -> Result<()> {
        let scores = Scores { key: key.to_owned(), rows: rows.to_vec() };
        self.scores.insert(name.to_owned(), scores);
        let bytes = serde_json::to_vec(&self.scores)?;
        Ok(write_atomically(&self.folder.join(SCORES), &bytes)?)
    }
}
