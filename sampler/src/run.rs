//! What is to be made: the arguments checked against the model, every default resolved.

use std::{
    collections::HashSet,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use flow::{
    checkpoint::Weights,
    lora::scaled_path,
    prompts::{self, Prompt, Prompts},
    solver::Solver,
    usage::Usage,
};

use crate::{
    args::{EngineArgs, Generate, ImageArgs},
    engine::{self, MEMORIES},
    export::{Export, random_seed},
    format::{self, Format},
    outputs::{self, STANDARD},
    request::{GivenNoise, Job, RNGS, Request, Rng},
    settings,
    sheet::Layout,
};

/// Most images in one run.
const MAX_IMAGES: usize = 1_000_000;

/// A run, ready to start.
pub struct Run {
    pub export: Arc<Export>,
    pub options: engine::Options,
    /// In the order they are made: all images of a prompt, then those of the next.
    pub images: Vec<Image>,
    pub latents_file: Option<PathBuf>,
    pub sheet: Option<(PathBuf, Layout)>,
    /// Whether pictures carry prompt and settings.
    pub metadata: bool,
    pub json: bool,
    /// What a person should know before it starts, a sentence each.
    pub notices: Vec<String>,
}

/// One image to make.
pub struct Image {
    pub file: PathBuf,
    pub job: Job,
}

impl Run {
    /// Reads the model's configs and everything else that `args` names, and makes sure that the
    /// results can be written, before any network is loaded.
    ///
    /// # Errors
    /// [`Usage`] when the arguments themselves are wrong, otherwise what is wrong with which file.
    pub fn new(args: &Generate) -> Result<Self> {
        let (folder, options) = engine_options(&args.engine)?;
        let export = Arc::new(Export::open(&folder, options.text_tokens)?);
        let (prompts, mut notices) = prompts(args)?;
        notices.extend(export.pipeline.notices().iter().cloned());
        let loras = load_loras(&export, &args.loras, &mut notices)?;
        let base = Request { loras, ..request(&args.image)? };
        let count = args.count as usize;
        let n_images = prompts.len() * count;
        if n_images > MAX_IMAGES {
            bail!(usage(format!("{n_images} images are above the limit of {MAX_IMAGES} a run")));
        }
        let files = outputs::image_files(&args.out, n_images).map_err(usage)?;
        let mut files = files.into_iter();
        let mut images = Vec::with_capacity(n_images);
        for (index, prompt) in prompts.iter().enumerate() {
            let of_file = |error: Usage| match &args.prompts {
                Some(file) => Usage(format!("{}: prompt {}: {error}", name_of(file), index + 1)),
                None => error,
            };
            let request = settings::of_prompt(prompt, &base).map_err(of_file)?;
            let first = request.seed.unwrap_or_else(random_seed);
            if first.checked_add(count as u64 - 1).is_none() {
                bail!(usage(format!("--seed {first} + {count} images passes the largest seed")));
            }
            for (seed, file) in (first..=u64::MAX).zip(files.by_ref().take(count)) {
                let request = Request { seed: Some(seed), ..request.clone() };
                let job = export.job(request).map_err(|error| of_file(error.into()))?;
                images.push(Image { file, job });
            }
        }
        let of_prompts = images.iter().step_by(count).flat_map(|image| &image.job.notices);
        notices.extend(of_prompts.cloned());
        notices.extend(args.engine.runtime.notices(&options));
        let mut said = HashSet::new();
        notices.retain(|notice| said.insert(notice.clone()));
        if let Some(path) = &args.noise {
            give_noise(path, &mut images)?;
        }
        let mut run = Self {
            sheet: sheet(args, &images, prompts.len())?,
            export,
            options,
            images,
            latents_file: args.latents_out.clone(),
            metadata: !args.no_metadata,
            json: args.json,
            notices,
        };
        let replaced = run.check_outputs()?;
        run.notices.extend(replaced);
        Ok(run)
    }

    /// Whether the image goes to standard output, so that nothing else may.
    pub fn is_piped(&self) -> bool {
        self.images.first().is_some_and(|image| image.file == Path::new(STANDARD))
    }

    /// What will be replaced, if anything.
    fn check_outputs(&self) -> Result<Option<String>> {
        let (mut seen, mut there) = (HashSet::new(), Vec::new());
        let files = self.images.iter().map(|image| image.file.as_path());
        let files = files.filter(|file| *file != Path::new(STANDARD));
        let others = self.latents_file.as_deref().into_iter();
        for file in files.chain(others).chain(self.sheet.iter().map(|(file, _)| file.as_path())) {
            if !seen.insert(file) {
                bail!(usage(format!("{} would be written twice", file.display())));
            }
            ensure!(!file.is_dir(), "cannot write {}: it is a folder", file.display());
            there.extend(file.is_file().then_some(file));
        }
        let folders: HashSet<&Path> = seen.into_iter().map(outputs::parent).collect();
        folders.into_iter().try_for_each(outputs::check_writable)?;
        Ok(there.first().map(|first| match there.len() {
            1 => format!("{} is there and will be replaced", first.display()),
            n => {
                format!(
                    "{n} files are there and will be replaced, the first is {}",
                    first.display()
                )
            }
        }))
    }
}

/// The model's folder and how its networks run.
///
/// # Errors
/// [`Usage`] for what is missing or unknown.
pub fn engine_options(args: &EngineArgs) -> Result<(PathBuf, engine::Options)> {
    let folder = args.model.clone().with_context(|| usage("--model is missing"))?;
    let memory = MEMORIES.iter().find(|(name, _)| *name == args.memory);
    let (_, memory) =
        memory.with_context(|| usage(format!("--memory {} is not known", args.memory)))?;
    Ok((folder, args.runtime.options(*memory)?))
}

/// What was typed for every image.
///
/// # Errors
/// [`Usage`] for a seed or solver that is none, or what is wrong with the initial picture.
pub fn request(args: &ImageArgs) -> Result<Request> {
    let solver = Solver::by_name(&args.solver)
        .with_context(|| usage(format!("--solver {} is not known", args.solver)))?;
    let init = args.init.as_deref().map(format::open).transpose()?;
    Ok(Request {
        prompt: String::new(),
        width: args.width.map(|pixels| pixels as usize),
        height: args.height.map(|pixels| pixels as usize),
        steps: Some(args.steps as usize),
        seed: settings::seed(&args.seed).map_err(|why| usage(format!("--seed {why}")))?,
        solver: Some(solver),
        guidance: args.guidance,
        shift: args.shift,
        init: init.map(Arc::new),
        strength: args.strength,
        noise: None,
        skip: args.skip,
        loras: Vec::new(),
        rng: RNGS.iter().find(|(name, _)| *name == args.rng).map_or(Rng::Own, |&(_, rng)| rng),
    })
}

/// A mistake in what was typed.
pub(crate) fn usage(message: impl Into<String>) -> Usage {
    Usage(message.into())
}

/// Names and scales of typed LoRAs; what is to be said of them goes into `notices`.
fn load_loras(
    export: &Export,
    typed: &[String],
    notices: &mut Vec<String>,
) -> Result<Vec<(String, f64)>> {
    let mut loras: Vec<(String, f64)> = Vec::new();
    for text in typed {
        let (path, scale) = scaled_path(text).map_err(usage)?;
        let stem = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let is_taken = loras.iter().any(|(name, _)| *name == stem);
        let name = if is_taken { path.display().to_string() } else { stem };
        let adapter = export.load_lora(&name, &path)?;
        notices.extend(adapter.lines.iter().cloned());
        loras.push((name, scale));
    }
    Ok(loras)
}

/// The prompts, and what of their file is not used.
fn prompts(args: &Generate) -> Result<(Vec<Prompt>, Vec<String>)> {
    match (&args.prompt, &args.prompts) {
        (Some(prompt), _) => Ok((vec![Prompt::new(prompt)], Vec::new())),
        (None, Some(file)) => {
            let read = read_prompts(file)?;
            let unused = settings::unused(&read.prompts);
            let unused = (!unused.is_empty())
                .then(|| format!("{} are no settings of an image", unused.join(", ")));
            let notices = read.notices().into_iter().chain(unused);
            let notices = notices.map(|notice| format!("{}: {notice}", name_of(file))).collect();
            Ok((read.prompts, notices))
        }
        (None, None) => bail!(usage("a prompt is missing: give --prompt or --prompts")),
    }
}

/// The prompts of a file, or of standard input for `-`.
///
/// # Errors
/// As [`prompts::read`].
pub fn read_prompts(file: &Path) -> Result<Prompts> {
    if file != Path::new(STANDARD) {
        return Ok(prompts::read(file)?);
    }
    let mut text = Vec::new();
    std::io::stdin().lock().take(prompts::MAX_FILE + 1).read_to_end(&mut text)?;
    let is_json = matches!(text.trim_ascii_start().first(), Some(b'{' | b'"'));
    let extension = if is_json { "jsonl" } else { "txt" };
    prompts::of_bytes(extension, &text).map_err(|why| anyhow!("standard input: {why}"))
}

/// As people know a prompt file.
fn name_of(file: &Path) -> String {
    if file == Path::new(STANDARD) { "standard input".into() } else { file.display().to_string() }
}

/// Gives each image its noise from a file, or all the same.
fn give_noise(path: &Path, images: &mut [Image]) -> Result<()> {
    let size = images[0].job.size;
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
    let (n_given, n_images) = (view.shape[0], images.len());
    ensure!(
        n_given == 1 || n_given == n_images,
        "{} holds noise for {n_given} images; give 1 or {n_images}",
        place()
    );
    let values = file.f32("latents")?;
    ensure!(values.iter().all(|value| value.is_finite()), "{} is not finite", place());
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let rows = values.chunks_exact(size.len());
    let given = rows.map(|row| Arc::new(GivenNoise { name: name.clone(), latents: row.to_vec() }));
    let given: Vec<Arc<GivenNoise>> = given.collect();
    for (index, image) in images.iter_mut().enumerate() {
        ensure!(image.job.size == size, "--noise is for images of one size");
        image.job.noise = Some(given[index % given.len()].clone());
    }
    Ok(())
}

fn sheet(args: &Generate, images: &[Image], n_prompts: usize) -> Result<Option<(PathBuf, Layout)>> {
    let Some(file) = args.sheet.clone() else { return Ok(None) };
    if Format::of(&file).is_none() {
        let file = file.display();
        bail!(usage(format!("--sheet {file}: end its name in .png, .jpg or .webp")));
    }
    let (width, height) = (images[0].job.width, images[0].job.height);
    if images.iter().any(|image| (image.job.width, image.job.height) != (width, height)) {
        bail!(usage("--sheet is for images of one size"));
    }
    let layout = Layout::new(n_prompts, args.count as usize, width, height)
        .map_err(|error| usage(error.to_string()))?;
    Ok(Some((file, layout)))
}
