//! LAION's aesthetic predictor: how much people like the look of an image.

use std::path::Path;

use anyhow::Result;
use flow::models::aesthetic::score;
use flow::ops::ParamPath;
use flow::ops::shapes::Shapes;
use tch::{Device, Tensor};

use super::clip::Clip;
use super::network::{Network, NetworkReward, compute};
use super::preparation::Fit;
use crate::data::pickle;
use crate::tensor::parameters::{Parameters, Storage};

/// A linear head on the vectors of CLIP ViT-L/14, about 1 to 10. The prompt is not looked at.
pub(super) struct Aesthetic {
    clip: Clip,
    head: Parameters,
}

impl Aesthetic {
    /// # Errors
    /// When a file is missing, broken or does not fit.
    pub(super) fn open(weights: &Path, clip: &Path, device: Device) -> Result<NetworkReward> {
        let (weights, clip) = (weights.to_owned(), clip.to_owned());
        NetworkReward::open(move || {
            let clip = Clip::open(&clip, device)?;
            let shapes = Shapes::new();
            score(&shapes, &ParamPath::root(), &vec![1, clip.width()], clip.width());
            let (manifest, weights) = (shapes.manifest(), pickle::weights(&weights)?);
            weights.check(&manifest, &[])?;
            let head = Parameters::load(&[manifest], weights, compute(device), Storage::Frozen)?;
            Ok((clip.preparation(Fit::Crop), Self { clip, head }))
        })
    }
}

impl Network for Aesthetic {
    fn score(&mut self, _prompt: &str, pixels: &Tensor) -> Result<Tensor> {
        let vector = self.clip.image_vector(pixels).into();
        let root = ParamPath::root();
        Ok(score(&self.head.ops(), &root, &vector, self.clip.width()).reshape([]))
    }
}
