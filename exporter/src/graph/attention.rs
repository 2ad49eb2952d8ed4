//! Heads: splitting, rotating, attending.

use flow::ops::{Mask, Ops, Rope};

use super::{Builder, EXTENSIONS, Kind, Value};
use crate::element::Float;
use crate::proto::{AttributeProto as Attribute, FunctionProto, NodeProto, OperatorSetIdProto};
use crate::target::{Attention, Form};

/// ONNX Runtime's attention without a matrix of scores.
pub(super) const MULTI_HEAD: &str = "MultiHeadAttention";

/// [`MULTI_HEAD`] in standard operators, for runtimes that do not have it; those that do take their own.
pub(super) fn multi_head(opset: i64) -> FunctionProto {
    let mut node = NodeProto {
        input: ["query", "key", "value"].map(String::from).to_vec(),
        output: vec!["output".into()],
        name: Some("attention".into()),
        op_type: Some("Attention".into()),
        ..NodeProto::default()
    };
    node.attribute = vec![
        Attribute::int_of("q_num_heads", "num_heads"),
        Attribute::int_of("kv_num_heads", "num_heads"),
        Attribute::float_of("scale", "scale"),
    ];
    FunctionProto {
        name: Some(MULTI_HEAD.into()),
        input: node.input.clone(),
        output: node.output.clone(),
        attribute: vec!["num_heads".into(), "scale".into()],
        node: vec![node],
        opset_import: vec![OperatorSetIdProto::new("", opset)],
        domain: Some(EXTENSIONS.into()),
    }
}

impl Builder {
    /// A reshape, as ONNX writes its target; tokens split into heads are remembered with their heads, and
    /// heads joined again are the tokens that they were split from.
    pub(super) fn reshaped(&self, x: Value, dims: &[i64]) -> Value {
        let whole = self.state.borrow().split_from.get(&x.index).copied();
        if let (Some(whole), [0, 0, _], false) = (whole, dims, x.swapped) {
            return whole;
        }
        let y = self.node("Reshape", &[x, self.ints(dims)], vec![], x.kind);
        let &[0, 0, heads @ 1..=i64::MAX, _] = dims else { return y };
        self.state.borrow_mut().split_from.insert(y.index, x);
        Value { heads: heads as usize, ..y }
    }

    /// Heads as tokens `[B, S, H·D]`.
    fn joined(&self, x: Value) -> Value {
        let lying = Value { swapped: !x.swapped, ..x };
        self.reshaped_whole(self.straight(lying))
    }

    fn reshaped_whole(&self, x: Value) -> Value {
        let whole = self.state.borrow().split_from.get(&x.index).copied();
        whole.unwrap_or_else(|| self.node("Reshape", &[x, self.ints(&[0, 0, -1])], vec![], x.kind))
    }

    /// Tokens `[B, S, H·D]` as heads again.
    fn split_again(&self, x: Value, heads: usize) -> Value {
        let y = self.node("Reshape", &[x, self.ints(&[0, 0, heads as i64, -1])], vec![], x.kind);
        self.state.borrow_mut().split_from.insert(y.index, x);
        Value { heads, swapped: true, ..y }
    }

    pub(super) fn attention_of(
        &self,
        heads: [Value; 3],
        scale: f64,
        mask: Mask<'_, Value>,
    ) -> Value {
        let heads = heads.map(|x| self.cast(x, self.arithmetic()));
        let n = heads[0].heads;
        assert!(n > 0, "attention is over heads");
        if self.dialect.table.attention == Attention::Decomposed {
            return self.scores_and_sums(heads, scale, mask);
        }
        let tokens = heads.map(|x| self.joined(x));
        let n_heads = n as i64;
        let scale = Attribute::float("scale", scale);
        // With a mask there are few tokens, and the standard operator has what it needs.
        let is_lean = self.dialect.table.attention == Attention::MultiHead;
        if let (Mask::None, true) = (&mask, is_lean) {
            let attributes = vec![Attribute::int("num_heads", n_heads), scale];
            let attended = self.node(MULTI_HEAD, &tokens, attributes, tokens[0].kind);
            return self.split_again(attended, n);
        }
        let mut inputs = tokens.to_vec();
        let mut attributes = vec![
            Attribute::int("q_num_heads", n_heads),
            Attribute::int("kv_num_heads", n_heads),
            scale,
        ];
        match mask {
            Mask::None => {}
            Mask::Bias(bias) => inputs.push(self.cast(*bias, tokens[0].kind)),
            Mask::Causal => attributes.push(Attribute::int("is_causal", 1)),
        }
        let attended = self.node("Attention", &inputs, attributes, tokens[0].kind);
        self.split_again(attended, n)
    }

    fn scores_and_sums(&self, [q, k, v]: [Value; 3], scale: f64, mask: Mask<'_, Value>) -> Value {
        let scaled = self.binary("Mul", self.straight(q), self.scalar(q.kind, scale));
        let keys = self.straight(k);
        let keys =
            self.node("Transpose", &[keys], vec![Attribute::ints("perm", [0, 1, 3, 2])], k.kind);
        let mut scores = self.node("MatMul", &[scaled, keys], vec![], q.kind);
        match mask {
            Mask::None => {}
            Mask::Bias(bias) => {
                scores = self.binary("Add", scores, self.cast(*bias, scores.kind));
            }
            Mask::Causal => scores = self.causal(scores, self.straight(q)),
        }
        let along = vec![Attribute::int("axis", -1)];
        let shares = self.node("Softmax", &[scores], along, scores.kind);
        let attended = self.node("MatMul", &[shares, v], vec![], v.kind);
        Value { heads: q.heads, ..attended }
    }

    /// Scores `[B, H, S, S]` where keys are not after their query, else the lowest number.
    fn causal(&self, scores: Value, q: Value) -> Value {
        let positions = self.positions(&q, 2);
        let (keys, queries) = (self.unsqueeze(&positions, 0), self.unsqueeze(&positions, 1));
        let is_later = self.node("Greater", &[keys, queries], vec![], Kind::Integer);
        let lowest = if scores.float() == Float::F16 { -65504.0 } else { -1e30 };
        let inputs = [is_later, self.scalar(scores.kind, lowest), scores];
        self.node("Where", &inputs, vec![], scores.kind)
    }

    pub(super) fn rotated(&self, x: Value, rope: &Rope<Value>) -> Value {
        if self.dialect.table.form == Form::Decomposed {
            return self.turned_pairs(x, rope);
        }
        let (cos, sin) = (self.cast(rope.cos, x.kind), self.cast(rope.sin, x.kind));
        let mut attributes = vec![Attribute::int("interleaved", 1)];
        if !x.swapped {
            let y = self.node("RotaryEmbedding", &[x, cos, sin], attributes, x.kind);
            return Value { heads: x.heads, ..y };
        }
        attributes.push(Attribute::int("num_heads", x.heads as i64));
        let tokens = self.joined(x);
        let y = self.node("RotaryEmbedding", &[tokens, cos, sin], attributes, x.kind);
        self.split_again(y, x.heads)
    }

    /// (x₀, x₁) → (x₀·cos − x₁·sin, x₁·cos + x₀·sin), in f32.
    fn turned_pairs(&self, x: Value, rope: &Rope<Value>) -> Value {
        let wide = self.wide(x).raw();
        let head = i64::from(!x.swapped) + 2 * i64::from(x.swapped);
        let table = |values: Value| {
            let axes = self.ints(&[head, 4]);
            self.node("Unsqueeze", &[self.wide(values), axes], vec![], Kind::Float(Float::F32))
        };
        let (cos, sin) = (table(rope.cos), table(rope.sin));
        let split = self.ints(&[0, 0, 0, -1, 2]);
        let pairs = self.node("Reshape", &[wide, split], vec![], wide.kind);
        let halves = Ops::split(self, &pairs, 2, 4);
        let product = |a: Value, b: Value| self.binary("Mul", a, b);
        let first = self.sub(&product(halves[0], cos), &product(halves[1], sin));
        let second = self.add(&product(halves[1], cos), &product(halves[0], sin));
        let turned = Ops::concat(self, &[&first, &second], 4);
        let joined = self.reshape_like(&turned, &wide);
        self.cast(Value { heads: x.heads, swapped: x.swapped, ..joined }, x.kind)
    }

    pub(super) fn rotations(
        &self,
        ids: Value,
        axes_dim: &[usize],
        theta: f64,
        batch: Value,
    ) -> Rope<Value> {
        let angles =
            || axes_dim.iter().enumerate().flat_map(|(a, &d)| (0..d / 2).map(move |i| (a, i, d)));
        let axes: Vec<_> = angles().map(|(a, _, _)| a as i64).collect();
        let frequencies: Vec<_> =
            angles().map(|(_, i, d)| 1.0 / theta.powf((2 * i) as f64 / d as f64)).collect();
        let ids = self.node_cast(ids, Kind::Double);
        let by_angle = vec![Attribute::int("axis", 1)];
        let ids = self.node("Gather", &[ids, self.ints(&axes)], by_angle, Kind::Double);
        let angle = self.mul(&ids, &self.doubles(&frequencies));
        let first = vec![Attribute::int("axis", 0)];
        let sizes = [self.size(batch, 0), self.ints(&[1, 1])];
        let shape = self.node("Concat", &sizes, first, Kind::Integer);
        let table = |x: Value| {
            let x = self.node_cast(x, self.arithmetic());
            self.node("Expand", &[x, shape], vec![], x.kind)
        };
        Rope { cos: table(self.cos(&angle)), sin: table(self.sin(&angle)) }
    }
}
