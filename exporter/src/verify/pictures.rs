//! Pictures of fixed prompts, made by an export and by its checkpoint from the same noise.
//!
//! The export's graphs run in ONNX Runtime as in [`super::blocks`], the checkpoint in plain Rust.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::{Weights, write_atomically};
use flow::latents::LatentSize;
use flow::lora::Lora;
use flow::models::transformer::{GUIDANCE, image_ids};
use flow::ops::shapes::Shapes;
use flow::picture::Picture;
use flow::pipeline::Pipeline;
use flow::schedule::Schedule;
use flow::solver::{self, Solver, Walk};
use flow::tokens::Tokenizers;
use host::Tensor;
use serde::{Deserialize, Serialize};

use super::blocks::Whole;
use super::reference;
use super::similarity::{gmsd, psnr};
use crate::part::Part;
use crate::precision::Precision;
use crate::weights::Source;

/// Its file.
pub const PNG: &str = "verification.png";
/// Most pictures.
pub const MAX_PICTURES: usize = 4;
/// What is painted.
const PROMPTS: [&str; MAX_PICTURES] =
    ["a red \"HAT\"", "a green \"SUN\"", "a blue \"42\"", "a yellow \"CUP\" on a table"];
/// The graphs that a picture takes.
const PARTS: [Part; 4] =
    [Part::TextEncoder, Part::TextEncoder2, Part::Transformer, Part::VaeDecoder];
/// Steps of Euler's method.
const STEPS: usize = 8;
/// Side in pixels that no picture is above.
pub const MAX_SIDE: usize = 256;
/// Work of the transformer in one program, in floating-point operations, that is done unasked.
const MAX_FLOPS: f64 = 2e12;
/// Side in pixels that pictures of the report are enlarged to.
const SHOWN: usize = 128;

/// Stands for no difference, dB.
pub const MAX_PSNR: f64 = 100.0;

/// How near pictures must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Least peak signal-to-noise ratio, dB.
    pub min_psnr: f64,
    /// Largest gradient magnitude similarity deviation.
    pub max_gmsd: f64,
}

/// What was found of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// What was painted.
    pub prompt: String,
    /// dB; at most [`MAX_PSNR`].
    pub psnr: f64,
    /// See [`gmsd`].
    pub gmsd: f64,
}

/// What was found of all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pictures {
    /// What passes.
    pub limits: Limits,
    /// Side in pixels.
    pub side: usize,
    /// Steps of Euler's method.
    pub steps: usize,
    /// One a prompt.
    pub judged: Vec<Judged>,
}

impl Precision {
    /// What passes where nobody chose: what the embedded model and random networks of small width reach, with
    /// room.
    pub fn limits(self) -> Limits {
        let [min_psnr, max_gmsd] = match self {
            Self::F32 => [60.0, 0.002],
            Self::F16 => [40.0, 0.01],
            Self::Bf16 => [35.0, 0.03],
            Self::Int8 | Self::Fp8 => [30.0, 0.05],
            Self::Int4 => [20.0, 0.15],
        };
        Limits { min_psnr, max_gmsd }
    }
}

/// How many prompts to paint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All of them, where weights are lossy and the work is small.
    Auto,
    /// So many.
    Some(usize),
}

impl From<Option<u8>> for Wanted {
    fn from(typed: Option<u8>) -> Self {
        typed.map_or(Self::Auto, |n| Self::Some(n.into()))
    }
}

impl Wanted {
    /// How many of which side, or why none: a line for the user.
    pub fn count(
        self,
        pipeline: &Pipeline,
        folder: &Path,
        precision: Precision,
    ) -> std::result::Result<usize, Option<String>> {
        let n = match self {
            Self::Some(0) => return Err(None),
            Self::Auto if precision == Precision::F32 => return Err(None),
            Self::Some(n) => n.min(MAX_PICTURES),
            Self::Auto => MAX_PICTURES,
        };
        if let Some(missing) = PARTS.iter().find(|part| !folder.join(part.folder()).is_dir()) {
            return Err(Some(format!("no pictures without {}", missing.folder())));
        }
        let shapes = Shapes::new();
        let side = side(pipeline);
        let tokens = (side / (2 * pipeline.vae.factor()).max(1)).pow(2);
        pipeline.dry_velocity(&shapes, 1, tokens, flow::tokens::MAX_TEXT_TOKENS);
        let flops = shapes.flops() * (n * STEPS) as f64;
        if self == Self::Auto && flops > MAX_FLOPS {
            return Err(Some(format!(
                "no pictures: {:.0} TFLOP in plain Rust would take long; --pictures 1 makes one with {:.0}",
                flops / 1e12,
                shapes.flops() * STEPS as f64 / 1e12
            )));
        }
        Ok(n)
    }
}

/// Paints `n` prompts twice, judges them by `limits` and writes [`PNG`] into `folder`.
///
/// # Errors
/// When weights or graphs cannot be read, ONNX Runtime fails, or `check` says to stop.
pub fn compare(
    folder: &Path,
    pipeline: &Pipeline,
    loras: &[Lora],
    n: usize,
    limits: Limits,
    threads: usize,
    check: &dyn Fn() -> Result<()>,
) -> Result<Pictures> {
    let side = side(pipeline);
    let brush = Brush { pipeline, size: pipeline.latent_size(side, side)?, n, check };
    let mut weights: HashMap<Part, Weights> = HashMap::new();
    for part in PARTS {
        weights.insert(part, pipeline.unread_weights(part.component())?);
    }
    let expected = brush.paint(&mut |part, inputs| {
        let source = Source { weights: &weights[&part], loras, component: part.component() };
        let mut last = Vec::new();
        reference::run(pipeline, part, source, inputs, &mut |_, _, outputs| {
            last = outputs.to_vec();
            check()
        })?;
        Ok(last)
    })?;
    let mut graphs: HashMap<Part, Whole> = HashMap::new();
    let found = brush.paint(&mut |part, inputs| {
        let graph = match graphs.entry(part) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let ranks: Vec<usize> = inputs.iter().map(|input| input.shape().len()).collect();
                place.insert(Whole::open(folder, part, &ranks, threads)?)
            }
        };
        graph.run(inputs)
    })?;
    let judge = |(index, (a, b)): (usize, (&Picture, &Picture))| Judged {
        prompt: PROMPTS[index].into(),
        psnr: psnr(a, b).min(MAX_PSNR),
        gmsd: gmsd(a, b),
    };
    let judged = expected.iter().zip(&found).enumerate().map(judge).collect();
    write_atomically(&folder.join(PNG), &sheet(&expected, &found)?)?;
    Ok(Pictures { limits, side, steps: STEPS, judged })
}

/// Runs one network: inputs and outputs in the graph's order.
type Network<'a> = &'a mut dyn FnMut(Part, &[Tensor]) -> Result<Vec<Tensor>>;

/// What pictures are made of, whoever computes.
struct Brush<'a> {
    pipeline: &'a Pipeline,
    size: LatentSize,
    n: usize,
    check: &'a dyn Fn() -> Result<()>,
}

impl Brush<'_> {
    fn paint(&self, network: Network<'_>) -> Result<Vec<Picture>> {
        let Self { pipeline, size, n, check } = self;
        let tokenizers = Tokenizers::open(&pipeline.dir, None)?;
        let (mut clip, mut t5) = (Vec::new(), Vec::new());
        for prompt in &PROMPTS[..*n] {
            let ids = tokenizers.encode(prompt).map_err(|why| anyhow!("{prompt}: {why}"))?;
            clip.extend(ids.clip.iter().map(|&id| id as f32));
            t5.extend(ids.t5.iter().map(|&id| id as f32));
        }
        let n_text = t5.len() / n;
        let rows = |ids: Vec<f32>| Tensor::new(&[*n, ids.len() / n], ids);
        let pooled = network(Part::TextEncoder, &[rows(clip)])?.pop().context("no pooled text")?;
        let states = network(Part::TextEncoder2, &[rows(t5)])?.pop().context("no text states")?;
        let tokens = [*n, size.tokens(), size.token_width()];
        let noise = (0..*n).flat_map(|seed| size.pack(&size.noise(seed as u64))).collect();
        let schedule = Schedule::new(STEPS, pipeline.scheduler.grid(size.tokens()))?;
        let mut walk = Walk::new(noise);
        for step in solver::plan(Solver::Euler, &schedule) {
            check()?;
            let mut inputs = vec![
                Tensor::new(&tokens, walk.x().to_vec()),
                states.clone(),
                pooled.clone(),
                Tensor::new(&[*n], vec![step.t as f32; *n]),
                Tensor::new(&[n_text, 3], vec![0.0; 3 * n_text]),
                Tensor::new(&[size.tokens(), 3], image_ids(size.rows(), size.columns())),
            ];
            if pipeline.transformer.guidance_embeds {
                inputs.push(Tensor::new(&[*n], vec![GUIDANCE as f32; *n]));
            }
            let v = network(Part::Transformer, &inputs)?.pop().context("no velocity")?;
            ensure!(v.shape() == tokens, "a velocity has shape {:?}", v.shape());
            walk.advance(&step, v.values());
        }
        let unscaled = |z: f32| pipeline.vae.unscaled(f64::from(z)) as f32;
        let latents = walk.x().chunks_exact(size.len()).flat_map(|packed| size.unpack(packed));
        let shape = [*n, size.channels, size.height, size.width];
        let z = Tensor::new(&shape, latents.map(unscaled).collect());
        let pixels = network(Part::VaeDecoder, &[z])?.pop().context("no pixels")?;
        let side = size.height * pipeline.vae.factor();
        let one = |sample: &[f32]| Picture::of_sample(sample, side, side);
        Ok(pixels.values().chunks_exact(3 * side * side).map(one).collect())
    }
}

fn side(pipeline: &Pipeline) -> usize {
    pipeline.default_size().min(MAX_SIDE)
}

/// A PNG with a row a prompt: the checkpoint's picture, the export's, and four times their difference.
fn sheet(expected: &[Picture], found: &[Picture]) -> Result<Vec<u8>> {
    let side = expected[0].width;
    let by = SHOWN.div_ceil(side).max(1);
    let (width, height) = (3 * side * by, expected.len() * side * by);
    let mut rgb = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        let (row, y) = (y / (side * by), y % (side * by) / by);
        for x in 0..width {
            let (column, x) = (x / (side * by), x % (side * by) / by);
            let at = 3 * (y * side + x);
            for channel in at..at + 3 {
                let (a, b) = (expected[row].rgb[channel], found[row].rgb[channel]);
                rgb.push([a, b, a.abs_diff(b).saturating_mul(4)][column]);
            }
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&rgb));
    written.context("cannot write the pictures")?;
    Ok(bytes)
}
