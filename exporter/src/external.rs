//! A graph and its weights on disk: `model.onnx`, and beside it the checkpoint's own files where they
//! can be used as they are, and `model.onnx_data` with the rest.
//!
//! A tensor is used as it is where the graph stores it in the checkpoint's type and layout and no adapter
//! changes it: the graph then says file and offset, and the file is a hard link, because ONNX Runtime
//! refuses paths that leave the folder, symbolic links too. Python's package `onnx` refuses hard links in its
//! turn, so that small files are copied unless links are asked for. A file of which the graph needs less
//! than half is never linked. The rest is written in order of first use, little-endian. Large tensors start on a page,
//! so that a runtime can map them; a few bytes are not worth a seek and stay in the graph's file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flow::checkpoint::Weights;
use flow::checksums::Sum;
use prost::Message;

use crate::graph::{EXTENSIONS, Graph, Parameter, SCALE};
use crate::precision::{Code, Storage};
use crate::proto::{
    EXTERNAL, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    element,
};
use crate::weights::Source;
use crate::weights::encode::encode;

pub(crate) mod data;
mod links;

use data::DataFile;
pub use data::Mode;
pub use links::{Linked, Place, scan};
use links::{in_place, link};

/// The graph's file.
pub const MODEL_FILE: &str = "model.onnx";
/// The weights' file.
pub const DATA_FILE: &str = "model.onnx_data";

/// Smaller tensors, in bytes, stay inside the graph's file.
const MIN_EXTERNAL: usize = 1024;
/// Bytes of mapped weights that are held before they are given back.
const HELD: usize = 64 << 20;

/// Whether weights may stay in the checkpoint's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Where a copy would take long.
    #[default]
    Auto,
    /// Never.
    Copied,
    /// Wherever they can.
    Linked,
}

/// What was written for one graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the graph's file and of weights written beside it.
    pub n_bytes: u64,
    /// Bytes of weights that lie in the checkpoint's own files.
    pub n_linked: u64,
}

/// What was made of one graph.
#[derive(Clone, Debug, Default)]
pub struct Made {
    /// Sizes.
    pub written: Written,
    /// Files that must still be read once, by [`scan`].
    pub linked: Vec<Linked>,
    /// SHA-256 of [`DATA_FILE`], where it was written.
    pub data: Option<Sum>,
}

/// Where a graph goes, and how.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// The graph's name.
    pub name: &'a str,
    /// Whether tensors stay in the checkpoint's files.
    pub placement: Placement,
    /// What the graph says of itself.
    pub metadata: &'a [(&'a str, String)],
    /// What is done with bytes.
    pub mode: Mode,
}

/// Writes `graph` with the values of its parameters out of `source`. `advance` hears how many numbers were read
/// since its last call, and stops the work by an error.
///
/// # Errors
/// When a parameter is missing, is no float, is not finite or has another shape, or the folder cannot be
/// written.
pub fn write<'a>(
    output: &Output<'_>,
    graph: Graph,
    source: impl Into<Source<'a>>,
    advance: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Made> {
    let source = source.into();
    let &Output { folder, name, placement, metadata, mode } = output;
    let mut writer = Writer {
        source,
        positive_scales: graph.dialect.table.positive_scales,
        linked: link(folder, &graph, source, placement, mode)?,
        data: None,
        folder,
        mode,
        n_linked: 0,
        n_held: 0,
        advance,
    };
    let functions = graph.functions();
    let mut initializer = graph.constants;
    for parameter in &graph.parameters {
        initializer.extend(writer.tensors(parameter)?);
    }
    let n_linked = writer.n_linked;
    let linked = writer.linked.into_values().collect();
    let (n_data_bytes, data) = writer.data.map_or(Ok((0, None)), DataFile::finish)?;
    let table = &graph.dialect.table;
    let is_extended = graph.nodes.iter().any(|node| node.domain.is_some());
    let model = ModelProto {
        ir_version: Some(table.ir),
        producer_name: Some("ng-export".into()),
        producer_version: Some(env!("CARGO_PKG_VERSION").into()),
        graph: Some(GraphProto {
            node: graph.nodes,
            name: Some(name.into()),
            initializer,
            input: graph.inputs,
            output: graph.outputs,
        }),
        opset_import: [OperatorSetIdProto::new("", table.opset)]
            .into_iter()
            .chain(is_extended.then(|| OperatorSetIdProto::new(EXTENSIONS, 1)))
            .collect(),
        functions,
        metadata_props: metadata
            .iter()
            .map(|(key, value)| StringStringEntryProto::new(key, value.clone()))
            .collect(),
    };
    let n_model_bytes = match mode {
        Mode::Counted => model.encoded_len() as u64,
        Mode::Written | Mode::Resumed => write_model(&folder.join(MODEL_FILE), &model)?,
    };
    let written = Written { n_bytes: n_data_bytes + n_model_bytes, n_linked };
    Ok(Made { written, linked, data })
}

/// Writes the graph's file and returns its size in bytes.
///
/// # Errors
/// When it cannot be written.
pub fn write_model(path: &Path, model: &ModelProto) -> Result<u64> {
    let bytes = model.encode_to_vec();
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(bytes.len() as u64)
}

/// A graph's weights while they are written.
struct Writer<'a, 'b> {
    source: Source<'a>,
    positive_scales: bool,
    linked: BTreeMap<PathBuf, Linked>,
    data: Option<DataFile>,
    folder: &'b Path,
    mode: Mode,
    n_linked: u64,
    /// Bytes of mapped weights read since they were last given back.
    n_held: usize,
    advance: &'b mut dyn FnMut(usize) -> Result<()>,
}

impl Writer<'_, '_> {
    /// The initializers of one parameter: its values or codes, and the scales of codes.
    fn tensors(&mut self, parameter: &Parameter) -> Result<Vec<TensorProto>> {
        if let Some((file, offset, float)) = in_place(parameter, self.source)
            && let Some(linked) = self.linked.get_mut(file)
        {
            let (dims, element, n_bytes) = stored(parameter);
            let (name, range) = (parameter.name.clone(), offset..offset + n_bytes);
            linked.tensors.push(Place { name, range, float });
            self.n_linked += n_bytes as u64;
            let mut tensor = tensor(parameter.name.clone(), &dims, element);
            place(&mut tensor, &linked.name, offset as u64, n_bytes);
            return Ok(vec![tensor]);
        }
        let (dims, element, n_bytes) = stored(parameter);
        let mut tensors = vec![tensor(parameter.name.clone(), &dims, element)];
        let n_scale_bytes = scale_bytes(parameter);
        if self.is_known(n_bytes, n_scale_bytes)? {
            self.keep(&mut tensors[0], n_bytes)?;
            (self.advance)(parameter.len())?;
            if n_scale_bytes > 0 {
                let mut scales = scales(parameter);
                self.keep(&mut scales, n_scale_bytes)?;
                tensors.push(scales);
            }
            return Ok(tensors);
        }
        let values = self.source.of(parameter)?;
        let size = values.len();
        let source = self.source.weights;
        let positive = self.positive_scales;
        let mut pace = Pace { n_held: &mut self.n_held, advance: &mut *self.advance, source };
        let of_blocks = if n_bytes < MIN_EXTERNAL {
            let mut raw = Vec::with_capacity(n_bytes);
            let of_blocks = encode(parameter, &values, positive, &mut |bytes| {
                raw.extend_from_slice(bytes);
                pace.passed(bytes.len() * size / n_bytes.max(1))
            })?;
            tensors[0].raw_data = Some(raw);
            of_blocks
        } else {
            let data = DataFile::in_folder(&mut self.data, self.folder, self.mode)?;
            let offset = data.begin(n_bytes)?;
            let of_blocks = encode(parameter, &values, positive, &mut |bytes| {
                data.append(bytes)?;
                pace.passed(bytes.len() * size / n_bytes.max(1))
            })?;
            place(&mut tensors[0], DATA_FILE, offset, n_bytes);
            of_blocks
        };
        if !of_blocks.is_empty() {
            let mut scales = scales(parameter);
            if of_blocks.len() < MIN_EXTERNAL {
                scales.raw_data = Some(of_blocks);
            } else {
                let data = DataFile::in_folder(&mut self.data, self.folder, self.mode)?;
                let offset = data.begin(of_blocks.len())?;
                data.append(&of_blocks)?;
                place(&mut scales, DATA_FILE, offset, of_blocks.len());
            }
            tensors.push(scales);
        }
        Ok(tensors)
    }

    /// Whether nothing need be computed: bytes are only counted, or were all written by an earlier run.
    fn is_known(&mut self, n_bytes: usize, n_scale_bytes: usize) -> Result<bool> {
        let is_outside = |n: usize| n == 0 || n >= MIN_EXTERNAL;
        match self.mode {
            Mode::Counted => Ok(true),
            Mode::Resumed if is_outside(n_bytes) && is_outside(n_scale_bytes) => {
                let data = DataFile::in_folder(&mut self.data, self.folder, self.mode)?;
                Ok(data.holds(n_bytes + n_scale_bytes))
            }
            Mode::Resumed | Mode::Written => Ok(false),
        }
    }

    /// Bytes that are known already.
    fn keep(&mut self, tensor: &mut TensorProto, n_bytes: usize) -> Result<()> {
        if n_bytes < MIN_EXTERNAL {
            tensor.raw_data = Some(vec![0; n_bytes]);
            return Ok(());
        }
        let data = DataFile::in_folder(&mut self.data, self.folder, self.mode)?;
        let offset = data.begin(n_bytes)?;
        data.skip(n_bytes);
        place(tensor, DATA_FILE, offset, n_bytes);
        Ok(())
    }
}

/// An initializer without its values.
fn tensor(name: String, dims: &[usize], element: i32) -> TensorProto {
    TensorProto {
        dims: dims.iter().map(|&n| n as i64).collect(),
        data_type: Some(element),
        name: Some(name),
        ..TensorProto::default()
    }
}

/// That of the scales of `parameter`.
fn scales(parameter: &Parameter) -> TensorProto {
    let name = format!("{}{SCALE}", parameter.name);
    tensor(name, &scale_shape(parameter), parameter.scale.element())
}

/// Tells of progress, and gives memory back in time.
struct Pace<'a> {
    n_held: &'a mut usize,
    advance: &'a mut dyn FnMut(usize) -> Result<()>,
    source: &'a Weights,
}

impl Pace<'_> {
    /// `n` numbers were read.
    fn passed(&mut self, n: usize) -> Result<()> {
        *self.n_held += n * size_of::<f32>();
        if *self.n_held >= HELD {
            self.source.release();
            *self.n_held = 0;
        }
        (self.advance)(n)
    }
}

/// Shape, element type and bytes of a parameter's values or codes.
fn stored(parameter: &Parameter) -> (Vec<usize>, i32, usize) {
    match parameter.storage {
        Storage::Plain(float) => {
            (parameter.shape.clone(), float.element(), parameter.len() * float.size())
        }
        Storage::Coded { code, block } => {
            let (n_out, n_in) = (parameter.shape[0], parameter.shape[1]);
            let (dims, n_codes) = if parameter.transposed {
                (vec![n_in, n_out], parameter.len())
            } else if code == Code::E4m3 {
                (vec![n_out, n_in], parameter.len())
            } else {
                let block = block.unwrap_or(n_in);
                let n_blocks = n_in.div_ceil(block);
                let blob = if code == Code::Int4 { block / 2 } else { block };
                (vec![n_out, n_blocks, blob], n_out * n_blocks * block)
            };
            let element = match (code, parameter.transposed) {
                (Code::E4m3, _) => element::FLOAT8E4M3FN,
                (_, false) => element::UINT8,
                (Code::Int8, true) => element::INT8,
                (Code::Int4, true) => element::INT4,
            };
            let n_bytes = if code == Code::Int4 { n_codes / 2 } else { n_codes };
            (dims, element, n_bytes)
        }
    }
}

fn scale_bytes(parameter: &Parameter) -> usize {
    match parameter.storage {
        Storage::Plain(_) => 0,
        Storage::Coded { .. } => {
            scale_shape(parameter).iter().product::<usize>() * parameter.scale.size()
        }
    }
}

fn scale_shape(parameter: &Parameter) -> Vec<usize> {
    let Storage::Coded { block: Some(block), .. } = parameter.storage else { return Vec::new() };
    let (n_out, n_blocks) = (parameter.shape[0], parameter.shape[1].div_ceil(block));
    if parameter.transposed { vec![n_blocks, n_out] } else { vec![n_out, n_blocks] }
}

/// Puts a tensor's values into another file.
fn place(tensor: &mut TensorProto, file: &str, offset: u64, n_bytes: usize) {
    tensor.data_location = Some(EXTERNAL);
    tensor.external_data = vec![
        StringStringEntryProto::new("location", file.into()),
        StringStringEntryProto::new("offset", offset.to_string()),
        StringStringEntryProto::new("length", n_bytes.to_string()),
    ];
}

#[cfg(test)]
mod tests;
