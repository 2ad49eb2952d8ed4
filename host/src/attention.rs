//! Attention of one head, and its slopes.

use multiversion::multiversion;

use crate::kernels::{softmax, sum};
use crate::product::{Added, Matrix, product, turned};

/// `softmax(scale·q·kᵀ + bias)·v`, appended; `q` `[m, d]`, `k` and `v` `[n, d]`, `bias` `[m, n]`.
pub(crate) fn attention(
    out: &mut Vec<f32>,
    [q, k, v]: [&[f32]; 3],
    width: usize,
    scale: f32,
    bias: Option<&[f32]>,
) {
    let shares = shares(q, k, width, scale, bias);
    let start = out.len();
    out.resize(start + q.len(), 0.0);
    let n = k.len() / width;
    product(&mut out[start..], &shares, n, Matrix::Columns(v), Added::Zero, width);
}

/// What reaches q, k and v from `dy`, which reached the result of an [`attention`] without bias.
pub(crate) fn attention_slopes(
    dy: &[f32],
    [q, k, v]: [&[f32]; 3],
    width: usize,
    scale: f32,
) -> [Vec<f32>; 3] {
    let (m, n) = (q.len() / width, k.len() / width);
    let shares = shares(q, k, width, scale, None);
    let by = |x: &[f32], inner: usize, matrix: Matrix<'_>, columns: usize| {
        let mut out = vec![0.0; x.len() / inner * columns];
        product(&mut out, x, inner, matrix, Added::Zero, columns);
        out
    };
    let of_v = by(&turned(&shares, n, 0, n), m, Matrix::Columns(dy), width);
    let mut of_scores = by(dy, width, Matrix::Rows(v), n);
    softmax_slopes(&mut of_scores, &shares, n, scale);
    let of_q = by(&of_scores, n, Matrix::Columns(k), width);
    let of_k = by(&turned(&of_scores, n, 0, n), m, Matrix::Columns(q), width);
    [of_q, of_k, of_v]
}

/// How much each query takes of each value: `[m, n]`.
fn shares(q: &[f32], k: &[f32], width: usize, scale: f32, bias: Option<&[f32]>) -> Vec<f32> {
    let n = k.len() / width;
    let mut scores = vec![0.0; q.len() / width * n];
    product(&mut scores, q, width, Matrix::Rows(k), Added::Zero, n);
    match bias {
        Some(bias) => scores.iter_mut().zip(bias).for_each(|(x, b)| *x = *x * scale + b),
        None => scores.iter_mut().for_each(|x| *x *= scale),
    }
    softmax(&mut scores, n);
    scores
}

/// From what reached softmaxes `y` to what reaches the scores before their `scale`, rows of `width`.
#[multiversion(targets = "simd")]
fn softmax_slopes(dy: &mut [f32], y: &[f32], width: usize, scale: f32) {
    for (dy, y) in dy.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
        dy.iter_mut().zip(y).for_each(|(dy, y)| *dy *= y);
        let total = sum(dy, |x| x);
        dy.iter_mut().zip(y).for_each(|(dy, y)| *dy = (*dy - total * y) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers;

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
}
