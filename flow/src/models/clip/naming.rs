//! CLIP as open_clip writes it: its names for the parameters, and its config file.
//!
//! The network uses the names of transformers. In open_clip's files (OpenAI's names) queries, keys and
//! values are the three thirds of one matrix, and the projections lie transposed.

use serde::Deserialize;

use super::ClipTextConfig;
use super::vision::{ClipConfig, ClipVisionConfig};
use crate::models::{ConfigError, only};
use crate::ops::shapes::Manifest;

/// Whose names the tensors of a file have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `vision_model.encoder.layers.0.self_attn.q_proj.weight`.
    Transformers,
    /// `visual.transformer.resblocks.0.attn.in_proj_weight`.
    OpenClip,
}

/// Parts of open_clip's text tower, which some of its models put below `text.`.
const TEXT_TOWER: [&str; 6] = [
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
];

/// The usual name of a tensor that a file of open_clip calls `name`.
pub fn usual(name: &str) -> &str {
    name.strip_prefix("text.")
        .filter(|rest| TEXT_TOWER.iter().any(|part| rest.starts_with(part)))
        .unwrap_or(name)
}

/// Where a parameter lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The tensor.
    pub name: String,
    /// What of it is the parameter.
    pub part: Part,
}

/// How a parameter lies in its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// As it is.
    Whole,
    /// The given third of its first axis.
    Third(usize),
    /// With both axes exchanged.
    Transposed,
}

/// Pieces of names: those of transformers, then those of open_clip. Longer pieces stand before their parts.
const RENAMED: [(&str, &str); 16] = [
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("visual_projection.weight", "visual.proj"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
];

impl Naming {
    /// The naming of a file that holds tensors called `names`.
    pub fn of<'a>(mut names: impl Iterator<Item = &'a str>) -> Self {
        if names.any(|name| name.starts_with("visual.")) {
            Self::OpenClip
        } else {
            Self::Transformers
        }
    }

    /// Where the parameter that the network calls `name` is.
    pub fn stored(self, name: &str) -> Stored {
        if self == Self::Transformers {
            return Stored { name: name.to_owned(), part: Part::Whole };
        }
        let renamed =
            RENAMED.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs));
        for (third, projection) in ["q_proj.", "k_proj.", "v_proj."].into_iter().enumerate() {
            if renamed.contains(projection) {
                let name = renamed.replace(projection, "in_proj_");
                return Stored { name, part: Part::Third(third) };
            }
        }
        let transposed = ["visual.proj", "text_projection"].contains(&renamed.as_str());
        let part = if transposed { Part::Transposed } else { Part::Whole };
        Stored { name: renamed, part }
    }

    /// What a file must hold for the parameters of `manifest`.
    #[must_use]
    pub fn manifest(self, manifest: &Manifest) -> Manifest {
        let mut stored = Manifest::default();
        for (name, shape) in manifest.entries() {
            let Stored { name, part } = self.stored(name);
            let mut shape = shape.to_vec();
            match part {
                Part::Whole => {}
                Part::Third(_) => shape[0] *= 3,
                Part::Transposed => shape.reverse(),
            }
            stored.merge(Manifest::new([(name, shape)]));
        }
        stored
    }
}

/// `open_clip_config.json`. A setting of another architecture is an unknown field.
#[derive(Clone, Debug, Deserialize)]
pub struct OpenClipConfig {
    model_cfg: ModelConfig,
    #[serde(default)]
    preprocess_cfg: PreprocessConfig,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelConfig {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: VisionConfig,
    text_cfg: TextConfig,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VisionConfig {
    image_size: usize,
    layers: usize,
    width: usize,
    patch_size: usize,
    #[serde(default = "default_head_width")]
    head_width: usize,
    #[serde(default = "default_mlp_ratio")]
    mlp_ratio: f64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TextConfig {
    context_length: usize,
    vocab_size: usize,
    width: usize,
    heads: usize,
    layers: usize,
    #[serde(default = "default_mlp_ratio")]
    mlp_ratio: f64,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct PreprocessConfig {
    #[serde(default)]
    resize_mode: Option<String>,
}

fn default_head_width() -> usize {
    64
}
fn default_mlp_ratio() -> f64 {
    4.0
}

/// open_clip pools at the highest id, which is its end of text.
const HIGHEST_ID: i64 = super::LEGACY_EOS;

impl OpenClipConfig {
    /// The same in the terms of transformers.
    pub fn clip(&self) -> ClipConfig {
        let ModelConfig { embed_dim, quick_gelu, vision_cfg, text_cfg } = &self.model_cfg;
        let hidden_act = if *quick_gelu { "quick_gelu" } else { "gelu" };
        let hidden = |width: usize, ratio: f64| (width as f64 * ratio) as usize;
        ClipConfig {
            text_config: ClipTextConfig {
                vocab_size: text_cfg.vocab_size,
                hidden_size: text_cfg.width,
                intermediate_size: hidden(text_cfg.width, text_cfg.mlp_ratio),
                num_hidden_layers: text_cfg.layers,
                num_attention_heads: text_cfg.heads,
                max_position_embeddings: text_cfg.context_length,
                hidden_act: hidden_act.into(),
                eos_token_id: HIGHEST_ID,
                ..ClipTextConfig::default()
            },
            vision_config: ClipVisionConfig {
                hidden_size: vision_cfg.width,
                intermediate_size: hidden(vision_cfg.width, vision_cfg.mlp_ratio),
                num_hidden_layers: vision_cfg.layers,
                num_attention_heads: vision_cfg.width / vision_cfg.head_width.max(1),
                image_size: vision_cfg.image_size,
                patch_size: vision_cfg.patch_size,
                hidden_act: hidden_act.into(),
                ..ClipVisionConfig::default()
            },
            projection_dim: *embed_dim,
        }
    }

    /// Whether images are squashed into the square; if not, their shorter side fills it and the rest of
    /// the longer one is cut off.
    ///
    /// # Errors
    /// When images are prepared in another way.
    pub fn squashes(&self) -> Result<bool, ConfigError> {
        let mode = self.preprocess_cfg.resize_mode.as_deref().unwrap_or("shortest");
        only("resize_mode", mode, &["shortest", "squash"], "shortest or squash")?;
        Ok(mode == "squash")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ViT-H-14.json` of open_clip, in the file that its folders on the model hub have.
    const VIT_H_14: &str = r#"{
        "model_cfg": {
            "embed_dim": 1024,
            "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80,
                "patch_size": 14},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16,
                "layers": 24}},
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}"#;

    #[test]
    fn configs_say_the_same() {
        let config: OpenClipConfig = serde_json::from_str(VIT_H_14).unwrap();
        let text_config =
            ClipTextConfig { eos_token_id: HIGHEST_ID, ..ClipConfig::vit_h_14().text_config };
        assert_eq!(config.clip(), ClipConfig { text_config, ..ClipConfig::vit_h_14() });
        assert!(!config.squashes().unwrap());
        let squash = VIT_H_14.replace(r#""mean""#, r#""resize_mode": "squash", "mean""#);
        assert!(serde_json::from_str::<OpenClipConfig>(&squash).unwrap().squashes().unwrap());
        let pad = VIT_H_14.replace(r#""mean""#, r#""resize_mode": "longest", "mean""#);
        let pad = serde_json::from_str::<OpenClipConfig>(&pad).unwrap();
        assert!(pad.squashes().unwrap_err().to_string().contains("longest"));
        let other = VIT_H_14.replace(r#""head_width""#, r#""timm_model_name": "x", "head_width""#);
        let error = serde_json::from_str::<OpenClipConfig>(&other).unwrap_err().to_string();
        assert!(error.contains("timm_model_name"), "{error}");
    }

    #[test]
    fn the_two_namings_hold_the_same_numbers() {
        let config = ClipConfig::vit_h_14();
        for manifest in [config.image_manifest(), config.text_manifest()] {
            let stored = Naming::OpenClip.manifest(&manifest);
            assert_eq!(stored.n_elements(), manifest.n_elements());
            assert_eq!(Naming::Transformers.manifest(&manifest), manifest);
            assert!(stored.entries().all(|(name, _)| !name.contains("_model.")));
        }
        let stored = |name| Naming::OpenClip.stored(name);
        let whole = |name: &str| Stored { name: name.into(), part: Part::Whole };
        assert_eq!(
            stored("text_model.encoder.layers.7.self_attn.k_proj.bias"),
            Stored {
                name: "transformer.resblocks.7.attn.in_proj_bias".into(),
                part: Part::Third(1)
            }
        );
        assert_eq!(
            stored("vision_model.encoder.layers.0.layer_norm2.weight"),
            whole("visual.transformer.resblocks.0.ln_2.weight")
        );
        assert_eq!(
            stored("visual_projection.weight"),
            Stored { name: "visual.proj".into(), part: Part::Transposed }
        );
    }
}
