//! The convolutional autoencoder of FLUX (`AutoencoderKL`): encoder and decoder.
//!
//! `B` batch, `h`×`w` latent cells, `f` = 2^(levels − 1) pixels a cell, `Z` latent channels.
//! Source: `AutoencoderKL` of diffusers 0.42.

use std::ops::{Add, Div, Mul, Sub};

use serde::Deserialize;

use super::{ConfigError, count, size};
use crate::ops::{Conv, Dim, Mask, Ops, ParamPath};

/// `vae/config.json`.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct VaeConfig {
    /// Image channels.
    #[serde(default = "rgb")]
    pub in_channels: usize,
    /// Image channels.
    #[serde(default = "rgb")]
    pub out_channels: usize,
    /// Channels at each level, finest first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks a level in the encoder; the decoder has one more.
    #[serde(default = "one")]
    pub layers_per_block: usize,
    /// Z.
    pub latent_channels: usize,
    /// Groups of every group normalisation.
    #[serde(default = "default_groups")]
    pub norm_num_groups: usize,
    /// Latents of the flow are `(z − shift)·scaling`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    #[serde(default)]
    pub shift_factor: Option<f64>,
    /// Side in pixels of the images it was trained on.
    #[serde(default)]
    pub sample_size: Option<usize>,
    /// Whether a 1×1 convolution follows the encoder.
    #[serde(default = "yes")]
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    #[serde(default = "yes")]
    pub use_post_quant_conv: bool,
    /// Whether the coarsest level has self-attention.
    #[serde(default = "yes")]
    pub mid_block_add_attention: bool,
}

fn rgb() -> usize {
    3
}
fn one() -> usize {
    1
}
fn default_groups() -> usize {
    32
}
fn yes() -> bool {
    true
}

const EPS: f64 = 1e-6;

impl VaeConfig {
    /// Pixels a latent cell covers in each direction.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The shift, 0 where the config gives none.
    pub fn shift(&self) -> f64 {
        self.shift_factor.unwrap_or(0.0)
    }

    /// Latents of the flow for what the encoder gives.
    pub fn scaled<T, U>(&self, z: T) -> U
    where
        T: Sub<f64, Output = U>,
        U: Mul<f64, Output = U>,
    {
        (z - self.shift()) * self.scaling_factor
    }

    /// What the decoder takes for latents of the flow; inverse of [`Self::scaled`].
    pub fn unscaled<T, U>(&self, latents: T) -> U
    where
        T: Div<f64, Output = U>,
        U: Add<f64, Output = U>,
    {
        latents / self.scaling_factor + self.shift()
    }

    /// # Errors
    /// When a size is absurd or the groups do not divide every level.
    pub fn validate(&self) -> Result<(), ConfigError> {
        size("latent_channels", self.latent_channels)?;
        count("layers_per_block", self.layers_per_block)?;
        let levels = &self.block_out_channels;
        if !(1..=6).contains(&levels.len()) {
            return Err(ConfigError::Invalid {
                field: "block_out_channels",
                value: format!("{levels:?}"),
                expected: "one to six levels",
            });
        }
        for &channels in levels {
            size("block_out_channels", channels)?;
        }
        if self.norm_num_groups == 0
            || levels.iter().any(|c| !c.is_multiple_of(self.norm_num_groups))
        {
            return Err(ConfigError::Invalid {
                field: "norm_num_groups",
                value: self.norm_num_groups.to_string(),
                expected: "a divisor of every entry of block_out_channels",
            });
        }
        if self.in_channels != 3 || self.out_channels != 3 {
            return Err(ConfigError::Unsupported {
                field: "in_channels/out_channels",
                value: format!("{}/{}", self.in_channels, self.out_channels),
                supported: "3 (RGB)",
            });
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor > 0.0) {
            return Err(ConfigError::Invalid {
                field: "scaling_factor",
                value: self.scaling_factor.to_string(),
                expected: "a positive number",
            });
        }
        Ok(())
    }

    /// Image `[B, 3, f·h, f·w]` in [−1, 1] from `z` `[B, Z, h, w]` (already unscaled and unshifted).
    pub fn decode<O: Ops>(&self, ops: &O, z: &O::Tensor) -> O::Tensor {
        let path = ParamPath::root().at("decoder");
        let coarsest = *self.block_out_channels.last().expect("validated");
        let post;
        let z = if self.use_post_quant_conv {
            let n = self.latent_channels;
            post = ops.conv2d(&ParamPath::root().at("post_quant_conv"), z, pointwise(n, n));
            &post
        } else {
            z
        };
        let x = ops.conv2d(&path.at("conv_in"), z, same(self.latent_channels, coarsest));
        let mut x = self.mid(ops, &path.at("mid_block"), &x, coarsest);
        let mut c_in = coarsest;
        let levels = self.block_out_channels.len();
        for (index, &channels) in self.block_out_channels.iter().rev().enumerate() {
            let block = path.at("up_blocks").at(index);
            for layer in 0..=self.layers_per_block {
                x = self.resnet(ops, &block.at("resnets").at(layer), &x, c_in, channels);
                c_in = channels;
            }
            if index + 1 < levels {
                let wide = ops.upsample2(&x);
                x = ops.conv2d(&block.at("upsamplers.0.conv"), &wide, same(channels, channels));
            }
        }
        self.output(ops, &path, &x, c_in, self.out_channels)
    }

    /// Means and log-variances `[B, 2Z, h, w]` of an image `[B, 3, f·h, f·w]` in [−1, 1].
    pub fn encode<O: Ops>(&self, ops: &O, image: &O::Tensor) -> O::Tensor {
        let path = ParamPath::root().at("encoder");
        let levels = self.block_out_channels.len();
        let mut c_in = self.block_out_channels[0];
        let mut x = ops.conv2d(&path.at("conv_in"), image, same(self.in_channels, c_in));
        for (index, &channels) in self.block_out_channels.iter().enumerate() {
            let block = path.at("down_blocks").at(index);
            for layer in 0..self.layers_per_block {
                x = self.resnet(ops, &block.at("resnets").at(layer), &x, c_in, channels);
                c_in = channels;
            }
            if index + 1 < levels {
                let halve = Conv { stride: 2, padding: [0, 0, 1, 1], ..same(channels, channels) };
                x = ops.conv2d(&block.at("downsamplers.0.conv"), &x, halve);
            }
        }
        let x = self.mid(ops, &path.at("mid_block"), &x, c_in);
        let n = 2 * self.latent_channels;
        let moments = self.output(ops, &path, &x, c_in, n);
        if self.use_quant_conv {
            ops.conv2d(&ParamPath::root().at("quant_conv"), &moments, pointwise(n, n))
        } else {
            moments
        }
    }

    fn output<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        c_in: usize,
        c_out: usize,
    ) -> O::Tensor {
        let x = ops.group_norm(&path.at("conv_norm_out"), x, self.norm_num_groups, c_in, EPS);
        ops.conv2d(&path.at("conv_out"), &ops.silu(&x), same(c_in, c_out))
    }

    fn mid<O: Ops>(&self, ops: &O, path: &ParamPath, x: &O::Tensor, channels: usize) -> O::Tensor {
        let mut x = self.resnet(ops, &path.at("resnets.0"), x, channels, channels);
        if self.mid_block_add_attention {
            x = self.attention(ops, &path.at("attentions.0"), &x, channels);
        }
        self.resnet(ops, &path.at("resnets.1"), &x, channels, channels)
    }

    fn resnet<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        c_in: usize,
        c_out: usize,
    ) -> O::Tensor {
        let groups = self.norm_num_groups;
        let h = ops.silu(&ops.group_norm(&path.at("norm1"), x, groups, c_in, EPS));
        let h = ops.conv2d(&path.at("conv1"), &h, same(c_in, c_out));
        let h = ops.silu(&ops.group_norm(&path.at("norm2"), &h, groups, c_out, EPS));
        let h = ops.conv2d(&path.at("conv2"), &h, same(c_out, c_out));
        if c_in == c_out {
            return ops.add(x, &h);
        }
        ops.add(&ops.conv2d(&path.at("conv_shortcut"), x, pointwise(c_in, c_out)), &h)
    }

    /// Single-head self-attention over the h·w cells.
    fn attention<O: Ops>(
        &self,
        ops: &O,
        path: &ParamPath,
        x: &O::Tensor,
        channels: usize,
    ) -> O::Tensor {
        let h = ops.group_norm(&path.at("group_norm"), x, self.norm_num_groups, channels, EPS);
        let h = ops.reshape(&h, &[Dim::Keep, Dim::Keep, Dim::Infer]); // [B, C, hw]
        let h = ops.permute(&h, &[0, 2, 1]);
        let project = |name: &str| {
            ops.unsqueeze(&ops.linear(&path.at(name), &h, channels, channels, true), 1)
        };
        let (q, k, v) = (project("to_q"), project("to_k"), project("to_v")); // [B, 1, hw, C]
        let h = ops.attention(&q, &k, &v, 1.0 / (channels as f64).sqrt(), Mask::None);
        let h = ops
            .reshape(&ops.permute(&h, &[0, 2, 1, 3]), &[Dim::Keep, Dim::Keep, Dim::Is(channels)]);
        let h = ops.linear(&path.at("to_out.0"), &h, channels, channels, true);
        ops.add(x, &ops.reshape_like(&ops.permute(&h, &[0, 2, 1]), x))
    }
}

fn same(c_in: usize, c_out: usize) -> Conv {
    Conv { c_in, c_out, kernel: 3, stride: 1, padding: [1; 4], bias: true }
}

fn pointwise(c_in: usize, c_out: usize) -> Conv {
    Conv { c_in, c_out, kernel: 1, stride: 1, padding: [0; 4], bias: true }
}
