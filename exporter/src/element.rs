//! Element types of floats.

use flow::checkpoint::Dtype;
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};

use crate::proto::element;

/// A type of floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Float {
    /// bfloat16: 8 bits of precision, the range of f32.
    Bf16,
    /// IEEE half: 11 bits, up to 65504.
    F16,
    /// IEEE single.
    F32,
}

impl Float {
    /// `TensorProto.DataType`.
    pub fn element(self) -> i32 {
        match self {
            Self::F32 => element::FLOAT,
            Self::F16 => element::FLOAT16,
            Self::Bf16 => element::BFLOAT16,
        }
    }

    /// Bytes of a number.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The type of a checkpoint's tensor, if it is one of these.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::F16 => Some(Self::F16),
            Dtype::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// The nearest number of this type.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }

    /// Appends `values` of this type, little-endian.
    pub fn append(self, bytes: &mut Vec<u8>, values: &[f32]) {
        let start = bytes.len();
        bytes.resize(start + values.len() * self.size(), 0);
        let to = &mut bytes[start..];
        let pairs = to.chunks_exact_mut(2);
        match self {
            Self::F32 => to
                .chunks_exact_mut(4)
                .zip(values)
                .for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes())),
            Self::F16 => {
                let mut halves = vec![f16::ZERO; values.len()];
                halves.convert_from_f32_slice(values);
                pairs.zip(halves).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
            }
            Self::Bf16 => pairs
                .zip(values)
                .for_each(|(to, &x)| to.copy_from_slice(&bf16::from_f32(x).to_le_bytes())),
        }
    }

    /// `values` of this type, little-endian.
    pub fn bytes(self, values: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(values.len() * self.size());
        self.append(&mut bytes, values);
        bytes
    }
}
