//! What is to be made: the arguments checked against the model, every default resolved.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    thread::available_parallelism,
};

use anyhow::{Context, Result, bail, ensure};
use flow::{
    checkpoint::Weights,
    latents::LatentSize,
    models::transformer::GUIDANCE,
    pipeline::Pipeline,
    prompts,
    schedule::{Schedule, Shift},
    solver::{Solver, Step, plan},
    tokens::MAX_TEXT_TOKENS,
    usage::Usage,
};

use crate::{args::Args, engine, outputs, picture::Origin, sheet::Layout};

/// Most pixels an image may have.
const MAX_PIXELS: usize = 1 << 26;
/// Most images in one run.
const MAX_IMAGES: usize = 1_000_000;

/// A run, ready to start.
pub struct Request {
    pub pipeline: Pipeline,
    /// Name of the model's folder.
    pub model: String,
    /// At least one.
    pub prompts: Vec<String>,
    /// In the order they are made: all images of a prompt, then those of the next.
    pub images: Vec<Image>,
    pub width: usize,
    pub height: usize,
    /// Latents of an image of that size.
    pub size: LatentSize,
    /// Steps asked for; a plan may have more network calls.
    pub n_steps: usize,
    pub solver: Solver,
    pub plan: Vec<Step>,
    /// Factor s of the schedule's shift.
    pub shift: f64,
    /// Present exactly when the model embeds guidance.
    pub guidance: Option<f32>,
    /// T5 tokens a prompt; `None` for the tokenizer's limit.
    pub text_tokens: Option<usize>,
    /// Threads for one operator.
    pub threads: usize,
    /// Initial noise instead of the seeds'.
    pub noise: Option<Noise>,
    pub latents_file: Option<PathBuf>,
    pub sheet: Option<(PathBuf, Layout)>,
    /// Whether PNGs carry prompt and settings.
    pub metadata: bool,
    pub json: bool,
}

/// One image to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub file: PathBuf,
    /// Index of its prompt.
    pub prompt: usize,
    pub seed: u64,
}

/// Noise from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Noise {
    /// Name of the file.
    pub name: String,
    /// `[Z, h, w]` each; one an image, or one for all.
    pub latents: Vec<Vec<f32>>,
}

impl Request {
    /// Reads the model's configs and everything else that `args` names, and makes sure that the
    /// results can be written, before any network is loaded.
    ///
    /// # Errors
    /// [`Usage`] when the arguments themselves are wrong, otherwise what is wrong with which file.
    pub fn new(args: &Args) -> Result<Self> {
        let folder = args.model.as_deref().context(Usage("--model is missing".into()))?;
        let pipeline = Pipeline::open(folder)?;
        engine::check_files(folder)?;
        let prompts = prompts(args)?;
        let (width, height) = image_size(args, &pipeline)?;
        let size = pipeline.latent_size(width, height).map_err(|error| usage(error.to_string()))?;
        let (shift, schedule) = schedule(args, &pipeline, &size)?;
        let solver = Solver::by_name(&args.solver)
            .with_context(|| usage(format!("--solver {} is not known", args.solver)))?;
        let images = images(args, prompts.len())?;
        let request = Self {
            model: folder_name(folder),
            guidance: guidance(args, &pipeline)?,
            text_tokens: text_tokens(args)?,
            threads: args.threads.map_or_else(all_cores, usize::from),
            noise: noise(args, &size, images.len())?,
            latents_file: args.latents_out.clone(),
            sheet: sheet(args, prompts.len(), width, height)?,
            n_steps: schedule.n_steps(),
            plan: plan(solver, &schedule),
            metadata: !args.no_metadata,
            json: args.json,
            pipeline,
            prompts,
            images,
            width,
            height,
            size,
            solver,
            shift,
        };
        request.check_outputs()?;
        Ok(request)
    }

    /// Where image `index` starts from, for its metadata.
    pub fn origin(&self, index: usize) -> Origin<'_> {
        match &self.noise {
            Some(noise) => Origin::File(&noise.name),
            None => Origin::Seed(self.images[index].seed),
        }
    }

    /// State of image `index` at t = 1, `[Z, h, w]`: a function of its seed and the size alone, or
    /// the file's.
    pub fn initial(&self, index: usize) -> Vec<f32> {
        match &self.noise {
            Some(noise) => noise.latents[index % noise.latents.len()].clone(),
            None => self.size.noise(self.images[index].seed),
        }
    }

    fn check_outputs(&self) -> Result<()> {
        let mut seen = HashSet::new();
        let files = self.images.iter().map(|image| image.file.as_path());
        let others = self.latents_file.as_deref().into_iter();
        for file in files.chain(others).chain(self.sheet.iter().map(|(file, _)| file.as_path())) {
            if !seen.insert(file) {
                bail!(Usage(format!("{} would be written twice", file.display())));
            }
            ensure!(!file.is_dir(), "cannot write {}: it is a folder", file.display());
        }
        let folders: HashSet<&Path> = seen.into_iter().map(outputs::parent).collect();
        folders.into_iter().try_for_each(outputs::check_writable)
    }
}

fn usage(message: impl Into<String>) -> Usage {
    Usage(message.into())
}

fn prompts(args: &Args) -> Result<Vec<String>> {
    match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => {
            prompts::check(prompt).map_err(usage)?;
            Ok(vec![prompt.clone()])
        }
        (None, Some(file)) => {
            Ok(prompts::read(file)?.into_iter().map(|prompt| prompt.text).collect())
        }
        (None, None) => bail!(Usage("a prompt is missing: give --prompt or --prompts".into())),
    }
}

/// Typed size, else the model's own.
fn image_size(args: &Args, pipeline: &Pipeline) -> Result<(usize, usize)> {
    let side = pipeline.default_size();
    let of = |typed: Option<u32>| typed.map_or(side, |pixels| pixels as usize);
    let (width, height) = (of(args.width), of(args.height));
    if width.saturating_mul(height) > MAX_PIXELS {
        bail!(Usage(format!("{width}x{height} is above the limit of {MAX_PIXELS} pixels")));
    }
    Ok((width, height))
}

fn schedule(args: &Args, pipeline: &Pipeline, size: &LatentSize) -> Result<(f64, Schedule)> {
    let grid = match args.shift {
        Some(shift) => Shift::Factor(shift).into(),
        None => pipeline.scheduler.grid(size.tokens()),
    };
    let schedule = Schedule::new(args.steps as usize, grid).map_err(|e| usage(e.to_string()))?;
    Ok((grid.shift.factor(), schedule))
}

fn guidance(args: &Args, pipeline: &Pipeline) -> Result<Option<f32>> {
    if !pipeline.transformer.guidance_embeds {
        return match args.guidance {
            Some(_) => bail!(Usage("this model embeds no guidance; leave --guidance out".into())),
            None => Ok(None),
        };
    }
    let guidance = args.guidance.unwrap_or(GUIDANCE as f32);
    if !(guidance.is_finite() && guidance >= 0.0) {
        bail!(Usage(format!("--guidance {guidance} is not a number from 0 up")));
    }
    Ok(Some(guidance))
}

fn text_tokens(args: &Args) -> Result<Option<usize>> {
    match args.max_sequence_length {
        Some(n) if !(2..=MAX_TEXT_TOKENS).contains(&n) => {
            bail!(Usage(format!("--max-sequence-length {n} is not from 2 to {MAX_TEXT_TOKENS}")))
        }
        typed => Ok(typed),
    }
}

fn all_cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

fn images(args: &Args, n_prompts: usize) -> Result<Vec<Image>> {
    let count = args.count as usize;
    let n_images = n_prompts * count;
    if n_images > MAX_IMAGES {
        bail!(Usage(format!("{n_images} images are above the limit of {MAX_IMAGES} a run")));
    }
    if args.seed.checked_add(u64::from(args.count) - 1).is_none() {
        bail!(Usage(format!("--seed {} + {count} images passes the largest seed", args.seed)));
    }
    let files = outputs::image_files(&args.output, n_images).map_err(usage)?;
    let of = |(index, file)| Image {
        file,
        prompt: index / count,
        seed: args.seed + (index % count) as u64,
    };
    Ok(files.into_iter().enumerate().map(of).collect())
}

fn noise(args: &Args, size: &LatentSize, n_images: usize) -> Result<Option<Noise>> {
    let Some(path) = &args.noise else { return Ok(None) };
    let file = Weights::open_file(path).context("cannot read the noise")?;
    let place = || format!("{}: tensor latents", path.display());
    let view = file.get("latents").with_context(|| format!("{} is missing", place()))?;
    let expected = [size.channels, size.height, size.width];
    ensure!(
        view.shape.len() == 4 && view.shape[1..] == expected,
        "{} has shape {:?}, not [N, {}, {}, {}]",
        place(),
        view.shape,
        size.channels,
        size.height,
        size.width
    );
    let n_given = view.shape[0];
    ensure!(
        n_given == 1 || n_given == n_images,
        "{} holds noise for {n_given} images; give 1 or {n_images}",
        place()
    );
    let values = file.f32("latents")?;
    ensure!(values.iter().all(|value| value.is_finite()), "{} is not finite", place());
    let latents = values.chunks_exact(size.len()).map(<[f32]>::to_vec).collect();
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(Some(Noise { name, latents }))
}

fn sheet(
    args: &Args,
    n_prompts: usize,
    width: usize,
    height: usize,
) -> Result<Option<(PathBuf, Layout)>> {
    let Some(file) = args.sheet.clone() else { return Ok(None) };
    if !outputs::is_png(&file) {
        bail!(Usage(format!("--sheet {}: a sheet is a PNG; end its name in .png", file.display())));
    }
    let layout = Layout::new(n_prompts, args.count as usize, width, height)
        .map_err(|error| usage(error.to_string()))?;
    Ok(Some((file, layout)))
}

/// The last component, also of `.` or a path that ends in `..`.
fn folder_name(folder: &Path) -> String {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned()
}
