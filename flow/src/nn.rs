//! Layers that several networks share.

use crate::ops::{Conv, Dim, Ops, ParamPath, Rope};

/// Query, key and value heads `[B, H, S, D]`.
pub struct Heads<T> {
    /// Queries.
    pub q: T,
    /// Keys.
    pub k: T,
    /// Values.
    pub v: T,
}

/// Rows of the table `path.weight` `[n, width]` at integer `ids`.
pub fn embedding<O: Ops>(
    ops: &O,
    path: &ParamPath,
    ids: &O::Tensor,
    n: usize,
    width: usize,
) -> O::Tensor {
    ops.gather(&ops.param(&path.at("weight"), &[n, width]), ids)
}

/// `[B, S, H·D]` → `[B, H, S, D]`.
pub fn split_heads<O: Ops>(ops: &O, x: &O::Tensor, heads: usize, width: usize) -> O::Tensor {
    let x = ops.reshape(x, &[Dim::Keep, Dim::Keep, Dim::Is(heads), Dim::Is(width)]);
    ops.permute(&x, &[0, 2, 1, 3])
}

/// `[B, H, S, D]` → `[B, S, H·D]`.
pub fn merge_heads<O: Ops>(ops: &O, x: &O::Tensor, heads: usize, width: usize) -> O::Tensor {
    let x = ops.permute(x, &[0, 2, 1, 3]);
    ops.reshape(&x, &[Dim::Keep, Dim::Keep, Dim::Is(heads * width)])
}

/// Tokens `[B, 1 + N, D]` of images `[B, 3, S, S]`: the class token, then one token a square patch with
/// side `patch`, row by row. `class` holds D numbers; `conv` is the path of the convolution.
pub fn patch_tokens<O: Ops>(
    ops: &O,
    conv: &ParamPath,
    class: &O::Tensor,
    pixels: &O::Tensor,
    Patches { patch, width, bias }: Patches,
) -> O::Tensor {
    let shape = Conv { c_in: 3, c_out: width, kernel: patch, stride: patch, padding: [0; 4], bias };
    let x = ops.conv2d(conv, pixels, shape);
    let x = ops.reshape(&x, &[Dim::Keep, Dim::Keep, Dim::Infer]);
    let class = ops.reshape(class, &[Dim::Is(1), Dim::Is(width)]);
    let class = ops.gather(&class, &ops.unsqueeze(&first_rows(ops, pixels), 1));
    ops.concat(&[&class, &ops.permute(&x, &[0, 2, 1])], 1)
}

/// How images become tokens.
#[derive(Clone, Copy, Debug)]
pub struct Patches {
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Width of a token.
    pub width: usize,
    /// Whether the convolution adds a bias.
    pub bias: bool,
}

/// The integer 0 for each entry of the first axis of `x`: `[B]`.
pub fn first_rows<O: Ops>(ops: &O, x: &O::Tensor) -> O::Tensor {
    ops.clamp(&ops.positions(x, 0), 0, 0)
}

/// Applies the rotation to queries and keys.
pub fn rotate<O: Ops>(
    ops: &O,
    heads: Heads<O::Tensor>,
    rope: &Rope<O::Tensor>,
) -> Heads<O::Tensor> {
    Heads { q: ops.rope(&heads.q, rope), k: ops.rope(&heads.k, rope), v: heads.v }
}

/// `x·(1 + scale) + shift`.
pub fn modulate<O: Ops>(ops: &O, x: &O::Tensor, shift: &O::Tensor, scale: &O::Tensor) -> O::Tensor {
    ops.add_product(shift, x, &ops.affine(scale, 1.0, 1.0))
}

/// `n` modulation vectors `[B, 1, D]` from the conditioning `temb` `[B, D]`.
pub fn modulation<O: Ops>(
    ops: &O,
    path: &ParamPath,
    temb: &O::Tensor,
    width: usize,
    n: usize,
) -> Vec<O::Tensor> {
    let emb = ops.linear(path, &ops.silu(temb), width, n * width, true);
    ops.split(&ops.reshape(&emb, &[Dim::Keep, Dim::Is(1), Dim::Is(n * width)]), n, 2)
}

/// Sinusoidal features `[B, width]`, cosines first, of `1000·t` for `t` `[B]` in [0, 1] (or a guidance
/// scale), at frequencies 10000^(−2i/width).
///
/// Source: `get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0)` of diffusers 0.42.
pub fn timestep_features<O: Ops>(ops: &O, t: &O::Tensor, width: usize) -> O::Tensor {
    let half = width / 2;
    let log_period = -(10_000f64.ln()) as f32;
    // Guidance reaches angles of thousands of radians: the exponent is rounded as the source rounds it.
    let exponents = (0..half).map(|i| f64::from(log_period * i as f32 / half as f32));
    let frequencies: Vec<f32> = exponents.map(|e| libm::exp(e) as f32).collect();
    let t = ops.affine(&ops.reshape(t, &[Dim::Infer, Dim::Is(1)]), 1000.0, 0.0);
    let angle = ops.mul(&t, &ops.floats(&frequencies, &[1, half]));
    ops.concat(&[&ops.cos(&angle), &ops.sin(&angle)], 1)
}

/// `linear_1 → silu → linear_2`, the embedder of times, guidance and pooled text.
pub fn embedder<O: Ops>(
    ops: &O,
    path: &ParamPath,
    x: &O::Tensor,
    n_in: usize,
    n_out: usize,
) -> O::Tensor {
    let h = ops.silu(&ops.linear(&path.at("linear_1"), x, n_in, n_out, true));
    ops.linear(&path.at("linear_2"), &h, n_out, n_out, true)
}
