//! A pipeline loaded for training: prompts to conditions, noise to latents, latents to images.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use flow::latents::LatentSize;
use flow::models::transformer::image_ids;
use flow::noise::Noise;
use flow::pipeline::{Component, Pipeline};
use flow::tokens::Tokenizers;
use image::RgbImage;
use tch::{Device, Kind, Tensor, no_grad};

use crate::engine::{Condition, Engine, segments};
use crate::init;
use crate::parameters::Parameters;

/// Images decoded or encoded at a time.
const DECODE_BATCH: usize = 16;

/// All networks of a pipeline on one device.
pub(crate) struct Model {
    pub(crate) pipeline: Pipeline,
    pub(crate) engine: Engine,
    pub(crate) text_encoder: Parameters,
    pub(crate) text_encoder_2: Parameters,
    pub(crate) vae: Parameters,
    tokenizers: Tokenizers,
    device: Device,
}

/// Where values come from when a component's folder holds none.
#[derive(Clone, Copy)]
pub(crate) enum Missing {
    Refuse,
    Draw(Noise),
}

impl Model {
    /// Opens the pipeline folder `dir`; `kind` is the type the transformer computes in.
    ///
    /// # Errors
    /// When the folder is no pipeline this project can run, or its weights do not fit its configs.
    pub(crate) fn load(dir: &Path, device: Device, kind: Kind) -> Result<Self> {
        Self::open(dir, device, kind, Missing::Refuse)
    }

    pub(crate) fn open(dir: &Path, device: Device, kind: Kind, missing: Missing) -> Result<Self> {
        let pipeline = Pipeline::open(dir)?;
        let tokenizers = Tokenizers::open(dir, None)?;
        let load = |component: Component, kind: Kind| {
            let manifests = match component {
                Component::Transformer => segments(&pipeline.transformer),
                other => vec![pipeline.manifest(other)],
            };
            let file =
                dir.join(component.folder()).join(format!("{}.safetensors", component.stem()));
            match missing {
                Missing::Draw(noise) if !file.exists() => {
                    let mut stream = (component as u64) << 32;
                    Parameters::build(&manifests, device, kind, |name, shape| {
                        stream += 1;
                        Ok(init::value(noise, stream, name, shape))
                    })
                }
                _ => Parameters::load(&manifests, &pipeline.weights(component)?, device, kind),
            }
        };
        let transformer = load(Component::Transformer, kind)?;
        Ok(Self {
            engine: Engine::new(pipeline.transformer.clone(), transformer),
            text_encoder: load(Component::TextEncoder, Kind::Float)?,
            text_encoder_2: load(Component::TextEncoder2, Kind::Float)?,
            vae: load(Component::Vae, Kind::Float)?,
            tokenizers,
            device,
            pipeline,
        })
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
        let ids = self.tokenise(prompts)?;
        Ok(no_grad(|| self.condition(&ids, guidance, size)))
    }

    /// Conditions of token ids, with a graph where the text encoders train.
    pub(crate) fn condition(
        &self,
        ids: &[Tensor; 2],
        guidance: f64,
        size: &LatentSize,
    ) -> Condition {
        let [clip, t5] = ids.each_ref().map(|ids| Rc::new(ids.shallow_clone()));
        let pooled =
            self.pipeline.text_encoder.forward(&self.text_encoder.ops(), &clip).pooler_output;
        let text = self.pipeline.text_encoder_2.forward(&self.text_encoder_2.ops(), &t5);
        let options = (Kind::Float, self.device);
        Condition {
            text: text.shallow_clone(),
            pooled: pooled.shallow_clone(),
            guidance: Tensor::full([clip.size()[0]], guidance, options),
            img_ids: Tensor::from_slice(&image_ids(size.rows(), size.columns()))
                .reshape([-1, 3])
                .to_device(self.device),
        }
    }

    /// `rows` of unpacked values `[Z·h·w]` as packed tokens `[B, S, C]`.
    pub(crate) fn pack(&self, rows: &[Vec<f32>], size: &LatentSize) -> Tensor {
        let packed: Vec<f32> = rows.iter().flat_map(|row| size.pack(row)).collect();
        Tensor::from_slice(&packed)
            .reshape([rows.len() as i64, size.tokens() as i64, size.token_width() as i64])
            .to_device(self.device)
    }

    /// Images of packed flow latents `[B, S, C]`.
    pub(crate) fn decode(&self, packed: &Tensor, size: &LatentSize) -> Result<Vec<RgbImage>> {
        let latents = unpack(packed, size)?.to_device(self.device);
        let mut images = Vec::new();
        for chunk in latents.split(DECODE_BATCH as i64, 0) {
            let pixels = no_grad(|| self.decode_latents(&chunk));
            images.extend(images_of(&pixels)?);
        }
        Ok(images)
    }

    /// Pixels `[B, 3, H, W]` around [−1, 1] of flow latents `[B, Z, h, w]`.
    pub(crate) fn decode_latents(&self, latents: &Tensor) -> Tensor {
        let config = &self.pipeline.vae;
        let z = latents / config.scaling_factor + config.shift();
        config.decode(&self.vae.ops(), &Rc::new(z)).shallow_clone()
    }

    /// Means and log-variances `[B, 2Z, h, w]` of pixels `[B, 3, H, W]` in [−1, 1].
    pub(crate) fn encode_pixels(&self, pixels: &Tensor) -> Tensor {
        let pixels = Rc::new(pixels.shallow_clone());
        self.pipeline.vae.encode(&self.vae.ops(), &pixels).shallow_clone()
    }
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
