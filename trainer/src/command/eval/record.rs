//! What is known of one contestant, on disk: its images and their scores.

use std::collections::BTreeMap;
use std::fs;
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
/// What a rank other than the first keeps its scores in, until the first one has gathered them.
const PART: &str = "scores-rank-";

/// A folder of images, one for each prompt and seed, that all follow from one settings file.
pub(super) struct Record {
    folder: PathBuf,
    /// Where this rank keeps scores.
    file: PathBuf,
    /// By the metric's name.
    scores: ByMetric,
    /// [`key`] of each metric in use: scores of another are of no more use.
    keys: BTreeMap<String, String>,
}

type ByMetric = BTreeMap<String, Scores>;

/// Scores by one metric.
#[derive(Default, Deserialize, Serialize)]
struct Scores {
    /// [`key`] of the metric.
    key: String,
    /// A row a prompt, a score an image; empty until it is scored. Numbers of this type survive being
    /// written as decimals, so that ties stay ties.
    rows: Vec<Vec<f32>>,
}

impl Scores {
    /// Takes the rows that it lacks from `other`, or all where these follow from something else.
    fn add(&mut self, other: Self) {
        if self.key != other.key {
            *self = other;
            return;
        }
        self.rows.resize(self.rows.len().max(other.rows.len()), Vec::new());
        for (row, other) in self.rows.iter_mut().zip(other.rows) {
            if row.len() < other.len() {
                *row = other;
            }
        }
    }
}

/// A short name for `settings`.
pub(super) fn key(settings: &serde_json::Value) -> String {
    let mut key = format!("{:x}", Sha256::digest(settings.to_string()));
    key.truncate(12);
    key
}

impl Record {
    /// The record of `settings` in the folder `out`, empty at first, that `rank` adds to; `name` is for people,
    /// and `keys` are those of the metrics in use.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn open(
        out: &Path,
        name: &str,
        settings: &serde_json::Value,
        rank: usize,
        keys: BTreeMap<String, String>,
    ) -> Result<Self> {
        let readable = name.replace(|letter: char| !letter.is_alphanumeric(), "-");
        let folder = out.join(format!("{readable}-{}", key(settings)));
        write_atomically(&folder.join(SETTINGS), &serde_json::to_vec_pretty(settings)?)?;
        let file = match rank {
            0 => folder.join(SCORES),
            _ => folder.join(format!("{PART}{rank:03}.json")),
        };
        let mut this = Self { folder, file, scores: BTreeMap::new(), keys };
        this.read()?;
        Ok(this)
    }

    /// Takes what all ranks have kept into the first one's file.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub(super) fn gather(&mut self) -> Result<()> {
        let parts = self.read()?;
        if parts.is_empty() {
            return Ok(());
        }
        self.write()?;
        for part in parts {
            fs::remove_file(&part).with_context(|| format!("removing {}", part.display()))?;
        }
        Ok(())
    }

    /// Reads everybody's scores; the files of other ranks than the first.
    fn read(&mut self) -> Result<Vec<PathBuf>> {
        let listed = || format!("cannot read {}", self.folder.display());
        let mut parts = Vec::new();
        for entry in fs::read_dir(&self.folder).with_context(listed)? {
            let entry = entry.with_context(listed)?;
            if entry.file_name().to_string_lossy().starts_with(PART) {
                parts.push(entry.path());
            }
        }
        parts.sort();
        let whole = self.folder.join(SCORES);
        for path in parts.iter().chain(whole.exists().then_some(&whole)) {
            let found: ByMetric = serde_json::from_slice(&read_bounded(path)?)
                .with_context(|| format!("{}: remove it to score again", path.display()))?;
            for (name, found) in found {
                if self.keys.get(&name).is_none_or(|key| *key == found.key) {
                    self.scores.entry(name).or_default().add(found);
                }
            }
        }
        Ok(parts)
    }

    fn write(&self) -> Result<()> {
        Ok(write_atomically(&self.file, &serde_json::to_vec(&self.scores)?)?)
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

    /// Scores of every prompt by the metric `name` with `key`, a row each, with one
    /// for each image that was ever asked for.
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
        self.write()
    }
}
