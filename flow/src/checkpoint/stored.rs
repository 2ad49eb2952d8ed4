//! A tensor as a file holds it, and the floats that it stands for.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

use super::blocks::Blocks;

/// How a file holds numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coding {
    /// One after the other.
    Plain(Dtype),
    /// In blocks that share a scale.
    Blocks(Blocks),
}

/// A tensor of a mapped file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) coding: Coding,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) range: Range<usize>,
}

impl Stored {
    /// Its outermost axis; a number alone is one row.
    pub(super) fn n_rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

impl Coding {
    /// Numbers that lie together, and their bytes.
    pub(super) fn unit(self) -> (usize, usize) {
        match self {
            Self::Plain(dtype) => (1, dtype.bitsize() / 8),
            Self::Blocks(blocks) => (blocks.len(), blocks.n_bytes()),
        }
    }

    /// The type that [`Coding::widened`] gives.
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2) => Dtype::BF16,
            Self::Plain(Dtype::F64) | Self::Blocks(_) => Dtype::F32,
            Self::Plain(dtype) => dtype,
        }
    }

    /// Floats that libraries compute with, little-endian: eight bits become bf16 and blocks f32 exactly, 64 bits
    /// are rounded to f32. All else stays as it is.
    pub(super) fn widened(self, bytes: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
        let of_f32 = |values: &mut dyn Iterator<Item = f32>| {
            Cow::Owned(values.flat_map(f32::to_le_bytes).collect())
        };
        let of_fp8 = |value: fn(u8) -> f32| {
            let table: Vec<[u8; 2]> =
                (0..=255).map(|byte| bf16::from_f32(value(byte)).to_le_bytes()).collect();
            Cow::Owned(bytes.iter().flat_map(|&byte| table[usize::from(byte)]).collect())
        };
        match self {
            Self::Plain(Dtype::F8_E4M3) => of_fp8(e4m3),
            Self::Plain(Dtype::F8_E5M2) => of_fp8(e5m2),
            Self::Plain(Dtype::F64) => {
                let eight = |b: &[u8]| f64::from_le_bytes(b.try_into().expect("eight bytes"));
                of_f32(&mut bytes.chunks_exact(8).map(|bytes| eight(bytes) as f32))
            }
            Self::Blocks(blocks) => of_f32(&mut blocks.decode(&bytes).into_iter()),
            Self::Plain(_) => bytes,
        }
    }
}

/// The number of a byte with four bits of exponent (bias 7) and three of mantissa; it has no infinities.
///
/// Source: OCP 8-bit Floating Point Specification 1.0, E4M3.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte < 128 { size } else { -size }
}

/// The number of a byte with five bits of exponent and two of mantissa: the upper half of an f16.
fn e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}
