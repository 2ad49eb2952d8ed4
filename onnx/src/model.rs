//! One ONNX graph in an ONNX Runtime session.

use std::{
    borrow::Cow,
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::f16;
use ort::{
    session::{
        OutputSelector, RunOptions, Session, SessionInputValue,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
    value::{DynValue, TensorElementType, TensorRef, ValueType},
};

use crate::{Data, Tensor, library::environment};

/// How a [`Model`] runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads that share one operator, at least 1. Operators run one after the other.
    pub threads: usize,
}

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    /// One entry a dimension, outermost first; `None` where the graph leaves the size open.
    pub shape: Vec<Option<usize>>,
    pub element: ElementType,
}

/// What a [`Port`] carries. `F16` and `I32` are converted from and to the `f32` and `i64` of a
/// [`Tensor`]; `Other` can be listed but not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ElementType {
    F32,
    F16,
    I64,
    I32,
    Other(String),
}

/// A loaded ONNX graph.
///
/// ### Why `run` takes `&mut self`
/// ONNX Runtime sessions are not safe to run from two threads at once in every configuration, so
/// a model belongs to one worker; workers that share a file open it once each.
pub struct Model {
    session: Session,
    path: PathBuf,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Model {
    /// Opens an `.onnx` file (external data beside it included), optimised for the CPU.
    ///
    /// # Errors
    /// ONNX Runtime is not installed (see [`crate::library`]), or the file is missing, not an
    /// ONNX model, or uses something this ONNX Runtime does not have.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        let path = path.as_ref();
        ensure!(options.threads > 0, "an ONNX model needs at least one thread");
        ensure!(path.is_file(), "no such ONNX model: {}", path.display());
        let environment = environment()?;
        let session = builder(SessionBuilder::new(&environment)?, options.threads)
            .map_err(|error| one_line(error.message()))
            .context("cannot configure ONNX Runtime")?
            .commit_from_file(path)
            .map_err(|error| one_line(error.message()))
            .with_context(|| format!("cannot open ONNX model {}", path.display()))?;
        let ports = |outlets: &[ort::value::Outlet]| {
            outlets.iter().map(|outlet| Port::new(outlet.name(), outlet.dtype())).collect()
        };
        let (inputs, outputs) = (ports(session.inputs()), ports(session.outputs()));
        Ok(Self { session, path: path.to_owned(), inputs, outputs })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Inputs that a run must give, in the graph's order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Outputs that a run can ask for, in the graph's order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The value of `key` in the model's `metadata_props`, if it has one.
    pub fn metadata(&self, key: &str) -> Option<String> {
        self.session.metadata().ok()?.custom(key)
    }

    /// Runs the graph once and returns the tensors named in `outputs`, in that order.
    ///
    /// # Errors
    /// An input is missing, unknown, given twice, or of another element type, rank or fixed size
    /// than the graph declares; an output is unknown; or the graph itself fails.
    pub fn run(&mut self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<Vec<Tensor>> {
        self.check(inputs, outputs)
            .with_context(|| format!("cannot run ONNX model {}", self.path.display()))?;
        let narrowed = inputs
            .iter()
            .map(|&(name, tensor)| {
                let port = self.inputs.iter().find(|port| port.name == name).expect("checked");
                Narrowed::new(tensor, &port.element).with_context(|| format!("input `{name}`"))
            })
            .collect::<Result<Vec<_>>>()?;
        let values = inputs
            .iter()
            .zip(&narrowed)
            .map(|((name, tensor), narrowed)| {
                Ok((Cow::Borrowed(*name), narrowed.value(&tensor.shape)?))
            })
            .collect::<Result<Vec<(Cow<'_, str>, SessionInputValue<'_>)>>>()?;
        let selector = outputs
            .iter()
            .fold(OutputSelector::no_default(), |selector, name| selector.with(*name));
        let options = RunOptions::new()?.with_outputs(selector);
        let results = self
            .session
            .run_with_options(values, &options)
            .map_err(|error| one_line(error.message()))
            .with_context(|| format!("ONNX model {} failed", self.path.display()))?;
        outputs
            .iter()
            .map(|name| {
                let value = results.get(name).context("ONNX Runtime returned no such output");
                value
                    .and_then(widen)
                    .with_context(|| format!("output `{name}` of {}", self.path.display()))
            })
            .collect()
    }

    fn check(&self, inputs: &[(&str, &Tensor)], outputs: &[&str]) -> Result<()> {
        for (i, (name, tensor)) in inputs.iter().enumerate() {
            let port = self.inputs.iter().find(|port| port.name == *name).ok_or_else(|| {
                anyhow!("no input `{name}`; the inputs are {}", names(&self.inputs))
            })?;
            ensure!(
                inputs[..i].iter().all(|(earlier, _)| earlier != name),
                "input `{name}` is given twice"
            );
            port.check(tensor)?;
        }
        let missing = self
            .inputs
            .iter()
            .filter(|port| inputs.iter().all(|(name, _)| *name != port.name))
            .cloned()
            .collect::<Vec<_>>();
        ensure!(missing.is_empty(), "missing input {}", names(&missing));
        ensure!(!outputs.is_empty(), "no output asked for");
        for name in outputs {
            ensure!(
                self.outputs.iter().any(|port| port.name == *name),
                "no output `{name}`; the outputs are {}",
                names(&self.outputs)
            );
        }
        Ok(())
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.path)
            .field("inputs", &self.inputs)
            .field("outputs", &self.outputs)
            .finish_non_exhaustive()
    }
}

impl Port {
    fn new(name: &str, dtype: &ValueType) -> Self {
        let shape = dtype
            .tensor_shape()
            .map(|shape| shape.iter().map(|&dim| usize::try_from(dim).ok()).collect())
            .unwrap_or_default();
        let element = match dtype.tensor_type() {
            Some(TensorElementType::Float32) => ElementType::F32,
            Some(TensorElementType::Float16) => ElementType::F16,
            Some(TensorElementType::Int64) => ElementType::I64,
            Some(TensorElementType::Int32) => ElementType::I32,
            _ => ElementType::Other(dtype.to_string()),
        };
        Self { name: name.to_owned(), shape, element }
    }

    fn check(&self, tensor: &Tensor) -> Result<()> {
        let (name, element) = (&self.name, &self.element);
        match (&tensor.data, element) {
            (Data::F32(_), ElementType::F32 | ElementType::F16)
            | (Data::I64(_), ElementType::I64 | ElementType::I32) => {}
            (Data::F32(_), _) => bail!("input `{name}` takes {element}, not f32"),
            (Data::I64(_), _) => bail!("input `{name}` takes {element}, not i64"),
        }
        let fits = self.shape.len() == tensor.shape.len()
            && self
                .shape
                .iter()
                .zip(&tensor.shape)
                .all(|(want, got)| want.is_none_or(|w| w == *got));
        ensure!(fits, "input `{name}` takes shape {}, not {:?}", Dims(&self.shape), tensor.shape);
        Ok(())
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {} {}", self.name, self.element, Dims(&self.shape))
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::Other(name) => name,
        })
    }
}

/// A shape with `?` where the graph leaves the size open.
struct Dims<'a>(&'a [Option<usize>]);

impl fmt::Display for Dims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, dim) in self.0.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            match dim {
                Some(dim) => write!(f, "{comma}{dim}")?,
                None => write!(f, "{comma}?")?,
            }
        }
        f.write_str("]")
    }
}

/// A tensor's elements in the type that the graph takes; borrowed where that is their own.
enum Narrowed<'a> {
    F32(&'a [f32]),
    F16(Vec<f16>),
    I64(&'a [i64]),
    I32(Vec<i32>),
}

impl<'a> Narrowed<'a> {
    fn new(tensor: &'a Tensor, element: &ElementType) -> Result<Self> {
        Ok(match (&tensor.data, element) {
            (Data::F32(data), ElementType::F16) => {
                Self::F16(data.iter().map(|&value| f16::from_f32(value)).collect())
            }
            (Data::F32(data), _) => Self::F32(data),
            (Data::I64(data), ElementType::I32) => {
                let narrow =
                    data.iter().map(|&value| i32::try_from(value)).collect::<Result<_, _>>();
                Self::I32(narrow.context("a value does not fit in i32")?)
            }
            (Data::I64(data), _) => Self::I64(data),
        })
    }

    fn value<'s>(&'s self, shape: &[usize]) -> Result<SessionInputValue<'s>> {
        let shape = shape.to_vec();
        Ok(match self {
            Self::F32(data) => TensorRef::from_array_view((shape, *data))?.into(),
            Self::F16(data) => TensorRef::from_array_view((shape, data.as_slice()))?.into(),
            Self::I64(data) => TensorRef::from_array_view((shape, *data))?.into(),
            Self::I32(data) => TensorRef::from_array_view((shape, data.as_slice()))?.into(),
        })
    }
}

fn builder(builder: SessionBuilder, threads: usize) -> ort::Result<SessionBuilder> {
    Ok(builder
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_parallel_execution(false)?
        .with_inter_threads(1)?
        .with_intra_threads(threads)?
        .with_deterministic_compute(true)?)
}

/// Copies an output, f16 to f32 and i32 to i64.
fn widen(value: &DynValue) -> Result<Tensor> {
    fn dims(shape: &[i64]) -> Vec<usize> {
        shape.iter().map(|&dim| dim as usize).collect()
    }
    match value.dtype().tensor_type() {
        Some(TensorElementType::Float32) => {
            let (shape, data) = value.try_extract_tensor::<f32>()?;
            Tensor::f32(dims(shape), data.to_vec())
        }
        Some(TensorElementType::Float16) => {
            let (shape, data) = value.try_extract_tensor::<f16>()?;
            Tensor::f32(dims(shape), data.iter().map(|value| value.to_f32()).collect())
        }
        Some(TensorElementType::Int64) => {
            let (shape, data) = value.try_extract_tensor::<i64>()?;
            Tensor::i64(dims(shape), data.to_vec())
        }
        Some(TensorElementType::Int32) => {
            let (shape, data) = value.try_extract_tensor::<i32>()?;
            Tensor::i64(dims(shape), data.iter().map(|&value| value.into()).collect())
        }
        _ => bail!("{} is not supported; f32, f16, i64 and i32 are", value.dtype()),
    }
}

fn names(ports: &[Port]) -> String {
    ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ")
}

/// ONNX Runtime's messages may run over several lines; ours are one.
fn one_line(message: &str) -> anyhow::Error {
    anyhow!(message.split_whitespace().collect::<Vec<_>>().join(" "))
}
