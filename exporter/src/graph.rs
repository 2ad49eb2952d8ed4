//! Recording a network as an ONNX graph.
//!
//! [`Builder`] interprets [`flow::ops::Ops`]: every method appends the nodes of its operator and
//! returns a handle to their result. Nothing is traced and no weight is read; a [`Graph`] names the
//! parameters it needs, and who writes the file fetches them.
//!
//! Which operators and types those are is the [`Dialect`]'s. A node that reads a parameter is named by the
//! parameter's path; the same node recorded twice is one node; what no output needs is left out.
//!
//! ### Why values can be swapped
//! Networks split tokens into heads and exchange axes, `[B, S, H, D]` to `[B, H, S, D]`; operators of
//! attention take heads where the products left them. So an exchange of axes 1 and 2 is remembered, not
//! recorded, and becomes a node only before an operator that needs it.

use std::cell::RefCell;
use std::collections::HashSet;

use prost::Message;

use crate::element::Float;
use crate::precision::{Dialect, Storage};
use crate::proto::{
    AttributeProto, Dimension, DimensionProto, FunctionProto, NodeProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, element,
};

mod attention;
mod linear;
mod norm;
mod record;
mod state;
#[cfg(test)]
mod tests;

use attention::{MULTI_HEAD, multi_head};
pub(crate) use state::EXTENSIONS;
use state::{Node, State};

/// What a value's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Floats.
    Float(Float),
    /// 64-bit floats, for rotary angles only.
    Double,
    /// 64-bit integers.
    Integer,
    /// Codes of a quantised matrix.
    Code,
}

impl Kind {
    fn element(self) -> i32 {
        match self {
            Self::Float(float) => float.element(),
            Self::Double => element::DOUBLE,
            Self::Integer => element::INT64,
            Self::Code => element::UINT8,
        }
    }
}

/// One dimension of an input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Size {
    /// Left to each run, under this name.
    Open(String),
    /// Always so.
    Fixed(usize),
}

impl From<&str> for Size {
    fn from(name: &str) -> Self {
        Self::Open(name.into())
    }
}

impl From<usize> for Size {
    fn from(size: usize) -> Self {
        Self::Fixed(size)
    }
}

/// A handle to a value of the graph under construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Value {
    index: usize,
    kind: Kind,
    /// Heads, once tokens are split into them; 0 before.
    heads: usize,
    /// Whether axes 1 and 2 of the recorded value are exchanged.
    swapped: bool,
}

/// A checkpoint tensor that the graph reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name of the initializer and of the checkpoint tensor.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// How the graph holds it.
    pub storage: Storage,
    /// Type of the scales of codes.
    pub scale: Float,
    /// Whether codes of a matrix `[n, m]` are held as `[m, n]`.
    pub transposed: bool,
    /// Whether all blocks have the scale of the whole matrix.
    pub whole_scale: bool,
}

/// What follows a parameter's name in the name of its scales.
pub const SCALE: &str = "_scale";

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A layer whose adapter can be given to each run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Path of the layer; the inputs are `layer.lora_A.weight` `[r, n_in]` and `layer.lora_B.weight`
    /// `[n_out, r]`.
    pub layer: String,
    /// Inputs of the layer.
    pub n_in: usize,
    /// Outputs of the layer.
    pub n_out: usize,
}

/// Where a network can be cut: a name, and the values that go on from there with their element types.
pub type Seam = (String, Vec<(String, i32)>);

/// A finished graph without its parameters' values.
#[derive(Clone, Debug)]
pub struct Graph {
    /// What it is written in.
    pub dialect: Dialect,
    /// Inputs in the order they were declared.
    pub inputs: Vec<ValueInfoProto>,
    /// Outputs in the order they were given.
    pub outputs: Vec<ValueInfoProto>,
    /// Nodes in topological order.
    pub nodes: Vec<NodeProto>,
    /// Small tensors that belong to the graph itself.
    pub constants: Vec<TensorProto>,
    /// Checkpoint tensors in order of first use.
    pub parameters: Vec<Parameter>,
    /// Layers with slots for adapters.
    pub slots: Vec<Slot>,
    /// Values between blocks, in order.
    pub seams: Vec<Seam>,
}

impl Graph {
    /// Operators that it brings along.
    pub fn functions(&self) -> Vec<FunctionProto> {
        let is_lean = |node: &NodeProto| node.op_type.as_deref() == Some(MULTI_HEAD);
        let opset = self.dialect.table.opset;
        self.nodes
            .iter()
            .find(|node| is_lean(node))
            .map(|_| multi_head(opset))
            .into_iter()
            .collect()
    }

    /// Elements of all its weights.
    pub fn n_parameters(&self) -> usize {
        self.parameters.iter().map(Parameter::len).sum()
    }
}

/// The interpreter that records.
pub struct Builder {
    dialect: Dialect,
    state: RefCell<State>,
}

impl Default for Builder {
    /// A builder for ONNX Runtime on a processor, in f32.
    fn default() -> Self {
        let dialect = crate::precision::Choice::default().dialect(crate::part::Part::Transformer);
        Self::new(dialect.expect("what nobody chose is possible"))
    }
}

impl Builder {
    /// A builder of a graph in `dialect`.
    pub fn new(dialect: Dialect) -> Self {
        Self { dialect, state: RefCell::default() }
    }

    /// Declares the next input of the graph.
    pub fn input(&self, name: &str, kind: Kind, shape: &[Size]) -> Value {
        let mut state = self.state.borrow_mut();
        state.inputs.push(port(name, kind, shape));
        let index = state.value(name);
        Value::new(index, kind)
    }

    /// Marks `values` as all that goes on from here, under `name`.
    pub fn seam(&self, name: String, values: &[&Value]) {
        let values = values.iter().map(|&&value| self.straight(value)).collect();
        self.state.borrow_mut().seams.push((name, values));
    }

    /// Ends recording: `outputs` are returned by the graph under the given names and shapes, floats as
    /// f32.
    ///
    /// # Panics
    /// When two outputs are one value, or an output is an input or a parameter: a network returns
    /// what it computed.
    pub fn finish(self, outputs: &[(&str, Value, Vec<Size>)]) -> Graph {
        let outputs: Vec<_> = outputs
            .iter()
            .map(|(name, value, shape)| (*name, self.wide(self.straight(*value)), shape))
            .collect();
        let mut state = self.state.into_inner();
        let mut renamed = HashSet::new();
        for (name, value, _) in &outputs {
            let computed = state.nodes.iter().any(|node| node.outputs.contains(&value.index));
            assert!(
                computed && renamed.insert(value.index),
                "output {name} needs a node of its own"
            );
            (*name).clone_into(&mut state.names[value.index]);
        }
        state.prune(outputs.iter().map(|(_, value, _)| value.index).collect());
        let names = &state.names;
        let nodes = state.nodes.iter().map(|node| node.to_proto(names)).collect();
        let edge = |value: &Value| (names[value.index].clone(), value.kind.element());
        let named = |values: &[Value]| values.iter().map(edge).collect();
        Graph {
            dialect: self.dialect,
            nodes,
            seams: state.seams.iter().map(|(name, values)| (name.clone(), named(values))).collect(),
            inputs: state.inputs.into_iter().chain(state.slot_inputs).collect(),
            outputs: outputs.iter().map(|(name, v, shape)| port(name, v.kind, shape)).collect(),
            constants: state.constants.into_iter().map(|(_, tensor)| tensor).collect(),
            parameters: state.parameters.into_iter().map(|(_, parameter)| parameter).collect(),
            slots: state.slots,
        }
    }

    /// Records a node with one result.
    fn node(
        &self,
        op: &'static str,
        inputs: &[Value],
        attributes: Vec<AttributeProto>,
        kind: Kind,
    ) -> Value {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.nodes(None, op, &inputs, attributes, kind, 1)[0]
    }

    /// Records a node that belongs to the module at `path`; its result is of the kind of its first input.
    fn node_at(
        &self,
        path: &str,
        op: &'static str,
        inputs: &[Value],
        attributes: Vec<AttributeProto>,
    ) -> Value {
        let (kind, inputs) = (inputs[0].kind, inputs.iter().copied().map(Some).collect::<Vec<_>>());
        self.nodes(Some(path), op, &inputs, attributes, kind, 1)[0]
    }

    /// Records a node with `n_outputs` results of one kind; `None` leaves an optional input out.
    fn nodes(
        &self,
        path: Option<&str>,
        op: &'static str,
        inputs: &[Option<Value>],
        attributes: Vec<AttributeProto>,
        kind: Kind,
        n_outputs: usize,
    ) -> Vec<Value> {
        let straight = |value: &Option<Value>| value.map(|value| self.straight(value).index);
        let inputs: Vec<_> = inputs.iter().map(straight).collect();
        let mut state = self.state.borrow_mut();
        let encoded = attributes.iter().map(Message::encode_to_vec).collect();
        let key = (op, inputs.clone(), encoded, n_outputs);
        if let Some(values) = state.recorded.get(&key) {
            return values.clone();
        }
        let name = state.node_name(path, op);
        let outputs: Vec<_> = (0..n_outputs)
            .map(|i| {
                let name = if n_outputs == 1 { name.clone() } else { format!("{name}.{i}") };
                state.value(&name)
            })
            .collect();
        let values: Vec<_> = outputs.iter().map(|&index| Value::new(index, kind)).collect();
        state.nodes.push(Node { op, name, inputs, outputs, attributes });
        state.recorded.insert(key, values.clone());
        values
    }

    /// The value itself, its axes exchanged by a node if they have to be.
    fn straight(&self, x: Value) -> Value {
        if !x.swapped {
            return x;
        }
        let order = vec![AttributeProto::ints("perm", [0, 2, 1, 3])];
        let turned = self.node("Transpose", &[x.raw()], order, x.kind);
        Value { heads: x.heads, ..turned }
    }

    /// A tensor of the graph's own; equal ones are stored once.
    fn constant(&self, kind: Kind, bytes: Vec<u8>, shape: &[usize]) -> Value {
        self.state.borrow_mut().constant(kind, bytes, shape)
    }

    /// A checkpoint tensor, stored as it is said.
    fn parameter(&self, parameter: Parameter, kind: Kind) -> Value {
        self.state.borrow_mut().parameter(parameter, kind)
    }
}

impl Value {
    fn new(index: usize, kind: Kind) -> Self {
        Self { index, kind, heads: 0, swapped: false }
    }

    /// What was recorded, whatever its axes mean.
    fn raw(self) -> Self {
        Self { swapped: false, ..self }
    }

    /// The type of a float value.
    ///
    /// # Panics
    /// When it is none.
    fn float(self) -> Float {
        match self.kind {
            Kind::Float(float) => float,
            other => panic!("a float is needed and not {other:?}"),
        }
    }
}

fn port(name: &str, kind: Kind, shape: &[Size]) -> ValueInfoProto {
    let dim = |size: &Size| DimensionProto {
        value: Some(match size {
            Size::Open(name) => Dimension::DimParam(name.clone()),
            Size::Fixed(n) => Dimension::DimValue(*n as i64),
        }),
    };
    let tensor_type = TensorTypeProto {
        elem_type: Some(kind.element()),
        shape: Some(TensorShapeProto { dim: shape.iter().map(dim).collect() }),
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto { tensor_type: Some(tensor_type) }),
    }
}
