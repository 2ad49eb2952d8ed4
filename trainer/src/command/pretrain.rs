//! Making a small model from captioned images: first the autoencoder, then the flow with its text
//! encoders. Alignment starts from the result.

mod course;

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, ensure};
use cluster::Group;
use flow::checkpoint::{Dtype, MAX_SHARD_BYTES};
use flow::latents::LatentSize;
use flow::log;
use flow::noise::Noise;
use flow::path;
use flow::pipeline::Component;
use flow::usage::Usage;
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use self::course::{Course, Stage, Training};
use crate::data::captioned::{METADATA, read_captioned};
use crate::group::seeds::{Use, family};
use crate::network::model::{Loading, Missing, Model, pixels_of};
use crate::network::optimizer::{AdamW, OptimizerConfig};
use crate::network::save::{self, Saved, Target};
use crate::tensor::device::Compute;
use crate::tensor::parameters::{Parameters, Storage};

/// Presets of `ng-train pretrain`.
pub const PRETRAIN_PRESETS: [(&str, &str); 2] = [
    ("signs", include_str!("../../presets/signs-pretrain.toml")),
    ("emoji", include_str!("../../presets/emoji-pretrain.toml")),
];

/// One run.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Pipeline folder to start from; components without weights start random.
    pub model: PathBuf,
    /// Pipeline folder to write.
    pub output: PathBuf,
    /// Folder of captioned images: `metadata.jsonl` with `file_name` and `text` beside the pictures.
    pub data: PathBuf,
    /// Everything random follows from it.
    pub seed: u64,
    /// Whether weights are written in bf16: half the bytes of f32.
    #[serde(default)]
    pub bf16: bool,
    /// Trains the autoencoder, where given.
    #[serde(default)]
    pub autoencoder: Option<AutoencoderConfig>,
    /// Trains transformer and text encoders, where given.
    #[serde(default)]
    pub flow: Option<FlowConfig>,
}

/// The autoencoder's stage.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AutoencoderConfig {
    /// Images seen, with repetition.
    pub image_passes: usize,
    /// Images a step.
    pub batch: usize,
    /// Weight of the mean Kullback–Leibler divergence against the mean squared error.
    pub kl_weight: f64,
    /// Its optimiser; the step size follows a cosine to zero.
    pub optimizer: OptimizerConfig,
}

/// The flow's stage.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FlowConfig {
    /// Images seen, with repetition.
    pub image_passes: usize,
    /// Images a step.
    pub batch: usize,
    /// Its optimiser; the step size follows a cosine to zero.
    pub optimizer: OptimizerConfig,
}

impl PretrainConfig {
    /// # Errors
    /// One line that names a setting that is out of range.
    pub(super) fn validate(&self) -> Result<()> {
        ensure!(
            self.autoencoder.is_some() || self.flow.is_some(),
            "nothing to train: give [autoencoder], [flow] or both"
        );
        ensure!(
            !self.output.is_file(),
            "output = {}: a file, name a folder",
            self.output.display()
        );
        let autoencoder = self.autoencoder.as_ref();
        if let Some(AutoencoderConfig { kl_weight, .. }) = autoencoder {
            let is_weight = *kl_weight >= 0.0 && kl_weight.is_finite();
            ensure!(is_weight, "autoencoder.kl_weight = {kl_weight}: at least 0");
        }
        let stages = autoencoder
            .map(|stage| ("autoencoder", stage.batch, stage.image_passes, &stage.optimizer))
            .into_iter()
            .chain(
                self.flow
                    .as_ref()
                    .map(|stage| ("flow", stage.batch, stage.image_passes, &stage.optimizer)),
            );
        for (name, batch, image_passes, optimizer) in stages {
            ensure!(batch > 0, "{name}.batch = 0: at least 1");
            ensure!(
                image_passes >= batch,
                "{name}.image_passes = {image_passes}: at least {name}.batch = {batch}, a step"
            );
            optimizer.validate().map_err(|error| anyhow!("{name}.{error}"))?;
        }
        Ok(())
    }
}

/// Images encoded at a time.
const ENCODE_BATCH: usize = 64;

/// Runs the stages that `config` names and writes the pipeline; goes on where an earlier run was stopped if it is
/// to `resume`.
///
/// # Errors
/// When data or model cannot be read, training diverges, or the output cannot be written;
/// [`Stopped`](crate::run::align::Stopped) when somebody asked for it.
pub fn run(config: &PretrainConfig, resume: bool, device: Device) -> Result<()> {
    config.validate().map_err(|error| Usage(error.to_string()))?;
    let course = Course::open(config, resume)?;
    ensure!(
        config.data.join(METADATA).exists(),
        "data = {folder}: it holds no {METADATA}, which lists pictures as {{\"file_name\": \"a.png\", \"text\": \
         \"a fox\"}}, one a line: name a folder that does; `ng-train signs {folder}` makes that of preset signs, \
         setup/emoji.sh that of emoji",
        folder = config.data.display()
    );
    let data = read_captioned(&config.data)?;
    let weights = family(config.seed, Use::Weights);
    let compute = Compute { device, kind: Kind::Float };
    let storage = Storage::Trainable(Group::alone());
    let loading = Loading { compute, storage, stream_text: false };
    let mut model = Model::open(&config.model, loading, Missing::Draw(weights))?;
    let images: Vec<&RgbImage> = data.iter().map(|(image, _)| image).collect();
    if let Some(stage) = &config.autoencoder {
        if !course.restore_made(Stage::Autoencoder, &model.vae)? {
            let mse = train_autoencoder(&mut model, stage, config.seed, &images, &course)?;
            log::note(&format!("autoencoder: PSNR {:.1} dB", 10.0 * (4.0 / mse).log10()));
        }
        let (shift, scaling) = latent_scale(&model, &images)?;
        model.pipeline.vae.shift_factor = Some(shift);
        model.pipeline.vae.scaling_factor = scaling;
        log::note(&format!("latents shifted by {shift:.4}, scaled by {scaling:.4}"));
    }
    let mut averaged = None;
    if let Some(stage) = &config.flow {
        let size = latent_size(&model, &images)?;
        let latents = encode_all(&model, &images, &size)?;
        let captions: Vec<&str> = data.iter().map(|(_, caption)| caption.as_str()).collect();
        let data = Encoded { latents, captions, size };
        averaged = train_flow(&mut model, stage, config.seed, &data, &course)?;
    }
    write(&model, config, averaged.as_deref())?;
    course.finish()
}

fn latent_size(model: &Model, images: &[&RgbImage]) -> Result<LatentSize> {
    let (width, height) = images.first().context("no images")?.dimensions();
    model.latent_size(Some([width as usize, height as usize]))
}

/// Step size factor after `done` of `total`.
fn cosine(done: usize, total: usize) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * done as f64 / total as f64).cos())
}

/// Random rows of the data set for `step`.
fn batch_rows(noise: Noise, step: usize, n: usize, batch: usize) -> Vec<usize> {
    noise
        .uniform(step as u64, batch)
        .into_iter()
        .map(|u| ((u * n as f64) as usize).min(n - 1))
        .collect()
}

/// Returns the mean squared error over the last steps, pixels in [−1, 1].
fn train_autoencoder(
    model: &mut Model,
    config: &AutoencoderConfig,
    seed: u64,
    images: &[&RgbImage],
    course: &Course<'_>,
) -> Result<f64> {
    model.vae.train();
    let model = &*model;
    let mut optimizer = AdamW::new(config.optimizer.clone(), &[&model.vae]);
    let n_steps = config.image_passes / config.batch;
    let (rows, posterior) = (family(seed, Use::Batches), family(seed, Use::Posterior));
    let trained = vec![&model.vae];
    let training = Training { stage: Stage::Autoencoder, trained, made: None, n_steps };
    course.train(&training, &mut optimizer, |step, optimizer| {
        let picked = batch_rows(rows, step, images.len(), config.batch);
        let batch: Vec<&RgbImage> = picked.iter().map(|&row| images[row]).collect();
        let pixels = pixels_of(&batch).to_device(model.device());
        let moments = model.encode_pixels(&pixels);
        let parts = moments.chunk(2, 1);
        let (mean, log_var) = (&parts[0], parts[1].clamp(-30.0, 20.0));
        let n = mean.numel();
        let eps = Tensor::from_slice(&posterior.normal(step as u64, n)).reshape(mean.size());
        let z = mean + (&log_var * 0.5).exp() * eps.to_device(model.device());
        let decoded = model.pipeline.vae.decode(&model.vae.ops(), &std::rc::Rc::new(z));
        let mse = (&*decoded - &pixels).square().mean(Kind::Float);
        let kl = (mean.square() + log_var.exp() - 1.0 - &log_var).mean(Kind::Float) * 0.5;
        (&mse + kl * config.kl_weight).backward();
        optimizer.step(&[&model.vae], cosine(step, n_steps))?;
        Ok(mse.double_value(&[]))
    })
}

/// Shift and scaling that give the data's latents mean 0 and standard deviation 1.
fn latent_scale(model: &Model, images: &[&RgbImage]) -> Result<(f64, f64)> {
    let sample: Vec<&RgbImage> =
        images.iter().step_by((images.len() / 1024).max(1)).copied().collect();
    let means = encode_means(model, &sample)?;
    let (mean, std) = (means.mean(Kind::Double), means.to_kind(Kind::Double).std(false));
    Ok((mean.double_value(&[]), 1.0 / std.double_value(&[])))
}

/// Posterior means `[N, Z, h, w]`.
fn encode_means(model: &Model, images: &[&RgbImage]) -> Result<Tensor> {
    let chunks: Vec<Tensor> = images
        .chunks(ENCODE_BATCH)
        .map(|chunk| {
            let pixels = pixels_of(chunk).to_device(model.device());
            no_grad(|| model.encode_pixels(&pixels).chunk(2, 1).swap_remove(0))
        })
        .collect();
    ensure!(!chunks.is_empty(), "no images to encode");
    Ok(Tensor::cat(&chunks, 0))
}

/// Packed flow latents `[N, S, C]` of all images.
fn encode_all(model: &Model, images: &[&RgbImage], size: &LatentSize) -> Result<Tensor> {
    let vae = &model.pipeline.vae;
    let latents: Tensor = vae.scaled(encode_means(model, images)?);
    let values = Vec::<f32>::try_from(&latents.to_device(Device::Cpu).reshape([-1]))?;
    let rows: Vec<Vec<f32>> = values.chunks(size.len()).map(<[f32]>::to_vec).collect();
    Ok(model.pack(&rows, size))
}

/// What the flow learns.
struct Encoded<'a> {
    /// `[N, S, C]`.
    latents: Tensor,
    /// N of them.
    captions: Vec<&'a str>,
    size: LatentSize,
}

/// Minimises the velocity error at logit-normal times; returns the moving averages where kept.
fn train_flow(
    model: &mut Model,
    config: &FlowConfig,
    seed: u64,
    data: &Encoded<'_>,
    course: &Course<'_>,
) -> Result<Option<Vec<Tensor>>> {
    let Encoded { latents, captions, size } = data;
    model.engine.train();
    model.text_encoder.train();
    model.text_encoder_2.train();
    let model = &*model;
    let ids = model.tokenise(captions)?;
    let mut optimizer = AdamW::new(config.optimizer.clone(), &trained(model));
    let n_steps = config.image_passes / config.batch;
    let (rows, times) = (family(seed, Use::Data), family(seed, Use::Times));
    let noise = family(seed, Use::Neighbourhood);
    let (made, trained_here) = (Some(&model.vae), trained(model).to_vec());
    let training = Training { stage: Stage::Flow, trained: trained_here, made, n_steps };
    course.train(&training, &mut optimizer, |step, optimizer| {
        let picked: Vec<i64> = batch_rows(rows, step, captions.len(), config.batch)
            .into_iter()
            .map(|row| row as i64)
            .collect();
        let picked = Tensor::from_slice(&picked).to_device(model.device());
        let x0 = latents.index_select(0, &picked);
        let eps = Tensor::from_slice(&noise.normal(step as u64, x0.numel()));
        let eps = eps.reshape(x0.size()).to_device(model.device());
        let times = logit_normal(times, step, config.batch);
        let x_t = on_path(&x0, &eps, &times);
        let t = Tensor::from_slice(&times).to_kind(Kind::Float).to_device(model.device());
        let condition =
            model.condition(&ids.each_ref().map(|i| i.index_select(0, &picked)), 1.0, size)?;
        let v = model.engine.forward(&x_t, &t, &condition)?;
        let loss = (v - (eps - x0)).square().mean(Kind::Float);
        loss.backward();
        optimizer.step(&trained(model), cosine(step, n_steps))?;
        Ok(loss.double_value(&[]))
    })?;
    Ok(optimizer.averaged().map(|flats| flats.iter().map(Tensor::shallow_clone).collect()))
}

/// Times t = sigmoid(normal), one a row: middle times are the hardest and the most frequent.
fn logit_normal(noise: Noise, step: usize, n: usize) -> Vec<f64> {
    noise.normal(step as u64, n).into_iter().map(|z| 1.0 / (1.0 + (-f64::from(z)).exp())).collect()
}

/// x_t of each row `[B, S, C]` at its own time.
fn on_path(x0: &Tensor, eps: &Tensor, times: &[f64]) -> Tensor {
    let column = |which: usize| {
        let weights: Vec<f32> = times.iter().map(|&t| path::weights(t)[which] as f32).collect();
        Tensor::from_slice(&weights).reshape([-1, 1, 1]).to_device(x0.device())
    };
    x0 * column(0) + eps * column(1)
}

/// The networks that the flow stage trains, in the order of its optimiser's segments.
fn trained(model: &Model) -> [&Parameters; 3] {
    [model.engine.trained(), &model.text_encoder, &model.text_encoder_2]
}

fn write(model: &Model, config: &PretrainConfig, averaged: Option<&[Tensor]>) -> Result<()> {
    let [transformer, clip, t5] = trained(model);
    let mut rest = averaged;
    let mut take = |parameters: &Parameters| {
        let (head, tail) = rest?.split_at(parameters.segments.len());
        rest = Some(tail);
        Some(head)
    };
    let (of_transformer, of_clip, of_t5) = (take(transformer), take(clip), take(t5));
    let dtype = if config.bf16 { Dtype::BF16 } else { Dtype::F32 };
    let part = |component, parameters, averaged| Saved { component, parameters, averaged, dtype };
    let saved = [
        part(Component::Transformer, transformer, of_transformer),
        part(Component::TextEncoder, clip, of_clip),
        part(Component::TextEncoder2, t5, of_t5),
        part(Component::Vae, &model.vae, None),
    ];
    let target = Target { dir: &config.output, max_shard_bytes: MAX_SHARD_BYTES, before: None };
    save::pipeline(&model.pipeline.dir, target, &saved, |folder| {
        let vae = &model.pipeline.vae;
        let values =
            [("scaling_factor", vae.scaling_factor.into()), ("shift_factor", vae.shift().into())];
        save::edit_config(&folder.join("vae/config.json"), &values)
    })?;
    println!("{}", config.output.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::settings::{Source, read};

    #[test]
    fn every_preset_reads() {
        for (name, _) in PRETRAIN_PRESETS {
            read::<PretrainConfig>(&Source::Preset(name), &PRETRAIN_PRESETS, &[]).unwrap();
        }
    }

    #[test]
    fn a_folder_without_captions_is_named_with_what_makes_one() {
        let home = tempfile::tempdir().unwrap();
        let [data, output] = ["data", "output"].map(|name| home.path().join(name));
        let settings = [format!("data={}", data.display()), format!("output={}", output.display())];
        let config: PretrainConfig =
            read(&Source::Preset("signs"), &PRETRAIN_PRESETS, &settings).unwrap();
        let said = run(&config, false, Device::Cpu).unwrap_err().to_string();
        assert!(said.contains(&format!("`ng-train signs {}`", data.display())), "{said}");
    }
}
