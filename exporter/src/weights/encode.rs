//! Numbers as a graph stores them: converted, or as codes with scales.
//!
//! Integers of b bits: code q stands for s·q with q in −2^(b−1) … 2^(b−1) − 1, where `MatMulNBits` wants
//! q + 2^(b−1), without a sign. The scale of a block is its extreme number over −2^(b−1), so that the
//! extreme is exact and no code is left out; where scales must be positive it is the least that holds all.
//! fp8 (E4M3): the largest magnitude becomes 448. Codes are chosen for the scale as it is stored.

use std::ops::Range;

use anyhow::{Result, bail, ensure};
use rayon::prelude::*;

use super::{Values, first_not_finite};
use crate::element::Float;
use crate::graph::Parameter;
use crate::precision::{Code, Storage};

/// Elements converted at a time.
const CHUNK: usize = 1 << 18;
/// Chunks converted before they are handed on, for each of at most [`MAX_THREADS`] threads.
const AHEAD: usize = 4;
const MAX_THREADS: usize = 16;
/// Largest number of E4M3.
const E4M3_MAX: f32 = 448.0;

/// Takes what was encoded, piece by piece.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;

/// How scales are chosen.
#[derive(Clone, Copy)]
struct Scales {
    code: Code,
    float: Float,
    positive: bool,
}

/// Hands `values` as `parameter` stores them to `sink`, and returns the bytes of the scales.
///
/// # Errors
/// When a number is not finite or does not fit the type, or `sink` fails.
pub fn encode(
    parameter: &Parameter,
    values: &Values<'_>,
    positive_scales: bool,
    sink: Sink<'_>,
) -> Result<Vec<u8>> {
    match parameter.storage {
        Storage::Plain(float) => plain(float, values, sink).map(|()| Vec::new()),
        Storage::Coded { code, block } => {
            let scales = Scales { code, float: parameter.scale, positive: positive_scales };
            let n_in = parameter.shape[1];
            let whole = if block.is_none() || parameter.whole_scale {
                Some(whole_scale(scales, values)?)
            } else {
                None
            };
            let block = block.unwrap_or(n_in);
            if parameter.transposed {
                columns(scales, values, n_in, block, whole, sink)
            } else {
                rows(scales, values, n_in, block, whole, sink)
            }
        }
    }
}

fn plain(float: Float, values: &Values<'_>, sink: Sink<'_>) -> Result<()> {
    let make = |range: Range<usize>| {
        if let Some(bytes) = values.as_they_are(float, range.clone())? {
            return Ok(bytes.to_vec());
        }
        let part = values.f32(range)?;
        let bytes = float.bytes(&part);
        if float == Float::F16
            && let Some((at, _)) = first_not_finite(float, &bytes)
        {
            bail!(
                "{} holds {}, beyond f16: choose another --precision, or bf16",
                values.name(),
                part[at]
            );
        }
        Ok(bytes)
    };
    in_order(values.len(), CHUNK, make, |bytes| sink(&bytes))
}

/// Codes `[N, K]`, blocks along rows, the last of each row filled up; scales `[N, ⌈K/block⌉]`.
fn rows(
    scales: Scales,
    values: &Values<'_>,
    n_in: usize,
    block: usize,
    whole: Option<f32>,
    sink: Sink<'_>,
) -> Result<Vec<u8>> {
    let make = |range: Range<usize>| {
        let (mut of_blocks, mut bytes, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        for row in values.f32(range)?.chunks_exact(n_in) {
            for part in row.chunks(block) {
                let scale = match whole {
                    Some(scale) => scale,
                    None => scales.of(part, values)?,
                };
                of_blocks.push(scale);
                codes.clear();
                scales.append(&mut codes, part, scale);
                if scales.code != Code::E4m3 {
                    // Without a sign; what fills up stands for 0.
                    for code in &mut codes {
                        *code = code.wrapping_add(scales.half());
                    }
                    codes.resize(block, scales.half());
                }
                pack(scales.code, &codes, &mut bytes);
            }
        }
        Ok((bytes, of_blocks))
    };
    let mut all = Vec::new();
    in_order(values.len(), (CHUNK / n_in).max(1) * n_in, make, |(bytes, of_blocks)| {
        all.extend(of_blocks);
        sink(&bytes)
    })?;
    Ok(scales.float.bytes(&all))
}

/// Codes `[K, N]`, blocks along columns; scales `[⌈K/block⌉, N]`, or one.
fn columns(
    scales: Scales,
    values: &Values<'_>,
    n_in: usize,
    block: usize,
    whole: Option<f32>,
    sink: Sink<'_>,
) -> Result<Vec<u8>> {
    let (values_f32, n_out) = (values.f32(0..values.len())?, values.len() / n_in);
    let make = |range: Range<usize>| {
        let (mut of_blocks, mut bytes, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        let mut band = vec![0; range.len() * n_out];
        for (column, row) in values_f32.chunks_exact(n_in).enumerate() {
            let part = &row[range.clone()];
            let scale = match whole {
                Some(scale) => scale,
                None => scales.of(part, values)?,
            };
            if whole.is_none() {
                of_blocks.push(scale);
            }
            codes.clear();
            scales.append(&mut codes, part, scale);
            for (i, code) in codes.iter().enumerate() {
                band[i * n_out + column] = *code;
            }
        }
        pack(scales.code, &band, &mut bytes);
        Ok((bytes, of_blocks))
    };
    let mut all = Vec::new();
    let height = if whole.is_some() { block.min(32) } else { block };
    in_order(n_in, height, make, |(bytes, of_blocks)| {
        all.extend(of_blocks);
        sink(&bytes)
    })?;
    all.extend(whole);
    Ok(scales.float.bytes(&all))
}

/// Hands `take` what `make` makes of each piece of `step` of `0..n`, in order; several are made at a time.
fn in_order<T: Send>(
    n: usize,
    step: usize,
    make: impl Fn(Range<usize>) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let at_once = step * AHEAD * rayon::current_num_threads().min(MAX_THREADS);
    for first in (0..n).step_by(at_once) {
        let starts: Vec<usize> = (first..n.min(first + at_once)).step_by(step).collect();
        let make = |start: usize| make(start..n.min(start + step));
        let made: Vec<Result<T>> = starts.into_par_iter().map(make).collect();
        made.into_iter().try_for_each(|made| take(made?))?;
    }
    Ok(())
}

fn whole_scale(scales: Scales, values: &Values<'_>) -> Result<f32> {
    let mut extremes = [0.0f32; 2];
    let make = |range: Range<usize>| {
        let part = values.f32(range)?;
        let low = part.iter().copied().fold(0.0, f32::min);
        Ok([low, part.iter().copied().fold(0.0, f32::max)])
    };
    in_order(values.len(), CHUNK, make, |[low, high]| {
        extremes = [extremes[0].min(low), extremes[1].max(high)];
        Ok(())
    })?;
    scales.of(&extremes, values)
}

/// Codes as bytes: of four bits two to a byte, the first in the lower half.
fn pack(code: Code, codes: &[u8], bytes: &mut Vec<u8>) {
    if code == Code::Int4 {
        bytes.extend(codes.chunks_exact(2).map(|pair| (pair[0] & 15) | (pair[1] << 4)));
    } else {
        bytes.extend_from_slice(codes);
    }
}

impl Scales {
    /// 2^(b−1).
    fn half(self) -> u8 {
        if self.code == Code::Int4 { 8 } else { 128 }
    }

    /// The scale of `block` as it is stored.
    fn of(self, block: &[f32], values: &Values<'_>) -> Result<f32> {
        let low = block.iter().copied().fold(0.0, f32::min);
        let high = block.iter().copied().fold(0.0, f32::max);
        let half = f32::from(self.half());
        let exact = match self.code {
            Code::E4m3 => high.max(-low) / E4M3_MAX,
            _ if self.positive => (high / (half - 1.0)).max(-low / half),
            _ if high > -low => -high / half,
            _ => -low / half,
        };
        let scale = self.float.round(exact);
        ensure!(
            scale.is_finite(),
            "{}: its numbers are beyond scales of type {}",
            values.name(),
            self.float.name()
        );
        // Any scale does for zeros, and a kernel may refuse 0.
        Ok(if scale == 0.0 { 1.0 } else { scale })
    }

    /// Codes of `block`, integers in two's complement.
    fn append(self, codes: &mut Vec<u8>, block: &[f32], scale: f32) {
        let by = 1.0 / scale;
        if self.code == Code::E4m3 {
            codes.extend(block.iter().map(|x| e4m3(x * by)));
            return;
        }
        let half = f32::from(self.half());
        // Beside this number lie integers: adding it rounds to the nearest, ties to even.
        let magic = 12_582_912.0f32;
        let code = |x: &f32| ((x * by).clamp(-half, half - 1.0) + magic).to_bits() as u8;
        codes.extend(block.iter().map(code));
    }
}

/// The nearest E4M3 number, ties to even, limited to ±448.
fn e4m3(x: f32) -> u8 {
    let (bits, sign) = (x.abs().to_bits(), if x.is_sign_negative() { 0x80 } else { 0 });
    // The smallest normal number is 2⁻⁶; below, numbers are multiples of 2⁻⁹.
    let code = if bits < 121 << 23 {
        (x.abs() * 512.0 + 12_582_912.0).to_bits() & 0xff
    } else {
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        ((rounded >> 20) - (120 << 3)).min(0x7e)
    };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use flow::checkpoint::{Entry, Weights, write_tensors};
    use flow::noise::Noise;

    use super::*;
    use crate::weights::Source;

    /// `ml_dtypes.float8_e4m3fn` of numpy for the same numbers.
    #[test]
    fn eight_bit_floats_are_those_of_ml_dtypes() {
        for (x, code) in [
            (0.0, 0x00),
            (-0.0, 0x80),
            (1.0, 0x38),
            (-1.0, 0xb8),
            (448.0, 0x7e),
            (1e6, 0x7e),
            (-448.0, 0xfe),
            (0.015_625, 0x08),
            (0.001_953_125, 0x01),
            (0.000_976_562_5, 0x00),
            (0.002_929_687_5, 0x02),
            (0.014_648_437_5, 0x08),
            (17.0, 0x58),
            (17.1, 0x59),
            (19.0, 0x5a),
            (0.3, 0x2a),
            (-3.3, 0xc5),
        ] {
            assert_eq!(e4m3(x), code, "{x}: {:#04x}", e4m3(x));
        }
    }

    struct Encoded {
        codes: Vec<u8>,
        scales: Vec<f32>,
    }

    fn encoded(
        values: &[f32],
        shape: [usize; 2],
        parameter: &Parameter,
        positive: bool,
    ) -> Encoded {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write_tensors(&path, &[Entry::f32("w", &shape, values)], &[]).unwrap();
        let weights = Weights::open_file(&path).unwrap();
        let values = Source::from(&weights).of(parameter).unwrap();
        let mut codes = Vec::new();
        let mut sink = |bytes: &[u8]| {
            codes.extend_from_slice(bytes);
            Ok(())
        };
        let scales = encode(parameter, &values, positive, &mut sink).unwrap();
        let scales = scales.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        Encoded { scales: scales.collect(), codes }
    }

    fn parameter(
        shape: [usize; 2],
        code: Code,
        block: Option<usize>,
        transposed: bool,
    ) -> Parameter {
        Parameter {
            name: "w".into(),
            shape: shape.to_vec(),
            storage: Storage::Coded { code, block },
            scale: Float::F32,
            transposed,
            whole_scale: false,
        }
    }

    #[test]
    fn codes_of_both_layouts_stand_for_the_numbers() {
        let (n_out, n_in, block) = (6, 72, 32);
        let values = Noise::new(3).normal(0, n_out * n_in);
        let n_blocks = n_in / block + 1;
        for (code, half) in [(Code::Int8, 128.0), (Code::Int4, 8.0)] {
            for (transposed, positive) in [(false, false), (true, true), (true, false)] {
                let parameter = parameter([n_out, n_in], code, Some(block), transposed);
                let found = encoded(&values, [n_out, n_in], &parameter, positive);
                assert_eq!(found.scales.len(), n_out * n_blocks);
                assert!(!positive || found.scales.iter().all(|&scale| scale > 0.0));
                let wide: Vec<u8> = match code {
                    Code::Int4 => found.codes.iter().flat_map(|b| [b & 15, b >> 4]).collect(),
                    _ => found.codes,
                };
                for (i, &x) in values.iter().enumerate() {
                    let (row, column) = (i / n_in, i % n_in);
                    let of_block = column / block;
                    let (code, scale) = if transposed {
                        let code = wide[column * n_out + row];
                        let signed = if half == 8.0 { (code << 4) as i8 >> 4 } else { code as i8 };
                        (f32::from(signed), found.scales[of_block * n_out + row])
                    } else {
                        let code = wide[row * n_blocks * block + column];
                        (f32::from(code) - half, found.scales[row * n_blocks + of_block])
                    };
                    // Half a step, and a whole one for what lies beyond the last code of the other side.
                    assert!(
                        (code * scale - x).abs() <= 1.001 * scale.abs(),
                        "{x} at {row} {column}"
                    );
                    assert!(scale.abs() <= 4.5 / (half - 1.0));
                }
            }
        }
    }

    #[test]
    fn one_scale_holds_a_whole_matrix() {
        let (n_out, n_in) = (3, 48);
        let values = Noise::new(4).normal(0, n_out * n_in);
        let largest = values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let parameter = parameter([n_out, n_in], Code::E4m3, None, true);
        let found = encoded(&values, [n_out, n_in], &parameter, true);
        assert_eq!(found.scales, [largest / 448.0]);
        let at = values.iter().position(|x| x.abs() == largest).unwrap();
        let code = found.codes[at % n_in * n_out + at / n_in];
        assert_eq!(code & 0x7f, 0x7e);
        assert_eq!(found.codes.len(), values.len());
    }
}
