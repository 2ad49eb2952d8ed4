//! A graph and its weights on disk: `model.onnx`, and beside it the checkpoint's own files where they
//! can be used as they are, and `model.onnx_data` with the rest.
//!
//! A tensor is used as it is where the graph stores it in the checkpoint's type and layout and no adapter
//! changes it: the graph then says file and offset, and the file is a hard link, because ONNX Runtime
//! refuses paths that leave the folder, symbolic links too. Python's package `onnx` refuses hard links in its
//! turn, so that small files are copied unless links are asked for. A file of which the graph needs less
//! than half is never linked. The rest is written in order of first use, little-endian. Large tensors start on a page,
//! so that a runtime can map them; a few bytes are not worth a seek and stay in the graph's file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use flow::checkpoint::Weights;
use prost::Message;

use crate::element::Float;
use crate::graph::{EXTENSIONS, Graph, Parameter, SCALE};
use crate::precision::{Code, Storage};
use crate::proto::{
    EXTERNAL, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    element,
};
use crate::weights::Source;
use crate::weights::encode::encode;

/// The graph's file.
pub const MODEL_FILE: &str = "model.onnx";
/// The weights' file.
pub const DATA_FILE: &str = "model.onnx_data";

/// Smaller tensors, in bytes, stay inside the graph's file.
const MIN_EXTERNAL: usize = 1024;
/// Larger tensors, in bytes, start at a multiple of [`PAGE`].
const MIN_ALIGNED: usize = 64 << 10;
const PAGE: u64 = 4096;
/// Start of any other tensor.
const CACHE_LINE: u64 = 64;
/// Bytes of mapped weights that are held before they are given back.
const HELD: usize = 64 << 20;
/// Smaller files, in bytes, are copied where nobody chose.
const MIN_LINKED: u64 = 1 << 30;

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

/// Writes `graph` as `name` with the values of its parameters out of `source` into `folder`; tensors stay in
/// the checkpoint's files as `placement` says. `advance` hears how many bytes of weights
/// were read since its last call, and stops the work by an error.
///
/// # Errors
/// When a parameter is missing, is no float, is not finite or has another shape, or the folder cannot be
/// written.
pub fn write<'a>(
    folder: &Path,
    name: &str,
    graph: Graph,
    source: impl Into<Source<'a>>,
    placement: Placement,
    metadata: &[(&str, String)],
    advance: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Written> {
    let source = source.into();
    let mut writer = Writer {
        source,
        positive_scales: graph.dialect.table.positive_scales,
        linked: linked_files(folder, &graph, source, placement)?,
        data: None,
        folder,
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
    let n_data_bytes = writer.data.map_or(Ok(0), DataFile::finish)?;
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
    let n_model_bytes = write_model(&folder.join(MODEL_FILE), &model)?;
    Ok(Written { n_bytes: n_data_bytes + n_model_bytes, n_linked })
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

/// File and first byte of `parameter` where the graph can read it there.
fn in_place<'a>(parameter: &Parameter, source: Source<'a>) -> Option<(&'a Path, usize)> {
    let (file, offset, dtype) = source.weights.in_place(&parameter.name)?;
    let float = Float::of(dtype)?;
    let fits = parameter.storage == Storage::Plain(float)
        && parameter.len() * float.size() >= MIN_EXTERNAL
        && !source.is_adapted(&parameter.name);
    fits.then_some((file, offset))
}

/// Files of the checkpoint that the graph needs more than half of: their names in `folder`, where they now
/// are, too.
fn linked_files(
    folder: &Path,
    graph: &Graph,
    source: Source<'_>,
    placement: Placement,
) -> Result<BTreeMap<PathBuf, String>> {
    if placement == Placement::Copied {
        return Ok(BTreeMap::new());
    }
    let mut needed: BTreeMap<&Path, u64> = BTreeMap::new();
    for parameter in &graph.parameters {
        if let Some((file, _)) = in_place(parameter, source) {
            *needed.entry(file).or_default() += stored(parameter).2 as u64;
        }
    }
    let mut linked = BTreeMap::new();
    let mut taken = BTreeSet::from([MODEL_FILE.to_owned(), DATA_FILE.to_owned()]);
    for (file, n_bytes) in needed {
        let read = || format!("cannot read {}", file.display());
        let size = file.metadata().with_context(read)?.len();
        if 2 * n_bytes < size || (placement == Placement::Auto && size < MIN_LINKED) {
            continue;
        }
        // A folder of the hub is full of links; what they point at can be linked again.
        let real = file.canonicalize().with_context(read)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !taken.insert(name.clone()) {
            continue;
        }
        match fs::hard_link(&real, folder.join(&name)) {
            Ok(()) => _ = linked.insert(file.to_owned(), name),
            // Another file system, or one without links: a copy does.
            Err(_) if placement == Placement::Auto => {}
            Err(why) => bail!(
                "cannot link {} into the export ({why}): give an --out on the same file system, or \
                 --copy-weights",
                file.display()
            ),
        }
    }
    Ok(linked)
}

/// A graph's weights while they are written.
struct Writer<'a, 'b> {
    source: Source<'a>,
    positive_scales: bool,
    linked: BTreeMap<PathBuf, String>,
    data: Option<DataFile>,
    folder: &'b Path,
    n_linked: u64,
    /// Bytes of mapped weights read since they were last given back.
    n_held: usize,
    advance: &'b mut dyn FnMut(usize) -> Result<()>,
}

impl Writer<'_, '_> {
    /// The initializers of one parameter: its values or codes, and the scales of codes.
    fn tensors(&mut self, parameter: &Parameter) -> Result<Vec<TensorProto>> {
        if let Some((file, offset)) = in_place(parameter, self.source)
            && let Some(name) = self.linked.get(file).cloned()
        {
            return Ok(vec![self.linked_tensor(parameter, &name, offset)?]);
        }
        let values = self.source.of(parameter)?;
        let (dims, element, n_bytes) = stored(parameter);
        let mut tensor = TensorProto {
            dims: dims.iter().map(|&n| n as i64).collect(),
            data_type: Some(element),
            name: Some(parameter.name.clone()),
            ..TensorProto::default()
        };
        let size = values.len();
        let source = self.source.weights;
        let positive = self.positive_scales;
        let mut pace = Pace { n_held: &mut self.n_held, advance: &mut *self.advance, source };
        let scales = if n_bytes < MIN_EXTERNAL {
            let mut raw = Vec::with_capacity(n_bytes);
            let scales = encode(parameter, &values, positive, &mut |bytes| {
                raw.extend_from_slice(bytes);
                pace.passed(bytes.len() * size / n_bytes.max(1))
            })?;
            tensor.raw_data = Some(raw);
            scales
        } else {
            let data = DataFile::in_folder(&mut self.data, self.folder)?;
            let offset = data.begin(n_bytes)?;
            let scales = encode(parameter, &values, positive, &mut |bytes| {
                data.append(bytes)?;
                pace.passed(bytes.len() * size / n_bytes.max(1))
            })?;
            place(&mut tensor, DATA_FILE, offset, n_bytes);
            scales
        };
        let mut tensors = vec![tensor];
        if !scales.is_empty() {
            tensors.push(self.scales(parameter, scales)?);
        }
        Ok(tensors)
    }

    fn scales(&mut self, parameter: &Parameter, bytes: Vec<u8>) -> Result<TensorProto> {
        let mut tensor = TensorProto {
            dims: scale_shape(parameter).into_iter().map(|n| n as i64).collect(),
            data_type: Some(parameter.scale.element()),
            name: Some(format!("{}{SCALE}", parameter.name)),
            ..TensorProto::default()
        };
        if bytes.len() < MIN_EXTERNAL {
            tensor.raw_data = Some(bytes);
            return Ok(tensor);
        }
        let data = DataFile::in_folder(&mut self.data, self.folder)?;
        let offset = data.begin(bytes.len())?;
        data.append(&bytes)?;
        place(&mut tensor, DATA_FILE, offset, bytes.len());
        Ok(tensor)
    }

    /// A tensor in a linked file, read once to see that it is finite.
    fn linked_tensor(
        &mut self,
        parameter: &Parameter,
        file: &str,
        offset: usize,
    ) -> Result<TensorProto> {
        let values = self.source.of(parameter)?;
        let Storage::Plain(float) = parameter.storage else { unreachable!("codes are written") };
        let n_bytes = values.len() * float.size();
        let mut tensor = TensorProto {
            dims: parameter.shape.iter().map(|&n| n as i64).collect(),
            data_type: Some(float.element()),
            name: Some(parameter.name.clone()),
            ..TensorProto::default()
        };
        place(&mut tensor, file, offset as u64, n_bytes);
        let source = self.source.weights;
        let mut pace = Pace { n_held: &mut self.n_held, advance: &mut *self.advance, source };
        let step = HELD / 8;
        for start in (0..values.len()).step_by(step) {
            let end = values.len().min(start + step);
            values.as_they_are(float, start..end)?;
            pace.passed(end - start)?;
        }
        self.n_linked += n_bytes as u64;
        Ok(tensor)
    }
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

/// The second file while it grows.
struct DataFile {
    path: PathBuf,
    file: BufWriter<File>,
    n_bytes: u64,
}

impl DataFile {
    /// The one in `folder`, begun when it is first needed.
    fn in_folder<'a>(slot: &'a mut Option<Self>, folder: &Path) -> Result<&'a mut Self> {
        if slot.is_none() {
            let path = folder.join(DATA_FILE);
            let file = File::create(&path);
            let file = file.with_context(|| format!("cannot create {}", path.display()))?;
            *slot = Some(Self { path, file: BufWriter::with_capacity(1 << 20, file), n_bytes: 0 });
        }
        Ok(slot.as_mut().expect("made above"))
    }

    /// Where a tensor of `n_bytes` goes.
    fn begin(&mut self, n_bytes: usize) -> Result<u64> {
        let to = if n_bytes < MIN_ALIGNED { CACHE_LINE } else { PAGE };
        let gap = self.n_bytes.next_multiple_of(to) - self.n_bytes;
        self.append(&[0; PAGE as usize][..gap as usize])?;
        Ok(self.n_bytes)
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

#[cfg(test)]
mod tests;
