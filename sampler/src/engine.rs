//! The networks of an export, loaded once, making images for many requests.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use sampler::{engine::{Engine, Options, Watch}, request::Request};
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

use anyhow::{Context, Error, Result, ensure};
use flow::{path::weights, solver::Walk};
use onnx::{Cancel, Cancelled, Provider};

use crate::{
    device,
    export::Export,
    networks::{Condition, Decoder, Encoder, Settings, TextEncoders, Transformer},
    picture::Picture,
    progress::Progress,
    report::{Stages, timed},
    request::Job,
    sample::{denoise, skipped},
    tensorrt,
    texts::{Read, Texts},
};

/// Image tokens of a batch together, at most: those of one FLUX image of 512×512, which alone leaves no
/// processor idle.
const BATCH_TOKENS: usize = 1024;

/// Said before a wait that can be long.
const BUILDS: &str = "engines that were not built before on this GPU are built now, which takes \
                      minutes for a large model; they are kept for the next run";

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
    /// Images that may share each call of the transformer, at least 1. Above 1 their bits are those
    /// they have alone where [`Options::batches_exactly`] says so.
    pub batch: usize,
}

impl Options {
    /// What a person should know before networks are opened.
    pub fn notice(&self) -> Option<&'static str> {
        self.provider.builds_engines().then_some(BUILDS)
    }

    /// Whether an image of weights of `precision` has in company the bits it has alone: the CPU's
    /// products of repacked f32 weights take each row by itself. Other kernels are chosen by the
    /// number of rows.
    pub fn batches_exactly(&self, precision: &str) -> bool {
        self.provider == Provider::Cpu && self.memory != Memory::Low && precision == "f32"
    }
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
            batch: 1,
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
    /// Job `index` is begun.
    fn begin(&mut self, index: usize) {
        let _ = index;
    }

    /// Job `index` has taken a step.
    fn step(&mut self, index: usize, progress: &mut Progress<'_>) {
        let _ = (index, progress);
    }

    /// Job `index` is finished, has failed, or was cancelled: [`is_cancelled`] tells.
    fn done(&mut self, index: usize, image: Result<Finished>);
}

/// A job whose prompt is read.
struct Row<'a> {
    index: usize,
    job: &'a Job,
    condition: Arc<Condition>,
    /// The packed state it starts from.
    start: Vec<f32>,
    stages: Stages,
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
            self.encode(job)?;
        }
        if self.options.memory != Memory::Keep {
            self.encoders = None;
        }
        Ok(())
    }

    /// Makes an image of every job and tells `watch`. Neighbours that go together share the calls of
    /// the transformer, up to [`Engine::most`]. Jobs that fail do not keep others from being made.
    pub fn generate(&mut self, jobs: &[Job], watch: &mut dyn Watch) {
        let mut first = 0;
        while let Some(job) = jobs.get(first) {
            let company = jobs[first..].iter().take(self.most(job));
            let n = company.take_while(|other| job.goes_with(other)).count();
            self.draw(first, &jobs[first..first + n], watch);
            first += n;
        }
    }

    /// How many jobs like `job` share the calls of the transformer.
    pub fn most(&self, job: &Job) -> usize {
        (BATCH_TOKENS / job.size.tokens()).clamp(1, self.options.batch)
    }

    /// Makes the images of jobs that go together, numbered from `first`.
    fn draw(&mut self, first: usize, jobs: &[Job], watch: &mut dyn Watch) {
        let mut rows = Vec::with_capacity(jobs.len());
        for (index, job) in (first..).zip(jobs) {
            watch.begin(index);
            match self.row(index, job) {
                Ok(row) => rows.push(row),
                Err(error) => watch.done(index, Err(error)),
            }
        }
        match self.sample(&mut rows, watch) {
            Ok(x0) => {
                for (row, x0) in rows.into_iter().zip(x0) {
                    watch.done(row.index, self.finish(row.job, &x0, row.stages));
                }
            }
            Err(error) if rows.len() == 1 => watch.done(rows[0].index, Err(error)),
            // One of them may be at fault alone.
            Err(_) => {
                for row in rows {
                    self.draw(row.index, std::slice::from_ref(row.job), watch);
                }
            }
        }
    }

    fn row<'a>(&mut self, index: usize, job: &'a Job) -> Result<Row<'a>> {
        if job.cancel.is_cancelled() {
            return Err(Cancelled.into());
        }
        self.encode(job)?;
        let Read { condition, time } = self.texts.take(&job.ids).context("just encoded")?;
        let [text, networks] = time;
        let mut stages = Stages { text, networks, ..Stages::default() };
        let start = self.start(job, &mut stages)?;
        Ok(Row { index, job, condition, start, stages })
    }

    /// The packed x0 of each row.
    fn sample(&mut self, rows: &mut [Row<'_>], watch: &mut dyn Watch) -> Result<Vec<Vec<f32>>> {
        let Some(&Row { job: first, .. }) = rows.first() else { return Ok(Vec::new()) };
        let (size, of) = (first.size, first.plan.len());
        let painters = self.painters()?;
        let (mut time, before) = (Duration::ZERO, painters.busy());
        let Painters { transformer, decoder } = painters;
        let conditions: Vec<_> = rows.iter().map(|row| row.condition.clone()).collect();
        let guidance: Vec<f32> = rows.iter().filter_map(|row| row.job.guidance).collect();
        let cancels: Vec<_> = rows.iter().map(|row| row.job.cancel.clone()).collect();
        let cancel = Cancel::of_all(&cancels);
        let mask = if first.skip { skipped(of) } else { Vec::new() };
        let start: Vec<f32> = rows.iter().flat_map(|row| &row.start).copied().collect();
        let n = start.len() / rows.len();
        let x0 = timed(&mut time, || {
            let mut network =
                transformer.conditioned(&size, &conditions, &guidance, &first.loras, &cancel)?;
            denoise(&mut network, &first.plan, &mask, start, |step, walk: &Walk| {
                if cancel.is_cancelled() {
                    return Err(Cancelled.into());
                }
                for (row, x0) in rows.iter().zip(walk.x0().chunks_exact(n)) {
                    let (step, cancel) = (step + 1, &row.job.cancel);
                    if !cancel.is_cancelled() {
                        watch
                            .step(row.index, &mut Progress { step, of, x0, size, decoder, cancel });
                    }
                }
                Ok(())
            })
        })?;
        let busy = self.painters()?.busy().saturating_sub(before);
        for row in rows {
            row.stages.sample = time;
            row.stages.networks += busy;
        }
        Ok(x0.chunks_exact(n).map(<[f32]>::to_vec).collect())
    }

    /// The image of a packed x0.
    fn finish(&mut self, job: &Job, x0: &[f32], mut stages: Stages) -> Result<Finished> {
        ensure!(x0.iter().all(|value| value.is_finite()), "the latents are not finite");
        let (latents, painters) = (job.size.unpack(x0), self.painters()?);
        let before = painters.busy();
        let decoder = &mut painters.decoder;
        let picture =
            timed(&mut stages.decode, || decoder.decode(&latents, &job.size, &job.cancel))?;
        stages.networks += painters.busy().saturating_sub(before);
        stages.load = self.load;
        Ok(Finished { picture, latents, stages, precision: self.precision() })
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
        let before = encoder.busy();
        let x0 = timed(&mut stages.text, || encoder.encode(init, &job.cancel))?;
        stages.networks += encoder.busy().saturating_sub(before);
        let [of_x0, of_noise] = weights(job.schedule.times()[0]).map(|weight| weight as f32);
        let x0 = job.size.pack(&x0);
        Ok(x0.iter().zip(noise).map(|(x0, noise)| of_x0 * x0 + of_noise * noise).collect())
    }

    /// Encodes a job's prompt unless it is known.
    fn encode(&mut self, job: &Job) -> Result<()> {
        if self.texts.has(&job.ids) {
            return Ok(());
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
        let (mut text, before) = (Duration::ZERO, encoders.busy());
        let condition = timed(&mut text, || encoders.encode(&job.ids, &job.cancel))?;
        let time = [text, encoders.busy().saturating_sub(before)];
        self.texts.put(job.ids.clone(), Read { condition: Arc::new(condition), time });
        Ok(())
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
        let profiles = tensorrt::profiles(
            &export.pipeline,
            export.default_side(),
            export.text_lengths(),
            self.options.batch,
        );
        let root = self.options.engines.as_deref();
        let version = onnx::tensorrt_version().unwrap_or_default();
        let engines = Some(tensorrt::folder(root, export.folder(), &gpu, &version));
        Settings { options: onnx::Options { engines, ..options }, profiles }
    }
}

impl Painters {
    /// Time spent in runs so far.
    fn busy(&self) -> Duration {
        self.transformer.busy() + self.decoder.busy()
    }

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
