//! A pipeline loaded for training: prompts to conditions, noise to latents, latents to images.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use flow::latents::LatentSize;
use flow::log;
use flow::lora::{self, Layers, Lora};
use flow::models::t5::{State, T5Config};
use flow::models::transformer::image_ids;
use flow::noise::Noise;
use flow::ops::shapes::{Manifest, Shapes};
use flow::pipeline::{Component, Pipeline};
use flow::tiles;
use flow::tokens::Tokenizers;
use image::RgbImage;
use tch::{Device, Kind, Tensor, no_grad};

use crate::network::condition::Condition;
use crate::network::embeddings::Embeddings;
use crate::network::engine::{Engine, segments};
use crate::network::init;
use crate::network::lora::Adapters;
use crate::tensor::device::Compute;
use crate::tensor::parameters::{Changed, Parameters, Storage};

/// Prompts encoded at a time where memory is short.
const STREAMED_TEXTS: i64 = 8;
/// Images and pixels decoded at a time.
const DECODE_BATCH: usize = 64;
const DECODE_PIXELS: usize = 1 << 20;

/// All networks of a pipeline on one device.
pub(crate) struct Model {
    pub(crate) pipeline: Pipeline,
    pub(crate) engine: Engine,
    pub(crate) text_encoder: Parameters,
    pub(crate) text_encoder_2: Parameters,
    pub(crate) vae: Parameters,
    /// Conditions come from there, and not from the text encoders, where given.
    pub(crate) embeddings: Option<Embeddings>,
    /// Whether adapters have gone into the weights.
    pub(crate) is_merged: bool,
    tokenizers: Tokenizers,
    device: Device,
}

/// Where values come from when a component's folder holds none.
#[derive(Clone, Copy)]
pub(crate) enum Missing {
    Refuse,
    /// Random values that start closed, for training from nothing.
    Draw(Noise),
    /// Random values on the device, for measuring.
    Fill(Noise),
}

/// How a model is held.
#[derive(Clone)]
pub(crate) struct Loading {
    /// Where tensors live, and what the transformer and the text encoders compute in; the autoencoder
    /// computes in f32.
    pub(crate) compute: Compute,
    /// How the transformer's weights are held.
    pub(crate) storage: Storage,
    /// Whether the text encoders stay on disk.
    pub(crate) stream_text: bool,
}

impl Loading {
    /// For looking: `stream` leaves the weights on disk.
    pub(crate) fn to_sample(compute: Compute, stream: bool) -> Self {
        let storage = if stream { Storage::Streamed } else { Storage::Frozen };
        Self { compute, storage, stream_text: stream }
    }
}

impl Model {
    /// Opens the pipeline folder `dir`.
    ///
    /// # Errors
    /// When the folder is no pipeline this project can run, or its weights do not fit its configs.
    pub(crate) fn load(dir: &Path, loading: Loading) -> Result<Self> {
        Self::open(dir, loading, Missing::Refuse)
    }

    pub(crate) fn open(dir: &Path, loading: Loading, missing: Missing) -> Result<Self> {
        let pipeline = Pipeline::open(dir)?;
        pipeline.notices().iter().for_each(|notice| log::note(&format!("note: {notice}")));
        let tokenizers = Tokenizers::open(dir, None)?;
        let compute = loading.compute;
        let of_vae = Compute { kind: Kind::Float, ..compute };
        let load = |component: Component, compute: Compute, storage: Storage| {
            let manifests = match component {
                Component::Transformer => segments(&pipeline.transformer),
                Component::TextEncoder2 => t5_segments(&pipeline.text_encoder_2),
                other => vec![pipeline.manifest(other)],
            };
            match missing {
                Missing::Draw(noise) | Missing::Fill(noise) if !pipeline.has_weights(component) => {
                    let mut streams = init::stream_of(component)..;
                    Parameters::build(&manifests, compute, storage, |name, shape| {
                        let stream = streams.next().expect("endless");
                        Ok(match missing {
                            Missing::Fill(_) => {
                                init::value_on(compute.device, noise, stream, name, shape)
                            }
                            _ => {
                                Tensor::from_slice(&init::closed_value(noise, stream, name, shape))
                            }
                        })
                    })
                }
                _ => {
                    let weights = pipeline.weights(component)?;
                    weights
                        .notices()
                        .iter()
                        .for_each(|notice| log::note(&format!("note: {notice}")));
                    Parameters::load(&manifests, weights, compute, storage)
                }
            }
        };
        let transformer = load(Component::Transformer, compute, loading.storage)?;
        let of_text = if loading.stream_text { Storage::Streamed } else { Storage::Frozen };
        Ok(Self {
            engine: Engine::new(pipeline.transformer.clone(), transformer),
            text_encoder: load(Component::TextEncoder, compute, of_text.clone())?,
            text_encoder_2: load(Component::TextEncoder2, compute, of_text)?,
            vae: load(Component::Vae, of_vae, Storage::Frozen)?,
            embeddings: None,
            is_merged: false,
            tokenizers,
            device: compute.device,
            pipeline,
        })
    }

    /// Puts the adapters of `files`, with their scales, on the networks, and says what each is: A and B of
    /// the transformer beside its weights, in place of others that were there; all else into the weights.
    ///
    /// # Errors
    /// When one is no LoRA or does not fit.
    pub(crate) fn add_loras(&mut self, files: &[(PathBuf, f64)]) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let layers = Layers::of(&self.pipeline);
        let open = |(path, scale): &(PathBuf, f64)| {
            let lora = Lora::open(path, *scale, &layers)?;
            lora.lines().iter().for_each(|line| log::note(line));
            Ok(lora)
        };
        let loras = files.iter().map(open).collect::<Result<Vec<Lora>>>()?;
        if !loras.iter().all(Lora::is_low_rank) {
            return self.merge(&loras.into());
        }
        let segments = segments(&self.pipeline.transformer);
        let compute = Compute { device: self.device, kind: self.engine.kind() };
        self.engine.adapt(Adapters::combined(&loras, &segments, compute)?);
        Ok(())
    }

    fn merge(&mut self, loras: &Rc<[Lora]>) -> Result<()> {
        self.is_merged = true;
        let texts = [Component::TextEncoder, Component::TextEncoder2];
        let changes = |component| loras.iter().any(|lora| lora.changes(component));
        if self.embeddings.is_some() && texts.into_iter().any(changes) {
            log::note(
                "note: what a LoRA changes in text encoders does nothing to embeddings made before",
            );
        }
        for component in [Component::Transformer, texts[0], texts[1]] {
            if !changes(component) {
                continue;
            }
            let (weights, loras) = (self.pipeline.weights(component)?, Rc::clone(loras));
            let changed: Changed =
                Box::new(move |name| Ok(lora::merged(&loras, component, &weights, name)?));
            match component {
                Component::TextEncoder => self.text_encoder.change(changed),
                Component::TextEncoder2 => self.text_encoder_2.change(changed),
                _ => self.engine.change(changed),
            }?;
        }
        Ok(())
    }

    /// The device everything is on.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The size of an image's latents; without a size, that of `vae/config.json`'s `sample_size`.
    pub(crate) fn latent_size(&self, size: Option<[usize; 2]>) -> Result<LatentSize> {
        let [width, height] = size.unwrap_or([self.pipeline.default_size(); 2]);
        Ok(self.pipeline.latent_size(width, height)?)
    }

    /// Token ids `[B, L]` of both tokenizers: CLIP, T5.
    pub(crate) fn tokenise(&self, prompts: &[&str]) -> Result<[Tensor; 2]> {
        ensure!(!prompts.is_empty(), "no prompts to encode");
        let (mut clip, mut t5) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let ids = self
                .tokenizers
                .encode(prompt)
                .map_err(|error| anyhow::anyhow!("{error}"))
                .with_context(|| format!("cannot tokenise {prompt:?}"))?;
            clip.extend(ids.clip);
            t5.extend(ids.t5);
        }
        let rows = prompts.len() as i64;
        Ok([clip, t5]
            .map(|ids| Tensor::from_slice(&ids).reshape([rows, -1]).to_device(self.device)))
    }

    /// Conditions of `prompts`, without gradients.
    pub(crate) fn encode(
        &self,
        prompts: &[&str],
        guidance: f64,
        size: &LatentSize,
    ) -> Result<Condition> {
        if let Some(embeddings) = &self.embeddings {
            let [text, pooled] = embeddings.rows(prompts)?.map(|rows| rows.to_device(self.device));
            return Ok(self.conditioned(text, pooled, guidance, size));
        }
        let ids = self.tokenise(prompts)?;
        no_grad(|| self.condition(&ids, guidance, size))
    }

    /// Text tokens `[B, L, D]` and pooled vectors `[B, P]` of `prompts`.
    pub(crate) fn embed(&self, prompts: &[&str]) -> Result<[Tensor; 2]> {
        let ids = self.tokenise(prompts)?;
        no_grad(|| self.texts(&ids))
    }

    fn texts(&self, ids: &[Tensor; 2]) -> Result<[Tensor; 2]> {
        let [clip, t5] = ids.each_ref().map(|ids| Rc::new(ids.shallow_clone()));
        let ops = self.text_encoder.segment(0)?;
        let pooled = self.pipeline.text_encoder.forward(&ops, &clip).pooler_output;
        Ok([self.encode_t5(&t5)?, pooled.shallow_clone()])
    }

    /// Conditions of token ids, with a graph where the text encoders train.
    ///
    /// # Errors
    /// When weights cannot be read.
    pub(crate) fn condition(
        &self,
        ids: &[Tensor; 2],
        guidance: f64,
        size: &LatentSize,
    ) -> Result<Condition> {
        let [text, pooled] = self.texts(ids)?;
        Ok(self.conditioned(text, pooled, guidance, size))
    }

    fn conditioned(
        &self,
        text: Tensor,
        pooled: Tensor,
        guidance: f64,
        size: &LatentSize,
    ) -> Condition {
        Condition {
            guidance: Tensor::full([text.size()[0]], guidance, (Kind::Float, self.device)),
            text,
            pooled,
            img_ids: Tensor::from_slice(&image_ids(size.rows(), size.columns()))
                .reshape([-1, 3])
                .to_device(self.device),
        }
    }

    /// Token states `[B, L, D]` of ids `[B, L]`: each block, which may have to be read from disk, for
    /// all rows, a few at a time.
    fn encode_t5(&self, ids: &Tensor) -> Result<Tensor> {
        let (config, parameters) = (&self.pipeline.text_encoder_2, &self.text_encoder_2);
        let at_once = if parameters.is_streamed() { STREAMED_TEXTS } else { ids.size()[0] };
        let ops = parameters.segment(0)?;
        let mut states: Vec<State<Rc<Tensor>>> = ids
            .split(at_once, 0)
            .into_iter()
            .map(|ids| config.prologue(&ops, &Rc::new(ids)))
            .collect();
        for index in 0..config.num_layers {
            let ops = parameters.segment(index + 1)?;
            for state in &mut states {
                *state = config.block(&ops, index, state);
            }
        }
        let ops = parameters.segment(config.num_layers + 1)?;
        let rows: Vec<Tensor> =
            states.iter().map(|state| config.epilogue(&ops, state).shallow_clone()).collect();
        Ok(Tensor::cat(&rows, 0))
    }

    /// `rows` of unpacked values `[Z·h·w]` as packed tokens `[B, S, C]`.
    pub(crate) fn pack(&self, rows: &[Vec<f32>], size: &LatentSize) -> Tensor {
        let packed: Vec<f32> = rows.iter().flat_map(|row| size.pack(row)).collect();
        Tensor::from_slice(&packed)
            .reshape([rows.len() as i64, size.tokens() as i64, size.token_width() as i64])
            .to_device(self.device)
    }

    /// Images of packed flow latents `[B, S, C]`: several small ones at a time, large ones in tiles.
    pub(crate) fn decode(&self, packed: &Tensor, size: &LatentSize) -> Result<Vec<RgbImage>> {
        let latents = unpack(packed, size)?;
        let factor = self.pipeline.vae.factor();
        let area = size.height * size.width * factor * factor;
        let at_once = (DECODE_PIXELS / area).min(DECODE_BATCH);
        let mut images = Vec::new();
        for chunk in latents.split(at_once.max(1) as i64, 0) {
            let pixels = if at_once > 0 {
                no_grad(|| self.decode_latents(&chunk.to_device(self.device)))
            } else {
                self.decode_tiled(&chunk, size)?
            };
            ensure!(
                pixels.isfinite().all().int64_value(&[]) == 1,
                "the decoded pixels are not finite: {} or the latents hold a NaN",
                self.pipeline.dir.join("vae").display()
            );
            images.extend(images_of(&pixels)?);
        }
        Ok(images)
    }

    /// Pixels `[1, 3, H, W]` of the flow latents `[1, Z, h, w]` of one image.
    fn decode_tiled(&self, latents: &Tensor, size: &LatentSize) -> Result<Tensor> {
        let factor = self.pipeline.vae.factor();
        let shape = |channels: usize, size: &LatentSize, factor: usize| {
            [1, channels, size.height * factor, size.width * factor].map(|n| n as i64)
        };
        let latents = Vec::<f32>::try_from(&latents.reshape([-1]))?;
        let pixels = tiles::decode(&latents, size, factor, |part, size| {
            let part = Tensor::from_slice(part).reshape(shape(size.channels, size, 1));
            let pixels = no_grad(|| self.decode_latents(&part.to_device(self.device)));
            Vec::<f32>::try_from(&pixels.to_device(Device::Cpu).reshape([-1]))
        })?;
        Ok(Tensor::from_slice(&pixels).reshape(shape(3, size, factor)))
    }

    /// The gradient of packed flow latents `[1, S, C]` where `of_pixels` makes that of the pixels `[1, 3, H, W]`,
    /// around [−1, 1], that they decode to.
    ///
    /// # Errors
    /// Those of `of_pixels`.
    pub(crate) fn decode_back(
        &self,
        packed: &Tensor,
        size: &LatentSize,
        of_pixels: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let latents = unpack(packed, size)?.to_device(self.device).set_requires_grad(true);
        let pixels = self.decode_latents(&latents);
        let gradient = of_pixels(&pixels.detach())?;
        (pixels * gradient).sum(Kind::Float).backward();
        let row = latents.grad().to_device(Device::Cpu).reshape([-1]);
        Ok(self.pack(&[Vec::<f32>::try_from(&row)?], size))
    }

    /// Pixels `[B, 3, H, W]` around [−1, 1] of flow latents `[B, Z, h, w]`.
    pub(crate) fn decode_latents(&self, latents: &Tensor) -> Tensor {
        let config = &self.pipeline.vae;
        let z: Tensor = config.unscaled(latents);
        config.decode(&self.vae.ops(), &Rc::new(z)).shallow_clone()
    }

    /// Means and log-variances `[B, 2Z, h, w]` of pixels `[B, 3, H, W]` in [−1, 1].
    pub(crate) fn encode_pixels(&self, pixels: &Tensor) -> Tensor {
        let pixels = Rc::new(pixels.shallow_clone());
        self.pipeline.vae.encode(&self.vae.ops(), &pixels).shallow_clone()
    }
}

/// One manifest a segment of T5: prologue, every block, epilogue.
fn t5_segments(config: &T5Config) -> Vec<Manifest> {
    let (dry, ids) = (Shapes::new(), vec![1, 2]);
    let mut state = config.prologue(&dry, &ids);
    let mut manifests = vec![dry.manifest()];
    for index in 0..config.num_layers {
        let dry = Shapes::new();
        state = config.block(&dry, index, &state);
        manifests.push(dry.manifest());
    }
    let dry = Shapes::new();
    config.epilogue(&dry, &state);
    manifests.push(dry.manifest());
    manifests
}

/// Packed tokens `[B, S, C]` as unpacked latents `[B, Z, h, w]` on the CPU.
pub(crate) fn unpack(packed: &Tensor, size: &LatentSize) -> Result<Tensor> {
    let values =
        Vec::<f32>::try_from(&packed.to_device(Device::Cpu).to_kind(Kind::Float).reshape([-1]))?;
    let rows: Vec<f32> = values.chunks(size.len()).flat_map(|row| size.unpack(row)).collect();
    let (z, h, w) = (size.channels as i64, size.height as i64, size.width as i64);
    Ok(Tensor::from_slice(&rows).reshape([-1, z, h, w]))
}

/// Pixels `[B, 3, H, W]` in [−1, 1].
pub(crate) fn pixels_of(images: &[&RgbImage]) -> Tensor {
    let rows: Vec<Tensor> = images
        .iter()
        .map(|image| {
            let (width, height) = (i64::from(image.width()), i64::from(image.height()));
            Tensor::from_slice(image.as_raw()).reshape([height, width, 3]).permute([2, 0, 1])
        })
        .collect();
    Tensor::stack(&rows, 0).to_kind(Kind::Float) / 127.5 - 1.0
}

/// Eight-bit images of pixels `[B, 3, H, W]` in [−1, 1], rounded as diffusers does.
pub(crate) fn images_of(pixels: &Tensor) -> Result<Vec<RgbImage>> {
    let bytes = ((pixels / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round().to_kind(Kind::Uint8);
    let bytes = bytes.permute([0, 2, 3, 1]).contiguous().to_device(Device::Cpu);
    let size = bytes.size();
    let (height, width) = (size[1] as u32, size[2] as u32);
    let values = Vec::<u8>::try_from(&bytes.reshape([-1]))?;
    Ok(values
        .chunks((height * width * 3) as usize)
        .map(|chunk| RgbImage::from_raw(width, height, chunk.to_vec()).expect("sizes agree"))
        .collect())
}
