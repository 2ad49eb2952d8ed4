//! Products with weights.

use flow::ops::{Ops, ParamPath};

use super::{Builder, Kind, Parameter, SCALE, Size, Slot, Value, port};
use crate::element::Float;
use crate::precision::{Code, Storage};
use crate::proto::{AttributeProto as Attribute, TensorProto, element};
use crate::target::{Product, Quantised};

/// Numbers that share a scale where one scale is meant for a matrix but the operator knows blocks only.
const WHOLE: usize = 128;

/// A layer: `[n_out, n_in]` weights at `path`.
struct Layer<'a> {
    path: &'a ParamPath,
    n_in: usize,
    n_out: usize,
    /// Type it is computed in.
    float: Float,
}

impl Builder {
    /// `x·Wᵀ (+ b)`, with the layer's slot for adapters where it has one.
    pub(super) fn product(
        &self,
        path: &ParamPath,
        x: Value,
        [n_in, n_out]: [usize; 2],
        has_bias: bool,
    ) -> Value {
        let layer = Layer { path, n_in, n_out, float: self.dialect.product(path.as_str()) };
        let x = self.cast(x, Kind::Float(layer.float));
        let bias = has_bias.then(|| self.float_parameter(&path.at("bias"), &[n_out], layer.float));
        match self.dialect.layer(path.as_str(), n_out) {
            Storage::Plain(_) => self.plain(&layer, x, bias),
            Storage::Coded { code, block } => {
                let y = match self.dialect.table.quantised {
                    Quantised::Fused => self.fused(&layer, x, bias, code, block),
                    Quantised::Dequantised => self.dequantised(&layer, x, bias, code, block),
                };
                self.with_slot(&layer, x, y)
            }
        }
    }

    fn plain(&self, layer: &Layer<'_>, x: Value, bias: Option<Value>) -> Value {
        let (path, shape) = (layer.path, [layer.n_out, layer.n_in]);
        let weight = self.float_parameter(&path.at("weight"), &shape, layer.float);
        if self.dialect.table.product == Product::MatMul {
            let order = vec![Attribute::ints("perm", [1, 0])];
            let turned = self.node("Transpose", &[weight], order, weight.kind);
            let y = self.node_at(path.as_str(), "MatMul", &[x, turned], vec![]);
            let y = bias.map_or(y, |bias| self.node_at(path.as_str(), "Add", &[y, bias], vec![]));
            return self.with_slot(layer, x, y);
        }
        let rows = self.rows(x, layer.n_in);
        let inputs: Vec<_> = [rows, weight].into_iter().chain(bias).collect();
        let y = self.gemm(Some(path), &inputs);
        let y = match self.slot(layer) {
            None => y,
            Some((a, b)) => {
                let inner = self.gemm(None, &[rows, a]);
                self.gemm(None, &[inner, b, y])
            }
        };
        self.unrolled(y, x, layer.n_out)
    }

    /// `a·bᵀ (+ c)`.
    fn gemm(&self, path: Option<&ParamPath>, inputs: &[Value]) -> Value {
        let turned = vec![Attribute::int("transB", 1)];
        match path {
            Some(path) => self.node_at(path.as_str(), "Gemm", inputs, turned),
            None => self.node("Gemm", inputs, turned, inputs[0].kind),
        }
    }

    /// Tokens of any number of axes as rows.
    fn rows(&self, x: Value, width: usize) -> Value {
        let shape = self.integers(&[-1, width as i64], &[2]);
        self.node("Reshape", &[x, shape], vec![], x.kind)
    }

    /// Rows in the axes of `like`.
    fn unrolled(&self, rows: Value, like: Value, width: usize) -> Value {
        let outer = vec![Attribute::int("start", 0), Attribute::int("end", -1)];
        let outer = self.node("Shape", &[like], outer, Kind::Integer);
        let width = self.integers(&[width as i64], &[1]);
        let first = vec![Attribute::int("axis", 0)];
        let shape = self.node("Concat", &[outer, width], first, Kind::Integer);
        self.node("Reshape", &[rows, shape], vec![], rows.kind)
    }

    fn fused(
        &self,
        layer: &Layer<'_>,
        x: Value,
        bias: Option<Value>,
        code: Code,
        block: Option<usize>,
    ) -> Value {
        let (block, whole_scale) = (block.unwrap_or(WHOLE), block.is_none());
        let scale = if code == Code::E4m3 { Float::F32 } else { layer.float };
        let storage = Storage::Coded { code, block: Some(block) };
        let (weight, scales) = self.coded(layer, storage, scale, false, whole_scale);
        let path = Some(layer.path.as_str());
        let size = Attribute::int("block_size", block as i64);
        let (op, inputs, attributes) = if code == Code::E4m3 {
            let inputs = vec![Some(x), Some(weight), Some(scales), None, bias];
            ("MatMulBlockQuantizedFp8Weight", inputs, vec![size])
        } else {
            let bits = if code == Code::Int4 { 4 } else { 8 };
            let attributes = vec![
                Attribute::int("K", layer.n_in as i64),
                Attribute::int("N", layer.n_out as i64),
                Attribute::int("bits", bits),
                size,
            ];
            ("MatMulNBits", vec![Some(x), Some(weight), Some(scales), None, None, bias], attributes)
        };
        let given = inputs.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.nodes(path, op, &inputs[..given], attributes, x.kind, 1)[0]
    }

    fn dequantised(
        &self,
        layer: &Layer<'_>,
        x: Value,
        bias: Option<Value>,
        code: Code,
        block: Option<usize>,
    ) -> Value {
        let storage = Storage::Coded { code, block };
        let (weight, scales) = self.coded(layer, storage, layer.float, true, false);
        let attributes = block.map_or_else(Vec::new, |block| {
            vec![Attribute::int("axis", 0), Attribute::int("block_size", block as i64)]
        });
        let path = layer.path.as_str();
        let inputs = [Some(weight), Some(scales)];
        let weight = self.nodes(Some(path), "DequantizeLinear", &inputs, attributes, x.kind, 1)[0];
        let y = self.node_at(path, "MatMul", &[x, weight], vec![]);
        bias.map_or(y, |bias| self.node_at(path, "Add", &[y, bias], vec![]))
    }

    /// Codes and scales of a layer.
    fn coded(
        &self,
        layer: &Layer<'_>,
        storage: Storage,
        scale: Float,
        transposed: bool,
        whole_scale: bool,
    ) -> (Value, Value) {
        let name = layer.path.at("weight");
        let parameter = Parameter {
            name: name.as_str().to_owned(),
            shape: vec![layer.n_out, layer.n_in],
            storage,
            scale,
            transposed,
            whole_scale,
        };
        let weight = self.parameter(parameter, Kind::Code);
        let scales = self.state.borrow_mut().scales(&format!("{name}{SCALE}"), scale);
        (weight, scales)
    }

    /// Adds what the layer's slot holds.
    fn with_slot(&self, layer: &Layer<'_>, x: Value, y: Value) -> Value {
        let Some((a, b)) = self.slot(layer) else { return y };
        let turned = |value: Value| {
            let order = vec![Attribute::ints("perm", [1, 0])];
            self.node("Transpose", &[value], order, value.kind)
        };
        let inner = self.node("MatMul", &[x, turned(a)], vec![], x.kind);
        let addition = self.node("MatMul", &[inner, turned(b)], vec![], x.kind);
        self.node("Add", &[y, addition], vec![], y.kind)
    }

    /// A `[r, n_in]` and B `[n_out, r]` of a layer that has a slot: inputs that need not be given.
    fn slot(&self, layer: &Layer<'_>) -> Option<(Value, Value)> {
        if !self.dialect.slots {
            return None;
        }
        let rank = format!("{}.rank", layer.path);
        let empty = self.dialect.table.empty_rank;
        let kind = Kind::Float(Float::F32);
        let input = |ending: &str, shape: [Size; 2], sizes: [usize; 2]| {
            let name = layer.path.at(ending).to_string();
            let mut state = self.state.borrow_mut();
            let index = state.value(&name);
            state.slot_inputs.push(port(&name, kind, &shape));
            let tensor = TensorProto {
                dims: sizes.iter().map(|&n| n as i64).collect(),
                data_type: Some(element::FLOAT),
                name: Some(name),
                raw_data: Some(vec![0; sizes[0] * sizes[1] * size_of::<f32>()]),
                ..TensorProto::default()
            };
            state.constants.push((index, tensor));
            Value::new(index, kind)
        };
        let (open, n_in, n_out) = (Size::Open(rank), layer.n_in, layer.n_out);
        let a = input(flow::lora::A, [open.clone(), n_in.into()], [empty, n_in]);
        let b = input(flow::lora::B, [n_out.into(), open], [n_out, empty]);
        let slot = Slot { layer: layer.path.to_string(), n_in, n_out };
        self.state.borrow_mut().slots.push(slot);
        let kind = Kind::Float(layer.float);
        Some((self.node_cast(a, kind), self.node_cast(b, kind)))
    }
}
