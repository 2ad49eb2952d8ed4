//! What is done to rows of numbers, compiled for each vector width.
#![expect(clippy::inline_always, reason = "a version's vectors reach only what is inlined into it")]

use multiversion::multiversion;

/// Numbers that go side by side.
pub(crate) const LANES: usize = 16;
/// 2·√(2/π) and the factor of x³ in the tanh form of gelu.
pub(crate) const TWICE: f32 = 2.0 * 0.797_884_6;
pub(crate) const CUBIC: f32 = 0.044_715;

/// e^x within 2 ulp; at the ends of f32's range the value there.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r with |r| ≤ ½·ln 2, ln 2 in two parts; adding 1.5·2²³ rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, x));
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p.mul_add(r, c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    // The last bits of `shifted` are n: as the exponent they make 2ⁿ.
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

#[inline(always)]
pub(crate) fn sum(values: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += of(x);
        }
    }
    folded(sums, |a, b| a + b) + rest.iter().map(|&x| of(x)).sum::<f32>()
}

/// Of products, number by number.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    folded(sums, |a, b| a + b) + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

/// All lanes as one, halves upon halves.
#[inline(always)]
fn folded(lanes: [f32; LANES], of: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = of(lanes[i], lanes[i + 8]);
    }
    for i in 0..4 {
        four[i] = of(eight[i], eight[i + 4]);
    }
    of(of(four[0], four[2]), of(four[1], four[3]))
}

/// `a + b`, appended.
#[multiversion(targets = "simd")]
pub(crate) fn add(out: &mut Vec<f32>, [a, b]: [&[f32]; 2]) {
    out.extend(a.iter().zip(b).map(|(a, b)| a + b));
}

/// `a·b`, appended.
#[multiversion(targets = "simd")]
pub(crate) fn mul(out: &mut Vec<f32>, [a, b]: [&[f32]; 2]) {
    out.extend(a.iter().zip(b).map(|(a, b)| a * b));
}

/// `a + b·c`, appended.
#[multiversion(targets = "simd")]
pub(crate) fn add_product(out: &mut Vec<f32>, [a, b, c]: [&[f32]; 3]) {
    out.extend(a.iter().zip(b).zip(c).map(|((a, b), c)| a + b * c));
}

/// The tanh form: x·sigmoid(2·√(2/π)·(x + 0.044715·x³)).
#[multiversion(targets = "simd")]
pub(crate) fn gelu_tanh(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| x / (1.0 + exp(-TWICE * (x + CUBIC * x * x * x)))).collect()
}

/// 1 / (1 + e^−x).
#[multiversion(targets = "simd")]
pub(crate) fn sigmoid(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| 1.0 / (1.0 + exp(-x))).collect()
}

/// x / (1 + e^−x).
#[multiversion(targets = "simd")]
pub(crate) fn silu(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| x / (1.0 + exp(-x))).collect()
}

/// The mean of a row, and the factor that brings its variance to 1.
#[inline(always)]
pub(crate) fn standard(row: &[f32], eps: f32) -> (f32, f32) {
    let mean = sum(row, |x| x) / row.len() as f32;
    let variance = sum(row, |x| (x - mean) * (x - mean)) / row.len() as f32;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Rows of `width` to mean 0 and variance 1.
#[multiversion(targets = "simd")]
pub(crate) fn standardise(x: &[f32], width: usize, eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let (mean, scale) = standard(row, eps);
        out.extend(row.iter().map(|x| (x - mean) * scale));
    }
    out
}

/// Rows of the width of `weight` divided by their root mean square, times `weight`.
#[multiversion(targets = "simd")]
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let scale = 1.0 / (sum(row, |x| x * x) / weight.len() as f32 + eps).sqrt();
        out.extend(row.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    out
}

/// Pairs (x₀, x₁) of each row turned by the row's angles, given by `cos` and `sin` of half the width.
#[multiversion(targets = "simd")]
pub(crate) fn rotate(x: &[f32], cos: &[f32], sin: &[f32]) -> Vec<f32> {
    let mut out = x.to_vec();
    for head in out.chunks_exact_mut(2 * cos.len()) {
        for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
            let (x, y) = (pair[0], pair[1]);
            pair[0] = x * c - y * s;
            pair[1] = x * s + y * c;
        }
    }
    out
}

/// Rows of `width` to their softmax.
#[multiversion(targets = "simd")]
pub(crate) fn softmax(values: &mut [f32], width: usize) {
    for row in values.chunks_exact_mut(width) {
        let larger = |a: f32, b: f32| if a > b { a } else { b };
        let mut largest = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (largest, &x) in largest.iter_mut().zip(chunk) {
                *largest = larger(*largest, x);
            }
        }
        let largest = rest.iter().copied().fold(folded(largest, larger), larger);
        for x in row.iter_mut() {
            *x = exp(*x - largest);
        }
        let scale = 1.0 / sum(row, |x| x);
        for x in row {
            *x *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers;

    #[test]
    fn exponentials_are_within_two_units() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let expected = f64::from(x).exp() as f32;
            let units = exp(x).to_bits().abs_diff(expected.to_bits());
            assert!(units <= 2, "e^{x}: {} and not {expected}", exp(x));
        }
        assert!(exp(-1e9) < 1e-37 && exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn gates_and_norms_follow_their_formulas() {
        let x: Vec<f32> = (-800..800).map(|i| i as f32 / 50.0).collect();
        for (i, &x64) in x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>().iter().enumerate() {
            let sigmoid = |y: f64| 1.0 / (1.0 + (-y).exp());
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044_715 * x64.powi(3));
            let near = |a: f32, b: f64| (f64::from(a) - b).abs() <= 2e-6 * b.abs() + 1e-9;
            assert!(
                near(super::gelu_tanh(&x)[i], 0.5 * x64 * (1.0 + inner.tanh())),
                "gelu of {x64}"
            );
            assert!(near(super::silu(&x)[i], x64 * sigmoid(x64)), "silu of {x64}");
            assert!(near(super::sigmoid(&x)[i], sigmoid(x64)), "sigmoid of {x64}");
        }
        let row = numbers(37, 9);
        let normed = standardise(&row, 37, 1e-6);
        let mean = normed.iter().sum::<f32>() / 37.0;
        let square = normed.iter().map(|x| x * x).sum::<f32>() / 37.0;
        assert!(mean.abs() < 1e-6 && (square - 1.0).abs() < 1e-4, "{mean} {square}");
        let rms = rms_norm(&row, &[2.0; 37], 0.0);
        assert!((rms.iter().map(|x| x * x).sum::<f32>() / 37.0 - 4.0).abs() < 1e-5);
    }
}
