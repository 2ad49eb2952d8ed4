//! The FLUX transformer: double-stream then single-stream blocks over text and image tokens.
//!
//! `B` batch, `S` image tokens, `L` text tokens, `C` channels of a packed latent, `D` width, `H` heads.
//! Source: `FluxTransformer2DModel` of diffusers 0.42; parameter names are its checkpoint's.

use serde::Deserialize;

use super::{ConfigError, MAX_COUNT, Quantization, count, only, size, within};
use crate::nn::{self, Heads};
use crate::ops::{Gelu, Mask, Ops, ParamPath, Rope};

/// `transformer/config.json`; what is left out is as in diffusers.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct TransformerConfig {
    /// Channels of a packed latent token: 4·16.
    pub in_channels: usize,
    /// Channels of a velocity; left out, those of a token.
    out_channels: Option<usize>,
    /// Side of the patches of a token; latents come packed.
    patch_size: usize,
    /// Double-stream blocks, or none.
    pub num_layers: usize,
    /// Single-stream blocks, or none.
    pub num_single_layers: usize,
    /// Width of a head.
    pub attention_head_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of a T5 token.
    pub joint_attention_dim: usize,
    /// Width of the pooled CLIP vector.
    pub pooled_projection_dim: usize,
    /// Whether a distilled guidance scale conditions the network.
    pub guidance_embeds: bool,
    /// Angles an axis of the position ids takes, times two; they add up to the head width.
    pub axes_dims_rope: Vec<usize>,
    /// How weights are quantised, in files of other libraries.
    pub(super) quantization_config: Option<Quantization>,
}

impl Default for TransformerConfig {
    /// `FluxTransformer2DModel()`.
    fn default() -> Self {
        Self {
            in_channels: 64,
            out_channels: None,
            patch_size: 1,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            quantization_config: None,
        }
    }
}

/// What the network takes.
pub struct Inputs<'a, T> {
    /// Packed noisy latents x_t, `[B, S, C]`.
    pub hidden_states: &'a T,
    /// T5 tokens, `[B, L, joint_attention_dim]`.
    pub encoder_hidden_states: &'a T,
    /// CLIP vector, `[B, pooled_projection_dim]`.
    pub pooled_projections: &'a T,
    /// Flow time t in [0, 1], `[B]`.
    pub timestep: &'a T,
    /// Position ids of image tokens, `[S, 3]`.
    pub img_ids: &'a T,
    /// Position ids of text tokens, `[L, 3]`.
    pub txt_ids: &'a T,
    /// Guidance scale, `[B]`; required exactly when the config embeds guidance.
    pub guidance: Option<&'a T>,
}

/// What one block hands to the next.
#[derive(Clone)]
pub struct State<T> {
    /// Image tokens `[B, S, D]`; between single-stream blocks, text and image `[B, L+S, D]`.
    pub x: T,
    /// Text tokens `[B, L, D]`.
    pub c: T,
    /// Conditioning `[B, D]`.
    pub temb: T,
    /// Rotation of the joint sequence.
    pub rope: Rope<T>,
}

/// FLUX.1-dev's usual guidance scale, the default of every program.
pub const GUIDANCE: f64 = 3.5;
/// Layer and RMS normalisation use one constant throughout.
const EPS: f64 = 1e-6;
/// Width of the sinusoidal features before their embedder.
const TIME_FEATURES: usize = 256;
/// Base of the rotary frequencies.
const ROPE_THETA: f64 = 10_000.0;

impl TransformerConfig {
    /// Width of a token.
    pub fn width(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Blocks of both kinds.
    pub fn n_blocks(&self) -> usize {
        self.num_layers + self.num_single_layers
    }

    /// # Errors
    /// When a size is absurd or the rotary axes do not fill a head.
    pub fn validate(&self) -> Result<(), ConfigError> {
        Quantization::refuse(self.quantization_config.as_ref())?;
        size("in_channels", self.in_channels)?;
        let out = self.out_channels.unwrap_or(self.in_channels).to_string();
        only("out_channels", &out, &[&self.in_channels.to_string()], "as many as in_channels")?;
        only("patch_size", &self.patch_size.to_string(), &["1"], "1")?;
        for (field, n) in
            [("num_layers", self.num_layers), ("num_single_layers", self.num_single_layers)]
        {
            within(field, n, 0..=MAX_COUNT, "a count from 0 to 4096")?;
        }
        size("attention_head_dim", self.attention_head_dim)?;
        count("num_attention_heads", self.num_attention_heads)?;
        size("joint_attention_dim", self.joint_attention_dim)?;
        size("pooled_projection_dim", self.pooled_projection_dim)?;
        let fills = self.axes_dims_rope.iter().sum::<usize>() == self.attention_head_dim
            && self.axes_dims_rope.iter().all(|dim| dim % 2 == 0)
            && self.axes_dims_rope.len() == 3;
        if fills {
            return Ok(());
        }
        Err(ConfigError::Invalid {
            field: "axes_dims_rope",
            value: format!("{:?}", self.axes_dims_rope),
            expected: "three even numbers that add up to attention_head_dim",
        })
    }

    /// Velocity `[B, S, C]`: prologue, every block, epilogue.
    pub fn forward<O: Ops>(&self, ops: &O, inputs: &Inputs<'_, O::Tensor>) -> O::Tensor {
        let mut state = self.prologue(ops, inputs);
        for index in 0..self.n_blocks() {
            state = self.block(ops, index, &state);
        }
        self.epilogue(ops, &state)
    }

    /// Embeds tokens, time, guidance and pooled text.
    pub fn prologue<O: Ops>(&self, ops: &O, inputs: &Inputs<'_, O::Tensor>) -> State<O::Tensor> {
        let (root, width) = (ParamPath::root(), self.width());
        let embed = root.at("time_text_embed");
        let times = |name: &str, t: &O::Tensor| {
            let features = nn::timestep_features(ops, t, TIME_FEATURES);
            nn::embedder(ops, &embed.at(name), &features, TIME_FEATURES, width)
        };
        let mut temb = times("timestep_embedder", inputs.timestep);
        if let Some(guidance) = inputs.guidance.filter(|_| self.guidance_embeds) {
            temb = ops.add(&temb, &times("guidance_embedder", guidance));
        }
        let pooled = nn::embedder(
            ops,
            &embed.at("text_embedder"),
            inputs.pooled_projections,
            self.pooled_projection_dim,
            width,
        );
        let ids = ops.concat(&[inputs.txt_ids, inputs.img_ids], 0);
        State {
            x: ops.linear(
                &root.at("x_embedder"),
                inputs.hidden_states,
                self.in_channels,
                width,
                true,
            ),
            c: ops.linear(
                &root.at("context_embedder"),
                inputs.encoder_hidden_states,
                self.joint_attention_dim,
                width,
                true,
            ),
            temb: ops.add(&temb, &pooled),
            rope: ops.rope_table(&ids, &self.axes_dims_rope, ROPE_THETA, inputs.hidden_states),
        }
    }

    /// Block `index` of [`TransformerConfig::n_blocks`], double-stream first.
    pub fn block<O: Ops>(
        &self,
        ops: &O,
        index: usize,
        state: &State<O::Tensor>,
    ) -> State<O::Tensor> {
        if index < self.num_layers {
            return self.double_block(
                ops,
                &ParamPath::root().at("transformer_blocks").at(index),
                state,
            );
        }
        let single = index - self.num_layers;
        let path = ParamPath::root().at("single_transformer_blocks").at(single);
        let joined;
        let x = if single == 0 {
            joined = ops.concat(&[&state.c, &state.x], 1);
            &joined
        } else {
            &state.x
        };
        let is_last = single + 1 == self.num_single_layers;
        State { x: self.single_block(ops, &path, x, state, is_last), ..state.clone() }
    }

    /// Velocity `[B, S, C]` from the last state.
    pub fn epilogue<O: Ops>(&self, ops: &O, state: &State<O::Tensor>) -> O::Tensor {
        let (root, width) = (ParamPath::root(), self.width());
        let scale_shift =
            nn::modulation(ops, &root.at("norm_out").at("linear"), &state.temb, width, 2);
        let x = ops.layer_norm(&state.x, width, None, EPS);
        let x = nn::modulate(ops, &x, &scale_shift[1], &scale_shift[0]);
        ops.linear(&root.at("proj_out"), &x, width, self.in_channels, true)
    }

    fn double_block<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        state: &State<O::Tensor>,
    ) -> State<O::Tensor> {
        let (width, attn) = (self.width(), path.at("attn"));
        let m_x = nn::modulation(ops, &path.at("norm1").at("linear"), &state.temb, width, 6);
        let m_c =
            nn::modulation(ops, &path.at("norm1_context").at("linear"), &state.temb, width, 6);
        let normed = |x: &O::Tensor, shift: &O::Tensor, scale: &O::Tensor| {
            nn::modulate(ops, &ops.layer_norm(x, width, None, EPS), shift, scale)
        };
        let x_in = normed(&state.x, &m_x[0], &m_x[1]);
        let c_in = normed(&state.c, &m_c[0], &m_c[1]);
        let of_x = self.heads(ops, &attn, ["to_q", "to_k", "to_v", "norm_q", "norm_k"], &x_in);
        let of_c = self.heads(
            ops,
            &attn,
            ["add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"],
            &c_in,
        );
        let joint = Heads {
            q: ops.concat(&[&of_c.q, &of_x.q], 2),
            k: ops.concat(&[&of_c.k, &of_x.k], 2),
            v: ops.concat(&[&of_c.v, &of_x.v], 2),
        };
        let attended = self.attend(ops, joint, &state.rope);
        let (c_att, x_att) = ops.split_after(&attended, &state.c, 1);
        let stream = |x: &O::Tensor, att: &O::Tensor, out: &str, ff: &str, m: &[O::Tensor]| {
            let att = ops.linear(&attn.at(out), att, width, width, true);
            let x = ops.add_product(x, &m[2], &att);
            let h = normed(&x, &m[3], &m[4]);
            let h = ops.linear(&path.at(ff).at("net.0.proj"), &h, width, 4 * width, true);
            let h = ops.gelu(&h, Gelu::Tanh);
            let h = ops.linear(&path.at(ff).at("net.2"), &h, 4 * width, width, true);
            ops.add_product(&x, &m[5], &h)
        };
        State {
            x: stream(&state.x, &x_att, "to_out.0", "ff", &m_x),
            c: stream(&state.c, &c_att, "to_add_out", "ff_context", &m_c),
            ..state.clone()
        }
    }

    /// Text tokens leave the network with the last block's keys and values: it returns image tokens alone.
    fn single_block<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        state: &State<O::Tensor>,
        is_last: bool,
    ) -> O::Tensor {
        let width = self.width();
        let going_on = |x: &O::Tensor| {
            if is_last { ops.split_after(x, &state.c, 1).1 } else { x.clone() }
        };
        let m = nn::modulation(ops, &path.at("norm").at("linear"), &state.temb, width, 3);
        let h = nn::modulate(ops, &ops.layer_norm(x, width, None, EPS), &m[0], &m[1]);
        let mlp = ops.linear(&path.at("proj_mlp"), &going_on(&h), width, 4 * width, true);
        let mlp = ops.gelu(&mlp, Gelu::Tanh);
        let heads =
            self.heads(ops, &path.at("attn"), ["to_q", "to_k", "to_v", "norm_q", "norm_k"], &h);
        let attended = self.attend(ops, heads, &state.rope);
        let h = ops.concat(&[&going_on(&attended), &mlp], 2);
        let h = ops.linear(&path.at("proj_out"), &h, 5 * width, width, true);
        ops.add_product(&going_on(x), &m[2], &h)
    }

    /// Heads from `x` `[B, S, D]`; queries and keys RMS-normalised. `names`: q, k, v, norm_q, norm_k.
    fn heads<O: Ops>(
        &self,
        ops: &O,
        attn: &ParamPath,
        names: [&str; 5],
        x: &O::Tensor,
    ) -> Heads<O::Tensor> {
        let (width, head) = (self.width(), self.attention_head_dim);
        let project = |name: &str| {
            let y = ops.linear(&attn.at(name), x, width, width, true);
            nn::split_heads(ops, &y, self.num_attention_heads, head)
        };
        Heads {
            q: ops.rms_norm(&attn.at(names[3]), &project(names[0]), head, EPS),
            k: ops.rms_norm(&attn.at(names[4]), &project(names[1]), head, EPS),
            v: project(names[2]),
        }
    }

    fn attend<O: Ops>(
        &self,
        ops: &O,
        heads: Heads<O::Tensor>,
        rope: &Rope<O::Tensor>,
    ) -> O::Tensor {
        let head = self.attention_head_dim;
        let Heads { q, k, v } = nn::rotate(ops, heads, rope);
        let attended = ops.attention(&q, &k, &v, 1.0 / (head as f64).sqrt(), Mask::None);
        nn::merge_heads(ops, &attended, self.num_attention_heads, head)
    }
}

/// Position ids `[S, 3]`, row-major, of the image tokens of a `rows`×`columns` packed latent:
/// (0, row, column).
pub fn image_ids(rows: usize, columns: usize) -> Vec<f32> {
    (0..rows).flat_map(|r| (0..columns).flat_map(move |c| [0.0, r as f32, c as f32])).collect()
}
