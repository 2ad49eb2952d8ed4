//! The vocabulary networks are written in.
//!
//! A network is a plain function over [`Ops`]; each method is one operator at ONNX granularity with
//! ONNX semantics, so that the exporter needs no pattern recovery. There is no shape query: a network
//! that cannot ask for a size cannot freeze a sample's size into an export. Parameters are named by
//! their checkpoint path at the point of use, and methods return tensors, not `Result`s: the manifest
//! check ([`shapes`]) at the border makes parameter errors impossible inside.

use std::fmt::{self, Display};

pub mod shapes;

/// One entry of a reshape target; ONNX `Reshape` writes these as 0, −1 and n.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim {
    /// The size of the input at the same position.
    Keep,
    /// Whatever is left; at most once.
    Infer,
    /// A fixed size.
    Is(usize),
}

/// The two usual forms of GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// x·Φ(x) with the error function.
    Exact,
    /// The tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    Tanh,
}

/// What attention may see.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a, T> {
    /// Everything.
    None,
    /// Position i sees positions ≤ i.
    Causal,
    /// A tensor added to the scores, broadcastable to `[B, H, S, S]`.
    Bias(&'a T),
}

/// The shape of a two-dimensional convolution.
#[derive(Clone, Copy, Debug)]
pub struct Conv {
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Kernel height and width.
    pub kernel: usize,
    /// Stride in both directions.
    pub stride: usize,
    /// Zero padding: top, left, bottom, right.
    pub padding: [usize; 4],
    /// Whether a bias is added.
    pub bias: bool,
}

/// Rotation tables of interleaved rotary embedding.
#[derive(Clone, Debug)]
pub struct Rope<T> {
    /// Cosines, `[B, S, D/2]`, or `[S, D/2]` where the interpreter broadcasts.
    pub cos: T,
    /// Sines, same shape.
    pub sin: T,
}

/// A parameter's or module's place in a checkpoint: names joined by dots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParamPath(String);

impl ParamPath {
    /// The root, from which every other path is built by [`ParamPath::at`].
    pub fn root() -> Self {
        Self::default()
    }

    /// The child called `name`; a number serves for a list entry.
    #[must_use]
    pub fn at(&self, name: impl Display) -> Self {
        if self.0.is_empty() { Self(name.to_string()) } else { Self(format!("{}.{name}", self.0)) }
    }

    /// The dotted name, as in the safetensors file.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Display for ParamPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a network may do. `B` batch, `S` sequence, `H` heads, `D` width of a head or token.
pub trait Ops {
    /// A handle to a value; cloning is cheap.
    type Tensor: Clone;

    /// The checkpoint tensor at `path`, of exactly `shape`.
    fn param(&self, path: &ParamPath, shape: &[usize]) -> Self::Tensor;
    /// A float constant.
    fn floats(&self, values: &[f32], shape: &[usize]) -> Self::Tensor;
    /// An integer constant.
    fn integers(&self, values: &[i64], shape: &[usize]) -> Self::Tensor;

    /// `x·Wᵀ (+ b)` over the last axis: `path.weight` is `[n_out, n_in]`, `path.bias` is `[n_out]`.
    fn linear(
        &self,
        path: &ParamPath,
        x: &Self::Tensor,
        n_in: usize,
        n_out: usize,
        bias: bool,
    ) -> Self::Tensor;
    /// Convolution of `[B, C, H, W]`; `path.weight` is `[c_out, c_in, k, k]`, `path.bias`, where there is
    /// one, `[c_out]`.
    fn conv2d(&self, path: &ParamPath, x: &Self::Tensor, conv: Conv) -> Self::Tensor;
    /// Rows of `table` `[n, …]` at the integer `ids`: shape of `ids` followed by `…`.
    fn gather(&self, table: &Self::Tensor, ids: &Self::Tensor) -> Self::Tensor;

    /// Sum with broadcasting; floats or integers.
    fn add(&self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// Difference with broadcasting; floats or integers.
    fn sub(&self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// Product with broadcasting.
    fn mul(&self, a: &Self::Tensor, b: &Self::Tensor) -> Self::Tensor;
    /// `a + b·c` with broadcasting.
    fn add_product(&self, a: &Self::Tensor, b: &Self::Tensor, c: &Self::Tensor) -> Self::Tensor {
        self.add(a, &self.mul(b, c))
    }
    /// `factor·x + offset`.
    fn affine(&self, x: &Self::Tensor, factor: f64, offset: f64) -> Self::Tensor;
    /// Integers limited to `low..=high`.
    fn clamp(&self, ids: &Self::Tensor, low: i64, high: i64) -> Self::Tensor;

    /// Cosine, in radians.
    fn cos(&self, x: &Self::Tensor) -> Self::Tensor;
    /// Sine, in radians.
    fn sin(&self, x: &Self::Tensor) -> Self::Tensor;
    /// Gaussian error linear unit.
    fn gelu(&self, x: &Self::Tensor, form: Gelu) -> Self::Tensor;
    /// Logistic function.
    fn sigmoid(&self, x: &Self::Tensor) -> Self::Tensor;
    /// x·sigmoid(x).
    fn silu(&self, x: &Self::Tensor) -> Self::Tensor;

    /// Layer normalisation over the last axis of size `width`; `affine` holds `.weight` and `.bias`.
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        width: usize,
        affine: Option<&ParamPath>,
        eps: f64,
    ) -> Self::Tensor;
    /// Root-mean-square normalisation over the last axis with `path.weight` `[width]`.
    fn rms_norm(&self, path: &ParamPath, x: &Self::Tensor, width: usize, eps: f64) -> Self::Tensor;
    /// Group normalisation of `[B, C, …]` with `path.weight` and `path.bias` `[channels]`.
    fn group_norm(
        &self,
        path: &ParamPath,
        x: &Self::Tensor,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> Self::Tensor;
    /// `softmax(scale·q·kᵀ + mask)·v` over `[B, H, S, D]`.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        scale: f64,
        mask: Mask<'_, Self::Tensor>,
    ) -> Self::Tensor;
    /// Interleaved rotary embedding of `x` `[B, H, S, D]`: pairs (x₀, x₁) turn by one angle.
    fn rope(&self, x: &Self::Tensor, rope: &Rope<Self::Tensor>) -> Self::Tensor;
    /// Rotation tables for position `ids` `[S, axes]` (float), one block of `axes_dim[a]/2` angles an
    /// axis with frequencies θ^(−2i/d), angles formed in f64. `batch` is any tensor whose first axis is B.
    fn rope_table(
        &self,
        ids: &Self::Tensor,
        axes_dim: &[usize],
        theta: f64,
        batch: &Self::Tensor,
    ) -> Rope<Self::Tensor>;

    /// The same values in another shape.
    fn reshape(&self, x: &Self::Tensor, dims: &[Dim]) -> Self::Tensor;
    /// The same values in the shape of `like`.
    fn reshape_like(&self, x: &Self::Tensor, like: &Self::Tensor) -> Self::Tensor;
    /// The same values with an axis of size 1 put in at `axis`.
    fn unsqueeze(&self, x: &Self::Tensor, axis: usize) -> Self::Tensor;
    /// Axis `i` of the result is axis `axes[i]` of `x`.
    fn permute(&self, x: &Self::Tensor, axes: &[usize]) -> Self::Tensor;
    /// Joins along `axis`.
    fn concat(&self, parts: &[&Self::Tensor], axis: usize) -> Self::Tensor;
    /// Cuts into `n` equal parts along `axis`.
    fn split(&self, x: &Self::Tensor, n: usize, axis: usize) -> Vec<Self::Tensor>;
    /// Cuts along `axis` into two: the first as long as `first` is there, and the rest.
    fn split_after(
        &self,
        x: &Self::Tensor,
        first: &Self::Tensor,
        axis: usize,
    ) -> (Self::Tensor, Self::Tensor);
    /// Doubles height and width of `[B, C, H, W]` by repeating pixels.
    fn upsample2(&self, x: &Self::Tensor) -> Self::Tensor;

    /// The integers 0, 1, … along `axis` of `x`: `[size]`.
    fn positions(&self, x: &Self::Tensor, axis: usize) -> Self::Tensor;
    /// Where each row of integer `ids` `[B, S]` has its first maximum: `[B]`.
    fn argmax(&self, ids: &Self::Tensor) -> Self::Tensor;
    /// Where each row of integer `ids` `[B, S]` first equals `value` (0 where it never does): `[B]`.
    fn first_match(&self, ids: &Self::Tensor, value: i64) -> Self::Tensor;
    /// Row `index[b]` of each `x[b]`: `[B, S, D]` and `[B]` give `[B, D]`.
    fn select_rows(&self, x: &Self::Tensor, index: &Self::Tensor) -> Self::Tensor;
}
