//! Parts of a written graph, as ONNX Runtime runs them on the processor.
//!
//! The nodes and the weights' bytes are the file's own. ONNX Runtime has no bf16 arithmetic there, and nothing
//! for matrices of fp8: bf16 values are widened to f32 where they are read, and such a product becomes its
//! dequantisation. Rounding of activations to bf16 is therefore not in what is measured.

use std::collections::HashSet;

use crate::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto, element,
};

/// A value between nodes: its name, element type and number of axes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Name in the graph.
    pub name: String,
    /// `TensorProto.DataType`.
    pub element: i32,
    /// Axes.
    pub rank: usize,
}

/// The part of `model` that makes `outputs` out of `inputs`.
pub fn cut(model: &ModelProto, inputs: &[Edge], outputs: &[Edge]) -> ModelProto {
    let graph = model.graph.clone().unwrap_or_default();
    let given: HashSet<&str> = inputs.iter().map(|edge| edge.name.as_str()).collect();
    let mut needed: HashSet<String> = outputs.iter().map(|edge| edge.name.clone()).collect();
    let mut node: Vec<NodeProto> = Vec::new();
    for candidate in graph.node.into_iter().rev() {
        let makes = |name: &String| needed.contains(name) && !given.contains(name.as_str());
        if candidate.output.iter().any(makes) {
            needed.extend(candidate.input.iter().cloned());
            node.push(candidate);
        }
    }
    node.reverse();
    let mut initializer = graph.initializer;
    initializer.retain(|tensor| tensor.name.as_ref().is_some_and(|name| needed.contains(name)));
    let graph = GraphProto {
        node,
        name: graph.name,
        initializer,
        input: inputs.iter().map(|edge| port(edge, true)).collect(),
        output: outputs.iter().map(|edge| port(edge, false)).collect(),
    };
    let mut part = ModelProto { graph: Some(graph), metadata_props: Vec::new(), ..model.clone() };
    widen(&mut part);
    part
}

fn port(edge: &Edge, has_shape: bool) -> ValueInfoProto {
    let dim = vec![DimensionProto { value: None }; edge.rank];
    let tensor_type = TensorTypeProto {
        elem_type: Some(edge.element),
        shape: has_shape.then_some(TensorShapeProto { dim }),
    };
    ValueInfoProto {
        name: Some(edge.name.clone()),
        r#type: Some(TypeProto { tensor_type: Some(tensor_type) }),
    }
}

/// Puts f32 in the place of bf16.
fn widen(model: &mut ModelProto) {
    let Some(graph) = &mut model.graph else { return };
    for port in graph.input.iter_mut().chain(&mut graph.output) {
        if let Some(tensor) = port.r#type.as_mut().and_then(|kind| kind.tensor_type.as_mut())
            && tensor.elem_type == Some(element::BFLOAT16)
        {
            tensor.elem_type = Some(element::FLOAT);
        }
    }
    let mut nodes = Vec::with_capacity(graph.node.len());
    for tensor in &mut graph.initializer {
        if let (Some(element::BFLOAT16), Some(name)) = (tensor.data_type, tensor.name.clone()) {
            let narrow = format!("{name}/bf16");
            let to = vec![AttributeProto::int("to", element::FLOAT.into())];
            nodes.push(node("Cast", std::slice::from_ref(&narrow), &name, to));
            tensor.name = Some(narrow);
        }
    }
    for mut each in std::mem::take(&mut graph.node) {
        for attribute in &mut each.attribute {
            let is_type = attribute.name.as_deref() == Some("to");
            if is_type && attribute.i == Some(element::BFLOAT16.into()) {
                attribute.i = Some(element::FLOAT.into());
            }
        }
        if each.op_type.as_deref() == Some("MatMulBlockQuantizedFp8Weight") {
            nodes.extend(dequantised(&each));
        } else {
            nodes.push(each);
        }
    }
    graph.node = nodes;
}

fn node(op: &str, input: &[String], output: &str, attribute: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        input: input.to_vec(),
        output: vec![output.to_owned()],
        name: Some(format!("{output}/{op}")),
        op_type: Some(op.to_owned()),
        attribute,
        ..NodeProto::default()
    }
}

/// A product with an fp8 matrix `[N, K]` in standard operators.
fn dequantised(product: &NodeProto) -> Vec<NodeProto> {
    let [x, codes, scales] = [0, 1, 2].map(|i| product.input[i].clone());
    let output = &product.output[0];
    let step = |name: &str| format!("{output}/{name}");
    let block = product.attribute.iter().find(|a| a.name.as_deref() == Some("block_size"));
    let attributes = vec![
        AttributeProto::int("axis", 1),
        AttributeProto::int("block_size", block.and_then(|a| a.i).unwrap_or(128)),
    ];
    let bias = product.input.get(4).filter(|name| !name.is_empty());
    let product = if bias.is_some() { step("product") } else { output.clone() };
    let turned = vec![AttributeProto::ints("perm", [1, 0])];
    let mut nodes = vec![
        node("DequantizeLinear", &[codes, scales], &step("weight"), attributes),
        node("Transpose", &[step("weight")], &step("turned"), turned),
        node("MatMul", &[x, step("turned")], &product, vec![]),
    ];
    if let Some(bias) = bias {
        nodes.push(node("Add", &[product, bias.clone()], output, vec![]));
    }
    nodes
}
