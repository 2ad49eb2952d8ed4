//! The networks of an export, loaded once, making images for many requests.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use sampler::{engine::{Engine, Options, Progress, Watch}, request::Request};
//!
//! struct Quiet;
//! impl Watch for Quiet {
//!     fn done(&mut self, index: usize, image: anyhow::Result<sampler::engine::Finished>) {
//!         println!("{index}: {}", image.is_ok());
//!     }
//! }
//! let mut engine = Engine::open("flux-onnx".as_ref(), &Options::default())?;
//! let job = engine.export().job(Request { prompt: "a fox".into(), ..Request::default() })?;
//! engine.generate(&[job], &mut Quiet);
//! # Ok(())
//! # }
//! ```

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, available_parallelism},
    time::Duration,
};

use anyhow::{Context, Error, Result};
use flow::{latents::LatentSize, path::weights, solver::Walk};
use onnx::{Cancel, Cancelled, Provider};

use crate::{
    device,
    export::Export,
    networks::{Condition, Decoder, Encoder, Settings, TextEncoders, Transformer},
    picture::Picture,
    report::{Stages, timed},
    request::Job,
    sample::{denoise, skipped},
    tensorrt,
    texts::Texts,
};

/// Sides in latent cells of a preview, at most: 256 pixels for FLUX.
const PREVIEW: usize = 32;

/// How an engine runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// T5 tokens a prompt is padded or cut to; `None` for the tokenizer's limit.
    pub text_tokens: Option<usize>,
    /// Threads for one operator.
    pub threads: usize,
    pub provider: Provider,
    /// Number of the GPU.
    pub device: usize,
    pub memory: Memory,
    /// Where TensorRT keeps its engines.
    pub engines: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            text_tokens: None,
            threads: available_parallelism().map_or(1, usize::from),
            provider: Provider::Cpu,
            device: 0,
            memory: Memory::Keep,
            engines: None,
        }
    }
}

/// What is held in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Memory {
    /// All networks, opened side by side.
    #[default]
    Keep,
    /// The text encoders are let go before the transformer is opened.
    Release,
    /// The same, and weights stay in their files where the processor can read them there.
    Low,
}

/// The names that people type.
pub const MEMORIES: [(&str, Memory); 3] =
    [("keep", Memory::Keep), ("release", Memory::Release), ("low", Memory::Low)];

/// Networks and what they need. One thread owns it; [`Engine::export`] is for all.
pub struct Engine {
    export: Arc<Export>,
    options: Options,
    texts: Texts,
    encoders: Option<TextEncoders>,
    painters: Option<Painters>,
    encoder: Option<Encoder>,
    load: Duration,
}

/// What makes an image of a condition.
struct Painters {
    transformer: Transformer,
    decoder: Decoder,
}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Finished {
    pub picture: Picture,
    /// `[Z, h, w]`, before the decoder.
    pub latents: Vec<f32>,
    /// `load` is the engine's so far, the rest this image's.
    pub stages: Stages,
    /// See [`Engine::precision`].
    pub precision: String,
}

/// Follows jobs while they are made.
pub trait Watch {
    /// Job `index` has taken a step.
    fn step(&mut self, index: usize, progress: &mut Progress<'_>) {
        let _ = (index, progress);
    }

    /// Job `index` is finished, has failed, or was cancelled: [`is_cancelled`] tells.
    fn done(&mut self, index: usize, image: Result<Finished>);
}

/// Where a job is.
pub struct Progress<'a> {
    /// Network calls done, from 1.
    pub step: usize,
    /// Network calls in all.
    pub of: usize,
    x0: &'a [f32],
    size: LatentSize,
    decoder: &'a mut Decoder,
    cancel: &'a Cancel,
}

impl Progress<'_> {
    /// The image as the network expects it to end, at most 256 pixels a side: its latents are made
    /// smaller before they are decoded.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn preview(&mut self) -> Result<Picture> {
        let latents = self.size.unpack(self.x0);
        let longest = self.size.width.max(self.size.height);
        let (latents, size) = shrunk(&latents, &self.size, longest.div_ceil(PREVIEW));
        self.decoder.decode(&latents, &size, self.cancel)
    }
}

/// Whether a job failed because it was cancelled.
pub fn is_cancelled(error: &Error) -> bool {
    error.chain().any(<dyn std::error::Error>::is::<Cancelled>)
}

impl Engine {
    /// Reads the configs of `folder` and opens its networks, or with [`Memory::Release`] and
    /// [`Memory::Low`] each when it is needed.
    ///
    /// # Errors
    /// Names what is missing or wrong: a file of the folder, ONNX Runtime, a library of the provider.
    pub fn open(folder: &Path, options: &Options) -> Result<Self> {
        let export = Arc::new(Export::open(folder, options.text_tokens)?);
        let mut engine = Self::closed(export, options);
        if options.memory == Memory::Keep {
            engine.open_all()?;
        }
        Ok(engine)
    }

    /// An engine that opens each network when it is needed.
    pub fn closed(export: Arc<Export>, options: &Options) -> Self {
        Self {
            export,
            options: options.clone(),
            texts: Texts::default(),
            encoders: None,
            painters: None,
            encoder: None,
            load: Duration::ZERO,
        }
    }

    /// What it can be asked for.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// How it runs.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// How the weights are stored, or the type of the transformer's states where the export does not
    /// say and it is open.
    pub fn precision(&self) -> String {
        match &self.export.description.precision {
            said if !said.is_empty() => said.clone(),
            _ => self.painters.as_ref().map_or_else(String::new, |it| it.transformer.precision()),
        }
    }

    /// Time spent on opening networks so far.
    pub fn load(&self) -> Duration {
        self.load
    }

    /// Encodes the prompts of `jobs` before any image is made, so that the text encoders need not
    /// stay. With [`Memory::Keep`] they do.
    ///
    /// # Errors
    /// When an encoder cannot be opened or fails.
    pub fn read(&mut self, jobs: &[Job]) -> Result<()> {
        self.texts.keep_all();
        for job in jobs {
            self.condition(job)?;
        }
        if self.options.memory != Memory::Keep {
            self.encoders = None;
        }
        Ok(())
    }

    /// Makes an image of every job and tells `watch`, in order. Jobs that fail do not keep others
    /// from being made.
    pub fn generate(&mut self, jobs: &[Job], watch: &mut dyn Watch) {
        for (index, job) in jobs.iter().enumerate() {
            let image = self.image(index, job, watch);
            watch.done(index, image);
        }
    }

    fn image(&mut self, index: usize, job: &Job, watch: &mut dyn Watch) -> Result<Finished> {
        let mut stages = Stages::default();
        let before = self.busy();
        let (condition, text) = self.condition(job)?;
        stages.text = text;
        let start = self.start(job, &mut stages)?;
        let painters = self.painters()?;
        let Painters { transformer, decoder } = painters;
        let guidance: Vec<f32> = job.guidance.into_iter().collect();
        let mask = if job.skip { skipped(job.plan.len()) } else { Vec::new() };
        let x0 = timed(&mut stages.sample, || {
            let mut network = transformer.conditioned(
                &job.size,
                &[condition],
                &guidance,
                &job.loras,
                &job.cancel,
            )?;
            denoise(&mut network, &job.plan, &mask, start, |step, walk: &Walk| {
                if job.cancel.is_cancelled() {
                    return Err(Cancelled.into());
                }
                let (step, of, cancel) = (step + 1, job.plan.len(), &job.cancel);
                let size = job.size;
                watch.step(index, &mut Progress { step, of, x0: walk.x0(), size, decoder, cancel });
                Ok(())
            })
        })?;
        let latents = job.size.unpack(&x0);
        let picture =
            timed(&mut stages.decode, || decoder.decode(&latents, &job.size, &job.cancel))?;
        stages.load = self.load;
        stages.networks = self.busy().saturating_sub(before);
        Ok(Finished { picture, latents, stages, precision: self.precision() })
    }

    /// Time that the open networks have spent in runs.
    fn busy(&self) -> Duration {
        let text = self.encoders.as_ref().map_or(Duration::ZERO, TextEncoders::busy);
        let painters = self.painters.as_ref().map_or(Duration::ZERO, |painters| {
            painters.transformer.busy() + painters.decoder.busy()
        });
        text + painters
    }

    /// The packed state that `job` starts from.
    fn start(&mut self, job: &Job, stages: &mut Stages) -> Result<Vec<f32>> {
        let noise = job.size.pack(&job.initial());
        let Some(init) = &job.init else { return Ok(noise) };
        if self.encoder.is_none() {
            let settings = self.settings();
            let pipeline = &self.export.pipeline;
            let opened = timed(&mut self.load, || Encoder::open(pipeline, &settings))?;
            self.encoder = Some(opened);
        }
        let encoder = self.encoder.as_mut().context("just opened")?;
        let x0 = timed(&mut stages.text, || encoder.encode(init, &job.cancel))?;
        let [of_x0, of_noise] = weights(job.schedule.times()[0]).map(|weight| weight as f32);
        let x0 = job.size.pack(&x0);
        Ok(x0.iter().zip(noise).map(|(x0, noise)| of_x0 * x0 + of_noise * noise).collect())
    }

    /// The condition of a job's prompt and the time it took.
    fn condition(&mut self, job: &Job) -> Result<(Arc<Condition>, Duration)> {
        if let Some(condition) = self.texts.get(&job.ids) {
            return Ok((condition, Duration::ZERO));
        }
        if self.encoders.is_none() {
            if self.options.memory != Memory::Keep {
                self.painters = None;
            }
            let (settings, pipeline) = (self.settings(), &self.export.pipeline);
            let opened = timed(&mut self.load, || TextEncoders::open(pipeline, &settings))?;
            self.encoders = Some(opened);
        }
        let encoders = self.encoders.as_mut().context("just opened")?;
        let mut time = Duration::ZERO;
        let condition = timed(&mut time, || encoders.encode(&job.ids, &job.cancel))?;
        let condition = Arc::new(condition);
        self.texts.put(job.ids.clone(), condition.clone());
        Ok((condition, time))
    }

    fn painters(&mut self) -> Result<&mut Painters> {
        if self.painters.is_none() {
            if self.options.memory != Memory::Keep {
                self.encoders = None;
            }
            let settings = self.settings();
            let export = &self.export;
            self.painters = Some(timed(&mut self.load, || Painters::open(export, &settings))?);
        }
        self.painters.as_mut().context("just opened")
    }

    /// Opens every network at the same time.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn open_all(&mut self) -> Result<()> {
        let (settings, export) = (self.settings(), &self.export);
        let pipeline = &export.pipeline;
        let (encoders, painters) = timed(&mut self.load, || {
            thread::scope(|scope| {
                let encoders = scope.spawn(|| TextEncoders::open(pipeline, &settings));
                let painters = Painters::open(export, &settings);
                (joined(encoders), painters)
            })
        });
        (self.encoders, self.painters) = (Some(encoders?), Some(painters?));
        Ok(())
    }

    fn settings(&self) -> Settings {
        let Options { threads, provider, device, memory, .. } = self.options;
        let repack = memory != Memory::Low;
        let options =
            onnx::Options { threads, provider, device, repack, ..onnx::Options::default() };
        if !provider.builds_engines() {
            return Settings { options, ..Settings::default() };
        }
        let (export, gpu) = (&self.export, device::name(provider, device));
        let profiles =
            tensorrt::profiles(&export.pipeline, export.default_side(), export.text_lengths());
        let root = self.options.engines.as_deref();
        let version = onnx::tensorrt_version().unwrap_or_default();
        let engines = Some(tensorrt::folder(root, export.folder(), &gpu, &version));
        Settings { options: onnx::Options { engines, ..options }, profiles }
    }
}

impl Painters {
    fn open(export: &Export, settings: &Settings) -> Result<Self> {
        let pipeline = &export.pipeline;
        thread::scope(|scope| {
            let decoder = scope.spawn(|| Decoder::open(pipeline, settings));
            let slots = export.description.lora_slots.clone();
            let transformer = Transformer::open(pipeline, slots, settings);
            Ok(Self { decoder: joined(decoder)?, transformer: transformer? })
        })
    }
}

/// What a thread returned; its panic goes on here.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The mean of every `factor`×`factor` cells, as far as whole ones go.
fn shrunk(latents: &[f32], size: &LatentSize, factor: usize) -> (Vec<f32>, LatentSize) {
    if factor <= 1 {
        return (latents.to_vec(), *size);
    }
    let small = LatentSize {
        height: (size.height / factor).max(1),
        width: (size.width / factor).max(1),
        ..*size
    };
    let cells = |side: usize, at: usize| (at * factor)..((at + 1) * factor).min(side);
    let mean = |z: usize, y: usize, x: usize| {
        let (rows, columns) = (cells(size.height, y), cells(size.width, x));
        let n = (rows.len() * columns.len()) as f32;
        let row = |y: usize| &latents[(z * size.height + y) * size.width..][columns.clone()];
        rows.flat_map(row).sum::<f32>() / n
    };
    let places = (0..small.channels).flat_map(|z| {
        (0..small.height).flat_map(move |y| (0..small.width).map(move |x| (z, y, x)))
    });
    (places.map(|(z, y, x)| mean(z, y, x)).collect(), small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preview_is_the_mean_of_its_cells() {
        let size = LatentSize { channels: 2, height: 4, width: 6 };
        let latents: Vec<f32> = (0..48u8).map(f32::from).collect();
        let (small, to) = shrunk(&latents, &size, 2);
        assert_eq!((to.height, to.width, small.len()), (2, 3, 12));
        assert_eq!(small[..3], [3.5, 5.5, 7.5]);
        assert_eq!(small[6], 27.5);
        assert_eq!(shrunk(&latents, &size, 1), (latents, size));
    }
}
