//! Scoring images that exist: what the rewards of a run say about them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use flow::log;
use flow::prompts::Prompt;
use serde::Serialize;
use tch::Device;

use crate::picture;
use crate::reward::Rewards;
use crate::run::config::AlignConfig;

/// Largest side of an image, pixels.
const MAX_EDGE: u32 = 12_000;

/// What to score.
pub struct Options<'a> {
    /// PNG or JPEG files.
    pub images: &'a [PathBuf],
    /// What all of them should show.
    pub prompt: &'a str,
    /// Worker threads of rewards.
    pub threads: usize,
    /// Where tensors live.
    pub device: Device,
}

#[derive(Serialize)]
struct Line<'a> {
    image: &'a Path,
    scores: BTreeMap<&'a str, f64>,
}

/// Prints one JSON line an image: its scores by the rewards and judges of `config`.
///
/// # Errors
/// When an image cannot be read, a reward cannot be opened or one that is required fails.
pub fn run(config: &AlignConfig, options: &Options<'_>) -> Result<()> {
    let images = options
        .images
        .iter()
        .map(|path| picture::open(path, MAX_EDGE))
        .collect::<Result<Vec<_>>>()?;
    let scorers: Vec<_> = config.group.rewards.iter().chain(&config.judges).cloned().collect();
    let rewards = Rewards::open(&scorers, options.threads, options.device)?;
    let prompt = Prompt::new(options.prompt);
    rewards.check(&[&prompt], None)?;
    let scores = rewards.score(&vec![&prompt; images.len()], &images.iter().collect::<Vec<_>>())?;
    for (index, image) in options.images.iter().enumerate() {
        let mut line = Line { image, scores: BTreeMap::new() };
        for ((name, _), outcome) in rewards.weights().zip(&scores.outcomes) {
            if let Some(scores) = &outcome.scores {
                line.scores.insert(name, scores[index]);
            }
        }
        println!("{}", serde_json::to_string(&line)?);
    }
    for ((name, _), outcome) in rewards.weights().zip(&scores.outcomes) {
        if outcome.scores.is_none() {
            let why = outcome.error.as_deref().unwrap_or("no scores");
            log::warn(&format!("{name} is left out: {why}"));
        }
    }
    Ok(())
}
