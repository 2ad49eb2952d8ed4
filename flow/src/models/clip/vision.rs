//! CLIP's image tower, and both towers with their projections into one space.
//!
//! Source: `CLIPModel` of transformers; `B` batch, `S` side of the image, `N` patches, `D` width, `E` width
//! of the shared space. The cosine of an image's and a text's vector says how well they agree.

use serde::Deserialize;

use super::{ClipTextConfig, Encoder};
use crate::models::{ConfigError, size};
use crate::nn::{self, Patches};
use crate::ops::shapes::{Manifest, Shapes};
use crate::ops::{Mask, Ops, ParamPath};

/// `vision_config` of `config.json`; what is left out is as in ViT-B/32.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct ClipVisionConfig {
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the hidden layer.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Side of the image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Constant of the layer normalisation.
    pub layer_norm_eps: f64,
}

/// `config.json` of a whole CLIP; what is left out is as in ViT-B/32.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct ClipConfig {
    /// The text tower.
    pub text_config: ClipTextConfig,
    /// The image tower.
    pub vision_config: ClipVisionConfig,
    /// Width of the space both are projected into.
    pub projection_dim: usize,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            text_config: ClipTextConfig::default(),
            vision_config: ClipVisionConfig::default(),
            projection_dim: 512,
        }
    }
}

impl ClipVisionConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        size("image_size", self.image_size)?;
        size("patch_size", self.patch_size)?;
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(ConfigError::Invalid {
                field: "image_size",
                value: self.image_size.to_string(),
                expected: "a multiple of patch_size",
            });
        }
        self.encoder().validate()
    }

    fn encoder(&self) -> Encoder<'_> {
        Encoder {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            hidden_act: &self.hidden_act,
            layer_norm_eps: self.layer_norm_eps,
        }
    }

    /// State of the class token, normalised, `[B, D]`.
    fn forward<O: Ops>(&self, ops: &O, pixels: &O::Tensor) -> O::Tensor {
        let (root, d) = (ParamPath::root().at("vision_model"), self.hidden_size);
        let embed = root.at("embeddings");
        let class = ops.param(&embed.at("class_embedding"), &[d]);
        let patches = Patches { patch: self.patch_size, width: d, bias: false };
        let tokens = nn::patch_tokens(ops, &embed.at("patch_embedding"), &class, pixels, patches);
        let n_tokens = (self.image_size / self.patch_size).pow(2) + 1;
        let positions = ops.param(&embed.at("position_embedding.weight"), &[n_tokens, d]);
        let x = ops.add(&tokens, &positions);
        // The name is misspelt in the files.
        let x = ops.layer_norm(&x, d, Some(&root.at("pre_layrnorm")), self.layer_norm_eps);
        let x = self.encoder().forward(ops, &root.at("encoder.layers"), x, &Mask::None);
        let x = ops.select_rows(&x, &nn::first_rows(ops, pixels));
        ops.layer_norm(&x, d, Some(&root.at("post_layernorm")), self.layer_norm_eps)
    }
}

impl ClipConfig {
    /// # Errors
    /// When a size is absurd, the heads do not divide the width, the patches not the image, or an
    /// activation is another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size("projection_dim", self.projection_dim)?;
        self.text_config.validate()?;
        self.vision_config.validate()
    }

    /// Vectors `[B, E]` of normalised `pixels` `[B, 3, S, S]`; not of length 1.
    pub fn image_features<O: Ops>(&self, ops: &O, pixels: &O::Tensor) -> O::Tensor {
        let x = self.vision_config.forward(ops, pixels);
        let path = ParamPath::root().at("visual_projection");
        ops.linear(&path, &x, self.vision_config.hidden_size, self.projection_dim, false)
    }

    /// Vectors `[B, E]` of integer `input_ids` `[B, L]`; not of length 1.
    pub fn text_features<O: Ops>(&self, ops: &O, input_ids: &O::Tensor) -> O::Tensor {
        let x = self.text_config.forward(ops, input_ids).pooler_output;
        let path = ParamPath::root().at("text_projection");
        ops.linear(&path, &x, self.text_config.hidden_size, self.projection_dim, false)
    }

    /// Parameters of the image tower and its projection.
    pub fn image_manifest(&self) -> Manifest {
        let (shapes, side) = (Shapes::new(), self.vision_config.image_size);
        self.image_features(&shapes, &vec![1, 3, side, side]);
        shapes.manifest()
    }

    /// Parameters of the text tower and its projection.
    pub fn text_manifest(&self) -> Manifest {
        let shapes = Shapes::new();
        self.text_features(&shapes, &vec![1, self.text_config.max_position_embeddings]);
        shapes.manifest()
    }

    /// ViT-H/14 as LAION trained it, which HPSv2 and PickScore tune.
    #[must_use]
    pub fn vit_h_14() -> Self {
        let hidden_act = || "gelu".to_owned();
        Self {
            text_config: ClipTextConfig {
                hidden_size: 1024,
                intermediate_size: 4096,
                num_hidden_layers: 24,
                num_attention_heads: 16,
                hidden_act: hidden_act(),
                ..ClipTextConfig::default()
            },
            vision_config: ClipVisionConfig {
                hidden_size: 1280,
                intermediate_size: 5120,
                num_hidden_layers: 32,
                num_attention_heads: 16,
                patch_size: 14,
                hidden_act: hidden_act(),
                ..ClipVisionConfig::default()
            },
            projection_dim: 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters of both towers and the temperature, which scores do not use.
    fn n_parameters(config: &ClipConfig) -> usize {
        config.validate().unwrap();
        let [image, text] = [config.image_manifest(), config.text_manifest()];
        let mut both = image.clone();
        both.merge(text.clone());
        assert_eq!(both.n_elements(), image.n_elements() + text.n_elements());
        both.n_elements() + 1
    }

    #[test]
    fn true_sizes_have_the_published_numbers_of_parameters() {
        assert_eq!(n_parameters(&ClipConfig::vit_h_14()), 986_109_441);
        assert_eq!(n_parameters(&ClipConfig::default()), 151_277_313);
        let large: ClipConfig = serde_json::from_str(
            r#"{"projection_dim": 768,
                "text_config": {"hidden_size": 768, "intermediate_size": 3072,
                    "num_attention_heads": 12, "eos_token_id": 2},
                "vision_config": {"hidden_size": 1024, "intermediate_size": 4096,
                    "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}}"#,
        )
        .unwrap();
        assert_eq!(n_parameters(&large), 427_616_513);
    }

    #[test]
    fn images_that_patches_do_not_fill_are_refused() {
        let mut config = ClipConfig::default();
        config.vision_config.patch_size = 30;
        assert!(config.validate().unwrap_err().to_string().contains("image_size = 224"));
    }
}
