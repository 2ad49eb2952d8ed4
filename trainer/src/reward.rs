//! Rewards: what an image is worth for its prompt.
//!
//! [`Rewards`] scores a group of images under every reward of a run. Training sums *advantages*
//! over rewards, not the rewards themselves (METHOD section 2), so scales need not match.
//!
//! A reward that fails (an error, a list of the wrong length, a number that is not finite) is
//! tried again after a pause that doubles, unless the fault is known to last. One that is required
//! and away (not reached, busy, out of order) is waited for for minutes. If it keeps failing, it
//! ends the run when it is required; else the group's sum goes without it. A failure never becomes
//! a score.

mod address;
mod aesthetic;
mod bicubic;
mod chat;
mod clip;
mod colour;
mod config;
mod connection;
mod constant;
mod ctc;
mod detector;
mod forward;
mod grid;
mod image_reward;
mod jpeg;
mod network;
mod ocr;
mod onnx;
mod pairwise;
mod pool;
mod preparation;
mod remote;
mod secret;
mod server;
mod text;

use std::{
    collections::HashSet,
    fmt,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use image::RgbImage;
use tch::{Device, Tensor};

#[cfg(test)]
pub(crate) use self::network::tiny;
use self::{
    aesthetic::Aesthetic,
    chat::Chat,
    clip::{ClipScore, Package},
    image_reward::ImageReward,
    pairwise::Pairwise,
    server::Server,
};
pub use self::{
    chat::ChatConfig,
    colour::ColourMatch,
    config::{JpegSize, Measure, RewardConfig, RewardKind},
    constant::Constant,
    detector::DetectorConfig,
    grid::Grid,
    jpeg::Jpeg,
    ocr::{LOG_PROB_FLOOR, Ocr, Verdict},
    onnx::{ImageModel, ImageModelConfig},
    remote::Endpoint,
    server::ServerConfig,
    text::{exact, similarity},
};
use flow::log;
use flow::prompts::Prompt;

/// Scores images for their prompts; higher is better.
pub trait Reward: Send + Sync {
    /// One finite number an image, in order; `prompts[i]` belongs to `images[i]`. An image's score
    /// depends on nothing but the image and its prompt. Called from several threads at once, each
    /// with a part of the images.
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>>;

    /// The score of an image `[1, 3, height, width]` in 0 to 1 for its prompt, and its gradient, like the image.
    ///
    /// # Errors
    /// Where there is none: [`RewardKind::is_network`].
    fn gradient(&self, _prompt: &Prompt, _image: &Tensor) -> Result<(f64, Tensor)> {
        bail!("scores of this kind have no gradient")
    }

    /// Refuses prompts that this reward can never score from images of `size` (width and height, where all
    /// have one), so that a run learns it at its start.
    fn check(&self, _prompts: &[&Prompt], _size: Option<[usize; 2]>) -> Result<()> {
        Ok(())
    }

    /// Whether [`Reward::score`] wants a whole group in one call: because it compares the images,
    /// which are then those of equal prompts in a row, or because it divides the work itself.
    fn wants_groups(&self) -> bool {
        false
    }
}

/// Why a reward failed, where it would fail again.
#[derive(Debug)]
struct Lasting(String);

impl fmt::Display for Lasting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Lasting {}

/// Why a reward failed, where it is likely to be back: not reached, busy, restarting.
#[derive(Debug)]
struct Away {
    why: String,
    /// How long the server asks to be left alone.
    wait: Option<Duration>,
}

impl Away {
    fn error(why: impl Into<String>) -> anyhow::Error {
        anyhow!(Self { why: why.into(), wait: None })
    }
}

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)?;
        match self.wait {
            Some(wait) => write!(f, " (asks to wait {} s)", wait.as_secs()),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Away {}

/// The rewards of a run.
pub struct Rewards {
    entries: Vec<Entry>,
    threads: usize,
    first_pause: Duration,
    /// Says whether nobody waits for scores any more.
    is_stopped: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// One group scored by every reward, in the order of the configuration.
#[derive(Clone, Debug)]
pub struct Scores {
    pub outcomes: Vec<Outcome>,
}

/// One group scored by one reward.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One score an image; `None` if the reward failed and is not required.
    pub scores: Option<Vec<f64>>,
    /// Failed attempts, and attempts after the first.
    pub failures: u32,
    pub retries: u32,
    /// Wall time of all attempts and the pauses between them.
    pub seconds: f64,
    /// Why the last failed attempt failed.
    pub error: Option<String>,
}

struct Entry {
    name: String,
    weight: f64,
    required: bool,
    retries: u32,
    patience: Duration,
    reward: Arc<dyn Reward>,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Most minutes that a reward may be waited for.
const MAX_PATIENCE: f64 = 7.0 * 24.0 * 60.0;
/// Most further attempts.
const MAX_RETRIES: u32 = 1000;

impl Rewards {
    /// Opens every reward, each for up to `threads` worker threads that use one core each; networks on
    /// libtorch live on `device`.
    ///
    /// # Errors
    /// There is no reward, two have one name, a setting is out of range, or a model does not open.
    pub fn open(configs: &[RewardConfig], threads: usize, device: Device) -> Result<Self> {
        Self::assembled(configs, threads, |config| {
            open(&config.kind, threads, device).map(Arc::from)
        })
    }

    /// As [`Rewards::open`], but those that are open here already, by name, are not opened again, and waits end as
    /// they do here.
    pub(crate) fn open_beside(
        &self,
        configs: &[RewardConfig],
        threads: usize,
        device: Device,
    ) -> Result<Self> {
        let opened = Self::assembled(configs, threads, |config| {
            let here = self.entries.iter().find(|entry| entry.name == config.name);
            here.map_or_else(
                || open(&config.kind, threads, device).map(Arc::from),
                |entry| Ok(Arc::clone(&entry.reward)),
            )
        })?;
        Ok(Self { is_stopped: Arc::clone(&self.is_stopped), ..opened })
    }

    fn assembled(
        configs: &[RewardConfig],
        threads: usize,
        opened: impl Fn(&RewardConfig) -> Result<Arc<dyn Reward>>,
    ) -> Result<Self> {
        let mut names = HashSet::new();
        let entries = configs
            .iter()
            .map(|config| {
                let name = &config.name;
                ensure!(names.insert(name), "two rewards are named {name:?}");
                config.validate()?;
                let reward =
                    opened(config).with_context(|| format!("cannot open reward {name:?}"))?;
                Ok(Entry {
                    name: name.clone(),
                    weight: config.weight,
                    required: config.required,
                    retries: config.retries,
                    patience: Duration::from_secs_f64(60.0 * config.patience),
                    reward,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Self::new(entries, threads)
    }

    /// Names and weights, in the order of [`Scores::outcomes`].
    pub fn weights(&self) -> impl ExactSizeIterator<Item = (&str, f64)> {
        self.entries.iter().map(|entry| (entry.name.as_str(), entry.weight))
    }

    /// Refuses prompts that a reward can never score from images of `size`: no quoted text for OCR or too
    /// much of it, an unknown colour.
    pub fn check(&self, prompts: &[&Prompt], size: Option<[usize; 2]>) -> Result<()> {
        self.entries.iter().try_for_each(|entry| {
            let checked = entry.reward.check(prompts, size);
            checked.with_context(|| format!("reward {:?}", entry.name))
        })
    }

    /// Scores the images of one group; `prompts[i]` belongs to `images[i]`.
    ///
    /// Call it once a group: a reward that fails is left out of all images given together. The
    /// scores do not depend on the number of threads.
    ///
    /// # Errors
    /// A required reward failed on every attempt.
    pub fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Scores> {
        ensure!(
            prompts.len() == images.len(),
            "{} prompts for {} images",
            prompts.len(),
            images.len()
        );
        let outcomes = self.entries.iter().map(|entry| self.outcome(entry, prompts, images));
        Ok(Scores { outcomes: outcomes.collect::<Result<_>>()? })
    }

    /// The weighted sum of an image's scores for its prompt, and its gradient; `image` is `[1, 3, height, width]` in
    /// 0 to 1. What has no weight is not asked.
    ///
    /// # Errors
    /// When a reward has no gradient, or fails.
    pub(crate) fn gradient(&self, prompt: &Prompt, image: &Tensor) -> Result<(f64, Tensor)> {
        let mut sum = (0.0, image.zeros_like());
        for entry in self.entries.iter().filter(|entry| entry.weight != 0.0) {
            let found = entry.reward.gradient(prompt, image);
            let (score, gradient) =
                found.with_context(|| format!("reward {:?} failed", entry.name))?;
            sum.0 += entry.weight * score;
            sum.1 += gradient.to_device(image.device()) * entry.weight;
        }
        Ok(sum)
    }

    fn new(entries: Vec<Entry>, threads: usize) -> Result<Self> {
        ensure!(!entries.is_empty(), "a run needs at least one reward");
        ensure!(threads > 0, "rewards need at least one thread");
        Ok(Self { entries, threads, first_pause: FIRST_PAUSE, is_stopped: Arc::new(|| false) })
    }

    /// Ends every wait for a reward, by an error, once `is_stopped` says so.
    pub(crate) fn stop_when(&mut self, is_stopped: impl Fn() -> bool + Send + Sync + 'static) {
        self.is_stopped = Arc::new(is_stopped);
    }

    fn outcome(&self, entry: &Entry, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Outcome> {
        let start = Instant::now();
        let threads = if entry.reward.wants_groups() { 1 } else { self.threads };
        let mut tries = Tries { pause: self.first_pause, failures: 0, away_since: None };
        let mut last_error: Option<anyhow::Error> = None;
        let scores = loop {
            let error = match score_in_parallel(&*entry.reward, prompts, images, threads) {
                Ok(scores) => break Some(scores),
                Err(error) => error,
            };
            match tries.after(&error, entry) {
                Some(pause) => self.wait(pause, entry)?,
                None if entry.required => {
                    let what =
                        format!("reward {:?} failed, attempts: {}", entry.name, tries.failures);
                    return Err(error.context(what));
                }
                None => {
                    last_error = Some(error);
                    break None;
                }
            }
            last_error = Some(error);
        };
        let failures = tries.failures;
        Ok(Outcome {
            retries: if scores.is_some() { failures } else { failures - 1 },
            scores,
            failures,
            seconds: start.elapsed().as_secs_f64(),
            error: last_error.map(|error| format!("{error:#}")),
        })
    }

    /// Sleeps, unless the run is asked to stop.
    fn wait(&self, pause: Duration, entry: &Entry) -> Result<()> {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            ensure!(!(self.is_stopped)(), "stopped while waiting for reward {:?}", entry.name);
            thread::sleep(left.min(Duration::from_millis(100)));
        }
    }
}

/// What has become of one group's attempts so far.
struct Tries {
    /// After the next failure.
    pause: Duration,
    failures: u32,
    /// When the present absence began.
    away_since: Option<Instant>,
}

impl Tries {
    /// How long to pause after `error` until the next attempt; nothing where that was the last.
    fn after(&mut self, error: &anyhow::Error, entry: &Entry) -> Option<Duration> {
        self.failures += 1;
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        if error.is::<Lasting>() {
            return None;
        }
        let has_retries = self.failures <= entry.retries;
        let Some(away) = error.downcast_ref::<Away>() else {
            self.away_since = None;
            return has_retries.then_some(pause);
        };
        let is_new = self.away_since.is_none();
        let absence = self.away_since.get_or_insert_with(Instant::now).elapsed();
        let pause = pause.max(away.wait.unwrap_or_default());
        let patience = if entry.required { entry.patience } else { Duration::ZERO };
        let is_patient = absence + pause <= patience;
        if is_patient && is_new {
            log::warn(&format!(
                "reward {:?} is away: {error:#}; waiting for it for up to {:.3} minutes",
                entry.name,
                patience.as_secs_f64() / 60.0
            ));
        }
        (is_patient || has_retries && pause <= LONGEST_PAUSE).then_some(pause)
    }
}

fn open(kind: &RewardKind, threads: usize, device: Device) -> Result<Box<dyn Reward>> {
    Ok(match kind {
        RewardKind::Ocr { model, characters, detector, measure } => {
            let (characters, detector) = (characters.as_deref(), detector.as_ref());
            Box::new(Ocr::open(model, characters, detector, *measure, threads)?)
        }
        RewardKind::Hpsv2 { weights, tokenizer } => {
            Box::new(ClipScore::open(Package::Hpsv2, weights, tokenizer, device)?)
        }
        RewardKind::Pickscore { weights, tokenizer } => {
            Box::new(ClipScore::open(Package::Transformers, weights, tokenizer, device)?)
        }
        RewardKind::Clip { weights, tokenizer } => {
            Box::new(ClipScore::open(Package::OfWeights, weights, tokenizer, device)?)
        }
        RewardKind::ImageReward { weights, tokenizer } => {
            Box::new(ImageReward::open(weights, tokenizer, device)?)
        }
        RewardKind::Aesthetic { weights, clip } => {
            Box::new(Aesthetic::open(weights, clip, device)?)
        }
        RewardKind::Jpeg { quality, prefer } => {
            ensure!((1..=100).contains(quality), "`quality` is {quality}, it goes from 1 to 100");
            Box::new(Jpeg { quality: *quality, prefer: *prefer })
        }
        RewardKind::Grid { period } => {
            ensure!((2..=64).contains(period), "`period` is {period}, it goes from 2 to 64");
            Box::new(Grid { period: *period as usize })
        }
        RewardKind::Colour {} => Box::new(ColourMatch),
        RewardKind::Onnx { model, size, mean, std, index } => {
            let config = ImageModelConfig {
                model: model.clone(),
                size: *size,
                mean: *mean,
                std: *std,
                index: *index,
            };
            Box::new(ImageModel::open(config, threads)?)
        }
        RewardKind::Server(config) => Box::new(Server::open(config)?),
        RewardKind::Chat(config) => Box::new(Chat::open(config, false)?),
        RewardKind::Pairwise { judge } => {
            Box::new(Pairwise::open(judge, threads, device).context("the `judge`")?)
        }
        RewardKind::Constant { value } => {
            ensure!(value.is_finite(), "`value` is not finite");
            Box::new(Constant { value: *value })
        }
    })
}

/// One attempt: the images in `threads` runs of neighbours, scored at once.
fn score_in_parallel(
    reward: &dyn Reward,
    prompts: &[&Prompt],
    images: &[&RgbImage],
    threads: usize,
) -> Result<Vec<f64>> {
    let n_each = images.len().div_ceil(threads).max(1);
    let mut parts = prompts.chunks(n_each).zip(images.chunks(n_each));
    let Some(first) = parts.next() else { return Ok(Vec::new()) };
    let parts = thread::scope(|scope| {
        let others: Vec<_> = parts
            .map(|(prompts, images)| scope.spawn(move || checked(reward, prompts, images)))
            .collect();
        let mut parts = vec![checked(reward, first.0, first.1)];
        parts.extend(others.into_iter().map(|worker| match worker.join() {
            Ok(part) => part,
            Err(panic) => std::panic::resume_unwind(panic),
        }));
        parts
    });
    parts.into_iter().collect::<Result<Vec<_>>>().map(|parts| parts.concat())
}

fn checked(reward: &dyn Reward, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
    let scores = reward.score(prompts, images)?;
    ensure!(
        scores.len() == images.len(),
        "it returned {} scores for {} images",
        scores.len(),
        images.len()
    );
    if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
        let prompt = &prompts[i].text;
        return Err(anyhow!("it scored an image of prompt {prompt:?} as {}", scores[i]));
    }
    Ok(scores)
}

#[cfg(test)]
mod loopback;
#[cfg(test)]
mod tests;
