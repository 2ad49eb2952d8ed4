//! What a builder has recorded so far.

use std::collections::{HashMap, HashSet};

use super::attention::MULTI_HEAD;
use super::{Kind, Parameter, Slot, Value};
use crate::element::Float;
use crate::proto::{AttributeProto, NodeProto, TensorProto, ValueInfoProto};

#[derive(Default)]
pub(super) struct State {
    pub(super) names: Vec<String>,
    taken: HashSet<String>,
    pub(super) inputs: Vec<ValueInfoProto>,
    pub(super) nodes: Vec<Node>,
    pub(super) recorded: HashMap<Key, Vec<Value>>,
    pub(super) constants: Vec<(usize, TensorProto)>,
    known_constants: HashMap<Constant, Value>,
    pub(super) parameters: Vec<(usize, Parameter)>,
    known_parameters: HashMap<String, Value>,
    n_named: HashMap<&'static str, usize>,
    /// Tokens `[B, S, H·D]` behind values that split them into heads `[B, S, H, D]`.
    pub(super) split_from: HashMap<usize, Value>,
    pub(super) slots: Vec<Slot>,
    pub(super) slot_inputs: Vec<ValueInfoProto>,
    pub(super) seams: Vec<(String, Vec<Value>)>,
}

pub(super) struct Node {
    pub(super) op: &'static str,
    pub(super) name: String,
    pub(super) inputs: Vec<Option<usize>>,
    pub(super) outputs: Vec<usize>,
    pub(super) attributes: Vec<AttributeProto>,
}

/// What makes two nodes the same: operator, inputs, encoded attributes, number of outputs.
type Key = (&'static str, Vec<Option<usize>>, Vec<Vec<u8>>, usize);
/// What makes two constants the same.
type Constant = (Kind, Vec<usize>, Vec<u8>);
/// Domain of ONNX Runtime's own operators.
pub(crate) const EXTENSIONS: &str = "com.microsoft";
/// Those of them in use.
const EXTENDED: [&str; 3] = [MULTI_HEAD, "MatMulNBits", "MatMulBlockQuantizedFp8Weight"];

impl State {
    /// A new value.
    ///
    /// # Panics
    /// When the name is taken: a network uses one parameter in one way.
    pub(super) fn value(&mut self, name: &str) -> usize {
        assert!(self.taken.insert(name.to_owned()), "two values are called {name}");
        self.names.push(name.to_owned());
        self.names.len() - 1
    }

    pub(super) fn node_name(&mut self, path: Option<&str>, op: &'static str) -> String {
        if let Some(name) = path.map(|path| format!("{path}/{op}"))
            && !self.taken.contains(&name)
        {
            return name;
        }
        let n = self.n_named.entry(op).or_default();
        *n += 1;
        format!("{op}_{n}")
    }

    pub(super) fn constant(&mut self, kind: Kind, bytes: Vec<u8>, shape: &[usize]) -> Value {
        let key = (kind, shape.to_vec(), bytes);
        if let Some(value) = self.known_constants.get(&key) {
            return *value;
        }
        let name = format!("constant_{}", self.constants.len());
        let index = self.value(&name);
        let tensor = TensorProto {
            dims: shape.iter().map(|&n| n as i64).collect(),
            data_type: Some(kind.element()),
            name: Some(name),
            raw_data: Some(key.2.clone()),
            ..TensorProto::default()
        };
        self.constants.push((index, tensor));
        let value = Value::new(index, kind);
        self.known_constants.insert(key, value);
        value
    }

    /// The numbers of a constant of floats, with its shape.
    pub(super) fn constant_tensor(&self, value: Value) -> Option<&TensorProto> {
        self.constants.iter().find(|(index, _)| *index == value.index).map(|(_, tensor)| tensor)
    }

    pub(super) fn parameter(&mut self, parameter: Parameter, kind: Kind) -> Value {
        if let Some(value) = self.known_parameters.get(&parameter.name) {
            return *value;
        }
        let name = parameter.name.clone();
        let index = self.value(&name);
        self.parameters.push((index, parameter));
        let value = Value::new(index, kind);
        self.known_parameters.insert(name, value);
        value
    }

    /// The scales that belong to a parameter's codes; their initializer is written with it.
    pub(super) fn scales(&mut self, name: &str, float: Float) -> Value {
        let kind = Kind::Float(float);
        if let Some(value) = self.known_parameters.get(name) {
            return *value;
        }
        let value = Value::new(self.value(name), kind);
        self.known_parameters.insert(name.to_owned(), value);
        value
    }

    /// Leaves out what the values `needed` do not depend on.
    pub(super) fn prune(&mut self, mut needed: HashSet<usize>) {
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
    pub(super) fn to_proto(&self, names: &[String]) -> NodeProto {
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
            domain: EXTENDED.contains(&self.op).then(|| EXTENSIONS.to_owned()),
        }
    }
}
