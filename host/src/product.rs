//! Products of matrices, compiled for each vector width.
#![expect(clippy::inline_always, reason = "a version's vectors reach only what is inlined into it")]

use multiversion::multiversion;

use crate::kernels::LANES;
use crate::tensor::Tensor;

/// Rows of a product that go side by side.
const ROWS: usize = 6;

/// A matrix `[n, k]` by whose rows others are multiplied, as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) enum Matrix<'a> {
    /// As [`panels`] lays it out.
    Panels(&'a [f32]),
    /// Row after row.
    Rows(&'a [f32]),
    /// Column after column.
    Columns(&'a [f32]),
}

/// What is added to a product.
#[derive(Clone, Copy)]
pub(crate) enum Added<'a> {
    Zero,
    /// A number a column.
    Bias(&'a [f32]),
    /// What is there.
    Out,
}

/// A matrix `[n, k]` as products read it: parts of [`LANES`] rows, each transposed to `[k, LANES]`, the last
/// filled up with zeros.
#[multiversion(targets = "simd")]
pub(crate) fn panels(matrix: Matrix<'_>, n: usize, k: usize) -> Vec<f32> {
    let mut panels = vec![0.0; n.next_multiple_of(LANES) * k];
    let (parts, _) = panels.as_chunks_mut::<LANES>();
    for (index, panel) in parts.chunks_exact_mut(k).enumerate() {
        lay(panel, matrix, n, index);
    }
    panels
}

/// Columns `from..from + width` of rows `x` of `n`, as rows.
#[multiversion(targets = "simd")]
pub(crate) fn turned(x: &[f32], n: usize, from: usize, width: usize) -> Vec<f32> {
    let m = x.len() / n;
    let mut out = vec![0.0; width * m];
    // Squares, so that what is read and what is written stay in the cache.
    for (block, rows) in x.chunks(LANES * n).enumerate() {
        for first in (0..width).step_by(LANES) {
            let columns = LANES.min(width - first);
            for (row, values) in rows.chunks_exact(n).enumerate() {
                for (column, &x) in values[from + first..][..columns].iter().enumerate() {
                    out[(first + column) * m + block * LANES + row] = x;
                }
            }
        }
    }
    out
}

/// `x·Wᵀ` over the last axis of `x`, and `bias`: W `[n, k]` is `weight`.
pub(crate) fn linear(x: &Tensor, n: usize, weight: Matrix<'_>, bias: Option<&[f32]>) -> Tensor {
    let mut shape = x.shape().to_vec();
    *shape.last_mut().expect("a tensor with an axis") = n;
    let mut out = vec![0.0; shape.iter().product()];
    product(&mut out, x.values(), x.width(), weight, bias.map_or(Added::Zero, Added::Bias), n);
    Tensor::new(&shape, out)
}

/// `out` `[m, n]` = `x·Wᵀ + added` of rows `x` `[m, k]` and a matrix `[n, k]`.
#[multiversion(targets = "simd")]
pub(crate) fn product(
    out: &mut [f32],
    x: &[f32],
    k: usize,
    matrix: Matrix<'_>,
    added: Added<'_>,
    n: usize,
) {
    let (last, is_out) = (x.len() / k - 1, matches!(added, Added::Out));
    let width = LANES * at_once(x.len(), k);
    let mut laid = Vec::new();
    for first in (0..n).step_by(width) {
        let beyond = (first + width).min(n);
        let panels = if let Matrix::Panels(panels) = matrix {
            &panels[first * k..beyond.next_multiple_of(LANES) * k]
        } else {
            laid.resize((beyond - first).next_multiple_of(LANES) * k, 0.0);
            for (index, panel) in laid.as_chunks_mut().0.chunks_exact_mut(k).enumerate() {
                lay(panel, matrix, n, first / LANES + index);
            }
            &laid
        };
        let (panels, _) = panels.as_chunks::<LANES>();
        for (block, out) in out.chunks_mut(ROWS * n).enumerate() {
            let row = |r: usize| &x[(block * ROWS + r).min(last) * k..][..k];
            let rows = [row(0), row(1), row(2), row(3), row(4), row(5)];
            for (index, panel) in panels.chunks_exact(k).enumerate() {
                let from = first + index * LANES;
                let columns = LANES.min(n - from);
                let mut bias = [0.0; LANES];
                if let Added::Bias(of) = added {
                    bias[..columns].copy_from_slice(&of[from..from + columns]);
                }
                let sums = tile(rows, panel);
                for (sums, out) in sums.iter().zip(out.chunks_exact_mut(n)) {
                    let part = &mut out[from..from + columns];
                    if let Some(part) = part.first_chunk_mut::<LANES>() {
                        add(part, sums, if is_out { *part } else { bias });
                        continue;
                    }
                    let (mut begun, mut whole) = (bias, [0.0; LANES]);
                    if is_out {
                        begun[..columns].copy_from_slice(part);
                    }
                    add(&mut whole, sums, begun);
                    part.copy_from_slice(&whole[..columns]);
                }
            }
        }
    }
}

/// Panels `[k, LANES]` by which a few rows are multiplied before the next rows: one where all rows, `n_x` numbers, fit
/// half of a core's cache, else as many as fit it, so that rows come from afar less often.
fn at_once(n_x: usize, k: usize) -> usize {
    let half = (1 << 19) / size_of::<f32>();
    if n_x <= half { 1 } else { (half / (k * LANES)).clamp(1, 8) }
}

#[inline(always)]
fn add(out: &mut [f32; LANES], a: &[f32; LANES], b: [f32; LANES]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = a + b;
    }
}

/// Panel `index` of a matrix `[n, k]` that is not laid out.
#[inline(always)]
fn lay(panel: &mut [[f32; LANES]], matrix: Matrix<'_>, n: usize, index: usize) {
    let (k, from) = (panel.len(), index * LANES);
    let columns = LANES.min(n - from);
    if columns < LANES {
        panel.fill([0.0; LANES]);
    }
    match matrix {
        Matrix::Panels(_) => unreachable!("laid out"),
        Matrix::Rows(rows) => {
            // A line of the cache from each row at a time.
            for (first, parts) in panel.chunks_mut(LANES).enumerate() {
                let rows = rows[from * k..].chunks_exact(k).take(LANES).enumerate();
                for (column, row) in rows {
                    for (part, &w) in parts.iter_mut().zip(&row[first * LANES..]) {
                        part[column] = w;
                    }
                }
            }
        }
        Matrix::Columns(values) => {
            for (part, row) in panel.iter_mut().zip(values.chunks_exact(n)) {
                match row[from..].first_chunk::<LANES>() {
                    Some(row) => *part = *row,
                    None => part[..columns].copy_from_slice(&row[from..]),
                }
            }
        }
    }
}

/// Products of rows of `[k]` with a panel `[k, LANES]`.
#[inline(always)]
fn tile([x0, x1, x2, x3, x4, x5]: [&[f32]; ROWS], panel: &[[f32; LANES]]) -> [[f32; LANES]; ROWS] {
    // Row by row, and `w` by value: a loop over rows is not always unrolled, and sums that are indexed stay in
    // memory.
    let [mut y0, mut y1, mut y2, mut y3, mut y4, mut y5] = [[0.0; LANES]; ROWS];
    let rows = x0.iter().zip(x1).zip(x2).zip(x3).zip(x4).zip(x5);
    for (&w, (((((x0, x1), x2), x3), x4), x5)) in panel.iter().zip(rows) {
        add_product(&mut y0, *x0, &w);
        add_product(&mut y1, *x1, &w);
        add_product(&mut y2, *x2, &w);
        add_product(&mut y3, *x3, &w);
        add_product(&mut y4, *x4, &w);
        add_product(&mut y5, *x5, &w);
    }
    [y0, y1, y2, y3, y4, y5]
}

#[inline(always)]
fn add_product(sums: &mut [f32; LANES], x: f32, w: &[f32; LANES]) {
    for (sum, w) in sums.iter_mut().zip(w) {
        *sum = x.mul_add(*w, *sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers;

    /// Rows, columns and terms; the last two in several panels at once.
    const SIZES: [(usize, usize, usize); 7] = [
        (1, 1, 1),
        (6, 16, 8),
        (7, 17, 5),
        (13, 40, 33),
        (5, 15, 128),
        (200, 40, 700),
        (45, 150, 3000),
    ];

    #[test]
    fn products_of_any_size_are_sums_of_products() {
        for (m, n, k) in SIZES {
            let (x, w, b) = (numbers(m * k, 1), numbers(n * k, 2), numbers(n, 3));
            let (laid, turned) = (panels(Matrix::Rows(&w), n, k), turned(&w, k, 0, k));
            let was = numbers(m * n, 4);
            for matrix in [Matrix::Panels(&laid), Matrix::Rows(&w), Matrix::Columns(&turned)] {
                for added in [Added::Zero, Added::Bias(&b), Added::Out] {
                    let mut out = was.clone();
                    product(&mut out, &x, k, matrix, added, n);
                    for (i, found) in out.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let terms = (0..k)
                            .map(|l| f64::from(x[row * k + l]) * f64::from(w[column * k + l]));
                        let begun = match added {
                            Added::Zero => 0.0,
                            Added::Bias(b) => b[column],
                            Added::Out => was[i],
                        };
                        let expected = f64::from(begun) + terms.sum::<f64>();
                        assert!(
                            (f64::from(*found) - expected).abs() < 1e-5 + 1e-7 * k as f64,
                            "{m}×{n}×{k} at {row}, {column}"
                        );
                    }
                }
            }
        }
    }
}
