//! ImageReward: BLIP reads the prompt while looking at the image, a linear head scores the result.
//!
//! Source: `ImageReward.score_gard` of THUDM/ImageReward; `B` batch, `L` tokens, `S` side of the image.

use super::ConfigError;
use super::aesthetic;
use super::blip::{BlipTextConfig, BlipVisionConfig};
use crate::nn;
use crate::ops::shapes::{Manifest, Shapes};
use crate::ops::{Ops, ParamPath};

/// Mean and standard deviation of the head's result over the data it was trained on.
const MEAN: f64 = 0.167_173_628_302_524_26;
const STD: f64 = 1.033_339_496_605_407_2;

/// Tokens of a prompt; the rest is cut off.
pub const MAX_TOKENS: usize = 35;

/// Both encoders.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageRewardConfig {
    /// The image encoder.
    pub vision: BlipVisionConfig,
    /// The text encoder.
    pub text: BlipTextConfig,
}

impl ImageRewardConfig {
    /// Where the image encoder is.
    pub fn vision_path() -> ParamPath {
        ParamPath::root().at("blip.visual_encoder")
    }

    /// # Errors
    /// When either encoder is absurd or unsupported.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.vision.validate()?;
        self.text.validate()
    }

    /// Rewards `[B, 1]` of normalised `pixels` `[B, 3, S, S]` for integer `input_ids` `[B, L]` without
    /// padding: padded positions are masked in the source, so that they change nothing.
    pub fn forward<O: Ops>(&self, ops: &O, input_ids: &O::Tensor, pixels: &O::Tensor) -> O::Tensor {
        let image = self.vision.forward(ops, &Self::vision_path(), pixels);
        let path = ParamPath::root().at("blip.text_encoder");
        let x = self.text.forward(ops, &path, input_ids, &image, self.vision.width);
        let x = ops.select_rows(&x, &nn::first_rows(ops, input_ids));
        let score = aesthetic::score(ops, &ParamPath::root().at("mlp"), &x, self.text.hidden_size);
        ops.affine(&score, 1.0 / STD, -MEAN / STD)
    }

    /// Parameters of the whole.
    pub fn manifest(&self) -> Manifest {
        let (shapes, side) = (Shapes::new(), self.vision.image_size);
        self.forward(&shapes, &vec![1, MAX_TOKENS], &vec![1, 3, side, side]);
        shapes.manifest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `med_config.json` as it is published, without what only training uses.
    const MED_CONFIG: &str = r#"{"architectures": ["BertModel"], "hidden_act": "gelu",
        "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
        "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": true}"#;

    #[test]
    fn it_has_the_published_number_of_parameters() {
        let vision = BlipVisionConfig { width: 1024, layers: 24, image_size: 224, patch_size: 16 };
        let config = ImageRewardConfig { vision, text: serde_json::from_str(MED_CONFIG).unwrap() };
        config.validate().unwrap();
        // Two projections of the published file are used in BLIP's training alone.
        let unused = (1024 + 1) * 256 + (768 + 1) * 256;
        assert_eq!(config.manifest().n_elements() + unused, 446_665_953);
    }
}
