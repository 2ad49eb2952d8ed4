//! A graph and its weights on disk: `model.onnx` and, beside it, `model.onnx_data`.
//!
//! Weights go into the second file as raw little-endian f32 in order of first use, because one
//! protobuf message cannot exceed 2 GB. Large ones start on a page, so that a runtime can map them;
//! a few bytes are not worth a seek and stay in the first file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use flow::checkpoint::{Dtype, View, Weights};
use flow::lora::{self, Lora};
use flow::pipeline::Component;
use prost::Message;

use crate::graph::{Graph, Parameter};
use crate::proto::{
    EXTERNAL, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    element,
};

/// The graph's file.
pub const MODEL_FILE: &str = "model.onnx";
/// The weights' file.
pub const DATA_FILE: &str = "model.onnx_data";

/// First operator set with `Attention`, `RMSNormalization` and `RotaryEmbedding`.
const OPSET: i64 = 23;
/// File format that came with it.
const IR_VERSION: i64 = 11;
/// Smaller tensors, in bytes, stay inside the graph's file.
const MIN_EXTERNAL: usize = 1024;
/// Larger tensors, in bytes, start at a multiple of [`PAGE`].
const MIN_ALIGNED: usize = 64 << 10;
const PAGE: u64 = 4096;
/// Start of any other tensor.
const CACHE_LINE: u64 = 64;
/// Elements converted at a time.
const CHUNK: usize = 1 << 20;
/// Side of the square blocks of a transposition.
const TILE: usize = 32;

/// Where the values of a graph's parameters come from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The checkpoint's.
    pub weights: &'a Weights,
    /// Adapters added to them.
    pub loras: &'a [Lora],
    /// Whose values they are.
    pub component: Component,
}

impl<'a> From<&'a Weights> for Source<'a> {
    fn from(weights: &'a Weights) -> Self {
        Self { weights, loras: &[], component: Component::Transformer }
    }
}

/// Writes `graph` as `name` with the values of its parameters out of `source` into `folder`.
/// `advance` hears how many bytes of weights were written since its last call, and stops the work
/// by an error. Returns the size of both files in bytes.
///
/// # Errors
/// When a parameter is missing, is no float or has another shape, or the folder cannot be written.
pub fn write<'a>(
    folder: &Path,
    name: &str,
    graph: Graph,
    source: impl Into<Source<'a>>,
    metadata: &[(&str, String)],
    advance: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<u64> {
    let mut data = DataFile::create(&folder.join(DATA_FILE))?;
    let mut initializer = graph.constants;
    let source = source.into();
    for parameter in &graph.parameters {
        let view = fetch(source.weights, parameter)?;
        let Source { weights, loras, component } = source;
        let merged = lora::merged(loras, component, weights, &parameter.name)?;
        let merged = merged.map(|values| little_endian(&values));
        let view = match merged {
            Some(bytes) => View { dtype: Dtype::F32, bytes: bytes.into(), ..view },
            None => view,
        };
        initializer.push(data.tensor(parameter, &view, advance)?);
    }
    let n_data_bytes = data.finish()?;
    let model = ModelProto {
        ir_version: Some(IR_VERSION),
        producer_name: Some("ng-export".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(GraphProto {
            node: graph.nodes,
            name: Some(name.into()),
            initializer,
            input: graph.inputs,
            output: graph.outputs,
        }),
        opset_import: vec![OperatorSetIdProto {
            domain: Some(String::new()),
            version: Some(OPSET),
        }],
        metadata_props: metadata
            .iter()
            .map(|(key, value)| StringStringEntryProto::new(key, value.clone()))
            .collect(),
    };
    let path = folder.join(MODEL_FILE);
    let bytes = model.encode_to_vec();
    let write = || {
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(n_data_bytes + bytes.len() as u64)
}

fn fetch<'a>(weights: &'a Weights, parameter: &Parameter) -> Result<View<'a>> {
    let Parameter { name, shape, .. } = parameter;
    let path = weights.path().display();
    let view = weights.get(name).with_context(|| format!("{path}: no tensor {name} in it"))?;
    if view.shape != shape {
        return Err(anyhow!("{path}: {name} has shape {:?} instead of {shape:?}", view.shape));
    }
    if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(anyhow!("{path}: {name} has type {:?} instead of a float", view.dtype));
    }
    Ok(view)
}

/// The second file while it grows.
struct DataFile {
    path: std::path::PathBuf,
    file: BufWriter<File>,
    n_bytes: u64,
}

impl DataFile {
    fn create(path: &Path) -> Result<Self> {
        let file =
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            n_bytes: 0,
        })
    }

    /// Writes one parameter, here or into the returned tensor itself.
    fn tensor(
        &mut self,
        parameter: &Parameter,
        view: &View<'_>,
        advance: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<TensorProto> {
        let n_bytes = parameter.len() * size_of::<f32>();
        let mut tensor = TensorProto {
            dims: parameter.stored_shape().into_iter().map(|n| n as i64).collect(),
            data_type: Some(element::FLOAT),
            name: Some(parameter.name.clone()),
            ..TensorProto::default()
        };
        if n_bytes < MIN_EXTERNAL {
            let mut raw = Vec::with_capacity(n_bytes);
            stream(parameter, view, &mut |bytes| {
                raw.extend_from_slice(bytes);
                advance(bytes.len())
            })?;
            tensor.raw_data = Some(raw);
            return Ok(tensor);
        }
        self.align(if n_bytes < MIN_ALIGNED { CACHE_LINE } else { PAGE })?;
        let offset = self.n_bytes;
        stream(parameter, view, &mut |bytes| {
            self.append(bytes)?;
            advance(bytes.len())
        })?;
        tensor.data_location = Some(EXTERNAL);
        tensor.external_data = vec![
            StringStringEntryProto::new("location", DATA_FILE.into()),
            StringStringEntryProto::new("offset", offset.to_string()),
            StringStringEntryProto::new("length", n_bytes.to_string()),
        ];
        Ok(tensor)
    }

    fn align(&mut self, to: u64) -> Result<()> {
        let gap = self.n_bytes.next_multiple_of(to) - self.n_bytes;
        self.append(&[0; PAGE as usize][..gap as usize])
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.write_all(bytes);
        written.with_context(|| format!("cannot write {}", self.path.display()))?;
        self.n_bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self) -> Result<u64> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(self.n_bytes)
    }
}

/// Hands the f32 bytes of a parameter to `sink` piece by piece, in the order the graph wants.
fn stream(
    parameter: &Parameter,
    view: &View<'_>,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let explain = |why| anyhow!("{}: {why}", parameter.name);
    if parameter.transposed {
        let [n_rows, n_columns] = parameter.shape[..] else {
            return Err(anyhow!("{}: only a matrix can be transposed", parameter.name));
        };
        let values = view.to_f32().map_err(explain)?;
        return stream_transposed(&values, n_rows, n_columns, sink);
    }
    let n_chunk_bytes = CHUNK * view.bytes.len() / parameter.len().max(1);
    for bytes in view.bytes.chunks(n_chunk_bytes.max(1)) {
        if view.dtype == Dtype::F32 {
            sink(bytes)?;
        } else {
            let part = View { bytes: bytes.into(), ..*view };
            sink(&little_endian(&part.to_f32().map_err(explain)?))?;
        }
    }
    Ok(())
}

/// Columns of the row-major `values` one after the other, a band of [`TILE`] columns at a time.
fn stream_transposed(
    values: &[f32],
    n_rows: usize,
    n_columns: usize,
    sink: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut band = vec![0.0; TILE.min(n_columns) * n_rows];
    for first in (0..n_columns).step_by(TILE) {
        let width = TILE.min(n_columns - first);
        for (row, of_row) in values.chunks_exact(n_columns).enumerate() {
            for (column, value) in of_row[first..first + width].iter().enumerate() {
                band[column * n_rows + row] = *value;
            }
        }
        sink(&little_endian(&band[..width * n_rows]))?;
    }
    Ok(())
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use flow::checkpoint::{Entry, write_tensors};
    use flow::ops::{Ops, ParamPath};

    use super::*;
    use crate::graph::{Builder, Kind};

    /// A sum over the parameters, so that each is used.
    fn graph(parameters: &[(&str, &[usize])]) -> Graph {
        let ops = Builder::default();
        let mut sum = ops.input("x", Kind::Float, &[]);
        for (name, shape) in parameters {
            sum = ops.add(&sum, &ops.param(&ParamPath::root().at(name), shape));
        }
        ops.finish(&[("y", sum, vec![])])
    }

    fn place(tensor: &TensorProto, key: &str) -> usize {
        let entry = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some(key));
        entry.and_then(|entry| entry.value.as_deref()).unwrap().parse().unwrap()
    }

    #[test]
    fn weights_lie_where_the_model_says() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let sizes = [("small", 255), ("medium", 300), ("odd", 257), ("large", 20_000)];
        let value = |i: usize| i as f32 * 0.5 - 3.0;
        let values: Vec<f32> = (0..20_000).map(value).collect();
        let entries = sizes.map(|(name, n)| Entry::f32(name, &[n], &values[..n]));
        write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
        let shapes = sizes.map(|(name, n)| (name, [n]));
        let graph = graph(&shapes.each_ref().map(|(name, shape)| (*name, shape.as_slice())));
        let weights = Weights::open(folder.path(), "w")?;
        let mut n_heard = 0;
        let mut advance = |n| {
            n_heard += n;
            Ok(())
        };
        let n_bytes = write(folder.path(), "sum", graph, &weights, &[], &mut advance)?;
        assert_eq!(n_heard, 4 * (255 + 300 + 257 + 20_000));

        let bytes = std::fs::read(folder.path().join(MODEL_FILE))?;
        let data = std::fs::read(folder.path().join(DATA_FILE))?;
        assert_eq!(n_bytes, (bytes.len() + data.len()) as u64);
        let tensors = ModelProto::decode(bytes.as_slice())?.graph.expect("a graph").initializer;
        for (tensor, (_, n)) in tensors.iter().zip(sizes) {
            let written = if let Some(raw) = &tensor.raw_data {
                assert_eq!(n, 255);
                raw.as_slice()
            } else {
                let (offset, length) = (place(tensor, "offset"), place(tensor, "length"));
                assert_eq!(offset % if n == 20_000 { 4096 } else { 64 }, 0);
                &data[offset..offset + length]
            };
            assert_eq!(written, little_endian(&values[..n]));
        }
        Ok(())
    }

    #[test]
    fn halves_widen_and_matrices_turn() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (n_out, n_in) = (33, 40);
        // bf16 is the upper half of an f32.
        let values: Vec<f32> = (0..n_out * n_in).map(|i| (i % 200) as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()[2..].to_vec()).collect();
        let entry = Entry::raw("proj.weight", &[n_out, n_in], Dtype::BF16, bytes);
        write_tensors(&folder.path().join("w.safetensors"), &[entry], &[])?;
        let ops = Builder::default();
        let x = ops.input("x", Kind::Float, &[]);
        let y = ops.linear(&ParamPath::root().at("proj"), &x, n_in, n_out, false);
        let graph = ops.finish(&[("y", y, vec![])]);
        let weights = Weights::open(folder.path(), "w")?;
        write(folder.path(), "linear", graph, &weights, &[], &mut |_| Ok(()))?;
        let turned: Vec<f32> = (0..n_in)
            .flat_map(|column| (0..n_out).map(move |row| ((row * n_in + column) % 200) as f32))
            .collect();
        assert_eq!(std::fs::read(folder.path().join(DATA_FILE))?, little_endian(&turned));
        Ok(())
    }

    #[test]
    fn a_tensor_that_does_not_fit_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let entries = [Entry::f32("a", &[3], &[0.0; 3]), Entry::i64("b", &[2], &[0, 0])];
        write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
        let weights = Weights::open(folder.path(), "w")?;
        for (name, shape, part) in [
            ("a", 2, "a has shape [3] instead of [2]"),
            ("b", 2, "b has type I64"),
            ("c", 2, "no tensor c"),
        ] {
            let graph = graph(&[(name, &[shape])]);
            let error = write(folder.path(), "sum", graph, &weights, &[], &mut |_| Ok(()));
            let message = error.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        Ok(())
    }
}
