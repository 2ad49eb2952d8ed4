//! ImageReward: how people rate an image for its prompt.

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use flow::models::blip::BlipVisionConfig;
use flow::models::image_reward::{ImageRewardConfig, MAX_TOKENS};
use flow::pipeline::read_json;
use flow::tokens::Truncated;
use tch::{Device, Tensor};

use super::network::{Network, NetworkReward, compute};
use super::preparation::{Fit, Preparation};
use crate::data::pickle;
use crate::tensor::parameters::{Parameters, Storage};

/// The raw reward, about −2.5 to 2.5: standardised over the data it was trained on.
pub(super) struct ImageReward {
    config: ImageRewardConfig,
    parameters: Parameters,
    tokenizer: Truncated,
    device: Device,
}

impl ImageReward {
    /// # Errors
    /// When a file is missing, broken or does not fit.
    pub(super) fn open(weights: &Path, tokenizer: &Path, device: Device) -> Result<NetworkReward> {
        let (weights, tokenizer) = (weights.to_owned(), tokenizer.to_owned());
        NetworkReward::open(move || Self::load(&weights, &tokenizer, device))
    }

    fn load(path: &Path, dir: &Path, device: Device) -> Result<(Preparation, Self)> {
        let weights = pickle::weights(path)?;
        let config_path = path.with_file_name("med_config.json");
        let vision = BlipVisionConfig::of(&weights, &ImageRewardConfig::vision_path())
            .with_context(|| format!("{} is no ImageReward: no image encoder", path.display()))?;
        let config = ImageRewardConfig { vision, text: read_json(&config_path)? };
        config.validate().with_context(|| config_path.display().to_string())?;
        let tokenizer = Truncated::open(dir, MAX_TOKENS)?;
        ensure!(
            tokenizer.n_ids() <= config.text.vocab_size,
            "{} has {} tokens, {} knows {}",
            dir.display(),
            tokenizer.n_ids(),
            path.display(),
            config.text.vocab_size
        );
        let manifest = config.manifest();
        // Files also hold projections of BLIP's training.
        let others: Vec<&str> = weights.names().collect();
        weights.check(&manifest, &others)?;
        let parameters = Parameters::load(&[manifest], weights, compute(device), Storage::Frozen)?;
        let preparation = Preparation { fit: Fit::Crop, side: config.vision.image_size };
        Ok((preparation, Self { config, parameters, tokenizer, device }))
    }
}

impl Network for ImageReward {
    fn score(&mut self, prompt: &str, pixels: &Tensor) -> Result<Tensor> {
        let ids = self.tokenizer.encode(prompt);
        let ids = ids.map_err(|error| anyhow!("cannot tokenise {prompt:?}: {error}"))?;
        let ids = Tensor::from_slice(&ids).unsqueeze(0).to_device(self.device).into();
        let pixels = pixels.to_device(self.device).into();
        Ok(self.config.forward(&self.parameters.ops(), &ids, &pixels).reshape([]))
    }
}
