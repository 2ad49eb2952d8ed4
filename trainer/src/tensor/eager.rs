//! The libtorch interpreter of [`flow::ops::Ops`]: each operator runs at once, with autograd where the
//! parameters ask for it.

use std::cell::Ref;
use std::collections::HashMap;
use std::ops::Deref;
use std::rc::Rc;

use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};
use tch::{Device, Kind, Tensor};

/// Parameters, or a segment of them, by name.
pub(crate) type Named = HashMap<String, Rc<Tensor>>;

/// Parameters by name: those that are held, or a segment just read.
pub(crate) enum Views<'a> {
    Held(Ref<'a, Named>),
    Read(Named),
}

impl Deref for Views<'_> {
    type Target = Named;

    fn deref(&self) -> &Named {
        match self {
            Self::Held(named) => named,
            Self::Read(named) => named,
        }
    }
}

/// What a network adds to its linear layers.
pub(crate) trait Addition {
    /// The addition to the layer at `path` for its input `x`, of the shape of its output; nothing where the
    /// layer stays as it is.
    fn of(&self, path: &ParamPath, x: &Tensor) -> Option<Tensor>;
}

/// Runs networks on the tensors of one component.
pub(crate) struct Eager<'a> {
    parameters: Views<'a>,
    addition: Option<&'a dyn Addition>,
    device: Device,
    kind: Kind,
}

impl<'a> Eager<'a> {
    /// `kind` is the type activations are computed in.
    pub(crate) fn new(parameters: Views<'a>, device: Device, kind: Kind) -> Self {
        Self { parameters, addition: None, device, kind }
    }

    /// Adds to the linear layers.
    pub(crate) fn with(self, addition: Option<&'a dyn Addition>) -> Self {
        Self { addition, ..self }
    }

    /// The parameters it computes with.
    pub(crate) fn views(&self) -> &Named {
        &self.parameters
    }

    fn optional(&self, path: &ParamPath, name: &str) -> Option<Rc<Tensor>> {
        self.parameters.get(path.at(name).as_str()).cloned()
    }

    fn named(&self, path: &ParamPath) -> Rc<Tensor> {
        // The manifest check at the border leaves no way for a name to be absent.
        self.parameters.get(path.as_str()).unwrap_or_else(|| panic!("no parameter {path}")).clone()
    }
}

type T = Rc<Tensor>;

impl Ops for Eager<'_> {
    type Tensor = T;

    fn param(&self, path: &ParamPath, _shape: &[usize]) -> T {
        self.named(path)
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> T {
        // In f32 whatever networks compute in: angles of thousands of radians come from them.
        Rc::new(Tensor::from_slice(values).reshape(dims(shape)).to_device(self.device))
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> T {
        Rc::new(Tensor::from_slice(values).reshape(dims(shape)).to_device(self.device))
    }

    fn linear(&self, path: &ParamPath, x: &T, _n_in: usize, _n_out: usize, bias: bool) -> T {
        let bias = bias.then(|| self.named(&path.at("bias")));
        let x = x.to_kind(self.kind);
        let y = x.linear(&self.named(&path.at("weight")), bias.as_deref());
        let added = self.addition.and_then(|addition| addition.of(path, &x));
        Rc::new(match added {
            Some(added) => y + added,
            None => y,
        })
    }

    fn conv2d(&self, path: &ParamPath, x: &T, conv: Conv) -> T {
        let [top, left, bottom, right] = conv.padding.map(|n| n as i64);
        let even = top == bottom && left == right;
        let padded = (!even).then(|| x.constant_pad_nd([left, right, top, bottom]));
        let stride = conv.stride as i64;
        let bias = conv.bias.then(|| self.named(&path.at("bias")));
        Rc::new(padded.as_ref().unwrap_or(x).conv2d(
            &self.named(&path.at("weight")),
            bias.as_deref(),
            [stride; 2],
            if even { [top, left] } else { [0; 2] },
            [1; 2],
            1,
        ))
    }

    fn gather(&self, table: &T, ids: &T) -> T {
        Rc::new(Tensor::embedding(table, ids, -1, false, false))
    }

    fn add(&self, a: &T, b: &T) -> T {
        Rc::new(&**a + &**b)
    }

    fn sub(&self, a: &T, b: &T) -> T {
        Rc::new(&**a - &**b)
    }

    fn mul(&self, a: &T, b: &T) -> T {
        Rc::new(&**a * &**b)
    }

    fn add_product(&self, a: &T, b: &T, c: &T) -> T {
        Rc::new(a.addcmul(b, c))
    }

    fn affine(&self, x: &T, factor: f64, offset: f64) -> T {
        let scaled = if factor == 1.0 { x.shallow_clone() } else { &**x * factor };
        Rc::new(if offset == 0.0 { scaled } else { scaled + offset })
    }

    fn clamp(&self, ids: &T, low: i64, high: i64) -> T {
        Rc::new(ids.clamp(low, high))
    }

    fn cos(&self, x: &T) -> T {
        Rc::new(x.cos())
    }

    fn sin(&self, x: &T) -> T {
        Rc::new(x.sin())
    }

    fn gelu(&self, x: &T, form: Gelu) -> T {
        Rc::new(x.gelu(match form {
            Gelu::Exact => "none",
            Gelu::Tanh => "tanh",
        }))
    }

    fn sigmoid(&self, x: &T) -> T {
        Rc::new(x.sigmoid())
    }

    fn silu(&self, x: &T) -> T {
        Rc::new(x.silu())
    }

    fn layer_norm(&self, x: &T, width: usize, affine: Option<&ParamPath>, eps: f64) -> T {
        let weight = affine.map(|path| self.named(&path.at("weight")));
        let bias = affine.map(|path| self.named(&path.at("bias")));
        Rc::new(x.layer_norm([width as i64], weight.as_deref(), bias.as_deref(), eps, true))
    }

    fn rms_norm(&self, path: &ParamPath, x: &T, width: usize, eps: f64) -> T {
        Rc::new(x.rms_norm([width as i64], Some(&*self.named(&path.at("weight"))), eps))
    }

    fn group_norm(&self, path: &ParamPath, x: &T, groups: usize, _channels: usize, eps: f64) -> T {
        let weight = self.optional(path, "weight");
        let bias = self.optional(path, "bias");
        Rc::new(x.group_norm(groups as i64, weight.as_deref(), bias.as_deref(), eps, true))
    }

    fn attention(&self, q: &T, k: &T, v: &T, scale: f64, mask: Mask<'_, T>) -> T {
        let (bias, causal) = match mask {
            Mask::None => (None, false),
            Mask::Causal => (None, true),
            // cuDNN's kernels take the bias's last axis for dense, and T5's, put together from heads, is not.
            Mask::Bias(bias) => (Some(bias.contiguous()), false),
        };
        Rc::new(Tensor::scaled_dot_product_attention(q, k, v, bias, 0.0, causal, scale, false))
    }

    fn rope(&self, x: &T, rope: &Rope<T>) -> T {
        // A turn of a pair is a complex product: one pass over memory instead of eight.
        let turn = Tensor::complex(&rope.cos, &rope.sin);
        let pairs = x.to_kind(Kind::Float).unflatten(-1, [-1, 2]).view_as_complex();
        Rc::new((pairs * turn).view_as_real().flatten(-2, -1).to_kind(self.kind))
    }

    fn rope_table(&self, ids: &T, axes_dim: &[usize], theta: f64, _batch: &T) -> Rope<T> {
        let ids = ids.to_kind(Kind::Double);
        let of_axis = |(axis, &dim): (usize, &usize)| {
            let exponent: Vec<f64> = (0..dim / 2).map(|i| -2.0 * i as f64 / dim as f64).collect();
            let frequencies: Vec<f64> = exponent.iter().map(|e| theta.powf(*e)).collect();
            let frequencies = Tensor::from_slice(&frequencies).to_device(self.device);
            ids.select(1, axis as i64).outer(&frequencies)
        };
        let angles: Vec<Tensor> = axes_dim.iter().enumerate().map(of_axis).collect();
        let angles = Tensor::cat(&angles, 1);
        Rope {
            cos: Rc::new(angles.cos().to_kind(Kind::Float)),
            sin: Rc::new(angles.sin().to_kind(Kind::Float)),
        }
    }

    fn reshape(&self, x: &T, shape: &[Dim]) -> T {
        let old = x.size();
        let size: Vec<i64> = shape
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim {
                Dim::Keep => old[i],
                Dim::Infer => -1,
                Dim::Is(n) => *n as i64,
            })
            .collect();
        Rc::new(x.reshape(size))
    }

    fn reshape_like(&self, x: &T, like: &T) -> T {
        Rc::new(x.reshape(like.size()))
    }

    fn unsqueeze(&self, x: &T, axis: usize) -> T {
        Rc::new(x.unsqueeze(axis as i64))
    }

    fn permute(&self, x: &T, axes: &[usize]) -> T {
        Rc::new(x.permute(dims(axes)))
    }

    fn concat(&self, parts: &[&T], axis: usize) -> T {
        let parts: Vec<&Tensor> = parts.iter().map(|part| &***part).collect();
        Rc::new(Tensor::cat(&parts, axis as i64))
    }

    fn split(&self, x: &T, n: usize, axis: usize) -> Vec<T> {
        x.chunk(n as i64, axis as i64).into_iter().map(Rc::new).collect()
    }

    fn split_after(&self, x: &T, first: &T, axis: usize) -> (T, T) {
        let (axis, length) = (axis as i64, first.size()[axis]);
        let rest = x.size()[axis as usize] - length;
        (Rc::new(x.narrow(axis, 0, length)), Rc::new(x.narrow(axis, length, rest)))
    }

    fn upsample2(&self, x: &T) -> T {
        let size = x.size();
        Rc::new(x.upsample_nearest2d([2 * size[2], 2 * size[3]], 2.0, 2.0))
    }

    fn positions(&self, x: &T, axis: usize) -> T {
        Rc::new(Tensor::arange(x.size()[axis], (Kind::Int64, self.device)))
    }

    fn argmax(&self, ids: &T) -> T {
        Rc::new(ids.argmax(1, false))
    }

    fn first_match(&self, ids: &T, value: i64) -> T {
        Rc::new((**ids).eq(value).to_kind(Kind::Int).argmax(1, false))
    }

    fn select_rows(&self, x: &T, index: &T) -> T {
        let width = x.size()[2];
        let index = index.reshape([-1, 1, 1]).expand([-1, 1, width], false);
        Rc::new(x.gather(1, &index, false).squeeze_dim(1))
    }
}

/// Sizes as libtorch counts them.
pub(crate) fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&n| n as i64).collect()
}
