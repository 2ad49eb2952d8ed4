//! Tensors as files hold them: their types, and their numbers as bytes.

use anyhow::{Context, Result, bail};
use flow::checkpoint::{Dtype, Entry, View, Weights};
use tch::{Device, Kind, Tensor};

/// The tensor called `name`, flat, in the type it is stored in.
pub(crate) fn tensor(weights: &Weights, name: &str) -> Result<Tensor> {
    let View { dtype, bytes, .. } = weights.get(name).context("no such tensor")?;
    let kind = kind_of(dtype)?;
    let n = bytes.len() / kind.elt_size_in_bytes();
    Ok(Tensor::from_data_size(&bytes, &[n as i64], kind))
}

/// The libtorch type of a stored one.
pub(crate) fn kind_of(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => bail!("unsupported type {other:?}: only F32, F16 and BF16 are read"),
    })
}

/// A float tensor as a safetensors entry: f64 as f32, others in their own type.
pub(crate) fn entry(name: &str, tensor: &Tensor) -> Result<Entry<'static>> {
    let tensor = match tensor.kind() {
        Kind::Double => &tensor.to_kind(Kind::Float),
        _ => tensor,
    };
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        other => bail!("{name}: {other:?} is not written"),
    };
    Ok(Entry::raw(name, &shape, dtype, bytes_of(tensor)))
}

/// The f32 numbers of `tensor`, fetched from its device when they are written.
pub(crate) fn later(name: String, tensor: &Tensor) -> Entry<'static> {
    let (tensor, n) = (tensor.shallow_clone(), tensor.numel());
    Entry::made(name, &[n], Dtype::F32, move || Ok(bytes_of(&tensor.to_kind(Kind::Float))))
}

/// The numbers of a tensor as they lie in memory.
pub(crate) fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; flat.numel() * flat.kind().elt_size_in_bytes()];
    flat.copy_data_u8(&mut bytes, flat.numel());
    bytes
}
