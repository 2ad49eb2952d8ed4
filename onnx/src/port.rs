//! Inputs and outputs of a graph.

use std::fmt;

use anyhow::{Result, bail, ensure};
use ort::value::{Outlet, TensorElementType, ValueType};

use crate::{Data, Tensor};

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    /// One entry a dimension, outermost first; `None` where the graph leaves the size open.
    pub shape: Vec<Option<usize>>,
    pub element: ElementType,
}

/// What a [`Port`] carries. `F16`, `Bf16` and `I32` are converted from and to the `f32` and `i64` of
/// a [`Tensor`]; `Other` can be listed but not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ElementType {
    F32,
    F16,
    Bf16,
    I64,
    I32,
    Other(String),
}

impl Port {
    pub(crate) fn of(outlet: &Outlet) -> Self {
        Self::new(outlet.name(), outlet.dtype())
    }

    pub(crate) fn new(name: &str, dtype: &ValueType) -> Self {
        let shape = dtype
            .tensor_shape()
            .map(|shape| shape.iter().map(|&dim| usize::try_from(dim).ok()).collect())
            .unwrap_or_default();
        let element = match dtype.tensor_type() {
            Some(TensorElementType::Float32) => ElementType::F32,
            Some(TensorElementType::Float16) => ElementType::F16,
            Some(TensorElementType::Bfloat16) => ElementType::Bf16,
            Some(TensorElementType::Int64) => ElementType::I64,
            Some(TensorElementType::Int32) => ElementType::I32,
            _ => ElementType::Other(dtype.to_string()),
        };
        Self { name: name.to_owned(), shape, element }
    }

    /// Whether `tensor` may be given here.
    pub(crate) fn check(&self, tensor: &Tensor) -> Result<()> {
        let (name, element) = (&self.name, &self.element);
        match (&tensor.data, element) {
            (Data::F32(_), ElementType::F32 | ElementType::F16 | ElementType::Bf16)
            | (Data::I64(_), ElementType::I64 | ElementType::I32) => {}
            (Data::F32(_), _) => bail!("input `{name}` takes {element}, not f32"),
            (Data::I64(_), _) => bail!("input `{name}` takes {element}, not i64"),
        }
        ensure!(
            self.holds(&tensor.shape),
            "input `{name}` takes shape {}, not {:?}",
            Dims(&self.shape),
            tensor.shape
        );
        Ok(())
    }

    /// Whether `shape` fits.
    pub(crate) fn holds(&self, shape: &[usize]) -> bool {
        self.shape.len() == shape.len()
            && self.shape.iter().zip(shape).all(|(want, got)| want.is_none_or(|w| w == *got))
    }
}

impl ElementType {
    /// The same in ONNX Runtime, for those that can be run.
    pub(crate) fn of_tensor(&self) -> Option<TensorElementType> {
        Some(match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
            Self::I64 => TensorElementType::Int64,
            Self::I32 => TensorElementType::Int32,
            Self::Other(_) => return None,
        })
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
            Self::Bf16 => "bf16",
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

/// Ports for an error message.
pub(crate) fn names(ports: &[Port]) -> String {
    ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ")
}
