//! What was typed; a run is what it means.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, builder::PossibleValuesParser};
use flow::solver::{DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS};
use manual::says::Says;

use crate::{engine::MEMORIES, request::RNGS, runtime::RuntimeArgs, server::args::ServeArgs};

/// Make images from an exported FLUX pipeline with ONNX Runtime.
#[derive(Clone, Debug, Parser)]
#[command(name = "ng-sample", version, after_help = FILES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub generate: Generate,

    #[command(flatten)]
    pub says: Says,
}

/// What to do; images are made when nothing is said.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Make images; the same without the word.
    #[command(after_help = FILES)]
    Generate(Box<Generate>),
    /// Say what a picture or a model folder holds.
    #[command(long_flag_alias = "inspect")]
    Inspect(Inspect),
    /// Serve models over HTTP: the OpenAI images API, jobs with progress, a page.
    Serve(ServeArgs),
    /// Measure each stage, in new processes and in one that is warm.
    Bench(Box<Bench>),
    /// Put images of several models or LoRAs from the same seeds on one sheet.
    Compare(Box<Compare>),
}

/// Arguments of `generate`.
#[derive(Args, Clone, Debug)]
#[command(group = ArgGroup::new("text").args(["prompt", "prompts"]).required(true))]
pub struct Generate {
    #[command(flatten)]
    pub engine: EngineArgs,

    /// What the image should show.
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// Prompts from a file, or from standard input with -; see below.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    #[command(flatten)]
    pub image: ImageArgs,

    /// Where images go; see below.
    #[arg(short, long, alias = "output", value_name = "PATH", default_value = "out.png")]
    pub out: PathBuf,

    /// LoRA of any trainer, with :SCALE where it is not 1; repeatable. The export needs slots.
    #[arg(long = "lora", value_name = "FILE[:SCALE]")]
    pub loras: Vec<String>,

    /// Images for each prompt; image i of a prompt has seed + i.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,

    /// Start from this noise instead of the seeds': safetensors, tensor `latents` [N, C, h, w] f32,
    /// one an image or one for all.
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,

    /// Store the final latents, before the decoder: safetensors, tensor `latents` [N, C, h, w] f32.
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,

    /// Write one picture with all images: a row a prompt when -n is above 1, else a square.
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,

    /// Leave prompt and settings out of the pictures.
    #[arg(long)]
    pub no_metadata: bool,

    /// Print one JSON object an image instead of text.
    #[arg(long)]
    pub json: bool,
}

/// What runs, and on what.
#[derive(Args, Clone, Debug)]
pub struct EngineArgs {
    /// Folder that `ng-export` or Optimum wrote.
    #[arg(short, long, value_name = "DIR", required = true)]
    pub model: Option<PathBuf>,

    /// keep: every network stays loaded; release: the text encoders go before the transformer comes;
    /// low: the same, and weights are read where they lie in their files.
    #[arg(long, value_name = "NAME", default_value = "release",
          value_parser = PossibleValuesParser::new(MEMORIES.map(|(name, _)| name)))]
    pub memory: String,

    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// What an image is like.
#[derive(Args, Clone, Debug)]
pub struct ImageArgs {
    /// Seed of the first image of every prompt; -1 draws one.
    #[arg(short, long, value_name = "N", default_value = "0", allow_hyphen_values = true)]
    pub seed: String,

    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_STEPS as u32,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,

    /// How a step is taken; dpmpp-2m is DPM-Solver++ 2M with λ = log((1 − t)/t), as in diffusers,
    /// dpmpp-2m-k with λ = −log t, as in ComfyUI.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SOLVER.name(),
          value_parser = PossibleValuesParser::new(SOLVERS.map(|(name, _)| name)))]
    pub solver: String,

    /// Pixels across [default: the model's].
    #[arg(short = 'W', long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<u32>,

    /// Pixels down [default: the model's].
    #[arg(short = 'H', long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<u32>,

    /// Distilled guidance scale [default: 3.5 if the model embeds one].
    #[arg(long, value_name = "SCALE", allow_hyphen_values = true)]
    pub guidance: Option<f32>,

    /// Shift of the schedule towards noise, 1 is none [default: the model's].
    #[arg(long, value_name = "SHIFT", allow_negative_numbers = true)]
    pub shift: Option<f64>,

    /// Start from this picture instead of from noise; it gives the size.
    #[arg(long, value_name = "FILE")]
    pub init: Option<PathBuf>,

    /// How much of the picture of --init may change, above 0 and up to 1 [default: 0.6].
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub strength: Option<f64>,

    /// Which numbers a seed stands for: own, those of training; torch, those that PyTorch draws on a
    /// CPU, so that an image can be laid beside one of diffusers.
    #[arg(long, value_name = "NAME", default_value = "own",
          value_parser = PossibleValuesParser::new(RNGS.map(|(name, _)| name)))]
    pub rng: String,

    /// Forecast every other velocity from the fourth network call on, except the last, instead of
    /// computing it: a quarter fewer of 8 calls, nearly half of 28, and another image. Not with heun.
    #[arg(long)]
    pub skip: bool,
}

/// Arguments of `inspect`.
#[derive(Args, Clone, Debug)]
pub struct Inspect {
    /// A picture, or a folder that `ng-export` or Optimum wrote.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `bench`.
#[derive(Args, Clone, Debug)]
pub struct Bench {
    #[command(flatten)]
    pub engine: EngineArgs,

    #[command(flatten)]
    pub image: ImageArgs,

    /// Images that are measured in one process.
    #[arg(long, value_name = "N", default_value_t = 10,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub images: u32,

    /// Processes that are started and measured.
    #[arg(long, value_name = "N", default_value_t = 3,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub starts: u32,

    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `compare`.
#[derive(Args, Clone, Debug)]
#[command(group = ArgGroup::new("text").args(["prompt", "prompts"]).required(true))]
pub struct Compare {
    /// Folder that `ng-export` or Optimum wrote; repeatable, a column each.
    #[arg(short, long = "model", value_name = "DIR", required = true)]
    pub models: Vec<PathBuf>,

    /// LoRA of any trainer, with :SCALE where it is not 1; repeatable, a column each after every model.
    #[arg(long = "lora", value_name = "FILE[:SCALE]")]
    pub loras: Vec<String>,

    /// What the images should show.
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// Prompts from a file, or from standard input with -.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    #[command(flatten)]
    pub image: ImageArgs,

    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// Images for each prompt; image i of a prompt has seed + i.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,

    /// The sheet.
    #[arg(short, long, value_name = "FILE", default_value = "sheet.png")]
    pub out: PathBuf,
}

const FILES: &str = "\
Where images go (PATH of -o):
  one image, PATH ends in .png, .jpg or .webp   PATH
  more images and such a PATH                   PATH numbered: out-000.png, out-001.png, …
                                                prompt by prompt
  -                                             one PNG to standard output
  any other PATH                                a folder, made if missing: PATH/000.png, …
A file of the same name is replaced, each as a whole once its image is finished.

Prompts (FILE of --prompts):
  .txt           one a line
  .json, .jsonl  strings, or objects with `prompt`, `text` or `caption`, which may have settings of
                 their own: seed, steps, width, height, guidance, solver, shift
  .csv, .tsv     columns of the same names
  -              standard input, as .jsonl where it begins with { or \", else as .txt

Exit code: 2 for a mistake in what was typed, 1 for every other failure.
ORT_DYLIB_PATH names the library of ONNX Runtime where it is not beside the program.

Example:
  ng-sample --model flux-onnx --prompt \"a red fox in the snow\" --steps 8 --seed 7 -o fox.png";
