//! What was typed; a request is what it means.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, builder::PossibleValuesParser};
use flow::solver::{DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS};

/// Make images from an exported FLUX pipeline with ONNX Runtime.
#[derive(Clone, Debug, Parser)]
#[command(name = "ng-sample", version, after_help = FILES)]
#[command(group = ArgGroup::new("task").required(true).args(["prompt", "prompts", "inspect"]))]
pub struct Args {
    /// Folder that `ng-export` or Optimum wrote.
    #[arg(short, long, value_name = "DIR", required_unless_present = "inspect")]
    pub model: Option<PathBuf>,

    /// What the image should show.
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// Prompts from a file: .txt with one a line, or .jsonl with objects holding `prompt` or `text`.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,

    /// Print the parameters stored in a PNG and exit.
    #[arg(long, value_name = "PNG", conflicts_with = "model")]
    pub inspect: Option<PathBuf>,

    /// Where images go; see below.
    #[arg(short, long, value_name = "PATH", default_value = "out.png")]
    pub output: PathBuf,

    /// Images for each prompt; image i of a prompt has seed + i.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,

    /// Seed of the first image of every prompt.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_STEPS as u32,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,

    /// How a step is taken; dpmpp-2m is DPM-Solver++ 2M with λ = log((1 − t)/t), as in diffusers.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SOLVER.name(),
          value_parser = PossibleValuesParser::new(SOLVERS.map(|(name, _)| name)))]
    pub solver: String,

    /// Pixels across [default: the model's].
    #[arg(short = 'W', long, value_name = "PIXELS")]
    pub width: Option<u32>,

    /// Pixels down [default: the model's].
    #[arg(short = 'H', long, value_name = "PIXELS")]
    pub height: Option<u32>,

    /// Distilled guidance scale [default: 3.5 if the model embeds one].
    #[arg(long, value_name = "SCALE")]
    pub guidance: Option<f32>,

    /// Shift of the schedule towards noise, 1 is none [default: the model's].
    #[arg(long, value_name = "SHIFT")]
    pub shift: Option<f64>,

    /// T5 tokens a prompt is padded or cut to [default: the tokenizer's limit, at most 512].
    #[arg(long, value_name = "N")]
    pub max_sequence_length: Option<usize>,

    /// Threads for one operator; the images do not depend on it [default: every core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Start from this noise instead of the seeds': safetensors, tensor `latents` [N, C, h, w] f32,
    /// one an image or one for all.
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,

    /// Store the final latents, before the decoder: safetensors, tensor `latents` [N, C, h, w] f32.
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,

    /// Write one PNG with all images: a row a prompt when -n is above 1, else a square.
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,

    /// Leave prompt and settings out of the PNGs.
    #[arg(long)]
    pub no_metadata: bool,

    /// Print one JSON object an image instead of text.
    #[arg(long)]
    pub json: bool,
}

const FILES: &str = "\
Where images go (PATH of -o):
  one image, PATH ends in .png     PATH
  more images, PATH ends in .png   PATH numbered: out-000.png, out-001.png, … prompt by prompt
  any other PATH                   a folder, made if missing: PATH/000.png, PATH/001.png, …
A file of the same name is replaced, each as a whole once its image is finished.

Example:
  ng-sample --model flux-onnx --prompt \"a red fox in the snow\" --steps 8 --seed 7 -o fox.png";
