//! A written graph, stage by stage in ONNX Runtime, against the checkpoint in the interpreter of `host/`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flow::checkpoint::read_bounded;
use flow::lora::Lora;
use flow::pipeline::Pipeline;
use onnx::{Model, Options, Tensor};
use prost::Message;
use serde::{Deserialize, Serialize};

use super::cut::{Edge, cut};
use super::{Difference, reference};
use crate::description::SEAMS;
use crate::external::MODEL_FILE;
use crate::graph::Seam;
use crate::part::Part;
use crate::proto::{ModelProto, ValueInfoProto, element};
use crate::weights::Source;

/// How one stage of a graph differs from the checkpoint's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// `prologue`, `block N`, `epilogue` or `whole`.
    pub name: String,
    /// Given what the checkpoint computed before it.
    pub alone: Difference,
    /// Given what the graph itself computed before it.
    pub chained: Difference,
}

/// All stages of the graph of `part` in the export `folder`.
///
/// # Errors
/// When weights or graph cannot be read, ONNX Runtime is missing or fails, or shapes differ.
pub fn compare(
    folder: &Path,
    part: Part,
    pipeline: &Pipeline,
    loras: &[Lora],
    threads: usize,
) -> Result<Vec<Stage>> {
    let folder = folder.join(part.folder());
    let graph = Written::open(&folder)?;
    let mut stages = Vec::new();
    let mut carried: HashMap<String, Tensor> = HashMap::new();
    let weights = pipeline.weights(part.component())?;
    let source = Source { weights: &weights, loras, component: part.component() };
    let given = reference::inputs(pipeline, part);
    reference::run(pipeline, part, source, &given, &mut |name, inputs, outputs| {
        let [from, to] = graph.edges(stages.len());
        ensure!(
            from.len() == inputs.len() && to.len() == outputs.len(),
            "{}: {name} has {} inputs and {} outputs instead of {} and {}: it was written by another \
             version",
            part.folder(),
            from.len(),
            to.len(),
            inputs.len(),
            outputs.len()
        );
        let ports = |edges: Vec<(String, i32)>, tensors: &[host::Tensor]| -> Vec<Edge> {
            let rank = |tensor: &host::Tensor| tensor.shape().len();
            let pairs = edges.into_iter().zip(tensors);
            pairs.map(|((name, element), t)| Edge { name, element, rank: rank(t) }).collect()
        };
        let (from, mut to) = (ports(from, inputs), ports(to, outputs));
        let made: Vec<bool> = to.iter().map(|edge| !from.contains(edge)).collect();
        let mut keep = made.iter();
        to.retain(|_| *keep.next().expect("one each"));
        let expected: Vec<&host::Tensor> =
            outputs.iter().zip(&made).filter(|(_, made)| **made).map(|(t, _)| t).collect();
        let mut model = graph.part(&from, &to, threads)?;
        let given = from.iter().zip(inputs).map(|(edge, tensor)| tensor_of(edge, tensor));
        let given = given.collect::<Result<Vec<_>>>()?;
        let chained: Vec<Tensor> = from
            .iter()
            .zip(&given)
            .map(|(edge, given)| carried.get(&edge.name).unwrap_or(given).clone())
            .collect();
        let alone = run(&mut model, &from, &given, &to)?;
        let followed = run(&mut model, &from, &chained, &to)?;
        stages.push(Stage {
            name: name.to_owned(),
            alone: worst(&alone, &expected)?,
            chained: worst(&followed, &expected)?,
        });
        carried.extend(from.into_iter().map(|edge| edge.name).zip(chained));
        carried.extend(to.into_iter().map(|edge| edge.name).zip(followed));
        Ok(())
    })
    .with_context(|| format!("cannot verify {}", part.folder()))?;
    Ok(stages)
}

/// A whole graph of an export, as the processor runs it.
pub(super) struct Whole {
    model: Model,
    from: Vec<(String, i32)>,
    to: Vec<(String, i32)>,
}

impl Whole {
    /// The graph of `part` in the export `folder`; `ranks` are the axes of its inputs.
    pub(super) fn open(folder: &Path, part: Part, ranks: &[usize], threads: usize) -> Result<Self> {
        let folder = folder.join(part.folder());
        let mut graph = Written::open(&folder)?;
        graph.seams.clear();
        let [from, to] = graph.edges(0);
        ensure!(
            from.len() == ranks.len(),
            "{}: the graph has {} inputs instead of {}",
            part.folder(),
            from.len(),
            ranks.len()
        );
        let edge = |((name, element), &rank): (&(String, i32), &usize)| Edge {
            name: name.clone(),
            element: *element,
            rank,
        };
        let inputs: Vec<Edge> = from.iter().zip(ranks).map(edge).collect();
        let outputs: Vec<Edge> = to.iter().zip(&[0, 0]).map(edge).collect();
        let model = graph.part(&inputs, &outputs, threads)?;
        Ok(Self { model, from, to })
    }

    /// Its outputs.
    pub(super) fn run(&mut self, inputs: &[host::Tensor]) -> Result<Vec<host::Tensor>> {
        let given = self.from.iter().zip(inputs).map(|((name, element), tensor)| {
            let edge = Edge { name: name.clone(), element: *element, rank: tensor.shape().len() };
            Ok((name.as_str(), tensor_of(&edge, tensor)?))
        });
        let given = given.collect::<Result<Vec<_>>>()?;
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, t)| (*name, t)).collect();
        let names: Vec<&str> = self.to.iter().map(|(name, _)| name.as_str()).collect();
        let found = self.model.run(&given, &names)?;
        found
            .into_iter()
            .map(|tensor| {
                let shape = tensor.shape.clone();
                Ok(host::Tensor::new(&shape, tensor.into_f32()?))
            })
            .collect()
    }
}

fn tensor_of(edge: &Edge, tensor: &host::Tensor) -> Result<Tensor> {
    if edge.element == element::INT64 {
        let ids = tensor.values().iter().map(|&id| id as i64).collect();
        return Tensor::i64(tensor.shape(), ids);
    }
    Tensor::f32(tensor.shape(), tensor.values().to_vec())
}

fn run(model: &mut Model, from: &[Edge], given: &[Tensor], to: &[Edge]) -> Result<Vec<Tensor>> {
    // What a stage only hands on is no input of its part.
    let known: Vec<String> = model.inputs().iter().map(|port| port.name.clone()).collect();
    let inputs: Vec<(&str, &Tensor)> = from
        .iter()
        .zip(given)
        .filter(|(edge, _)| known.contains(&edge.name))
        .map(|(edge, tensor)| (edge.name.as_str(), tensor))
        .collect();
    let outputs: Vec<&str> = to.iter().map(|edge| edge.name.as_str()).collect();
    model.run(&inputs, &outputs)
}

fn worst(found: &[Tensor], expected: &[&host::Tensor]) -> Result<Difference> {
    let mut worst = Difference { absolute: 0.0, relative: 0.0 };
    for (found, expected) in found.iter().zip(expected) {
        ensure!(
            found.shape == expected.shape(),
            "a value has shape {:?}, but {:?} in the checkpoint's network",
            found.shape,
            expected.shape()
        );
        worst = worst.worse(Difference::between(found.as_f32()?, expected.values()));
    }
    Ok(worst)
}

/// A graph on disk, its weights in the files beside it.
struct Written<'a> {
    folder: &'a Path,
    model: ModelProto,
    seams: Vec<Seam>,
}

impl<'a> Written<'a> {
    fn open(folder: &'a Path) -> Result<Self> {
        let path = folder.join(MODEL_FILE);
        let read = || format!("cannot read {}", path.display());
        let bytes = read_bounded(&path).with_context(read)?;
        let model = ModelProto::decode(bytes.as_slice()).with_context(read)?;
        let mut metadata = model.metadata_props.iter();
        let seams = metadata.find(|entry| entry.key.as_deref() == Some(SEAMS));
        let seams = match seams.and_then(|entry| entry.value.as_deref()) {
            Some(text) => serde_json::from_str(text).with_context(read)?,
            None => Vec::new(),
        };
        Ok(Self { folder, model, seams })
    }

    /// Names and types of what goes into stage `index` and what comes out.
    fn edges(&self, index: usize) -> [Vec<(String, i32)>; 2] {
        let graph = self.model.graph.as_ref();
        let initializers = graph.map(|graph| graph.initializer.as_slice()).unwrap_or_default();
        let of = |ports: &[ValueInfoProto]| -> Vec<(String, i32)> {
            let kind =
                |port: &ValueInfoProto| port.r#type.as_ref()?.tensor_type.as_ref()?.elem_type;
            let given = |port: &&ValueInfoProto| !initializers.iter().any(|t| t.name == port.name);
            let edge = |port: &ValueInfoProto| Some((port.name.clone()?, kind(port)?));
            ports.iter().filter(given).filter_map(edge).collect()
        };
        let seam = |index: usize| self.seams.get(index).map(|(_, values)| values.clone());
        let inputs = graph.map(|graph| of(&graph.input)).unwrap_or_default();
        let outputs = graph.map(|graph| of(&graph.output)).unwrap_or_default();
        let from = index.checked_sub(1).and_then(seam).unwrap_or(inputs);
        [from, seam(index).unwrap_or(outputs)]
    }

    /// The part between two sets of values, opened.
    fn part(&self, from: &[Edge], to: &[Edge], threads: usize) -> Result<Model> {
        let mut file = tempfile::Builder::new()
            .prefix(".part-")
            .suffix(".onnx")
            .tempfile_in(self.folder)
            .with_context(|| format!("cannot write into {}", self.folder.display()))?;
        let bytes = cut(&self.model, from, to).encode_to_vec();
        std::io::Write::write_all(&mut file, &bytes).context("cannot write a part of a graph")?;
        Model::open(file.path(), &Options { threads, ..Options::default() })
    }
}
