//! BLIP's image encoder and the text encoder that looks at its result.
//!
//! Source: `vit.py` and `med.py` of salesforce/BLIP; `B` batch, `S` side of the image, `N` patches, `L`
//! tokens, `V` width of an image token, `D` width of a text token.

use serde::Deserialize;

use super::{ConfigError, count, heads, only, size};
use crate::checkpoint::Weights;
use crate::nn::{self, Patches};
use crate::ops::{Gelu, Mask, Ops, ParamPath};

/// Sizes of the image encoder; no file states them, so they are read off its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlipVisionConfig {
    /// Width of a token.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// Side of the image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
}

/// Width of a head in ViT-B and ViT-L.
const HEAD: usize = 64;
const VISION_EPS: f64 = 1e-6;

impl BlipVisionConfig {
    /// The sizes of the image encoder at `path` in `weights`, if there is one.
    pub fn of(weights: &Weights, path: &ParamPath) -> Option<Self> {
        let shape = |name: &str| weights.get(path.at(name).as_str()).map(|view| view.shape);
        let &[width, _, patch_size, _] = shape("patch_embed.proj.weight")? else { return None };
        let n_patches = shape("pos_embed")?.get(1)?.checked_sub(1)?;
        let layers = (0..).take_while(|i| shape(&format!("blocks.{i}.norm1.weight")).is_some());
        let image_size = n_patches.isqrt().checked_mul(patch_size)?;
        Some(Self { width, layers: layers.count(), image_size, patch_size })
    }

    /// # Errors
    /// When a size is absurd or heads do not divide the width.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size("patch_size", self.patch_size)?;
        size("image_size", self.image_size)?;
        count("layers", self.layers)?;
        heads(self.width, self.width.div_ceil(HEAD))
    }

    /// Tokens `[B, 1 + N, V]` of normalised `pixels` `[B, 3, S, S]`.
    pub fn forward<O: Ops>(&self, ops: &O, path: &ParamPath, pixels: &O::Tensor) -> O::Tensor {
        let d = self.width;
        let class = ops.param(&path.at("cls_token"), &[1, 1, d]);
        let patches = Patches { patch: self.patch_size, width: d, bias: true };
        let tokens = nn::patch_tokens(ops, &path.at("patch_embed.proj"), &class, pixels, patches);
        let n_tokens = (self.image_size / self.patch_size).pow(2) + 1;
        let mut x = ops.add(&tokens, &ops.param(&path.at("pos_embed"), &[1, n_tokens, d]));
        for index in 0..self.layers {
            x = self.block(ops, &path.at("blocks").at(index), &x);
        }
        ops.layer_norm(&x, d, Some(&path.at("norm")), VISION_EPS)
    }

    fn block<O: Ops>(&self, ops: &O, path: &ParamPath, x: &O::Tensor) -> O::Tensor {
        let (d, heads) = (self.width, self.width / HEAD);
        let h = ops.layer_norm(x, d, Some(&path.at("norm1")), VISION_EPS);
        let qkv = ops.split(&ops.linear(&path.at("attn.qkv"), &h, d, 3 * d, true), 3, 2);
        let [q, k, v] = [0, 1, 2].map(|i| nn::split_heads(ops, &qkv[i], heads, HEAD));
        let h = ops.attention(&q, &k, &v, 1.0 / (HEAD as f64).sqrt(), Mask::None);
        let h = nn::merge_heads(ops, &h, heads, HEAD);
        let x = ops.add(x, &ops.linear(&path.at("attn.proj"), &h, d, d, true));

        let h = ops.layer_norm(&x, d, Some(&path.at("norm2")), VISION_EPS);
        let h = ops.gelu(&ops.linear(&path.at("mlp.fc1"), &h, d, 4 * d, true), Gelu::Exact);
        ops.add(&x, &ops.linear(&path.at("mlp.fc2"), &h, 4 * d, d, true))
    }
}

/// `med_config.json`: BERT with a cross-attention in every block.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct BlipTextConfig {
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
    /// Rows of the position table.
    pub max_position_embeddings: usize,
    /// `gelu`.
    pub hidden_act: String,
    /// Constant of the layer normalisation.
    pub layer_norm_eps: f64,
}

impl BlipTextConfig {
    /// # Errors
    /// When a size is absurd, the heads do not divide the width or the activation is another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size("vocab_size", self.vocab_size)?;
        size("intermediate_size", self.intermediate_size)?;
        count("num_hidden_layers", self.num_hidden_layers)?;
        size("max_position_embeddings", self.max_position_embeddings)?;
        only("hidden_act", &self.hidden_act, &["gelu"], "gelu")?;
        heads(self.hidden_size, self.num_attention_heads)
    }

    /// Token states `[B, L, D]` of integer `input_ids` `[B, L]`, no padding among them, that look at image
    /// tokens `[B, 1 + N, image_width]`.
    pub fn forward<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        input_ids: &O::Tensor,
        image: &O::Tensor,
        image_width: usize,
    ) -> O::Tensor {
        let (d, embed) = (self.hidden_size, path.at("embeddings"));
        let words = embed.at("word_embeddings");
        let words = nn::embedding(ops, &words, input_ids, self.vocab_size, d);
        let positions = nn::embedding(
            ops,
            &embed.at("position_embeddings"),
            &ops.positions(input_ids, 1),
            self.max_position_embeddings,
            d,
        );
        let x = ops.add(&words, &positions);
        let mut x = ops.layer_norm(&x, d, Some(&embed.at("LayerNorm")), self.layer_norm_eps);
        for index in 0..self.num_hidden_layers {
            let path = path.at("encoder.layer").at(index);
            x = self.attend(ops, &path.at("attention"), &x, &x, d);
            x = self.attend(ops, &path.at("crossattention"), &x, image, image_width);
            let h = ops.linear(&path.at("intermediate.dense"), &x, d, self.intermediate_size, true);
            let h = ops.gelu(&h, Gelu::Exact);
            x = self.join(ops, &path.at("output"), &h, self.intermediate_size, &x);
        }
        x
    }

    /// `x` `[B, L, D]` after it has looked at `seen` `[B, M, width]`.
    fn attend<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        seen: &O::Tensor,
        width: usize,
    ) -> O::Tensor {
        let (d, heads) = (self.hidden_size, self.num_attention_heads);
        let head = d / heads;
        let project = |name: &str, from: &O::Tensor, width: usize| {
            let path = path.at("self").at(name);
            nn::split_heads(ops, &ops.linear(&path, from, width, d, true), heads, head)
        };
        let (q, k) = (project("query", x, d), project("key", seen, width));
        let v = project("value", seen, width);
        let h = ops.attention(&q, &k, &v, 1.0 / (head as f64).sqrt(), Mask::None);
        self.join(ops, &path.at("output"), &nn::merge_heads(ops, &h, heads, head), d, x)
    }

    /// `norm(x + dense(h))`, where `h` is `[B, L, width]`.
    fn join<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        h: &O::Tensor,
        width: usize,
        x: &O::Tensor,
    ) -> O::Tensor {
        let d = self.hidden_size;
        let sum = ops.add(x, &ops.linear(&path.at("dense"), h, width, d, true));
        ops.layer_norm(&sum, d, Some(&path.at("LayerNorm")), self.layer_norm_eps)
    }
}
