//! CLIP: the text encoder here, the image encoder and both together in [`vision`], the other naming of
//! its parameters in [`naming`].
//!
//! Source: `CLIPTextModel` of transformers; `B` batch, `L` tokens, `D` width.

use serde::Deserialize;

use super::{ConfigError, Quantization, count, heads, only, size};
use crate::nn;
use crate::ops::{Gelu, Mask, Ops, ParamPath};

pub mod naming;
pub mod vision;

/// `text_encoder/config.json`; what is left out is as in ViT-B/32.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default)]
pub struct ClipTextConfig {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of a token.
    pub hidden_size: usize,
    /// Width of the hidden layer.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Rows of the position table: the longest prompt in tokens.
    pub max_position_embeddings: usize,
    /// `quick_gelu` or `gelu`.
    pub hidden_act: String,
    /// Constant of the layer normalisation.
    pub layer_norm_eps: f64,
    /// The pooled vector is the state at the first such token.
    pub eos_token_id: i64,
    /// How weights are quantised, in files of other libraries.
    pub(super) quantization_config: Option<Quantization>,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            eos_token_id: 49407,
            quantization_config: None,
        }
    }
}

/// Old configs carry this wrong id; transformers then pools at the highest id instead.
const LEGACY_EOS: i64 = 2;

/// What the encoder returns.
pub struct Encoded<T> {
    /// `[B, L, D]`.
    pub last_hidden_state: T,
    /// State at the end-of-text token, `[B, D]`.
    pub pooler_output: T,
}

impl ClipTextConfig {
    /// # Errors
    /// When a size is absurd, the heads do not divide the width or the activation is another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        Quantization::refuse(self.quantization_config.as_ref())?;
        size("vocab_size", self.vocab_size)?;
        size("max_position_embeddings", self.max_position_embeddings)?;
        self.encoder().validate()
    }

    /// Token states and pooled vector of integer `input_ids` `[B, L]`, L ≤ `max_position_embeddings`.
    pub fn forward<O: Ops>(&self, ops: &O, input_ids: &O::Tensor) -> Encoded<O::Tensor> {
        let (root, d) = (ParamPath::root().at("text_model"), self.hidden_size);
        let embed = root.at("embeddings");
        let tokens =
            nn::embedding(ops, &embed.at("token_embedding"), input_ids, self.vocab_size, d);
        let positions = nn::embedding(
            ops,
            &embed.at("position_embedding"),
            &ops.positions(input_ids, 1),
            self.max_position_embeddings,
            d,
        );
        let x = ops.add(&tokens, &positions);
        let x = self.encoder().forward(ops, &root.at("encoder.layers"), x, &Mask::Causal);
        let x = ops.layer_norm(&x, d, Some(&root.at("final_layer_norm")), self.layer_norm_eps);
        let end = if self.eos_token_id == LEGACY_EOS {
            ops.argmax(input_ids)
        } else {
            ops.first_match(input_ids, self.eos_token_id)
        };
        Encoded { pooler_output: ops.select_rows(&x, &end), last_hidden_state: x }
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
}

/// The transformer that text and image towers share.
struct Encoder<'a> {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    hidden_act: &'a str,
    layer_norm_eps: f64,
}

impl Encoder<'_> {
    fn validate(&self) -> Result<(), ConfigError> {
        size("intermediate_size", self.intermediate_size)?;
        count("num_hidden_layers", self.num_hidden_layers)?;
        heads(self.hidden_size, self.num_attention_heads)?;
        only("hidden_act", self.hidden_act, &["quick_gelu", "gelu"], "quick_gelu or gelu")
    }

    /// All blocks on `x` `[B, L, D]`.
    fn forward<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        mut x: O::Tensor,
        mask: &Mask<'_, O::Tensor>,
    ) -> O::Tensor {
        for index in 0..self.num_hidden_layers {
            x = self.block(ops, &path.at(index), &x, mask);
        }
        x
    }

    fn block<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        mask: &Mask<'_, O::Tensor>,
    ) -> O::Tensor {
        let (d, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let head = d / heads;
        let attn = path.at("self_attn");
        let h = ops.layer_norm(x, d, Some(&path.at("layer_norm1")), eps);
        let project = |name: &str| {
            nn::split_heads(ops, &ops.linear(&attn.at(name), &h, d, d, true), heads, head)
        };
        let (q, k, v) = (project("q_proj"), project("k_proj"), project("v_proj"));
        let h = ops.attention(&q, &k, &v, 1.0 / (head as f64).sqrt(), mask.clone());
        let h = nn::merge_heads(ops, &h, heads, head);
        let x = ops.add(x, &ops.linear(&attn.at("out_proj"), &h, d, d, true));

        let h = ops.layer_norm(&x, d, Some(&path.at("layer_norm2")), eps);
        let h = ops.linear(&path.at("mlp.fc1"), &h, d, self.intermediate_size, true);
        let h = self.activate(ops, &h);
        ops.add(&x, &ops.linear(&path.at("mlp.fc2"), &h, self.intermediate_size, d, true))
    }

    fn activate<O: Ops>(&self, ops: &O, x: &O::Tensor) -> O::Tensor {
        if self.hidden_act == "quick_gelu" {
            ops.mul(x, &ops.sigmoid(&ops.affine(x, 1.702, 0.0)))
        } else {
            ops.gelu(x, Gelu::Exact)
        }
    }
}
