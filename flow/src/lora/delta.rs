//! What an adapter adds to a matrix, in each of the forms that files have.

use std::ops::Range;

use crate::checkpoint::{CheckpointError, Weights};

type Result<T> = std::result::Result<T, CheckpointError>;

/// A matrix of a file: its tensor's name and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Matrix {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Matrix {
    /// Its rows in `range`.
    fn read(&self, weights: &Weights, range: Range<usize>) -> Result<Vec<f32>> {
        let values = weights.f32(&self.name)?;
        Ok(values[range.start * self.columns..range.end * self.columns].to_vec())
    }

    fn whole(&self, weights: &Weights) -> Result<Vec<f32>> {
        weights.f32(&self.name)
    }
}

/// A matrix, or the product of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Factor {
    Whole(Matrix),
    Product(Matrix, Matrix),
}

impl Factor {
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Whole(m) => [m.rows, m.columns],
            Self::Product(a, b) => [a.rows, b.columns],
        }
    }

    /// Columns of the first of two: r.
    pub(super) fn rank(&self) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product(_, b) => Some(b.rows),
        }
    }

    fn rows(&self, weights: &Weights, range: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Whole(m) => m.read(weights, range),
            Self::Product(a, b) => {
                let n_rows = range.len();
                let (a, b_values) = (a.read(weights, range)?, b.whole(weights)?);
                let mut values = vec![0.0; n_rows * b.columns];
                add_product(&a, &b_values, b.rows, &mut values);
                Ok(values)
            }
        }
    }
}

/// What is added to a matrix `[n_out, n_in]`, before its factor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Delta {
    /// LoRA: B·A (Hu et al. 2021); or the difference itself.
    Plain(Factor),
    /// LoKr: the Kronecker product w1 ⊗ w2 (Yeh et al. 2023).
    Kronecker(Factor, Factor),
    /// LoHa: the product of two matrices, element by element (Hyeon-Woo et al. 2021).
    Hadamard(Factor, Factor),
}

impl Delta {
    /// `[n_out, n_in]`.
    pub(super) fn shape(&self) -> [usize; 2] {
        match self {
            Self::Plain(f) | Self::Hadamard(f, _) => f.shape(),
            Self::Kronecker(w1, w2) => {
                let ([a, b], [c, d]) = (w1.shape(), w2.shape());
                [a.saturating_mul(c), b.saturating_mul(d)]
            }
        }
    }

    /// r, where the form has one.
    pub(super) fn rank(&self) -> Option<usize> {
        match self {
            Self::Plain(f) | Self::Hadamard(f, _) => f.rank(),
            Self::Kronecker(w1, w2) => w2.rank().or(w1.rank()),
        }
    }

    /// Its rows `range`, row-major.
    pub(super) fn rows(&self, weights: &Weights, range: Range<usize>) -> Result<Vec<f32>> {
        match self {
            Self::Plain(f) => f.rows(weights, range),
            Self::Hadamard(f, g) => {
                let mut values = f.rows(weights, range.clone())?;
                for (x, y) in values.iter_mut().zip(g.rows(weights, range)?) {
                    *x *= y;
                }
                Ok(values)
            }
            Self::Kronecker(w1, w2) => {
                let ([a, b], [c, d]) = (w1.shape(), w2.shape());
                let (w1, w2) = (w1.rows(weights, 0..a)?, w2.rows(weights, 0..c)?);
                let mut values = Vec::with_capacity(range.len() * b * d);
                for row in range {
                    let (first, second) =
                        (&w1[row.div_euclid(c) * b..][..b], &w2[row % c * d..][..d]);
                    values.extend(first.iter().flat_map(|x| second.iter().map(move |y| x * y)));
                }
                Ok(values)
            }
        }
    }
}

/// Adds `a` `[n, r]` times `b` `[r, m]` to `values` `[n, m]`.
pub(super) fn add_product(a: &[f32], b: &[f32], r: usize, values: &mut [f32]) {
    if values.is_empty() {
        return;
    }
    let n_columns = b.len() / r;
    for (row, a) in values.chunks_exact_mut(n_columns).zip(a.chunks_exact(r)) {
        for (a, b) in a.iter().zip(b.chunks_exact(n_columns)) {
            for (value, b) in row.iter_mut().zip(b) {
                *value += a * b;
            }
        }
    }
}
