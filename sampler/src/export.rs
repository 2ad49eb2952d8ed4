//! A folder that `ng-export` or Optimum wrote: what it is and what it can be asked for.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, bail, ensure};
use flow::{
    latents::{LatentSize, check_pixels},
    models::transformer::GUIDANCE,
    pipeline::{Pipeline, read_json},
    prompts,
    schedule::{Schedule, Shift},
    solver::{DEFAULT_SOLVER, DEFAULT_STEPS, Solver, plan},
    tokens::{MAX_TEXT_TOKENS, PromptIds, Tokenizers},
    usage::Usage,
};
use onnx::Cancel;
use serde::Deserialize;

use crate::{
    adapters::{Adapter, Adapters, Scaled, Slots},
    networks,
    request::{Job, Request},
    sample::skipped,
};

/// `--strength` unless given, as `FluxImg2ImgPipeline` has it.
pub const DEFAULT_STRENGTH: f64 = 0.6;

/// The configs and tokenizers of an export; any number of threads may ask it for [`Job`]s while an
/// engine works.
pub struct Export {
    pub pipeline: Pipeline,
    /// Name of the folder.
    pub name: String,
    /// What the folder says of itself, where `ng-export` wrote it.
    pub description: Description,
    adapters: Adapters,
    tokenizers: Tokenizers,
}

impl Export {
    /// Reads the configs of `folder` and makes sure that every graph is there. Prompts have
    /// `text_tokens` T5 tokens, by default the tokenizer's limit.
    ///
    /// # Errors
    /// Names the first file that is missing or wrong.
    pub fn open(folder: &Path, text_tokens: Option<usize>) -> Result<Self> {
        if let Some(n) = text_tokens.filter(|n| !(2..=MAX_TEXT_TOKENS).contains(n)) {
            bail!(Usage(format!("--max-sequence-length {n} is not from 2 to {MAX_TEXT_TOKENS}")));
        }
        let pipeline = Pipeline::open(folder)?;
        networks::check_files(folder)?;
        let tokenizers = Tokenizers::open(folder, text_tokens)?;
        pipeline.check_folder("tokenizer")?;
        pipeline.check_folder("tokenizer_2")?;
        pipeline.check_unreplaced()?;
        let n_positions = pipeline.text_encoder.max_position_embeddings;
        ensure!(
            tokenizers.clip_tokens() <= n_positions,
            "tokenizer/tokenizer_config.json pads to {} tokens, but text_encoder/config.json has \
             {n_positions} positions",
            tokenizers.clip_tokens()
        );
        let description = Description::open(folder)?;
        let (name, adapters) = (folder_name(folder), Adapters::default());
        Ok(Self { pipeline, name, description, adapters, tokenizers })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.pipeline.dir
    }

    /// Side in pixels of an image nobody gave a size for.
    pub fn default_side(&self) -> usize {
        self.pipeline.default_size()
    }

    /// CLIP and T5 tokens of a prompt.
    pub fn text_lengths(&self) -> [usize; 2] {
        [self.tokenizers.clip_tokens(), self.tokenizers.text_tokens()]
    }

    /// Whether requests may have an initial image.
    pub fn takes_images(&self) -> bool {
        self.encoder_file().is_file()
    }

    /// Checks `request` and fills in every default.
    ///
    /// # Errors
    /// [`Invalid`], with the field at fault.
    pub fn job(&self, request: Request) -> Result<Job, Invalid> {
        prompts::check(&request.prompt).map_err(|why| invalid("prompt", why))?;
        let ids = self.tokenizers.encode(&request.prompt).map_err(|error| {
            invalid("prompt", format!("cannot tokenise {:?}: {error}", request.prompt))
        })?;
        let (width, height, size) = self.size(&request)?;
        let steps = request.steps.unwrap_or(DEFAULT_STEPS);
        let grid = match request.shift {
            Some(shift) => Shift::Factor(shift).into(),
            None => self.pipeline.scheduler.grid(size.tokens()),
        };
        let schedule =
            Schedule::new(steps, grid).map_err(|error| invalid("steps", error.to_string()))?;
        let strength = strength(&request)?;
        let skipped = if request.init.is_some() { steps - kept(steps, strength)? } else { 0 };
        let schedule = schedule.after(skipped);
        let loras = self.scaled(&request.loras)?;
        let solver = request.solver.unwrap_or(DEFAULT_SOLVER);
        let guidance = self.guidance(request.guidance)?;
        if let Some(noise) =
            request.noise.as_ref().filter(|noise| noise.latents.len() != size.len())
        {
            let why = format!("{} is noise for an image of another size", noise.name);
            return Err(invalid("noise", why));
        }
        let plan = plan(solver, &schedule);
        let skip = skips(&request, solver, plan.len())?;
        let mut notices = self.notices(&ids);
        notices.extend((request.skip && !skip).then(|| nothing_skipped(plan.len())));
        Ok(Job {
            notices,
            ids: Arc::new(ids),
            width,
            height,
            steps,
            seed: request.seed.unwrap_or_else(random_seed),
            solver,
            guidance,
            shift: grid.shift.factor(),
            strength,
            cancel: Cancel::default(),
            plan,
            schedule,
            size,
            skip,
            rng: request.rng,
            loras,
            prompt: request.prompt,
            init: request.init,
            noise: request.noise,
        })
    }

    /// Reads a LoRA of any trainer that requests may name from now on; one of that name is replaced.
    ///
    /// # Errors
    /// When the export has no slots, or it is no LoRA of this model, or changes what has no slot.
    pub fn load_lora(&self, name: &str, path: &Path) -> Result<Arc<Adapter>> {
        self.adapters.load(name, path, &self.pipeline, self.description.lora_slots.as_ref())
    }

    /// Lets go of a LoRA; false if there is none of that name. Jobs that have it keep it.
    pub fn unload_lora(&self, name: &str) -> bool {
        self.adapters.unload(name)
    }

    /// Names of the loaded LoRAs.
    pub fn loras(&self) -> Vec<String> {
        self.adapters.names()
    }

    fn scaled(&self, loras: &[(String, f64)]) -> Result<Vec<Scaled>, Invalid> {
        let find = |(name, scale): &(String, f64)| {
            if !scale.is_finite() {
                return Err(invalid("loras", format!("{name}: {scale} is no scale")));
            }
            let adapter = self.adapters.get(name).ok_or_else(|| {
                let known = self.loras().join(", ");
                invalid("loras", format!("no LoRA {name:?} is loaded; there are: {known}"))
            })?;
            Ok((adapter, *scale))
        };
        loras.iter().map(find).collect()
    }

    /// What of a prompt was cut, a sentence a tokenizer.
    fn notices(&self, ids: &PromptIds) -> Vec<String> {
        let [clip, t5] = self.text_lengths();
        let of = [("CLIP", clip), ("T5", t5)].into_iter().zip(ids.cut);
        of.filter(|&(_, cut)| cut > 0)
            .map(|((encoder, limit), cut)| {
                format!(
                    "the prompt is longer than the {limit} tokens that {encoder} reads: its last \
                     {cut} are cut"
                )
            })
            .collect()
    }

    fn size(&self, request: &Request) -> Result<(usize, usize, LatentSize), Invalid> {
        let side = self.default_side();
        let (mut width, mut height) =
            (request.width.unwrap_or(side), request.height.unwrap_or(side));
        if let Some(init) = &request.init {
            let typed = |typed: Option<usize>, own: usize| typed.is_none_or(|side| side == own);
            if !typed(request.width, init.width) || !typed(request.height, init.height) {
                let (w, h) = (init.width, init.height);
                let why = format!("{width}x{height} is not the {w}x{h} of the initial image");
                return Err(invalid("size", why));
            }
            if !self.takes_images() {
                let why = format!("this export has no {}", self.encoder_file().display());
                return Err(invalid("init", why));
            }
            (width, height) = (init.width, init.height);
        }
        check_pixels(width, height).map_err(|error| invalid("size", error.to_string()))?;
        let size = self.pipeline.latent_size(width, height);
        let size = size.map_err(|error| invalid("size", error.to_string()))?;
        Ok((width, height, size))
    }

    fn guidance(&self, guidance: Option<f32>) -> Result<Option<f32>, Invalid> {
        if !self.pipeline.transformer.guidance_embeds {
            return match guidance {
                Some(_) => Err(invalid(
                    "guidance",
                    "this model embeds no guidance; leave --guidance out".into(),
                )),
                None => Ok(None),
            };
        }
        let guidance = guidance.unwrap_or(GUIDANCE as f32);
        if !(guidance.is_finite() && guidance >= 0.0) {
            let why = format!("--guidance {guidance} is not a number from 0 up");
            return Err(invalid("guidance", why));
        }
        Ok(Some(guidance))
    }

    fn encoder_file(&self) -> PathBuf {
        networks::graph_file(self.folder(), networks::VAE_ENCODER)
    }
}

/// `export.json`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Description {
    /// What it was made for, as `ng-export --target` takes it.
    pub target: String,
    /// How weights are stored, as `ng-export --precision` takes it.
    pub precision: String,
    /// Adapters that are merged: file name and scale.
    pub merged: Vec<(String, f64)>,
    /// Slots for adapters.
    pub lora_slots: Option<Slots>,
}

impl Description {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("export.json");
        if path.is_file() { Ok(read_json(&path)?) } else { Ok(Self::default()) }
    }
}

/// A request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The part of the request that is at fault, as [`Request`] names it; `size` for both sides.
    pub field: &'static str,
    /// One line.
    pub why: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Invalid {}

impl From<Invalid> for Usage {
    fn from(invalid: Invalid) -> Self {
        Self(invalid.why)
    }
}

fn invalid(field: &'static str, why: String) -> Invalid {
    Invalid { field, why }
}

fn strength(request: &Request) -> Result<f64, Invalid> {
    if request.init.is_none() && request.strength.is_some() {
        return Err(invalid("strength", "--strength is for an initial image: give --init".into()));
    }
    let strength = request.strength.unwrap_or(DEFAULT_STRENGTH);
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(invalid(
            "strength",
            format!("--strength {strength} is not above 0 and up to 1"),
        ));
    }
    Ok(strength)
}

/// Of `steps` steps those that an initial image goes through. Source: `get_timesteps` of
/// `FluxImg2ImgPipeline`.
fn kept(steps: usize, strength: f64) -> Result<usize, Invalid> {
    match (steps as f64 * strength).min(steps as f64) as usize {
        0 => {
            Err(invalid("strength", format!("--strength {strength} of {steps} steps leaves none")))
        }
        kept => Ok(kept),
    }
}

/// Whether any of `n_calls` network calls is forecast.
fn skips(request: &Request, solver: Solver, n_calls: usize) -> Result<bool, Invalid> {
    if request.skip && solver == Solver::Heun {
        let why = "--skip is not for the solver heun, which calls the network twice at one time, \
                   where no line can be drawn: leave --skip out, or take another --solver";
        return Err(invalid("skip", why.into()));
    }
    Ok(request.skip && skipped(n_calls).contains(&true))
}

/// What `--skip` means for so few network calls.
pub(crate) fn nothing_skipped(n_calls: usize) -> String {
    format!(
        "--skip has no effect: of {n_calls} network calls none is forecast; it takes at least 5"
    )
}

/// A seed of 32 bits, which every tool of this field can type in again.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // The standard library's hasher is keyed by the system's randomness.
    RandomState::new().hash_one(std::time::SystemTime::now()) >> 32
}

/// The last component, also of `.` or a path that ends in `..`.
fn folder_name(folder: &Path) -> String {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    whole.file_name().unwrap_or(whole.as_os_str()).to_string_lossy().into_owned()
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("folder", &self.folder()).finish_non_exhaustive()
    }
}
