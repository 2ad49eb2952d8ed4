//! What a velocity and a training pass of a model, or iterations of a run, take on a device, with random
//! weights made there.

use std::fmt;
use std::time::Instant;

use anyhow::{Result, anyhow};
use cluster::Group;
use flow::latents::LatentSize;
use flow::models::transformer::{GUIDANCE, image_ids};
use flow::noise::Noise;
use flow::ops::shapes::Shapes;
use flow::pipeline::{Component, Pipeline};
use flow::usage::Usage;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::network::condition::Condition;
use crate::network::engine::{Engine, segments};
use crate::network::lora::{Adapters, LoraConfig};
use crate::tensor::device::{self, Compute};
use crate::tensor::parameters::{Parameters, Storage};

pub mod iteration;

/// What to measure.
pub struct Options<'a> {
    /// The model, a folder or a published one.
    pub pipeline: &'a Pipeline,
    /// Widths and heights in pixels; none for the model's own.
    pub sizes: &'a [[usize; 2]],
    /// Images at a time.
    pub batch: usize,
    /// T5 tokens a prompt.
    pub text_tokens: usize,
    /// Rank of the adapters that the training pass trains.
    pub lora_rank: usize,
    /// Whether backward keeps all activations in place of computing each block again.
    pub plain: bool,
    /// Whether the folder's weights are read from disk block by block, in place of random ones in memory;
    /// passes are not warmed up then.
    pub stream: bool,
    /// Passes of each kind; the median is told.
    pub repeats: usize,
    /// Whether to print JSON.
    pub json: bool,
    /// Where it runs.
    pub compute: Compute,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    device: String,
    precision: String,
    batch: usize,
    text_tokens: usize,
    /// 10¹² operations a second of a large matrix product.
    matmul_tflops: f64,
    /// GB (10⁹ bytes) in use once the weights are there.
    weights_gb: Option<f64>,
    rows: Vec<Row>,
}

/// One image size.
#[derive(Serialize)]
struct Row {
    width: usize,
    height: usize,
    /// Image tokens.
    tokens: usize,
    /// Operations of one velocity.
    velocity_tflop: f64,
    velocity_ms: f64,
    /// Forward and backward, adapters training.
    training_ms: f64,
    /// GB above the weights at the peak of a velocity, and of a training pass.
    velocity_gb: Option<f64>,
    training_gb: Option<f64>,
}

/// Measures and prints.
///
/// # Errors
/// When a size does not fit the model.
pub fn run(options: &Options<'_>) -> Result<()> {
    let Options { pipeline, batch, text_tokens, compute, .. } = *options;
    let own = [[pipeline.default_size(); 2]];
    let sizes = if options.sizes.is_empty() { &own[..] } else { options.sizes };
    let latents = |&[width, height]: &[usize; 2]| {
        let size = pipeline.latent_size(width, height);
        size.map_err(|error| anyhow!(Usage(format!("--size {width}x{height}: {error}"))))
    };
    let sizes = sizes.iter().map(latents).collect::<Result<Vec<LatentSize>>>()?;
    let matmul_tflops = matmul(compute) / 1e12;
    let engine = engine(options)?;
    let weights_gb = peak_gb(compute.device);
    let rows = sizes.iter().map(|size| measure(options, &engine, size));
    let rows = rows.collect::<Result<Vec<Row>>>()?;
    let precision = device::precision_name(compute.kind).to_owned();
    let device = format!("{:?}", compute.device);
    let report = Report { device, precision, batch, text_tokens, matmul_tflops, weights_gb, rows };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

/// The velocity network with its own weights on disk or random ones, and new adapters.
fn engine(options: &Options<'_>) -> Result<Engine> {
    let (config, compute) = (&options.pipeline.transformer, options.compute);
    let segments = segments(config);
    let parameters = if options.stream {
        let weights = options.pipeline.weights(Component::Transformer)?;
        Parameters::load(&segments, weights, compute, Storage::Streamed)?
    } else {
        Parameters::build(&segments, compute, Storage::Frozen, |_, shape| {
            let n = shape.iter().product::<usize>() as i64;
            // Numbers that stay in range through any depth.
            let scale = if shape.len() == 1 { 0.02 } else { (shape[1] as f64).powf(-0.5) };
            Ok(Tensor::randn([n], (compute.kind, compute.device)) * scale)
        })?
    };
    let mut engine = Engine::new(config.clone(), parameters);
    let lora = LoraConfig { rank: options.lora_rank, ..LoraConfig::default() };
    let (noise, alone) = (Noise::new(0), Group::alone());
    engine.adapt(Adapters::new(&lora, None, &segments, noise, compute, &alone)?);
    engine.train();
    engine.recompute = !options.plain;
    Ok(engine)
}

fn measure(options: &Options<'_>, engine: &Engine, size: &LatentSize) -> Result<Row> {
    let Options { pipeline, batch, text_tokens, compute, .. } = *options;
    let (network, device) = (&pipeline.transformer, compute.device);
    let random = |shape: &[usize]| {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        Tensor::randn(shape, (Kind::Float, device))
    };
    let x_t = random(&[batch, size.tokens(), size.token_width()]);
    let t = Tensor::full([batch as i64], 0.5, (Kind::Float, device));
    let condition = Condition {
        text: random(&[batch, text_tokens, network.joint_attention_dim]),
        pooled: random(&[batch, network.pooled_projection_dim]),
        guidance: Tensor::full([batch as i64], GUIDANCE, (Kind::Float, device)),
        img_ids: Tensor::from_slice(&image_ids(size.rows(), size.columns()))
            .reshape([-1, 3])
            .to_device(device),
    };
    let timed = |pass: &dyn Fn() -> Result<()>| {
        device::forget_peak();
        let before = peak_gb(device);
        if !options.stream {
            pass()?;
        }
        let ms = median_ms(options.repeats, device, pass)?;
        anyhow::Ok((ms, peak_gb(device).zip(before).map(|(peak, before)| peak - before)))
    };
    let forward = || engine.velocity(&x_t, &t, &condition).map(drop);
    let training = || engine.forward_backward(&x_t, &t, &condition, |v| Ok(v.shallow_clone()));
    let (velocity_ms, velocity_gb) = timed(&forward)?;
    let (training_ms, training_gb) = timed(&training)?;
    let shapes = Shapes::new();
    pipeline.dry_velocity(&shapes, batch, size.tokens(), text_tokens);
    let factor = pipeline.vae.factor();
    Ok(Row {
        width: size.width * factor,
        height: size.height * factor,
        tokens: size.tokens(),
        velocity_tflop: shapes.flops() / 1e12,
        velocity_ms,
        training_ms,
        velocity_gb,
        training_gb,
    })
}

/// Operations a second of a large square product, the best of several.
fn matmul(Compute { device, kind }: Compute) -> f64 {
    let n: i64 = if device.is_cuda() { 8192 } else { 1024 };
    let [a, b] = [(); 2].map(|()| Tensor::randn([n, n], (kind, device)));
    let once = || {
        let started = Instant::now();
        drop(a.matmul(&b));
        device::synchronise(device);
        2.0 * (n as f64).powi(3) / started.elapsed().as_secs_f64()
    };
    (0..10).map(|_| once()).fold(0.0, f64::max)
}

/// Milliseconds of `pass`.
fn median_ms(repeats: usize, device: Device, pass: &dyn Fn() -> Result<()>) -> Result<f64> {
    let once = || {
        let started = Instant::now();
        pass()?;
        device::synchronise(device);
        anyhow::Ok(1e3 * started.elapsed().as_secs_f64())
    };
    let mut ms = (0..repeats).map(|_| once()).collect::<Result<Vec<f64>>>()?;
    ms.sort_by(f64::total_cmp);
    Ok(ms[ms.len() / 2])
}

fn peak_gb(device: Device) -> Option<f64> {
    device::peak_bytes(device).map(|bytes| bytes / 1e9)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |value: Option<f64>| value.map_or("?".to_owned(), |gb| format!("{gb:.2}"));
        writeln!(
            f,
            "{} in {}: {:.3} TFLOP/s in a matrix product; {} GB in use; images at a time: {}; {} text \
             tokens\n",
            self.device,
            self.precision,
            self.matmul_tflops,
            gb(self.weights_gb),
            self.batch,
            self.text_tokens
        )?;
        writeln!(f, "       size  velocity ms  TFLOP/s  of product     GB  training ms     GB")?;
        for row in &self.rows {
            let rate = 1e3 * row.velocity_tflop / row.velocity_ms;
            writeln!(
                f,
                "{:>11}{:>13.1}{rate:>9.3}{:>10.0} %{:>7}{:>13.1}{:>7}",
                format!("{}x{}", row.width, row.height),
                row.velocity_ms,
                100.0 * rate / self.matmul_tflops,
                gb(row.velocity_gb),
                row.training_ms,
                gb(row.training_gb)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_was_typed_is_wrong_usage() {
        let error = run(&Options {
            pipeline: &Pipeline::known("flux.1-dev").unwrap(),
            sizes: &[[33, 33]],
            batch: 1,
            text_tokens: 1,
            lora_rank: 1,
            plain: false,
            stream: false,
            repeats: 1,
            json: false,
            compute: Compute::CPU,
        })
        .unwrap_err();
        assert!(error.is::<Usage>() && error.to_string().starts_with("--size 33x33: "), "{error}");
    }
}
