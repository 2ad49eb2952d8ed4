//! What is done to rows of numbers, compiled for each vector width.
#![expect(clippy::inline_always, reason = "a version's vectors reach only what is inlined into it")]

use multiversion::multiversion;

/// Numbers that go side by side.
pub(crate) const LANES: usize = 16;
/// Rows of a product that go side by side.
const ROWS: usize = 6;

/// e^x within 2 ulp; at the ends of f32's range the value there.
#[inline(always)]
fn exp(x: f32) -> f32 {
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
    const TWICE: f32 = 2.0 * 0.797_884_6;
    x.iter().map(|&x| x / (1.0 + exp(-TWICE * (x + 0.044_715 * x * x * x)))).collect()
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

/// Rows of `width` to mean 0 and variance 1.
#[multiversion(targets = "simd")]
pub(crate) fn standardise(x: &[f32], width: usize, eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(width) {
        let mean = sum(row, |x| x) / width as f32;
        let variance = sum(row, |x| (x - mean) * (x - mean)) / width as f32;
        let scale = 1.0 / (variance + eps).sqrt();
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
fn softmax(values: &mut [f32], width: usize) {
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

/// Rows `[n, k]` as products read them: parts of [`LANES`] rows, each transposed to `[k, LANES]`, the last
/// filled up with zeros.
pub(crate) fn panels(rows: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut panels = vec![0.0; n.next_multiple_of(LANES) * k];
    for (row, values) in rows.chunks_exact(k).enumerate() {
        let (panel, _) = panels[row / LANES * LANES * k..].as_chunks_mut::<LANES>();
        for (part, &x) in panel.iter_mut().zip(values) {
            part[row % LANES] = x;
        }
    }
    panels
}

/// `out` `[m, n]` = `x·Wᵀ + b` of rows `x` `[m, k]`: `panels` holds W as [`panels()`] lays it out, and `bias`
/// a number an output, filled up to whole parts like them.
#[multiversion(targets = "simd")]
pub(crate) fn product(
    out: &mut [f32],
    x: &[f32],
    k: usize,
    panels: &[f32],
    bias: &[f32],
    n: usize,
) {
    let (panels, _) = panels.as_chunks::<LANES>();
    let (bias, _) = bias.as_chunks::<LANES>();
    let last = x.len() / k - 1;
    for ((panel, bias), from) in panels.chunks_exact(k).zip(bias).zip((0..n).step_by(LANES)) {
        for (block, out) in out.chunks_mut(ROWS * n).enumerate() {
            let row = |r: usize| &x[(block * ROWS + r).min(last) * k..][..k];
            let sums = tile([row(0), row(1), row(2), row(3), row(4), row(5)], panel, bias);
            for (sums, out) in sums.iter().zip(out.chunks_exact_mut(n)) {
                match out[from..].first_chunk_mut::<LANES>() {
                    Some(part) => *part = *sums,
                    None => out[from..].copy_from_slice(&sums[..n - from]),
                }
            }
        }
    }
}

/// `start` and the products of rows of `[k]` with a panel `[k, LANES]`.
#[inline(always)]
fn tile(
    [x0, x1, x2, x3, x4, x5]: [&[f32]; ROWS],
    panel: &[[f32; LANES]],
    start: &[f32; LANES],
) -> [[f32; LANES]; ROWS] {
    let mut sums = [*start; ROWS];
    let rows = x0.iter().zip(x1).zip(x2).zip(x3).zip(x4).zip(x5);
    for (&w, (((((x0, x1), x2), x3), x4), x5)) in panel.iter().zip(rows) {
        for (sums, x) in sums.iter_mut().zip([x0, x1, x2, x3, x4, x5]) {
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = x.mul_add(w, *sum);
            }
        }
    }
    sums
}

/// `softmax(scale·q·kᵀ + bias)·v` of one head, appended; `q` `[m, d]`, `k` and `v` `[n, d]`, `bias` `[m, n]`.
pub(crate) fn attention(
    out: &mut Vec<f32>,
    [q, k, v]: [&[f32]; 3],
    width: usize,
    scale: f32,
    bias: Option<&[f32]>,
) {
    let (m, n) = (q.len() / width, k.len() / width);
    let mut keys = panels(k, n, width);
    for x in &mut keys {
        *x *= scale;
    }
    let zeros = vec![0.0; n.max(width).next_multiple_of(LANES)];
    let mut scores = vec![0.0; m * n];
    product(&mut scores, q, width, &keys, &zeros, n);
    if let Some(bias) = bias {
        scores.iter_mut().zip(bias).for_each(|(score, b)| *score += b);
    }
    softmax(&mut scores, n);
    // Columns of v are what rows of k are.
    let mut values = vec![0.0; width.next_multiple_of(LANES) * n];
    for (l, row) in v.chunks_exact(width).enumerate() {
        for (part, row) in row.chunks(LANES).enumerate() {
            values[(part * n + l) * LANES..][..row.len()].copy_from_slice(row);
        }
    }
    let start = out.len();
    out.resize(start + m * width, 0.0);
    product(&mut out[start..], &scores, n, &values, &zeros, width);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [−1, 1) that do not repeat.
    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

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
    fn products_of_any_size_are_sums_of_products() {
        for (m, n, k) in [(1, 1, 1), (6, 16, 8), (7, 17, 5), (13, 40, 33), (5, 15, 128)] {
            let (x, w, b) = (numbers(m * k, 1), numbers(n * k, 2), numbers(n, 3));
            let mut bias = b.clone();
            bias.resize(n.next_multiple_of(LANES), 0.0);
            let mut out = vec![0.0; m * n];
            product(&mut out, &x, k, &panels(&w, n, k), &bias, n);
            for (i, found) in out.iter().enumerate() {
                let (row, column) = (i / n, i % n);
                let terms =
                    (0..k).map(|l| f64::from(x[row * k + l]) * f64::from(w[column * k + l]));
                let expected = f64::from(b[column]) + terms.sum::<f64>();
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-5,
                    "{m}×{n}×{k} at {row}, {column}"
                );
            }
        }
    }

    #[test]
    fn attention_is_a_mean_by_softmax() {
        let (m, n, width) = (5, 19, 6);
        let [q, k, v] = [(m, 1), (n, 2), (n, 3)].map(|(rows, seed)| numbers(rows * width, seed));
        let bias = numbers(m * n, 4);
        let mut out = Vec::new();
        attention(&mut out, [&q, &k, &v], width, 0.7, Some(&bias));
        for i in 0..m {
            let dot =
                |j: usize| (0..width).map(|d| q[i * width + d] * k[j * width + d]).sum::<f32>();
            let scores: Vec<f64> =
                (0..n).map(|j| f64::from(0.7 * dot(j) + bias[i * n + j])).collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum();
            for d in 0..width {
                let mean: f64 =
                    (0..n).map(|j| scores[j].exp() / total * f64::from(v[j * width + d])).sum();
                assert!((f64::from(out[i * width + d]) - mean).abs() < 1e-6, "row {i}, {d}");
            }
        }
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
