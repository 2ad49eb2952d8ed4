//! One image as it is asked for, and as it will be made.

use std::sync::Arc;

use flow::{
    latents::LatentSize,
    noise::torch,
    schedule::Schedule,
    solver::{Solver, Step},
    tokens::PromptIds,
};
use onnx::Cancel;

use crate::{
    adapters::{self, Scaled},
    picture::Picture,
};

/// What one image should be. What is `None` is left to the model or to the program's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// At most 8 KiB.
    pub prompt: String,
    /// Pixels, a multiple of 16 for FLUX.
    pub width: Option<usize>,
    /// Pixels, a multiple of 16 for FLUX.
    pub height: Option<usize>,
    /// From 1 to 1000.
    pub steps: Option<usize>,
    /// Drawn at random when absent; [`Job::seed`] says which.
    pub seed: Option<u64>,
    pub solver: Option<Solver>,
    /// Embedded guidance; only for a model that has it.
    pub guidance: Option<f32>,
    /// Shift of the schedule towards noise, 1 is none.
    pub shift: Option<f64>,
    /// Start from this image instead of from noise; it gives the size.
    pub init: Option<Arc<Picture>>,
    /// How much of `init` may change: 0 nothing, 1 everything.
    pub strength: Option<f64>,
    /// Start from this noise `[Z, h, w]` instead of the seed's.
    pub noise: Option<Arc<GivenNoise>>,
    /// Forecast the velocities that [`crate::sample::skipped`] names instead of computing them.
    pub skip: bool,
    pub rng: Rng,
    /// Names of loaded LoRAs, and their scales.
    pub loras: Vec<(String, f64)>,
}

/// Which numbers a seed stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rng {
    /// Those of training, the same on every machine.
    #[default]
    Own,
    /// Those of PyTorch's CPU generator, as diffusers draws them; see [`flow::noise::torch`].
    Torch,
}

/// The names that people type.
pub const RNGS: [(&str, Rng); 2] = [("own", Rng::Own), ("torch", Rng::Torch)];

/// Noise from a file.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenNoise {
    /// Name of the file.
    pub name: String,
    /// `[Z, h, w]`.
    pub latents: Vec<f32>,
}

/// An image ready to be made, every default resolved and everything checked.
#[derive(Clone, Debug)]
pub struct Job {
    pub prompt: String,
    pub width: usize,
    pub height: usize,
    /// Steps asked for; the plan may have more network calls, and with an initial image has fewer.
    pub steps: usize,
    pub seed: u64,
    pub solver: Solver,
    /// Present exactly when the model embeds guidance.
    pub guidance: Option<f32>,
    /// Factor s of the schedule's shift.
    pub shift: f64,
    pub init: Option<Arc<Picture>>,
    pub strength: f64,
    pub noise: Option<Arc<GivenNoise>>,
    /// Whether any velocity is forecast.
    pub skip: bool,
    pub rng: Rng,
    pub loras: Vec<Scaled>,
    /// What was changed in the request, a sentence each: a prompt that is cut, a setting without effect.
    pub notices: Vec<String>,
    /// The prompt in tokens.
    pub ids: Arc<PromptIds>,
    /// Stops the job, also inside a step.
    pub cancel: Cancel,
    /// Latents of an image of this size.
    pub size: LatentSize,
    /// Times from where it starts to 0.
    pub schedule: Schedule,
    /// One entry a network call.
    pub plan: Vec<Step>,
}

impl Job {
    /// Whether both can share the calls of the network: same size, plan and LoRAs.
    pub fn goes_with(&self, other: &Self) -> bool {
        let key = |job: &Self| (job.size, job.skip, adapters::key(&job.loras));
        key(self) == key(other) && self.plan == other.plan
    }

    /// The noise `[Z, h, w]` it starts from.
    pub fn initial(&self) -> Vec<f32> {
        match &self.noise {
            Some(noise) => noise.latents.clone(),
            None if self.rng == Rng::Torch => torch::normal(self.seed, self.size.len()),
            None => self.size.noise(self.seed),
        }
    }
}
