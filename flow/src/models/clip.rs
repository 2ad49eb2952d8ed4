//! The CLIP text encoder.
//!
//! Source: `CLIPTextModel` of transformers; `B` batch, `L` tokens, `D` width.

use serde::Deserialize;

use super::{ConfigError, count, only, size};
use crate::nn;
use crate::ops::{Gelu, Mask, Ops, ParamPath};

/// `text_encoder/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
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
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    /// The pooled vector is the state at the first such token.
    #[serde(default = "default_eos")]
    pub eos_token_id: i64,
}

fn default_eps() -> f64 {
    1e-5
}
fn default_eos() -> i64 {
    49407
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
        size("vocab_size", self.vocab_size)?;
        size("hidden_size", self.hidden_size)?;
        size("intermediate_size", self.intermediate_size)?;
        count("num_hidden_layers", self.num_hidden_layers)?;
        count("num_attention_heads", self.num_attention_heads)?;
        size("max_position_embeddings", self.max_position_embeddings)?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(ConfigError::Invalid {
                field: "num_attention_heads",
                value: self.num_attention_heads.to_string(),
                expected: "a divisor of hidden_size",
            });
        }
        only("hidden_act", &self.hidden_act, &["quick_gelu", "gelu"], "quick_gelu or gelu")
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
        let mut x = ops.add(&tokens, &positions);
        for index in 0..self.num_hidden_layers {
            x = self.block(ops, &root.at("encoder.layers").at(index), &x);
        }
        let x = ops.layer_norm(&x, d, Some(&root.at("final_layer_norm")), self.layer_norm_eps);
        let end = if self.eos_token_id == LEGACY_EOS {
            ops.argmax(input_ids)
        } else {
            ops.first_match(input_ids, self.eos_token_id)
        };
        Encoded { pooler_output: ops.select_rows(&x, &end), last_hidden_state: x }
    }

    fn block<O: Ops>(&self, ops: &O, path: &ParamPath, x: &O::Tensor) -> O::Tensor {
        let (d, heads, eps) = (self.hidden_size, self.num_attention_heads, self.layer_norm_eps);
        let head = d / heads;
        let attn = path.at("self_attn");
        let h = ops.layer_norm(x, d, Some(&path.at("layer_norm1")), eps);
        let project = |name: &str| {
            nn::split_heads(ops, &ops.linear(&attn.at(name), &h, d, d, true), heads, head)
        };
        let (q, k, v) = (project("q_proj"), project("k_proj"), project("v_proj"));
        let h = ops.attention(&q, &k, &v, 1.0 / (head as f64).sqrt(), Mask::Causal);
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
