//! Each operator of a network as standard ONNX nodes.

use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath, Rope};

use super::{Builder, Kind, Value};
use crate::proto::{AttributeProto as Attribute, element};

impl Builder {
    fn ints(&self, values: &[i64]) -> Value {
        self.integers(values, &[values.len()])
    }

    fn doubles(&self, values: &[f64]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::Double, bytes, &[values.len()])
    }

    /// A number that broadcasts against values of `kind`.
    fn scalar(&self, kind: Kind, value: f64) -> Value {
        let bytes = match kind {
            Kind::Float => (value as f32).to_le_bytes().to_vec(),
            Kind::Double => value.to_le_bytes().to_vec(),
            Kind::Integer => (value as i64).to_le_bytes().to_vec(),
        };
        self.constant(kind, bytes, &[])
    }

    fn cast(&self, x: Value, kind: Kind) -> Value {
        self.node("Cast", &[x], vec![Attribute::int("to", kind.element().into())], kind)
    }

    /// The size of `x` along `axis`, `[1]`.
    fn size(&self, x: Value, axis: usize) -> Value {
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

    fn binary(&self, op: &'static str, a: Value, b: Value) -> Value {
        self.node(op, &[a, b], vec![], a.kind)
    }

    fn unary(&self, op: &'static str, x: Value) -> Value {
        self.node(op, &[x], vec![], x.kind)
    }
}

impl Ops for Builder {
    type Tensor = Value;

    fn param(&self, path: &ParamPath, shape: &[usize]) -> Value {
        self.parameter(path.as_str(), shape, false)
    }

    fn floats(&self, values: &[f32], shape: &[usize]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::Float, bytes, shape)
    }

    fn integers(&self, values: &[i64], shape: &[usize]) -> Value {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(Kind::Integer, bytes, shape)
    }

    /// A product and a sum, for inputs of any rank. The matrix is stored as `[n_in, n_out]`: ONNX
    /// Runtime multiplies by it as it is, where a `Transpose` would be folded into a second copy of
    /// every weight when a session opens.
    fn linear(&self, path: &ParamPath, x: &Value, n_in: usize, n_out: usize, bias: bool) -> Value {
        let weight = self.parameter(path.at("weight").as_str(), &[n_out, n_in], true);
        let product = self.node_at(path.as_str(), "MatMul", &[*x, weight], vec![]);
        if !bias {
            return product;
        }
        let bias = self.param(&path.at("bias"), &[n_out]);
        self.node_at(path.as_str(), "Add", &[product, bias], vec![])
    }

    fn conv2d(&self, path: &ParamPath, x: &Value, conv: Conv) -> Value {
        let Conv { c_in, c_out, kernel, stride, padding, bias } = conv;
        let mut inputs = vec![*x, self.param(&path.at("weight"), &[c_out, c_in, kernel, kernel])];
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
        let form = match form {
            Gelu::Exact => "none",
            Gelu::Tanh => "tanh",
        };
        self.node("Gelu", &[*x], vec![Attribute::text("approximate", form)], x.kind)
    }

    fn sigmoid(&self, x: &Value) -> Value {
        self.unary("Sigmoid", *x)
    }

    fn silu(&self, x: &Value) -> Value {
        self.mul(x, &self.sigmoid(x))
    }

    fn layer_norm(&self, x: &Value, width: usize, affine: Option<&ParamPath>, eps: f64) -> Value {
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
        if let Some(path) = affine {
            let weight = self.param(&path.at("weight"), &[width]);
            let bias = self.param(&path.at("bias"), &[width]);
            self.node_at(path.as_str(), "LayerNormalization", &[*x, weight, bias], attributes)
        } else {
            let ones = self.floats(&vec![1.0; width], &[width]);
            self.node("LayerNormalization", &[*x, ones], attributes, x.kind)
        }
    }

    fn rms_norm(&self, path: &ParamPath, x: &Value, width: usize, eps: f64) -> Value {
        let weight = self.param(&path.at("weight"), &[width]);
        let attributes = vec![Attribute::int("axis", -1), Attribute::float("epsilon", eps)];
        self.node_at(path.as_str(), "RMSNormalization", &[*x, weight], attributes)
    }

    fn group_norm(
        &self,
        path: &ParamPath,
        x: &Value,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> Value {
        let weight = self.param(&path.at("weight"), &[channels]);
        let bias = self.param(&path.at("bias"), &[channels]);
        let groups = Attribute::int("num_groups", groups as i64);
        let attributes = vec![groups, Attribute::float("epsilon", eps)];
        self.node_at(path.as_str(), "GroupNormalization", &[*x, weight, bias], attributes)
    }

    fn attention(
        &self,
        q: &Value,
        k: &Value,
        v: &Value,
        scale: f64,
        mask: Mask<'_, Value>,
    ) -> Value {
        let mut inputs = vec![*q, *k, *v];
        let mut attributes = vec![Attribute::float("scale", scale)];
        match mask {
            Mask::None => {}
            Mask::Causal => attributes.push(Attribute::int("is_causal", 1)),
            Mask::Bias(bias) => inputs.push(*bias),
        }
        self.node("Attention", &inputs, attributes, q.kind)
    }

    fn rope(&self, x: &Value, rope: &Rope<Value>) -> Value {
        let pairs = vec![Attribute::int("interleaved", 1)];
        self.node("RotaryEmbedding", &[*x, rope.cos, rope.sin], pairs, x.kind)
    }

    fn rope_table(
        &self,
        ids: &Value,
        axes_dim: &[usize],
        theta: f64,
        batch: &Value,
    ) -> Rope<Value> {
        let angles =
            || axes_dim.iter().enumerate().flat_map(|(a, &d)| (0..d / 2).map(move |i| (a, i, d)));
        let axes: Vec<_> = angles().map(|(a, _, _)| a as i64).collect();
        let frequencies: Vec<_> =
            angles().map(|(_, i, d)| 1.0 / theta.powf((2 * i) as f64 / d as f64)).collect();
        let ids = self.cast(*ids, Kind::Double);
        let by_angle = vec![Attribute::int("axis", 1)];
        let ids = self.node("Gather", &[ids, self.ints(&axes)], by_angle, Kind::Double);
        let angle = self.mul(&ids, &self.doubles(&frequencies));
        let first = vec![Attribute::int("axis", 0)];
        let sizes = [self.size(*batch, 0), self.ints(&[1, 1])];
        let shape = self.node("Concat", &sizes, first, Kind::Integer);
        let table = |x: Value| {
            let x = self.cast(x, Kind::Float);
            self.node("Expand", &[x, shape], vec![], Kind::Float)
        };
        Rope { cos: table(self.cos(&angle)), sin: table(self.sin(&angle)) }
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
        self.node("Reshape", &[*x, self.ints(&dims)], vec![], x.kind)
    }

    fn reshape_like(&self, x: &Value, like: &Value) -> Value {
        let shape = self.node("Shape", &[*like], vec![], Kind::Integer);
        self.node("Reshape", &[*x, shape], vec![], x.kind)
    }

    fn unsqueeze(&self, x: &Value, axis: usize) -> Value {
        self.node("Unsqueeze", &[*x, self.ints(&[axis as i64])], vec![], x.kind)
    }

    fn permute(&self, x: &Value, axes: &[usize]) -> Value {
        let order = vec![Attribute::ints("perm", axes.iter().copied())];
        self.node("Transpose", &[*x], order, x.kind)
    }

    fn concat(&self, parts: &[&Value], axis: usize) -> Value {
        let inputs: Vec<_> = parts.iter().map(|&&part| part).collect();
        let axis = vec![Attribute::int("axis", axis as i64)];
        self.node("Concat", &inputs, axis, inputs[0].kind)
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
