//! Where the values of a graph's parameters come from: a checkpoint with its adapters.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::{Dtype, View, Weights};
use flow::lora::{self, Lora};
use flow::pipeline::Component;

use crate::element::Float;
use crate::graph::Parameter;

pub mod encode;

/// A checkpoint with adapters merged into it.
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

impl<'a> Source<'a> {
    /// The values of the tensor called `name`, of `shape`.
    ///
    /// # Errors
    /// When it is missing, no float or of another shape, or an adapter cannot be read.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Values<'a>> {
        let path = self.weights.path().display();
        let view = self.weights.get(name);
        let view = view.with_context(|| format!("{path}: no tensor {name} in it"))?;
        ensure!(
            view.shape == shape,
            "{path}: {name} has shape {:?} instead of {shape:?}",
            view.shape
        );
        let float = Float::of(view.dtype).with_context(|| {
            format!("{path}: {name} has type {:?} instead of a float", view.dtype)
        })?;
        let merged = lora::merged(self.loras, self.component, self.weights, name)?;
        Ok(Values { name: format!("{path}: {name}"), view, float, merged })
    }

    /// The values of `parameter`.
    ///
    /// # Errors
    /// As [`Source::values`].
    pub fn of(&self, parameter: &Parameter) -> Result<Values<'a>> {
        self.values(&parameter.name, &parameter.shape)
    }

    /// Whether an adapter changes `name`.
    pub fn is_adapted(&self, name: &str) -> bool {
        self.loras.iter().any(|lora| lora.changes_tensor(self.component, name))
    }
}

/// The values of one tensor, read when they are asked for.
pub struct Values<'a> {
    /// File and tensor, for messages.
    name: String,
    view: View<'a>,
    float: Float,
    merged: Option<Vec<f32>>,
}

impl Values<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.view.bytes.len() / self.float.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// File and tensor.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Numbers of `range` as f32.
    ///
    /// # Errors
    /// When one is not finite.
    pub fn f32(&self, range: Range<usize>) -> Result<Cow<'_, [f32]>> {
        let values: Cow<'_, [f32]> = if let Some(merged) = &self.merged {
            merged[range.clone()].into()
        } else {
            let bytes = self.bytes(range.clone());
            let part = View { bytes: bytes.into(), ..self.view };
            part.to_f32().map_err(|why| anyhow!("{}: {why}", self.name))?.into()
        };
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(self.not_finite(range.start + at, values[at]));
        }
        Ok(values)
    }

    /// The bytes of `range` where they can be used as they are: of type `float`, without adapters.
    ///
    /// # Errors
    /// When a number is not finite.
    pub fn as_they_are(&self, float: Float, range: Range<usize>) -> Result<Option<&[u8]>> {
        if self.float != float || self.merged.is_some() {
            return Ok(None);
        }
        let bytes = self.bytes(range.clone());
        if !is_finite(self.float, bytes) {
            self.f32(range)?;
        }
        Ok(Some(bytes))
    }

    fn bytes(&self, range: Range<usize>) -> &[u8] {
        let size = self.float.size();
        &self.view.bytes[range.start * size..range.end * size]
    }

    fn not_finite(&self, at: usize, value: f32) -> anyhow::Error {
        anyhow!("{} holds {value} at {at}: weights must be finite", self.name)
    }
}

/// Whether no number of `bytes` has all bits of its exponent set: one more in its exponent would then carry into
/// the bit of its sign. Several numbers lie in a word, each with the exponent's bits alone, so that none carries
/// into another.
fn is_finite(float: Float, bytes: &[u8]) -> bool {
    let (exponent, one): (u64, u64) = match float {
        Float::F16 => (0x7c00_7c00_7c00_7c00, 0x0400_0400_0400_0400),
        Float::Bf16 => (0x7f80_7f80_7f80_7f80, 0x0080_0080_0080_0080),
        Float::F32 => (0x7f80_0000_7f80_0000, 0x0080_0000_0080_0000),
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let carried = |bits: u64, word: &[u8; 8]| bits | ((u64::from_le_bytes(*word) & exponent) + one);
    let carried = words.iter().fold(carried(0, &last), carried);
    carried & (exponent + one) == 0
}

/// Index and value of the first number of `bytes` that is not finite.
pub(crate) fn first_not_finite(float: Float, bytes: &[u8]) -> Option<(usize, f32)> {
    if is_finite(float, bytes) {
        return None;
    }
    let (dtype, shape) = (dtype(float), [bytes.len() / float.size()]);
    let values = View { dtype, shape: &shape, bytes: bytes.into() }.to_f32().ok()?;
    values.into_iter().enumerate().find(|(_, value)| !value.is_finite())
}

/// The checkpoint's own type for `float`.
pub fn dtype(float: Float) -> Dtype {
    match float {
        Float::F32 => Dtype::F32,
        Float::F16 => Dtype::F16,
        Float::Bf16 => Dtype::BF16,
    }
}

#[cfg(test)]
mod tests {
    use flow::checkpoint::{Entry, write_tensors};

    use super::*;

    #[test]
    fn a_number_that_is_not_finite_is_found_in_every_type() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        // Seven numbers do not fill words of eight bytes.
        let places = [0, 1, 3, 6].into_iter().flat_map(|at| {
            [(1.0, true), (f32::NAN, false), (f32::NEG_INFINITY, false)].map(|what| (at, what))
        });
        for (at, (value, is_sound)) in places {
            for float in [Float::F32, Float::F16, Float::Bf16] {
                let mut values = [0.5, -2.0, 3.0, -65504.0, 0.0, -0.0, 6e-8];
                values[at] = value;
                let entry = Entry::raw("a", &[7], dtype(float), float.bytes(&values));
                write_tensors(&path, &[entry], &[]).unwrap();
                let weights = Weights::open_file(&path).unwrap();
                let values = Source::from(&weights).values("a", &[7]).unwrap();
                let found = values.as_they_are(float, 0..7).map(|bytes| bytes.unwrap().len());
                assert_eq!(found.is_ok(), is_sound, "{float:?} {value}");
                if let Err(error) = found {
                    let (message, place) = (error.to_string(), format!("at {at}:"));
                    assert!(message.contains("a holds") && message.contains(&place), "{message}");
                }
                assert_eq!(values.f32(0..7).is_ok(), is_sound);
                assert!(values.f32(4..6).is_ok());
            }
        }
    }
}
