//! Each operator of a network as ONNX nodes.

use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};

use super::{Builder, Kind, Parameter, Value};
use crate::element::Float;
use crate::precision::Storage;
use crate::proto::{AttributeProto as Attribute, element};

/// Largest number of f16.
const F16_MAX: f64 = 65504.0;

impl Builder {
    pub(super) fn ints(&self, values: &[i64]) -> Value {
        self.integers(values, &[values.len()])
    }

    pub(super) fn doubles(&self, values: &[f64]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::Double, bytes, &[values.len()])
    }

    /// A number that broadcasts against values of `kind`.
    pub(super) fn scalar(&self, kind: Kind, value: f64) -> Value {
        let bytes = match kind {
            Kind::Float(float) => float.bytes(&[value as f32]),
            Kind::Double => value.to_le_bytes().to_vec(),
            Kind::Integer | Kind::Code => (value as i64).to_le_bytes().to_vec(),
        };
        self.constant(kind, bytes, &[])
    }

    /// `x` as `kind`; the axes stay as they are, and a constant is converted here.
    pub(super) fn cast(&self, x: Value, kind: Kind) -> Value {
        if x.kind == kind {
            return x;
        }
        if let Kind::Float(float) = kind
            && let Some((values, shape)) = self.constant_floats(x)
        {
            return self.constant(kind, float.bytes(&values), &shape);
        }
        self.node_cast(x, kind)
    }

    /// The same by a node, if one is needed.
    pub(super) fn node_cast(&self, x: Value, kind: Kind) -> Value {
        if x.kind == kind {
            return x;
        }
        let to = vec![Attribute::int("to", kind.element().into())];
        Value { heads: x.heads, swapped: x.swapped, ..self.node("Cast", &[x.raw()], to, kind) }
    }

    /// Values and shape of a constant of f32.
    fn constant_floats(&self, x: Value) -> Option<(Vec<f32>, Vec<usize>)> {
        let state = self.state.borrow();
        let tensor = state.constant_tensor(x).filter(|_| x.kind == Kind::Float(Float::F32))?;
        let shape = tensor.dims.iter().map(|&n| n as usize).collect();
        let bytes = tensor.raw_data.as_ref()?.chunks_exact(size_of::<f32>());
        Some((bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(), shape))
    }

    /// A float as f32.
    pub(super) fn wide(&self, x: Value) -> Value {
        match x.kind {
            Kind::Float(_) => self.cast(x, Kind::Float(Float::F32)),
            _ => x,
        }
    }

    /// Type of activations.
    pub(super) fn arithmetic(&self) -> Kind {
        Kind::Float(self.dialect.arithmetic)
    }

    /// A float parameter that arithmetic in `float` reads.
    pub(super) fn float_parameter(&self, path: &ParamPath, shape: &[usize], float: Float) -> Value {
        // What arithmetic in f32 needs in a graph of f16 is stored so; bf16 has the range of f32.
        let is_wider = float == Float::F32 && self.dialect.stored == Float::F16;
        let stored = if is_wider { float } else { self.dialect.stored };
        let parameter = Parameter {
            name: path.as_str().to_owned(),
            shape: shape.to_vec(),
            storage: Storage::Plain(stored),
            scale: float,
            transposed: false,
            whole_scale: false,
        };
        let value = self.parameter(parameter, Kind::Float(stored));
        self.node_cast(value, Kind::Float(float))
    }

    /// A residual stream, which in f16 may leave the type's range: limited to it, as diffusers does.
    pub fn limited(&self, x: &Value) -> Value {
        if x.kind != Kind::Float(Float::F16) {
            return *x;
        }
        let limits = [-F16_MAX, F16_MAX].map(|limit| self.scalar(x.kind, limit));
        self.node("Clip", &[*x, limits[0], limits[1]], vec![], x.kind)
    }

    /// The size of `x` along `axis`, `[1]`.
    pub(super) fn size(&self, x: Value, axis: usize) -> Value {
        let axis = axis as i64;
        let ends = vec![Attribute::int("start", axis), Attribute::int("end", axis + 1)];
        self.node("Shape", &[x], ends, Kind::Integer)
    }

    /// First position of the largest entry of each row of `ids` `[B, S]`: `[B]`. Kernels for 64-bit
    /// integers are rare; 32 bits hold every vocabulary.
    fn first_largest(&self, ids: Value) -> Value {
        let to = vec![Attribute::int("to", element::INT32.into())];
        let narrow = self.node("Cast", &[ids], to, Kind::Integer);
        let along = vec![Attribute::int("axis", 1), Attribute::int("keepdims", 0)];
        self.node("ArgMax", &[narrow], along, Kind::Integer)
    }

    /// Both as the wider of their types; constants take the type of the other.
    fn alike(&self, a: Value, b: Value) -> (Value, Value) {
        let (Kind::Float(of_a), Kind::Float(of_b)) = (a.kind, b.kind) else { return (a, b) };
        let is_constant = |x: Value| self.state.borrow().constant_tensor(x).is_some();
        let kind = match (is_constant(a), is_constant(b)) {
            (true, false) => b.kind,
            (false, true) => a.kind,
            _ => Kind::Float(of_a.max(of_b)),
        };
        (self.cast(a, kind), self.cast(b, kind))
    }

    pub(super) fn binary(&self, op: &'static str, a: Value, b: Value) -> Value {
        let (a, b) = self.alike(a, b);
        self.node(op, &[a, b], vec![], a.kind)
    }

    pub(super) fn unary(&self, op: &'static str, x: Value) -> Value {
        self.node(op, &[x], vec![], x.kind)
    }
}

impl Ops for Builder {
    type Tensor = Value;

    fn param(&self, path: &ParamPath, shape: &[usize]) -> Value {
        self.float_parameter(path, shape, self.dialect.arithmetic)
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Value {
        self.constant(Kind::Float(Float::F32), Float::F32.bytes(values), shape)
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::Integer, bytes, shape)
    }

    fn linear(&self, path: &ParamPath, x: &Value, n_in: usize, n_out: usize, bias: bool) -> Value {
        self.product(path, *x, [n_in, n_out], bias)
    }

    fn conv2d(&self, path: &ParamPath, x: &Value, conv: Conv) -> Value {
        let Conv { c_in, c_out, kernel, stride, padding, bias } = conv;
        let weight = self.param(&path.at("weight"), &[c_out, c_in, kernel, kernel]);
        let mut inputs = vec![self.cast(*x, self.arithmetic()), weight];
        if bias {
            inputs.push(self.param(&path.at("bias"), &[c_out]));
        }
        let attributes = vec![
            Attribute::ints("kernel_shape", [kernel; 2]),
            Attribute::ints("strides", [stride; 2]),
            Attribute::ints("pads", padding),
        ];
        self.node_at(path.as_str(), "Conv", &inputs, attributes)
    }

    fn gather(&self, table: &Value, ids: &Value) -> Value {
        self.node("Gather", &[*table, *ids], vec![Attribute::int("axis", 0)], table.kind)
    }

    fn add(&self, a: &Value, b: &Value) -> Value {
        self.binary("Add", *a, *b)
    }

    fn sub(&self, a: &Value, b: &Value) -> Value {
        self.binary("Sub", *a, *b)
    }

    fn mul(&self, a: &Value, b: &Value) -> Value {
        self.binary("Mul", *a, *b)
    }

    #[expect(clippy::float_cmp, reason = "only exactly 1 and 0 change nothing")]
    fn affine(&self, x: &Value, factor: f64, offset: f64) -> Value {
        let mut y = *x;
        if factor != 1.0 {
            y = self.binary("Mul", y, self.scalar(x.kind, factor));
        }
        if offset != 0.0 {
            y = self.binary("Add", y, self.scalar(x.kind, offset));
        }
        y
    }

    fn clamp(&self, ids: &Value, low: i64, high: i64) -> Value {
        let (low, high) = (self.integers(&[low], &[]), self.integers(&[high], &[]));
        self.node("Clip", &[*ids, low, high], vec![], ids.kind)
    }

    fn cos(&self, x: &Value) -> Value {
        self.unary("Cos", *x)
    }

    fn sin(&self, x: &Value) -> Value {
        self.unary("Sin", *x)
    }

    fn gelu(&self, x: &Value, form: Gelu) -> Value {
        self.gelu_of(*x, form)
    }

    fn sigmoid(&self, x: &Value) -> Value {
        self.unary("Sigmoid", *x)
    }

    fn silu(&self, x: &Value) -> Value {
        self.mul(x, &self.sigmoid(x))
    }

    fn layer_norm(&self, x: &Value, width: usize, affine: Option<&ParamPath>, eps: f64) -> Value {
        self.layer_norm_of(*x, width, affine, eps)
    }

    fn rms_norm(&self, path: &ParamPath, x: &Value, width: usize, eps: f64) -> Value {
        self.rms_norm_of(path, *x, width, eps)
    }

    fn group_norm(
        &self,
        path: &ParamPath,
        x: &Value,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> Value {
        self.group_norm_of(path, *x, groups, channels, eps)
    }

    fn attention(
        &self,
        q: &Value,
        k: &Value,
        v: &Value,
        scale: f64,
        mask: Mask<'_, Value>,
    ) -> Value {
        self.attention_of([*q, *k, *v], scale, mask)
    }

    fn rope(&self, x: &Value, rope: &Rope<Value>) -> Value {
        self.rotated(*x, rope)
    }

    fn rope_table(
        &self,
        ids: &Value,
        axes_dim: &[usize],
        theta: f64,
        batch: &Value,
    ) -> Rope<Value> {
        self.rotations(*ids, axes_dim, theta, *batch)
    }

    fn reshape(&self, x: &Value, dims: &[Dim]) -> Value {
        let dims: Vec<_> = dims
            .iter()
            .map(|dim| match dim {
                Dim::Keep => 0,
                Dim::Infer => -1,
                Dim::Is(n) => *n as i64,
            })
            .collect();
        self.reshaped(*x, &dims)
    }

    fn reshape_like(&self, x: &Value, like: &Value) -> Value {
        let shape = self.node("Shape", &[*like], vec![], Kind::Integer);
        self.node("Reshape", &[*x, shape], vec![], x.kind)
    }

    fn unsqueeze(&self, x: &Value, axis: usize) -> Value {
        let y = self.node("Unsqueeze", &[*x, self.ints(&[axis as i64])], vec![], x.kind);
        // Tokens under one head.
        Value { heads: usize::from(axis == 1), ..y }
    }

    fn permute(&self, x: &Value, axes: &[usize]) -> Value {
        if axes == [0, 2, 1, 3] {
            return Value { swapped: !x.swapped, ..*x };
        }
        let order = vec![Attribute::ints("perm", axes.iter().copied())];
        self.node("Transpose", &[*x], order, x.kind)
    }

    fn concat(&self, parts: &[&Value], axis: usize) -> Value {
        let first = *parts[0];
        let is_swapped = parts.iter().all(|part| part.swapped);
        let axis = if is_swapped && (axis == 1 || axis == 2) { 3 - axis } else { axis };
        let inputs: Vec<_> = parts
            .iter()
            .map(|part| self.cast(if is_swapped { part.raw() } else { **part }, first.kind))
            .collect();
        let axis = vec![Attribute::int("axis", axis as i64)];
        let joined = self.node("Concat", &inputs, axis, first.kind);
        Value { heads: first.heads, swapped: is_swapped, ..joined }
    }

    fn split(&self, x: &Value, n: usize, axis: usize) -> Vec<Value> {
        let attributes =
            vec![Attribute::int("axis", axis as i64), Attribute::int("num_outputs", n as i64)];
        self.nodes(None, "Split", &[Some(*x)], attributes, x.kind, n)
    }

    fn split_after(&self, x: &Value, first: &Value, axis: usize) -> (Value, Value) {
        let (start, end) = (self.ints(&[0]), self.ints(&[i64::MAX]));
        let (at, axis) = (self.size(*first, axis), self.ints(&[axis as i64]));
        let slice = |from, to| self.node("Slice", &[*x, from, to, axis], vec![], x.kind);
        (slice(start, at), slice(at, end))
    }

    fn upsample2(&self, x: &Value) -> Value {
        let attributes = vec![
            Attribute::text("mode", "nearest"),
            Attribute::text("coordinate_transformation_mode", "asymmetric"),
            Attribute::text("nearest_mode", "floor"),
        ];
        let scales = self.floats(&[1.0, 1.0, 2.0, 2.0], &[4]);
        let inputs = [Some(*x), None, Some(scales)];
        self.nodes(None, "Resize", &inputs, attributes, x.kind, 1)[0]
    }

    fn positions(&self, x: &Value, axis: usize) -> Value {
        let n = self.unary("Squeeze", self.size(*x, axis));
        let (start, step) = (self.integers(&[0], &[]), self.integers(&[1], &[]));
        self.node("Range", &[start, n, step], vec![], Kind::Integer)
    }

    fn argmax(&self, ids: &Value) -> Value {
        self.first_largest(*ids)
    }

    fn first_match(&self, ids: &Value, value: i64) -> Value {
        let equal = self.node("Equal", &[*ids, self.integers(&[value], &[])], vec![], ids.kind);
        self.first_largest(equal)
    }

    fn select_rows(&self, x: &Value, index: &Value) -> Value {
        let index = self.unsqueeze(index, 1);
        self.node("GatherND", &[*x, index], vec![Attribute::int("batch_dims", 1)], x.kind)
    }
}
