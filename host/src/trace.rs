//! A network that is run and then walked back, for its slopes.

use std::cell::RefCell;
use std::sync::LazyLock;

use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};

use crate::attention::attention_slopes;
use crate::interpreter::{Interpreter, repeated, zipped};
use crate::learned::Share;
use crate::parameters::Parameters;
use crate::passage::{Back, Passage, Step, Weights, named};
use crate::product::{Added, Matrix, linear, product};
use crate::tensor::{Tensor, offsets};
use crate::{kernels, slopes};

/// Runs a network on weights that train and remembers its steps. It knows the slopes of what the velocity
/// network does.
///
/// # Panics
/// Where a value that depends on the weights goes through any other operator.
pub struct Trace<'a> {
    source: Source<'a>,
    steps: RefCell<Vec<Step>>,
}

/// What has the values of parameters.
enum Source<'a> {
    Weights(&'a Weights<'a>),
    Parameters(&'a Parameters),
}

/// A value, and the step that made it where it depends on the weights.
#[derive(Clone)]
pub struct Traced {
    value: Tensor,
    step: Option<usize>,
}

/// An input whose values no slope needs.
struct Shape {
    shape: Vec<usize>,
    step: Option<usize>,
}

static NO_PARAMETERS: LazyLock<Parameters> = LazyLock::new(Parameters::default);

impl From<&Tensor> for Traced {
    fn from(value: &Tensor) -> Self {
        Self { value: value.clone(), step: None }
    }
}

impl Shape {
    fn of(x: &Traced) -> Self {
        Self { shape: x.value.shape().to_vec(), step: x.step }
    }
}

impl<'a> Trace<'a> {
    /// A network over `weights`, which hold what its manifest names.
    pub fn new(weights: &'a Weights<'a>) -> Self {
        Self { source: Source::Weights(weights), steps: RefCell::default() }
    }

    /// The same, over what an [`Interpreter`] reads.
    pub fn over(parameters: &'a Parameters) -> Self {
        Self { source: Source::Parameters(parameters), steps: RefCell::default() }
    }

    /// The way to `y`.
    pub fn passage(self, y: &Traced) -> Passage {
        Passage { steps: self.steps.into_inner(), value: y.value.clone(), last: y.step }
    }

    fn values(&self, path: &ParamPath) -> &'a [f32] {
        match self.source {
            Source::Weights(weights) => named(weights, path),
            Source::Parameters(parameters) => parameters.named(path).tensor.values(),
        }
    }

    fn matrix(&self, path: &ParamPath) -> Matrix<'a> {
        match self.source {
            Source::Weights(weights) => Matrix::Rows(named(weights, path)),
            Source::Parameters(parameters) => Matrix::Panels(parameters.named(path).panels()),
        }
    }

    /// A value that depends on the weights.
    fn step(
        &self,
        value: Tensor,
        step: impl FnOnce(Vec<f32>, &mut Back<'_>) + Send + 'static,
    ) -> Traced {
        let mut steps = self.steps.borrow_mut();
        steps.push(Box::new(step));
        Traced { value, step: Some(steps.len() - 1) }
    }

    /// A value of `x` alone.
    fn of_one(
        &self,
        x: &Traced,
        value: Tensor,
        slope: impl FnOnce(Vec<f32>) -> Vec<f32> + Send + 'static,
    ) -> Traced {
        let Some(of_x) = x.step else { return Traced { value, step: None } };
        self.step(value, move |dy, back| back.reach(Some(of_x), slope(dy)))
    }

    /// Entries from `from` on along `axis` of `x`.
    fn narrowed(&self, x: &Traced, axis: usize, from: usize, length: usize) -> Traced {
        let value = x.value.narrowed(axis, from, length);
        let shape = x.value.shape().to_vec();
        let Some(of_x) = x.step else { return Traced { value, step: None } };
        self.step(value, move |dy, back| {
            let inner: usize = shape[axis + 1..].iter().product();
            let (whole, part) = (shape[axis] * inner, length * inner);
            let sums = back.sums(of_x, shape.iter().product());
            for (sums, dy) in sums.chunks_exact_mut(whole).zip(dy.chunks_exact(part)) {
                let sums = &mut sums[from * inner..][..part];
                sums.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
            }
        })
    }
}

fn plain() -> Interpreter<'static> {
    Interpreter::new(&NO_PARAMETERS)
}

/// A value that every weight leaves as it is.
fn constant<const N: usize>(inputs: [&Traced; N], value: Tensor) -> Traced {
    assert!(inputs.iter().all(|x| x.step.is_none()), "an operator without slopes");
    Traced { value, step: None }
}

/// Sums over the axes along which `shape` repeated.
fn summed(dy: Tensor, shape: &[usize]) -> Vec<f32> {
    if dy.shape() == shape {
        return dy.into_values();
    }
    let steps = repeated(shape, dy.shape());
    let (width, is_one) = (dy.width(), steps.last() == Some(&0));
    let mut sums = vec![0.0; shape.iter().product()];
    for (dy, [at]) in dy.values().chunks_exact(width).zip(offsets(dy.shape(), [&steps])) {
        if is_one {
            sums[at] += kernels::sum(dy, |dy| dy);
        } else {
            sums[at..at + width].iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
    }
    sums
}

/// Part `index` of `n` equal ones.
fn part(x: &[f32], index: usize, n: usize) -> &[f32] {
    let length = x.len() / n;
    &x[index * length..][..length]
}

/// The product with the slopes of a function, in place.
fn times(mut dy: Vec<f32>, slopes: impl FnOnce(&mut [f32])) -> Vec<f32> {
    slopes(&mut dy);
    dy
}

impl Ops for Trace<'_> {
    type Tensor = Traced;

    fn param(&self, path: &ParamPath, _shape: &[usize]) -> Traced {
        panic!("{path}: an operator without slopes")
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Traced {
        constant([], plain().floats(values, shape))
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> Traced {
        constant([], plain().integers(values, shape))
    }

    fn linear(
        &self,
        path: &ParamPath,
        x: &Traced,
        n_in: usize,
        n_out: usize,
        bias: bool,
    ) -> Traced {
        let (weight, of_bias) = (path.at("weight"), path.at("bias"));
        let bias_values = bias.then(|| self.values(&of_bias));
        let y = linear(&x.value, n_out, self.matrix(&weight), bias_values);
        let Traced { value: x, step } = x.clone();
        self.step(y, move |dy, back| {
            if step.is_some() {
                let (w, mut dx) = (back.weight(&weight), vec![0.0; x.values().len()]);
                product(&mut dx, &dy, n_out, Matrix::Columns(w), Added::Zero, n_in);
                back.reach(step, dx);
            }
            let dy = Tensor::new(&[dy.len() / n_out, n_out], dy);
            if bias {
                back.keep(&of_bias, Share::Rows(dy.clone()));
            }
            back.keep(&weight, Share::Product { dy, x });
        })
    }

    fn conv2d(&self, path: &ParamPath, _x: &Traced, _conv: Conv) -> Traced {
        panic!("{path}: an operator without slopes")
    }

    fn gather(&self, table: &Traced, ids: &Traced) -> Traced {
        constant([table, ids], plain().gather(&table.value, &ids.value))
    }

    fn add(&self, a: &Traced, b: &Traced) -> Traced {
        let value = plain().add(&a.value, &b.value);
        if a.step.or(b.step).is_none() {
            return Traced { value, step: None };
        }
        let (shape, inputs) = (value.shape().to_vec(), [a, b].map(Shape::of));
        self.step(value, move |dy, back| {
            let dy = Tensor::new(&shape, dy);
            for input in inputs.iter().filter(|input| input.step.is_some()) {
                back.reach(input.step, summed(dy.clone(), &input.shape));
            }
        })
    }

    fn sub(&self, a: &Traced, b: &Traced) -> Traced {
        constant([a, b], plain().sub(&a.value, &b.value))
    }

    fn mul(&self, a: &Traced, b: &Traced) -> Traced {
        constant([a, b], plain().mul(&a.value, &b.value))
    }

    fn add_product(&self, a: &Traced, b: &Traced, c: &Traced) -> Traced {
        let value = plain().add_product(&a.value, &b.value, &c.value);
        if a.step.or(b.step).or(c.step).is_none() {
            return Traced { value, step: None };
        }
        let (shape, of_a, b, c) = (value.shape().to_vec(), Shape::of(a), b.clone(), c.clone());
        self.step(value, move |dy, back| {
            let dy = Tensor::new(&shape, dy);
            for (input, other) in [(&b, &c), (&c, &b)] {
                if input.step.is_some() {
                    let dx = zipped([&dy, &other.value], kernels::mul);
                    back.reach(input.step, summed(dx, input.value.shape()));
                }
            }
            if of_a.step.is_some() {
                back.reach(of_a.step, summed(dy, &of_a.shape));
            }
        })
    }

    fn affine(&self, x: &Traced, factor: f64, offset: f64) -> Traced {
        let value = plain().affine(&x.value, factor, offset);
        self.of_one(x, value, move |dy| {
            times(dy, |dy| dy.iter_mut().for_each(|dy| *dy *= factor as f32))
        })
    }

    fn clamp(&self, ids: &Traced, low: i64, high: i64) -> Traced {
        constant([ids], plain().clamp(&ids.value, low, high))
    }

    fn cos(&self, x: &Traced) -> Traced {
        constant([x], plain().cos(&x.value))
    }

    fn sin(&self, x: &Traced) -> Traced {
        constant([x], plain().sin(&x.value))
    }

    fn gelu(&self, x: &Traced, form: Gelu) -> Traced {
        let value = plain().gelu(&x.value, form);
        let Gelu::Tanh = form else { return constant([x], value) };
        let inner = x.value.clone();
        self.of_one(x, value, move |dy| times(dy, |dy| slopes::gelu_tanh(dy, inner.values())))
    }

    fn sigmoid(&self, x: &Traced) -> Traced {
        constant([x], plain().sigmoid(&x.value))
    }

    fn silu(&self, x: &Traced) -> Traced {
        let inner = x.value.clone();
        self.of_one(x, plain().silu(&x.value), move |dy| {
            times(dy, |dy| slopes::silu(dy, inner.values()))
        })
    }

    fn layer_norm(&self, x: &Traced, width: usize, affine: Option<&ParamPath>, eps: f64) -> Traced {
        assert!(affine.is_none(), "an operator without slopes");
        let (value, inner) = (plain().layer_norm(&x.value, width, None, eps), x.value.clone());
        self.of_one(x, value, move |dy| {
            times(dy, |dy| slopes::standardise(dy, inner.values(), width, eps as f32))
        })
    }

    fn rms_norm(&self, path: &ParamPath, x: &Traced, width: usize, eps: f64) -> Traced {
        let path = path.at("weight");
        let eps = eps as f32;
        let y = kernels::rms_norm(x.value.values(), self.values(&path), eps);
        let Traced { value: x, step } = x.clone();
        self.step(Tensor::new(x.shape(), y), move |mut dy, back| {
            let mut of_weight = vec![0.0; width];
            slopes::rms_norm(&mut dy, &mut of_weight, x.values(), back.weight(&path), eps);
            back.keep(&path, Share::Rows(Tensor::new(&[1, width], of_weight)));
            back.reach(step, dy);
        })
    }

    fn group_norm(
        &self,
        path: &ParamPath,
        _x: &Traced,
        _groups: usize,
        _channels: usize,
        _eps: f64,
    ) -> Traced {
        panic!("{path}: an operator without slopes")
    }

    fn attention(
        &self,
        q: &Traced,
        k: &Traced,
        v: &Traced,
        scale: f64,
        mask: Mask<'_, Traced>,
    ) -> Traced {
        assert!(matches!(mask, Mask::None), "an operator without slopes");
        let inputs = [q, k, v].map(|x| x.value.clone());
        let [q_in, k_in, v_in] = &inputs;
        let value = plain().attention(q_in, k_in, v_in, scale, Mask::None);
        let (steps, width) = ([q.step, k.step, v.step], q_in.width());
        let n_heads = q_in.shape()[0] * q_in.shape()[1];
        self.step(value, move |dy, back| {
            let mut reached = inputs.each_ref().map(|x| Vec::with_capacity(x.values().len()));
            for head in 0..n_heads {
                let rows = inputs.each_ref().map(|x| part(x.values(), head, n_heads));
                let of_head = part(&dy, head, n_heads);
                let slopes = attention_slopes(of_head, rows, width, scale as f32);
                for (reached, slopes) in reached.iter_mut().zip(slopes) {
                    reached.extend(slopes);
                }
            }
            for (step, reached) in steps.into_iter().zip(reached) {
                back.reach(step, reached);
            }
        })
    }

    fn rope(&self, x: &Traced, rope: &Rope<Traced>) -> Traced {
        let table = Rope { cos: rope.cos.value.clone(), sin: rope.sin.value.clone() };
        let value = plain().rope(&x.value, &table);
        self.of_one(x, value, move |dy| {
            let back: Vec<f32> = table.sin.values().iter().map(|sin| -sin).collect();
            kernels::rotate(&dy, table.cos.values(), &back)
        })
    }

    fn rope_table(
        &self,
        ids: &Traced,
        axes_dim: &[usize],
        theta: f64,
        batch: &Traced,
    ) -> Rope<Traced> {
        let table = plain().rope_table(&ids.value, axes_dim, theta, &batch.value);
        Rope { cos: (&table.cos).into(), sin: (&table.sin).into() }
    }

    fn reshape(&self, x: &Traced, dims: &[Dim]) -> Traced {
        Traced { value: plain().reshape(&x.value, dims), step: x.step }
    }

    fn reshape_like(&self, x: &Traced, like: &Traced) -> Traced {
        Traced { value: plain().reshape_like(&x.value, &like.value), step: x.step }
    }

    fn unsqueeze(&self, x: &Traced, axis: usize) -> Traced {
        Traced { value: plain().unsqueeze(&x.value, axis), step: x.step }
    }

    fn permute(&self, x: &Traced, axes: &[usize]) -> Traced {
        let value = x.value.permuted(axes);
        let (shape, mut back) = (value.shape().to_vec(), vec![0; axes.len()]);
        axes.iter().enumerate().for_each(|(to, &from)| back[from] = to);
        self.of_one(x, value, move |dy| Tensor::new(&shape, dy).permuted(&back).into_values())
    }

    fn concat(&self, parts: &[&Traced], axis: usize) -> Traced {
        let values: Vec<&Tensor> = parts.iter().map(|part| &part.value).collect();
        let value = Tensor::joined(&values, axis);
        if parts.iter().all(|part| part.step.is_none()) {
            return Traced { value, step: None };
        }
        let (shape, parts) = (value.shape().to_vec(), parts.iter().map(|x| Shape::of(x)));
        let parts: Vec<Shape> = parts.collect();
        self.step(value, move |dy, back| {
            let dy = Tensor::new(&shape, dy);
            let mut from = 0;
            for part in parts {
                let length = part.shape[axis];
                back.reach(part.step, dy.narrowed(axis, from, length).into_values());
                from += length;
            }
        })
    }

    fn split(&self, x: &Traced, n: usize, axis: usize) -> Vec<Traced> {
        let length = x.value.shape()[axis] / n;
        (0..n).map(|i| self.narrowed(x, axis, i * length, length)).collect()
    }

    fn split_after(&self, x: &Traced, first: &Traced, axis: usize) -> (Traced, Traced) {
        let (length, whole) = (first.value.shape()[axis], x.value.shape()[axis]);
        (self.narrowed(x, axis, 0, length), self.narrowed(x, axis, length, whole - length))
    }

    fn upsample2(&self, x: &Traced) -> Traced {
        constant([x], plain().upsample2(&x.value))
    }

    fn positions(&self, x: &Traced, axis: usize) -> Traced {
        constant([], plain().positions(&x.value, axis))
    }

    fn argmax(&self, ids: &Traced) -> Traced {
        constant([ids], plain().argmax(&ids.value))
    }

    fn first_match(&self, ids: &Traced, value: i64) -> Traced {
        constant([ids], plain().first_match(&ids.value, value))
    }

    fn select_rows(&self, x: &Traced, index: &Traced) -> Traced {
        constant([x, index], plain().select_rows(&x.value, &index.value))
    }
}
