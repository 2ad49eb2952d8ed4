//! Recording a network as an ONNX graph.
//!
//! [`Builder`] interprets [`flow::ops::Ops`]: every method appends the nodes of its operator and
//! returns a handle to their result. Nothing is traced and no weight is read; a [`Graph`] names the
//! parameters it needs, and who writes the file fetches them.
//!
//! Only standard operators of opset 23 are used. A node that reads a parameter is named by the
//! parameter's path; the same node recorded twice is one node; what no output needs is left out.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use prost::Message;

use crate::proto::{
    AttributeProto, Dimension, DimensionProto, NodeProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto, element,
};

mod record;
#[cfg(test)]
mod tests;

/// What a value's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 32-bit floats.
    Float,
    /// 64-bit floats, for rotary angles only.
    Double,
    /// 64-bit integers.
    Integer,
}

impl Kind {
    fn element(self) -> i32 {
        match self {
            Self::Float => element::FLOAT,
            Self::Double => element::DOUBLE,
            Self::Integer => element::INT64,
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
}

/// A checkpoint tensor that the graph reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name of the initializer and of the checkpoint tensor.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Whether the graph holds a matrix `[n, m]` of the checkpoint as `[m, n]`.
    pub transposed: bool,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shape in the graph.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}

/// A finished graph without its parameters' values.
#[derive(Clone, Debug)]
pub struct Graph {
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
}

/// The interpreter that records.
#[derive(Default)]
pub struct Builder {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    names: Vec<String>,
    taken: HashSet<String>,
    inputs: Vec<ValueInfoProto>,
    nodes: Vec<Node>,
    recorded: HashMap<Key, Vec<Value>>,
    constants: Vec<(usize, TensorProto)>,
    known_constants: HashMap<Constant, Value>,
    parameters: Vec<(usize, Parameter)>,
    known_parameters: HashMap<(String, bool), Value>,
    n_named: HashMap<&'static str, usize>,
}

struct Node {
    op: &'static str,
    name: String,
    inputs: Vec<Option<usize>>,
    outputs: Vec<usize>,
    attributes: Vec<AttributeProto>,
}

/// What makes two nodes the same: operator, inputs, encoded attributes, number of outputs.
type Key = (&'static str, Vec<Option<usize>>, Vec<Vec<u8>>, usize);
/// What makes two constants the same.
type Constant = (Kind, Vec<usize>, Vec<u8>);

impl Builder {
    /// Declares the next input of the graph.
    pub fn input(&self, name: &str, kind: Kind, shape: &[Size]) -> Value {
        let mut state = self.state.borrow_mut();
        state.inputs.push(port(name, kind, shape));
        let index = state.value(name);
        Value { index, kind }
    }

    /// Ends recording: `outputs` are returned by the graph under the given names and shapes.
    ///
    /// # Panics
    /// When two outputs are one value, or an output is an input or a parameter: a network returns
    /// what it computed.
    pub fn finish(self, outputs: &[(&str, Value, Vec<Size>)]) -> Graph {
        let mut state = self.state.into_inner();
        let mut renamed = HashSet::new();
        for (name, value, _) in outputs {
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
        Graph {
            inputs: state.inputs,
            outputs: outputs.iter().map(|(name, v, shape)| port(name, v.kind, shape)).collect(),
            nodes,
            constants: state.constants.into_iter().map(|(_, tensor)| tensor).collect(),
            parameters: state.parameters.into_iter().map(|(_, parameter)| parameter).collect(),
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

    /// Records a node that belongs to the module at `path`.
    fn node_at(
        &self,
        path: &str,
        op: &'static str,
        inputs: &[Value],
        attributes: Vec<AttributeProto>,
    ) -> Value {
        let inputs: Vec<_> = inputs.iter().copied().map(Some).collect();
        self.nodes(Some(path), op, &inputs, attributes, Kind::Float, 1)[0]
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
        let mut state = self.state.borrow_mut();
        let inputs: Vec<_> = inputs.iter().map(|value| value.map(|value| value.index)).collect();
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
        let values: Vec<_> = outputs.iter().map(|&index| Value { index, kind }).collect();
        state.nodes.push(Node { op, name, inputs, outputs, attributes });
        state.recorded.insert(key, values.clone());
        values
    }

    /// A tensor of the graph's own; equal ones are stored once.
    fn constant(&self, kind: Kind, bytes: Vec<u8>, shape: &[usize]) -> Value {
        let mut state = self.state.borrow_mut();
        let key = (kind, shape.to_vec(), bytes);
        if let Some(value) = state.known_constants.get(&key) {
            return *value;
        }
        let name = format!("constant_{}", state.constants.len());
        let index = state.value(&name);
        let tensor = TensorProto {
            dims: shape.iter().map(|&n| n as i64).collect(),
            data_type: Some(kind.element()),
            name: Some(name),
            raw_data: Some(key.2.clone()),
            ..TensorProto::default()
        };
        state.constants.push((index, tensor));
        state.known_constants.insert(key, Value { index, kind });
        Value { index, kind }
    }

    fn parameter(&self, name: &str, shape: &[usize], transposed: bool) -> Value {
        let mut state = self.state.borrow_mut();
        let key = (name.to_owned(), transposed);
        if let Some(value) = state.known_parameters.get(&key) {
            return *value;
        }
        let index = state.value(name);
        let parameter = Parameter { name: name.to_owned(), shape: shape.to_vec(), transposed };
        state.parameters.push((index, parameter));
        state.known_parameters.insert(key, Value { index, kind: Kind::Float });
        Value { index, kind: Kind::Float }
    }
}

impl State {
    /// A new value.
    ///
    /// # Panics
    /// When the name is taken: a network uses one parameter in one way.
    fn value(&mut self, name: &str) -> usize {
        assert!(self.taken.insert(name.to_owned()), "two values are called {name}");
        self.names.push(name.to_owned());
        self.names.len() - 1
    }

    fn node_name(&mut self, path: Option<&str>, op: &'static str) -> String {
        if let Some(name) = path.map(|path| format!("{path}/{op}"))
            && !self.taken.contains(&name)
        {
            return name;
        }
        let n = self.n_named.entry(op).or_default();
        *n += 1;
        format!("{op}_{n}")
    }

    /// Leaves out what the values `needed` do not depend on.
    fn prune(&mut self, mut needed: HashSet<usize>) {
        let mut kept: Vec<_> = std::mem::take(&mut self.nodes)
            .into_iter()
            .rev()
            .filter(|node| {
                let used = node.outputs.iter().any(|output| needed.contains(output));
                if used {
                    needed.extend(node.inputs.iter().flatten());
                }
                used
            })
            .collect();
        kept.reverse();
        self.nodes = kept;
        self.constants.retain(|(index, _)| needed.contains(index));
        self.parameters.retain(|(index, _)| needed.contains(index));
    }
}

impl Node {
    fn to_proto(&self, names: &[String]) -> NodeProto {
        NodeProto {
            input: self
                .inputs
                .iter()
                .map(|index| index.map_or_else(String::new, |index| names[index].clone()))
                .collect(),
            output: self.outputs.iter().map(|&index| names[index].clone()).collect(),
            name: Some(self.name.clone()),
            op_type: Some(self.op.to_owned()),
            attribute: self.attributes.clone(),
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
