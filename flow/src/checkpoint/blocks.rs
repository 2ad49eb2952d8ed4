//! Numbers in blocks that share a scale, as GGUF files hold them.
//!
//! Source: `gguf.quants` of the package gguf 0.19, whose results these are to the bit: scales are f16, all else
//! is computed in f32 in this order.

use half::f16;

/// A type of GGUF whose numbers lie in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocks {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Numbers in a block of the first five, and of the others.
const SHORT: usize = 32;
const LONG: usize = 256;

impl Blocks {
    /// Numbers in a block.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => SHORT,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => LONG,
        }
    }

    /// Bytes of a block.
    pub(super) fn n_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// The numbers of whole blocks.
    pub(super) fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / self.n_bytes() * self.len()];
        let blocks = bytes.chunks_exact(self.n_bytes());
        for (block, out) in blocks.zip(values.chunks_exact_mut(self.len())) {
            match self {
                Self::Q4_0 => {
                    let value = |q| float(block) * f32::from(q as i8 - 8);
                    short(out, &block[2..], None, value);
                }
                Self::Q4_1 => {
                    let value = |q| float(block) * f32::from(q) + float(&block[2..]);
                    short(out, &block[4..], None, value);
                }
                Self::Q5_0 => {
                    let value = |q| float(block) * f32::from(q as i8 - 16);
                    short(out, &block[6..], Some(&block[2..6]), value);
                }
                Self::Q5_1 => {
                    let value = |q| float(block) * f32::from(q) + float(&block[2..]);
                    short(out, &block[8..], Some(&block[4..8]), value);
                }
                Self::Q8_0 => {
                    let scale = float(block);
                    for (out, q) in out.iter_mut().zip(&block[2..]) {
                        *out = f32::from(*q as i8) * scale;
                    }
                }
                Self::Q2K => q2_k(block, out),
                Self::Q3K => q3_k(block, out),
                Self::Q4K => q4_k(block, out),
                Self::Q5K => q5_k(block, out),
                Self::Q6K => q6_k(block, out),
            }
        }
        values
    }
}

/// The f16 that `bytes` begin with.
fn float(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// 32 numbers of four bits: the low halves of 16 bytes, then the high ones; a fifth bit each from `fifths`.
fn short(out: &mut [f32], nibbles: &[u8], fifths: Option<&[u8]>, value: impl Fn(u8) -> f32) {
    for (i, out) in out.iter_mut().enumerate() {
        let low = nibbles[i % 16] >> (4 * (i / 16)) & 15;
        let high = fifths.map_or(0, |bits| (bits[i / 8] >> (i % 8) & 1) << 4);
        *out = value(low | high);
    }
}

/// Scales and minima of four bits for 16 numbers each, numbers of two.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, qs, d, dmin) =
        (&block[..16], &block[16..80], float(&block[80..]), float(&block[82..]));
    for (i, out) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        let q = qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        *out = (d * f32::from(scale & 15)) * f32::from(q) - dmin * f32::from(scale >> 4);
    }
}

/// Scales of six bits for 16 numbers each, numbers of two bits and one more that stands apart.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (mask, qs, packed, d) =
        (&block[..32], &block[32..96], &block[96..108], float(&block[108..]));
    let scale = |at: usize| {
        let low = packed[at % 8] >> (4 * (at / 8)) & 15;
        let high = packed[8 + at % 4] >> (2 * (at / 4)) & 3;
        f32::from((low | high << 4) as i8 - 32)
    };
    for (i, out) in out.iter_mut().enumerate() {
        let low = qs[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        // The offset is 0 where the bit is 1.
        let offset = (mask[i % 32] >> (i / 32) & 1 ^ 1) << 2;
        *out = (d * scale(i / 16)) * f32::from(low as i8 - offset as i8);
    }
}

/// Scale and minimum of the 32 numbers `at`, six bits each in 12 bytes.
fn scale_and_minimum(packed: &[u8], at: usize) -> (f32, f32) {
    let (scale, minimum) = if at < 4 {
        (packed[at] & 63, packed[at + 4] & 63)
    } else {
        let (low, scales, minima) = (packed[at + 4], packed[at - 4], packed[at]);
        (low & 0xf | scales >> 2 & 0x30, low >> 4 | minima >> 2 & 0x30)
    };
    (f32::from(scale), f32::from(minimum))
}

/// Scales and minima for 32 numbers each, numbers of four bits.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (packed, qs) = (&block[4..16], &block[16..144]);
    long(block, packed, out, |i| qs[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15);
}

/// As [`q4_k`], with a fifth bit that stands apart.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (packed, fifths, qs) = (&block[4..16], &block[16..48], &block[48..176]);
    long(block, packed, out, |i| {
        let low = qs[i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
        low | (fifths[i % 32] >> (i / 32) & 1) << 4
    });
}

fn long(block: &[u8], packed: &[u8], out: &mut [f32], q: impl Fn(usize) -> u8) {
    let (d, dmin) = (float(block), float(&block[2..]));
    for (i, out) in out.iter_mut().enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, i / 32);
        *out = (d * scale) * f32::from(q(i)) - dmin * minimum;
    }
}

/// Signed scales for 16 numbers each, numbers of four bits and two more that stand apart.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) =
        (&block[..128], &block[128..192], &block[192..208], float(&block[208..]));
    for (i, out) in out.iter_mut().enumerate() {
        let q = low[i / 128 * 64 + i % 64] >> (4 * (i / 64 % 2)) & 15;
        let q = q | (high[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3) << 4;
        *out = (d * f32::from(scales[i / 16] as i8)) * f32::from(q as i8 - 32);
    }
}
