//! Scoring images that exist: what the rewards of a run say about them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::log;
use flow::prompts::Prompt;
use serde::Serialize;
use tch::Device;

use crate::data::prompts;
use crate::picture;
use crate::reward::Rewards;
use crate::run::config::AlignConfig;

/// Largest side of an image, pixels.
const MAX_EDGE: u32 = 12_000;
/// How the names of images in a folder end.
const ENDS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// What images should show.
#[derive(Clone, Copy, Debug)]
pub enum Shown<'a> {
    /// All of them the same.
    All(&'a str),
    /// A prompt of the file each, in its order; or several in a row, as many for each prompt.
    Each(&'a Path),
}

/// What to score.
pub struct Options<'a> {
    /// PNG, JPEG or WebP files, and folders of them.
    pub images: &'a [PathBuf],
    /// What they should show.
    pub shown: Shown<'a>,
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
/// When an image cannot be read, images and prompts do not match, a reward cannot be opened or one that is
/// required fails.
pub fn run(config: &AlignConfig, options: &Options<'_>) -> Result<()> {
    let files = files(options.images)?;
    let shown = shown(options.shown, files.len())?;
    let prompts: Vec<&Prompt> =
        (0..files.len()).map(|index| &shown[index * shown.len() / files.len()]).collect();
    let images =
        files.iter().map(|path| picture::open(path, MAX_EDGE)).collect::<Result<Vec<_>>>()?;
    let scorers: Vec<_> = config.group.rewards.iter().chain(&config.judges).cloned().collect();
    let rewards = Rewards::open(&scorers, options.threads, options.device)?;
    rewards.check(&prompts, None)?;
    let scores = rewards.score(&prompts, &images.iter().collect::<Vec<_>>())?;
    for (index, image) in files.iter().enumerate() {
        let mut line = Line { image, scores: BTreeMap::new() };
        for ((name, _), outcome) in rewards.weights().zip(&scores.outcomes) {
            if let Some(scores) = &outcome.scores {
                line.scores.insert(name, scores[index]);
            }
        }
        println!("{}", serde_json::to_string(&line)?);
    }
    let mut means = Vec::new();
    for ((name, _), outcome) in rewards.weights().zip(&scores.outcomes) {
        if let Some(scores) = &outcome.scores {
            means.push(format!("{name} {:.4}", scores.iter().sum::<f64>() / scores.len() as f64));
        } else {
            let why = outcome.error.as_deref().unwrap_or("no scores");
            log::warn(&format!("{name} is left out: {why}"));
        }
    }
    if files.len() > 1 {
        log::note(&format!("note: means of {} images: {}", files.len(), means.join(", ")));
    }
    Ok(())
}

/// The images of `given`, those of a folder by name.
fn files(given: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in given {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = fs::read_dir(path).and_then(|found| {
            found.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>()
        });
        let mut inside = entries.with_context(|| format!("cannot read {}", path.display()))?;
        inside.retain(|file| {
            let end = file.extension().and_then(|end| end.to_str()).unwrap_or_default();
            ENDS.contains(&&*end.to_ascii_lowercase())
        });
        ensure!(!inside.is_empty(), "{} holds no PNG, JPEG or WebP file", path.display());
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

/// What `n` images show, as many to each prompt.
fn shown(shown: Shown<'_>, n: usize) -> Result<Vec<Prompt>> {
    let file = match shown {
        Shown::All(text) => return Ok(vec![Prompt::new(text)]),
        Shown::Each(file) => file,
    };
    let prompts = prompts::read(file)?;
    ensure!(
        n.is_multiple_of(prompts.len()),
        "{} holds {} prompts, but there are {n} images: give one image a prompt, or as many for each",
        file.display(),
        prompts.len()
    );
    Ok(prompts)
}
