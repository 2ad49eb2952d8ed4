//! Copying numbers between a [`Tensor`] and ONNX Runtime's own, in the type that a graph has.

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use ort::value::{DynTensor, DynValue, TensorElementType};

use crate::{Data, Tensor};

/// Copies `data` into `into`, equally long: f32 to f16 or bf16, rounded to nearest, i64 to i32.
pub(crate) fn write(into: &mut DynTensor, data: &Data) -> Result<()> {
    fn fill<T, U: Copy>(to: &mut [T], from: &[U], of: impl Fn(U) -> T) {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = of(from));
    }
    match (data, *into.data_type()) {
        (Data::F32(data), TensorElementType::Float32) => {
            into.try_extract_tensor_mut::<f32>()?.1.copy_from_slice(data);
        }
        (Data::F32(data), TensorElementType::Float16) => {
            fill(into.try_extract_tensor_mut::<f16>()?.1, data, f16::from_f32);
        }
        (Data::F32(data), TensorElementType::Bfloat16) => {
            fill(into.try_extract_tensor_mut::<bf16>()?.1, data, bf16::from_f32);
        }
        (Data::I64(data), TensorElementType::Int64) => {
            into.try_extract_tensor_mut::<i64>()?.1.copy_from_slice(data);
        }
        (Data::I64(data), TensorElementType::Int32) => {
            let narrow = data.iter().map(|&value| i32::try_from(value));
            let narrow = narrow.collect::<Result<Vec<_>, _>>();
            let narrow = narrow.context("a value does not fit in i32")?;
            into.try_extract_tensor_mut::<i32>()?.1.copy_from_slice(&narrow);
        }
        (Data::F32(_), other) => bail!("{other} takes no f32"),
        (Data::I64(_), other) => bail!("{other} takes no i64"),
    }
    Ok(())
}

/// Copies an output, f16 and bf16 to f32 and i32 to i64.
pub(crate) fn read(value: &DynValue) -> Result<Tensor> {
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
        Some(TensorElementType::Bfloat16) => {
            let (shape, data) = value.try_extract_tensor::<bf16>()?;
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
        _ => bail!("{} is not supported; f32, f16, bf16, i64 and i32 are", value.dtype()),
    }
}

/// Copies a float tensor into `into`, equally long.
pub(crate) fn read_into(value: &DynTensor, into: &mut [f32]) -> Result<()> {
    match *value.data_type() {
        TensorElementType::Float32 => {
            into.copy_from_slice(value.try_extract_tensor::<f32>()?.1);
        }
        TensorElementType::Float16 => {
            let data = value.try_extract_tensor::<f16>()?.1;
            into.iter_mut().zip(data).for_each(|(to, from)| *to = from.to_f32());
        }
        TensorElementType::Bfloat16 => {
            let data = value.try_extract_tensor::<bf16>()?.1;
            into.iter_mut().zip(data).for_each(|(to, from)| *to = from.to_f32());
        }
        other => bail!("{other} is no float"),
    }
    Ok(())
}
