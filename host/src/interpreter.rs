//! Operators over [`Tensor`]s.

use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};

use crate::attention::attention;
use crate::kernels;
use crate::parameters::Parameters;
use crate::product::{Matrix, linear};
use crate::tensor::{Tensor, offsets, strides};

/// Runs networks over parameters.
pub struct Interpreter<'a> {
    parameters: &'a Parameters,
}

impl<'a> Interpreter<'a> {
    /// An interpreter over `parameters`, which hold what the network's manifest names.
    pub fn new(parameters: &'a Parameters) -> Self {
        Self { parameters }
    }

    fn named(&self, path: &ParamPath) -> &'a Tensor {
        &self.parameters.named(path).tensor
    }

    fn scaled_and_shifted(&self, path: &ParamPath, values: &mut [f32], per_channel: usize) {
        let (weight, bias) = (self.named(&path.at("weight")), self.named(&path.at("bias")));
        let channels = weight.values().iter().zip(bias.values()).cycle();
        for (part, (w, b)) in values.chunks_exact_mut(per_channel).zip(channels) {
            for x in part {
                *x = *x * w + b;
            }
        }
    }
}

fn broadcast(shapes: &[&[usize]]) -> Vec<usize> {
    let rank = shapes.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let mut out = vec![1; rank];
    for shape in shapes {
        for (axis, &n) in (rank - shape.len()..).zip(*shape) {
            assert!(n == out[axis] || n == 1 || out[axis] == 1, "{shapes:?} do not broadcast");
            out[axis] = out[axis].max(n);
        }
    }
    out
}

/// Steps through a tensor of shape `own` along each axis of `shape`, 0 where it repeats.
pub(crate) fn repeated(own: &[usize], shape: &[usize]) -> Vec<usize> {
    let missing = shape.len() - own.len();
    let own = strides(own).into_iter().zip(own);
    let own = own.map(|(stride, &n)| if n == 1 { 0 } else { stride });
    std::iter::repeat_n(0, missing).chain(own).collect()
}

/// Appends what `kernel` makes of every row of the broadcast shape.
pub(crate) fn zipped<const N: usize>(
    inputs: [&Tensor; N],
    kernel: impl Fn(&mut Vec<f32>, [&[f32]; N]),
) -> Tensor {
    let shape = broadcast(&inputs.map(Tensor::shape));
    let mut out = Vec::with_capacity(shape.iter().product());
    if inputs.iter().all(|x| x.shape() == shape) {
        kernel(&mut out, inputs.map(Tensor::values));
        return Tensor::new(&shape, out);
    }
    let width = shape.last().copied().unwrap_or(1);
    let steps = inputs.map(|x| repeated(x.shape(), &shape));
    // A value that repeats along a row is written out.
    let mut spread = inputs.map(|_| Vec::new());
    for starts in offsets(&shape, steps.each_ref().map(Vec::as_slice)) {
        for n in 0..N {
            if steps[n].last() == Some(&0) {
                spread[n].clear();
                spread[n].resize(width, inputs[n].values()[starts[n]]);
            }
        }
        let rows = std::array::from_fn(|n| {
            if spread[n].is_empty() {
                &inputs[n].values()[starts[n]..starts[n] + width]
            } else {
                &spread[n][..]
            }
        });
        kernel(&mut out, rows);
    }
    Tensor::new(&shape, out)
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::new(shape, vec![0.0; shape.iter().product()])
}

/// Each value by itself.
fn mapped(x: &Tensor, of: impl Fn(f32) -> f32) -> Tensor {
    Tensor::new(x.shape(), x.values().iter().map(|&x| of(x)).collect())
}

impl Ops for Interpreter<'_> {
    type Tensor = Tensor;

    fn param(&self, path: &ParamPath, _shape: &[usize]) -> Tensor {
        self.named(path).clone()
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::new(shape, values.to_vec())
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> Tensor {
        Tensor::new(shape, values.iter().map(|&n| n as f32).collect())
    }

    fn linear(
        &self,
        path: &ParamPath,
        x: &Tensor,
        _n_in: usize,
        n_out: usize,
        bias: bool,
    ) -> Tensor {
        let weight = Matrix::Panels(self.parameters.named(&path.at("weight")).panels());
        let bias = bias.then(|| self.named(&path.at("bias")).values());
        linear(x, n_out, weight, bias)
    }

    fn conv2d(&self, path: &ParamPath, x: &Tensor, conv: Conv) -> Tensor {
        let &[batch, _, height, width] = x.shape() else { panic!("{path}: {:?}", x.shape()) };
        let [top, left, bottom, right] = conv.padding;
        let side = |n: usize, pad: usize| (n + pad - conv.kernel) / conv.stride + 1;
        let (rows, columns) = (side(height, top + bottom), side(width, left + right));
        let depth = conv.c_in * conv.kernel * conv.kernel;
        // What each cell of the result sees, in the order of the weights: channel, row, column.
        let mut seen = Vec::with_capacity(batch * rows * columns * depth);
        for image in x.values().chunks_exact(conv.c_in * height * width) {
            for cell in 0..rows * columns {
                let (y, x) = (cell / columns * conv.stride, cell % columns * conv.stride);
                for plane in image.chunks_exact(height * width) {
                    for y in (y..y + conv.kernel).map(|y| y.wrapping_sub(top)) {
                        for x in (x..x + conv.kernel).map(|x| x.wrapping_sub(left)) {
                            let inside = y < height && x < width;
                            seen.push(if inside { plane[y * width + x] } else { 0.0 });
                        }
                    }
                }
            }
        }
        let seen = Tensor::new(&[batch, rows, columns, depth], seen);
        self.linear(path, &seen, depth, conv.c_out, conv.bias).permuted(&[0, 3, 1, 2])
    }

    fn gather(&self, table: &Tensor, ids: &Tensor) -> Tensor {
        let row: usize = table.shape()[1..].iter().product();
        let rows = ids.values().iter().flat_map(|&id| &table.values()[id as usize * row..][..row]);
        let shape: Vec<usize> = ids.shape().iter().chain(&table.shape()[1..]).copied().collect();
        Tensor::new(&shape, rows.copied().collect())
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        zipped([a, b], kernels::add)
    }

    fn sub(&self, a: &Tensor, b: &Tensor) -> Tensor {
        zipped([a, b], |out, [a, b]| out.extend(a.iter().zip(b).map(|(a, b)| a - b)))
    }

    fn mul(&self, a: &Tensor, b: &Tensor) -> Tensor {
        zipped([a, b], kernels::mul)
    }

    fn add_product(&self, a: &Tensor, b: &Tensor, c: &Tensor) -> Tensor {
        zipped([a, b, c], kernels::add_product)
    }

    fn affine(&self, x: &Tensor, factor: f64, offset: f64) -> Tensor {
        let (factor, offset) = (factor as f32, offset as f32);
        mapped(x, |x| x * factor + offset)
    }

    fn clamp(&self, ids: &Tensor, low: i64, high: i64) -> Tensor {
        mapped(ids, |id| id.clamp(low as f32, high as f32))
    }

    fn cos(&self, x: &Tensor) -> Tensor {
        mapped(x, f32::cos)
    }

    fn sin(&self, x: &Tensor) -> Tensor {
        mapped(x, f32::sin)
    }

    fn gelu(&self, x: &Tensor, form: Gelu) -> Tensor {
        match form {
            Gelu::Tanh => Tensor::new(x.shape(), kernels::gelu_tanh(x.values())),
            Gelu::Exact => mapped(x, |x| {
                let x = f64::from(x);
                (0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
            }),
        }
    }

    fn sigmoid(&self, x: &Tensor) -> Tensor {
        Tensor::new(x.shape(), kernels::sigmoid(x.values()))
    }

    fn silu(&self, x: &Tensor) -> Tensor {
        Tensor::new(x.shape(), kernels::silu(x.values()))
    }

    fn layer_norm(&self, x: &Tensor, width: usize, affine: Option<&ParamPath>, eps: f64) -> Tensor {
        let mut values = kernels::standardise(x.values(), width, eps as f32);
        if let Some(path) = affine {
            self.scaled_and_shifted(path, &mut values, 1);
        }
        Tensor::new(x.shape(), values)
    }

    fn rms_norm(&self, path: &ParamPath, x: &Tensor, _width: usize, eps: f64) -> Tensor {
        let weight = self.named(&path.at("weight"));
        Tensor::new(x.shape(), kernels::rms_norm(x.values(), weight.values(), eps as f32))
    }

    fn group_norm(
        &self,
        path: &ParamPath,
        x: &Tensor,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> Tensor {
        let cells: usize = x.shape()[2..].iter().product();
        let width = channels / groups * cells;
        let mut values = kernels::standardise(x.values(), width, eps as f32);
        self.scaled_and_shifted(path, &mut values, cells);
        Tensor::new(x.shape(), values)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        scale: f64,
        mask: Mask<'_, Tensor>,
    ) -> Tensor {
        let &[batch, heads, m, width] = q.shape() else { panic!("queries {:?}", q.shape()) };
        let n = k.shape()[2];
        let future = |i: usize| if i % n > i / n { f32::NEG_INFINITY } else { 0.0 };
        let bias = match mask {
            Mask::None => None,
            Mask::Causal => Some(Tensor::new(&[m, n], (0..m * n).map(future).collect())),
            Mask::Bias(bias) => Some(bias.clone()),
        };
        let of_head = |bias: &Tensor| self.add(&zeros(&[batch, heads, m, n]), bias);
        let bias = bias.as_ref().map(of_head);
        let mut out = Vec::with_capacity(q.values().len());
        for head in 0..batch * heads {
            let rows = [(q, m), (k, n), (v, n)]
                .map(|(x, rows)| &x.values()[head * rows * width..][..rows * width]);
            let bias = bias.as_ref().map(|bias| &bias.values()[head * m * n..][..m * n]);
            attention(&mut out, rows, width, scale as f32, bias);
        }
        Tensor::new(q.shape(), out)
    }

    fn rope(&self, x: &Tensor, rope: &Rope<Tensor>) -> Tensor {
        let values = kernels::rotate(x.values(), rope.cos.values(), rope.sin.values());
        Tensor::new(x.shape(), values)
    }

    fn rope_table(
        &self,
        ids: &Tensor,
        axes_dim: &[usize],
        theta: f64,
        _batch: &Tensor,
    ) -> Rope<Tensor> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in ids.values().chunks_exact(ids.width()) {
            for (&id, &dim) in position.iter().zip(axes_dim) {
                for i in 0..dim / 2 {
                    let angle = f64::from(id) * theta.powf(-2.0 * i as f64 / dim as f64);
                    cos.push(angle.cos() as f32);
                    sin.push(angle.sin() as f32);
                }
            }
        }
        let shape = [ids.shape()[0], axes_dim.iter().sum::<usize>() / 2];
        Rope { cos: Tensor::new(&shape, cos), sin: Tensor::new(&shape, sin) }
    }

    fn reshape(&self, x: &Tensor, dims: &[Dim]) -> Tensor {
        let fixed = |(i, dim): (usize, &Dim)| match dim {
            Dim::Keep => x.shape()[i],
            Dim::Is(n) => *n,
            Dim::Infer => 1,
        };
        let known: usize = dims.iter().enumerate().map(fixed).product();
        let size = |(i, dim): (usize, &Dim)| match dim {
            Dim::Infer => x.values().len() / known,
            _ => fixed((i, dim)),
        };
        x.shaped(&dims.iter().enumerate().map(size).collect::<Vec<_>>())
    }

    fn reshape_like(&self, x: &Tensor, like: &Tensor) -> Tensor {
        x.shaped(like.shape())
    }

    fn unsqueeze(&self, x: &Tensor, axis: usize) -> Tensor {
        let mut shape = x.shape().to_vec();
        shape.insert(axis, 1);
        x.shaped(&shape)
    }

    fn permute(&self, x: &Tensor, axes: &[usize]) -> Tensor {
        x.permuted(axes)
    }

    fn concat(&self, parts: &[&Tensor], axis: usize) -> Tensor {
        Tensor::joined(parts, axis)
    }

    fn split(&self, x: &Tensor, n: usize, axis: usize) -> Vec<Tensor> {
        let length = x.shape()[axis] / n;
        (0..n).map(|i| x.narrowed(axis, i * length, length)).collect()
    }

    fn split_after(&self, x: &Tensor, first: &Tensor, axis: usize) -> (Tensor, Tensor) {
        let (length, whole) = (first.shape()[axis], x.shape()[axis]);
        (x.narrowed(axis, 0, length), x.narrowed(axis, length, whole - length))
    }

    fn upsample2(&self, x: &Tensor) -> Tensor {
        let &[batch, channels, height, width] = x.shape() else { panic!("{:?}", x.shape()) };
        let mut values = Vec::with_capacity(4 * x.values().len());
        for row in x.values().chunks_exact(width) {
            for _ in 0..2 {
                values.extend(row.iter().flat_map(|&x| [x, x]));
            }
        }
        Tensor::new(&[batch, channels, 2 * height, 2 * width], values)
    }

    fn positions(&self, x: &Tensor, axis: usize) -> Tensor {
        let n = x.shape()[axis];
        Tensor::new(&[n], (0..n).map(|i| i as f32).collect())
    }

    fn argmax(&self, ids: &Tensor) -> Tensor {
        let first = |row: &[f32]| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            row.iter().position(|&id| id == largest).expect("a row of ids") as f32
        };
        let rows = ids.values().chunks_exact(ids.width()).map(first).collect();
        Tensor::new(&ids.shape()[..1], rows)
    }

    fn first_match(&self, ids: &Tensor, value: i64) -> Tensor {
        let first = |row: &[f32]| row.iter().position(|&id| id == value as f32).unwrap_or(0) as f32;
        let rows = ids.values().chunks_exact(ids.width()).map(first).collect();
        Tensor::new(&ids.shape()[..1], rows)
    }

    fn select_rows(&self, x: &Tensor, index: &Tensor) -> Tensor {
        let &[batch, n, width] = x.shape() else { panic!("{:?}", x.shape()) };
        let rows = index.values().iter().enumerate();
        let rows = rows.flat_map(|(b, &i)| &x.values()[(b * n + i as usize) * width..][..width]);
        Tensor::new(&[batch, width], rows.copied().collect())
    }
}
