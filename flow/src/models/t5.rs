//! The T5 v1.1 encoder: relative position bias, gated GELU, no mask (padding is attended to, as
//! `FluxPipeline` does).
//!
//! Source: `T5EncoderModel` of transformers; `B` batch, `L` tokens, `D` width, `H` heads.

use serde::Deserialize;

use super::{ConfigError, Quantization, count, only, size};
use crate::nn;
use crate::ops::{Gelu, Mask, Ops, ParamPath};

/// `text_encoder_2/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct T5Config {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of a token.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width of the gated hidden layer.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads.
    pub num_heads: usize,
    /// Buckets of relative position.
    #[serde(default = "default_buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distances from here on share the last bucket.
    #[serde(default = "default_distance")]
    pub relative_attention_max_distance: usize,
    /// Constant of the RMS normalisation.
    #[serde(default = "default_eps")]
    pub layer_norm_epsilon: f64,
    /// `gated-gelu` is the only form in use for text conditioning.
    #[serde(default = "default_projection")]
    pub feed_forward_proj: String,
    /// How weights are quantised, in files of other libraries.
    #[serde(default)]
    pub(super) quantization_config: Option<Quantization>,
}

fn default_buckets() -> usize {
    32
}
fn default_distance() -> usize {
    128
}
fn default_eps() -> f64 {
    1e-6
}
fn default_projection() -> String {
    "relu".into()
}

/// What one block hands to the next.
#[derive(Clone)]
pub struct State<T> {
    /// Token states `[B, L, D]`.
    pub x: T,
    /// Bias of the attention scores by distance, `[1, H, L, L]`.
    pub bias: T,
}

impl T5Config {
    /// # Errors
    /// When a size is absurd or the feed-forward form is another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        Quantization::refuse(self.quantization_config.as_ref())?;
        size("vocab_size", self.vocab_size)?;
        size("d_model", self.d_model)?;
        size("d_kv", self.d_kv)?;
        size("d_ff", self.d_ff)?;
        count("num_layers", self.num_layers)?;
        count("num_heads", self.num_heads)?;
        count("relative_attention_num_buckets", self.relative_attention_num_buckets)?;
        size("relative_attention_max_distance", self.relative_attention_max_distance)?;
        if !self.relative_attention_num_buckets.is_multiple_of(4)
            || self.relative_attention_max_distance <= self.relative_attention_num_buckets / 4
        {
            return Err(ConfigError::Invalid {
                field: "relative_attention_num_buckets",
                value: self.relative_attention_num_buckets.to_string(),
                expected: "a multiple of 4, below four times relative_attention_max_distance",
            });
        }
        only("feed_forward_proj", &self.feed_forward_proj, &["gated-gelu"], "gated-gelu")
    }

    /// Token states `[B, L, D]` of integer `input_ids` `[B, L]`: prologue, every block, epilogue.
    pub fn forward<O: Ops>(&self, ops: &O, input_ids: &O::Tensor) -> O::Tensor {
        let mut state = self.prologue(ops, input_ids);
        for index in 0..self.num_layers {
            state = self.block(ops, index, &state);
        }
        self.epilogue(ops, &state)
    }

    /// Embeds the tokens and their distances.
    pub fn prologue<O: Ops>(&self, ops: &O, input_ids: &O::Tensor) -> State<O::Tensor> {
        let table = ParamPath::root().at("shared");
        State {
            x: nn::embedding(ops, &table, input_ids, self.vocab_size, self.d_model),
            bias: self.position_bias(ops, input_ids),
        }
    }

    /// Token states `[B, L, D]` from the last state.
    pub fn epilogue<O: Ops>(&self, ops: &O, state: &State<O::Tensor>) -> O::Tensor {
        let path = ParamPath::root().at("encoder.final_layer_norm");
        ops.rms_norm(&path, &state.x, self.d_model, self.layer_norm_epsilon)
    }

    /// Block `index` of `num_layers`.
    pub fn block<O: Ops>(
        &self,
        ops: &O,
        index: usize,
        State { x, bias }: &State<O::Tensor>,
    ) -> State<O::Tensor> {
        let path = ParamPath::root().at("encoder.block").at(index).at("layer");
        let (d, eps, inner) = (self.d_model, self.layer_norm_epsilon, self.num_heads * self.d_kv);
        let attn = path.at(0).at("SelfAttention");
        let h = ops.rms_norm(&path.at(0).at("layer_norm"), x, d, eps);
        let project = |name: &str| {
            let y = ops.linear(&attn.at(name), &h, d, inner, false);
            nn::split_heads(ops, &y, self.num_heads, self.d_kv)
        };
        // T5 folds 1/√d into its initialisation: the scores are not scaled.
        let h = ops.attention(&project("q"), &project("k"), &project("v"), 1.0, Mask::Bias(bias));
        let h = nn::merge_heads(ops, &h, self.num_heads, self.d_kv);
        let x = ops.add(x, &ops.linear(&attn.at("o"), &h, inner, d, false));

        let dense = path.at(1).at("DenseReluDense");
        let h = ops.rms_norm(&path.at(1).at("layer_norm"), &x, d, eps);
        let gate = ops.gelu(&ops.linear(&dense.at("wi_0"), &h, d, self.d_ff, false), Gelu::Tanh);
        let h = ops.mul(&gate, &ops.linear(&dense.at("wi_1"), &h, d, self.d_ff, false));
        let x = ops.add(&x, &ops.linear(&dense.at("wo"), &h, self.d_ff, d, false));
        State { x, bias: bias.clone() }
    }

    /// `[1, H, L, L]`: the bias of query i looking at key j depends on j − i alone.
    fn position_bias<O: Ops>(&self, ops: &O, input_ids: &O::Tensor) -> O::Tensor {
        use crate::ops::Dim::{Infer, Is};
        let reach = self.relative_attention_max_distance as i64;
        let buckets: Vec<i64> = (-reach..=reach).map(|distance| self.bucket(distance)).collect();
        let table = nn::embedding(
            ops,
            &ParamPath::root().at("encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
            &ops.integers(&buckets, &[buckets.len()]),
            self.relative_attention_num_buckets,
            self.num_heads,
        );
        let positions = ops.positions(input_ids, 1);
        let key = ops.reshape(&positions, &[Is(1), Infer]);
        let query = ops.reshape(&positions, &[Infer, Is(1)]);
        let distance = ops.clamp(&ops.sub(&key, &query), -reach, reach);
        let bias = ops.gather(&table, &ops.add(&distance, &ops.integers(&[reach], &[1])));
        // [L, L, H] → [1, H, L, L]
        ops.permute(&ops.unsqueeze(&bias, 0), &[0, 3, 1, 2])
    }

    /// Bucket of key position − query position, bidirectional: exact for near tokens, logarithmic
    /// beyond. Source: `T5Attention._relative_position_bucket` of transformers.
    fn bucket(&self, distance: i64) -> i64 {
        let half = self.relative_attention_num_buckets as i64 / 2;
        let side = if distance > 0 { half } else { 0 };
        let (n, exact) = (distance.abs(), half / 2);
        if n < exact {
            return side + n;
        }
        let ratio = (n as f32 / exact as f32).ln()
            / (self.relative_attention_max_distance as f32 / exact as f32).ln();
        side + (exact + (ratio * (half - exact) as f32) as i64).min(half - 1)
    }
}
