//! Scores by CLIP: how well an image agrees with its prompt (HPSv2, PickScore, CLIP score).

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::Weights;
use flow::models::clip::naming::{self, Naming, OpenClipConfig, Part};
use flow::models::clip::vision::ClipConfig;
use flow::ops::shapes::Manifest;
use flow::pipeline::read_json;
use flow::tokens::{Truncated, plain};
use tch::{Device, Kind, Tensor};

use super::network::{Network, NetworkReward, compute};
use super::preparation::{Fit, Preparation};
use crate::data::pickle;
use crate::tensor::parameters::{Parameters, Storage};
use crate::tensor::stored;

/// Whose preparation of images and prompts a score follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Package {
    Hpsv2,
    Transformers,
    /// transformers or open_clip, after the names of the tensors.
    OfWeights,
}

/// Cosine of the vectors of image and prompt, −1 to 1.
pub(super) struct ClipScore {
    clip: Clip,
    text: Parameters,
    tokenizer: Truncated,
    plain: bool,
    /// The vector of the prompt asked for last: a group shares its prompt.
    last: Option<(String, Tensor)>,
}

impl ClipScore {
    /// # Errors
    /// When a file is missing, broken or does not fit.
    pub(super) fn open(
        package: Package,
        weights: &Path,
        tokenizer: &Path,
        device: Device,
    ) -> Result<NetworkReward> {
        let (weights, tokenizer) = (weights.to_owned(), tokenizer.to_owned());
        NetworkReward::open(move || Self::load(package, &weights, &tokenizer, device))
    }

    fn load(
        package: Package,
        weights: &Path,
        tokenizer: &Path,
        device: Device,
    ) -> Result<(Preparation, Self)> {
        let known = (package == Package::Hpsv2).then(ClipConfig::vit_h_14);
        let file = ClipFile::open(weights, known)?;
        let text = &file.config.text_config;
        let dir = tokenizer;
        let tokenizer = Truncated::clip(dir, text.max_position_embeddings)?;
        ensure!(
            tokenizer.n_ids() <= text.vocab_size,
            "{} has {} tokens, {} knows {}",
            dir.display(),
            tokenizer.n_ids(),
            weights.display(),
            text.vocab_size
        );
        let (fit, plain) = match package {
            Package::Hpsv2 => (Fit::Pad, true),
            Package::Transformers => (Fit::CropDown, false),
            Package::OfWeights => (file.fit, file.naming == Naming::OpenClip),
        };
        let text = file.load(&file.config.text_manifest(), device)?;
        let clip = file.image_tower(device)?;
        Ok((clip.preparation(fit), Self { clip, text, tokenizer, plain, last: None }))
    }

    fn text_vector(&mut self, prompt: &str) -> Result<Tensor> {
        if let Some((last, vector)) = &self.last
            && last == prompt
        {
            return Ok(vector.shallow_clone());
        }
        let encode = |text: &str| {
            let ids = self.tokenizer.encode(text);
            ids.map_err(|error| anyhow!("cannot tokenise {prompt:?}: {error}"))
        };
        let ids = if self.plain { encode(&plain(prompt))? } else { encode(prompt)? };
        let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(self.clip.device);
        let vector = unit_length(&self.clip.config.text_features(&self.text.ops(), &ids.into()));
        self.last = Some((prompt.to_owned(), vector.shallow_clone()));
        Ok(vector)
    }
}

impl Network for ClipScore {
    fn score(&mut self, prompt: &str, pixels: &Tensor) -> Result<Tensor> {
        let text = self.text_vector(prompt)?;
        Ok((self.clip.image_vector(pixels) * text).sum(Kind::Float))
    }
}

/// CLIP's image tower.
pub(super) struct Clip {
    config: ClipConfig,
    image: Parameters,
    pub(super) device: Device,
}

impl Clip {
    /// Reads the image tower of a whole CLIP.
    ///
    /// # Errors
    /// When a file is missing, broken or does not fit.
    pub(super) fn open(weights: &Path, device: Device) -> Result<Self> {
        ClipFile::open(weights, None)?.image_tower(device)
    }

    pub(super) fn preparation(&self, fit: Fit) -> Preparation {
        Preparation { fit, side: self.config.vision_config.image_size }
    }

    /// Width of its vectors.
    pub(super) fn width(&self) -> usize {
        self.config.projection_dim
    }

    /// `[1, E]`, of length 1.
    pub(super) fn image_vector(&self, pixels: &Tensor) -> Tensor {
        let pixels = pixels.to_device(self.device).into();
        unit_length(&self.config.image_features(&self.image.ops(), &pixels))
    }
}

fn unit_length(vector: &Tensor) -> Tensor {
    vector / vector.norm_scalaropt_dim(2.0, [-1], true)
}

/// A whole CLIP on disk, in either naming.
struct ClipFile {
    weights: Weights,
    naming: Naming,
    config: ClipConfig,
    fit: Fit,
}

impl ClipFile {
    /// `known` is the architecture of open_clip's files without a config.
    fn open(path: &Path, known: Option<ClipConfig>) -> Result<Self> {
        let weights = pickle::weights(path)?.renamed(|name| Some(naming::usual(name).to_owned()));
        let naming = Naming::of(weights.names());
        let (config, fit) = match (naming, beside(path, naming), known) {
            (Naming::Transformers, config, _) => (read_json(&config)?, Fit::CropDown),
            (Naming::OpenClip, config, Some(known)) if !config.exists() => (known, Fit::Crop),
            (Naming::OpenClip, config, _) => {
                let read: OpenClipConfig = read_json(&config)?;
                let squash = read.squashes().with_context(|| config.display().to_string())?;
                (read.clip(), if squash { Fit::Squash } else { Fit::Crop })
            }
        };
        config.validate().with_context(|| beside(path, naming).display().to_string())?;
        Ok(Self { weights, naming, config, fit })
    }

    fn image_tower(self, device: Device) -> Result<Clip> {
        let image = self.load(&self.config.image_manifest(), device)?;
        Ok(Clip { config: self.config, image, device })
    }

    /// The parameters of one tower, in f32.
    fn load(&self, manifest: &Manifest, device: Device) -> Result<Parameters> {
        // Files also hold the other tower, the temperature and buffers.
        let others: Vec<&str> = self.weights.names().collect();
        self.weights.check(&self.naming.manifest(manifest), &others)?;
        let value = |name: &str, shape: &[usize]| {
            let stored = self.naming.stored(name);
            let flat = stored::tensor(&self.weights, &stored.name)?;
            Ok(match stored.part {
                Part::Whole => flat,
                Part::Third(third) => flat.chunk(3, 0).swap_remove(third),
                Part::Transposed => flat.reshape([shape[1] as i64, shape[0] as i64]).tr(),
            })
        };
        Parameters::build(std::slice::from_ref(manifest), compute(device), Storage::Frozen, value)
    }
}

/// The config file of weights in `naming`.
fn beside(weights: &Path, naming: Naming) -> PathBuf {
    weights.with_file_name(match naming {
        Naming::Transformers => "config.json",
        Naming::OpenClip => "open_clip_config.json",
    })
}
