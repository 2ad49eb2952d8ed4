//! The dry interpreter: runs a network on shapes alone.
//!
//! It yields the parameter [`Manifest`] that a checkpoint is checked against before anything is loaded,
//! and the floating-point operations of one call. Shapes that do not fit are errors of the network's
//! author and panic.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};

/// Parameters a network uses: name and shape, in order of first use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest(Vec<(String, Vec<usize>)>);

impl Manifest {
    /// A manifest of `entries`: name and shape.
    pub fn new(entries: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        Self(entries.into_iter().collect())
    }

    /// Name and shape of each parameter, in order of first use.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.0.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()))
    }

    /// Numbers in all parameters together.
    pub fn n_elements(&self) -> usize {
        self.0.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    /// Appends what `other` has and this one lacks.
    pub fn merge(&mut self, other: Manifest) {
        for entry in other.0 {
            if !self.0.iter().any(|(name, _)| *name == entry.0) {
                self.0.push(entry);
            }
        }
    }
}

/// A tensor without values.
pub type Shape = Vec<usize>;

/// Records parameters and counts operations while a network runs.
#[derive(Default)]
pub struct Shapes {
    seen: RefCell<BTreeMap<String, Vec<usize>>>,
    order: RefCell<Vec<String>>,
    flops: Cell<f64>,
    kept: Cell<f64>,
}

impl Shapes {
    /// An interpreter that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// What has been used so far.
    pub fn manifest(&self) -> Manifest {
        let seen = self.seen.borrow();
        Manifest(
            self.order.borrow().iter().map(|name| (name.clone(), seen[name].clone())).collect(),
        )
    }

    /// Multiplications and additions of matrix products, convolutions and attention so far.
    pub fn flops(&self) -> f64 {
        self.flops.get()
    }

    /// Numbers that a backward pass would need: the results of every operator so far but views and sums.
    pub fn kept(&self) -> f64 {
        self.kept.get()
    }

    fn keep(&self, shape: Shape) -> Shape {
        self.kept.set(self.kept.get() + shape.iter().product::<usize>() as f64);
        shape
    }

    fn count(&self, flops: usize) {
        self.flops.set(self.flops.get() + flops as f64);
    }

    fn pair(&self, path: &ParamPath, width: usize) {
        self.param(&path.at("weight"), &[width]);
        self.param(&path.at("bias"), &[width]);
    }
}

fn broadcast(a: &[usize], b: &[usize]) -> Shape {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], i: usize| {
        (i + shape.len()).checked_sub(rank).map_or(1, |index| shape[index])
    };
    (0..rank)
        .map(|i| {
            let (m, n) = (at(a, i), at(b, i));
            assert!(m == n || m == 1 || n == 1, "{a:?} and {b:?} do not broadcast");
            if m == 1 { n } else { m }
        })
        .collect()
}

fn with_last(x: &[usize], width: usize) -> Shape {
    let mut shape = x.to_vec();
    *shape.last_mut().expect("a tensor with an axis") = width;
    shape
}

impl Ops for Shapes {
    type Tensor = Shape;

    fn param(&self, path: &ParamPath, shape: &[usize]) -> Shape {
        let mut seen = self.seen.borrow_mut();
        if let Some(known) = seen.get(path.as_str()) {
            assert_eq!(known, shape, "{path} is used with two shapes");
        } else {
            seen.insert(path.as_str().to_owned(), shape.to_vec());
            self.order.borrow_mut().push(path.as_str().to_owned());
        }
        shape.to_vec()
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Shape {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        shape.to_vec()
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> Shape {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        shape.to_vec()
    }

    fn linear(&self, path: &ParamPath, x: &Shape, n_in: usize, n_out: usize, bias: bool) -> Shape {
        assert_eq!(x.last(), Some(&n_in), "{path} takes {n_in} features, got {x:?}");
        self.param(&path.at("weight"), &[n_out, n_in]);
        if bias {
            self.param(&path.at("bias"), &[n_out]);
        }
        self.count(2 * x.iter().product::<usize>() * n_out);
        self.keep(with_last(x, n_out))
    }

    fn conv2d(&self, path: &ParamPath, x: &Shape, conv: Conv) -> Shape {
        let &[b, c, h, w] = x.as_slice() else { panic!("{path} takes [B, C, H, W], got {x:?}") };
        assert_eq!(c, conv.c_in, "{path} takes {} channels", conv.c_in);
        self.param(&path.at("weight"), &[conv.c_out, conv.c_in, conv.kernel, conv.kernel]);
        if conv.bias {
            self.param(&path.at("bias"), &[conv.c_out]);
        }
        let [top, left, bottom, right] = conv.padding;
        let side = |n: usize, pad: usize| (n + pad - conv.kernel) / conv.stride + 1;
        let shape = vec![b, conv.c_out, side(h, top + bottom), side(w, left + right)];
        self.count(2 * shape.iter().product::<usize>() * conv.c_in * conv.kernel * conv.kernel);
        self.keep(shape)
    }

    fn gather(&self, table: &Shape, ids: &Shape) -> Shape {
        ids.iter().chain(&table[1..]).copied().collect()
    }

    fn add(&self, a: &Shape, b: &Shape) -> Shape {
        broadcast(a, b)
    }

    fn sub(&self, a: &Shape, b: &Shape) -> Shape {
        broadcast(a, b)
    }

    fn mul(&self, a: &Shape, b: &Shape) -> Shape {
        self.keep(broadcast(a, b))
    }

    fn affine(&self, x: &Shape, _factor: f64, _offset: f64) -> Shape {
        x.clone()
    }

    fn clamp(&self, ids: &Shape, _low: i64, _high: i64) -> Shape {
        ids.clone()
    }

    fn cos(&self, x: &Shape) -> Shape {
        x.clone()
    }

    fn sin(&self, x: &Shape) -> Shape {
        x.clone()
    }

    fn gelu(&self, x: &Shape, _form: Gelu) -> Shape {
        self.keep(x.clone())
    }

    fn sigmoid(&self, x: &Shape) -> Shape {
        self.keep(x.clone())
    }

    fn silu(&self, x: &Shape) -> Shape {
        self.keep(x.clone())
    }

    fn layer_norm(&self, x: &Shape, width: usize, affine: Option<&ParamPath>, _eps: f64) -> Shape {
        assert_eq!(x.last(), Some(&width));
        if let Some(path) = affine {
            self.pair(path, width);
        }
        self.keep(x.clone())
    }

    fn rms_norm(&self, path: &ParamPath, x: &Shape, width: usize, _eps: f64) -> Shape {
        assert_eq!(x.last(), Some(&width), "{path}");
        self.param(&path.at("weight"), &[width]);
        self.keep(x.clone())
    }

    fn group_norm(
        &self,
        path: &ParamPath,
        x: &Shape,
        groups: usize,
        channels: usize,
        _eps: f64,
    ) -> Shape {
        assert!(x[1] == channels && channels.is_multiple_of(groups), "{path}: {x:?}");
        self.pair(path, channels);
        self.keep(x.clone())
    }

    fn attention(&self, q: &Shape, k: &Shape, v: &Shape, _: f64, mask: Mask<'_, Shape>) -> Shape {
        assert!(k == v && q[..2] == k[..2] && q[3] == k[3], "{q:?} {k:?} {v:?}");
        if let Mask::Bias(bias) = mask {
            let scores = [q[0], q[1], q[2], k[2]];
            assert_eq!(broadcast(bias, &scores), scores);
        }
        self.count(4 * q.iter().product::<usize>() * k[2]);
        self.keep(q.clone())
    }

    fn rope(&self, x: &Shape, rope: &Rope<Shape>) -> Shape {
        assert!(rope.cos.ends_with(&[x[2], x[3] / 2]), "{:?} does not turn {x:?}", rope.cos);
        self.keep(x.clone())
    }

    fn rope_table(&self, ids: &Shape, axes_dim: &[usize], _: f64, batch: &Shape) -> Rope<Shape> {
        assert_eq!(ids[1], axes_dim.len());
        let table = vec![batch[0], ids[0], axes_dim.iter().sum::<usize>() / 2];
        Rope { cos: table.clone(), sin: table }
    }

    fn reshape(&self, x: &Shape, dims: &[Dim]) -> Shape {
        let total: usize = x.iter().product();
        let known: usize = dims
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim {
                Dim::Keep => x[i],
                Dim::Infer => 1,
                Dim::Is(n) => *n,
            })
            .product();
        let shape: Shape = dims
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim {
                Dim::Keep => x[i],
                Dim::Infer => total / known,
                Dim::Is(n) => *n,
            })
            .collect();
        assert_eq!(shape.iter().product::<usize>(), total, "{x:?} does not reshape to {dims:?}");
        shape
    }

    fn reshape_like(&self, x: &Shape, like: &Shape) -> Shape {
        assert_eq!(x.iter().product::<usize>(), like.iter().product::<usize>());
        like.clone()
    }

    fn unsqueeze(&self, x: &Shape, axis: usize) -> Shape {
        let mut shape = x.clone();
        shape.insert(axis, 1);
        shape
    }

    fn permute(&self, x: &Shape, axes: &[usize]) -> Shape {
        assert_eq!(x.len(), axes.len());
        axes.iter().map(|&axis| x[axis]).collect()
    }

    fn concat(&self, parts: &[&Shape], axis: usize) -> Shape {
        let mut shape = parts[0].clone();
        shape[axis] = parts.iter().map(|part| part[axis]).sum();
        for part in parts {
            let rest_agrees = (0..shape.len()).all(|i| i == axis || part[i] == shape[i]);
            assert!(rest_agrees, "{parts:?} do not join along axis {axis}");
        }
        self.keep(shape)
    }

    fn split(&self, x: &Shape, n: usize, axis: usize) -> Vec<Shape> {
        assert!(x[axis].is_multiple_of(n), "{x:?} does not split {n} ways along axis {axis}");
        let mut part = x.clone();
        part[axis] /= n;
        vec![part; n]
    }

    fn split_after(&self, x: &Shape, first: &Shape, axis: usize) -> (Shape, Shape) {
        let (mut head, mut tail) = (x.clone(), x.clone());
        head[axis] = first[axis];
        tail[axis] = x[axis] - first[axis];
        (head, tail)
    }

    fn upsample2(&self, x: &Shape) -> Shape {
        vec![x[0], x[1], 2 * x[2], 2 * x[3]]
    }

    fn positions(&self, x: &Shape, axis: usize) -> Shape {
        vec![x[axis]]
    }

    fn argmax(&self, ids: &Shape) -> Shape {
        vec![ids[0]]
    }

    fn first_match(&self, ids: &Shape, _value: i64) -> Shape {
        vec![ids[0]]
    }

    fn select_rows(&self, x: &Shape, index: &Shape) -> Shape {
        assert_eq!(x[0], index[0]);
        vec![x[0], x[2]]
    }
}
