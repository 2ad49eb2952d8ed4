//! One adapter on the parameters of its layers.

use std::rc::Rc;

use super::delta::Delta;
use super::layers::Target;
use crate::checkpoint::{CheckpointError, Weights};

type Result<T> = std::result::Result<T, CheckpointError>;

/// What one layer of a file changes.
pub(super) struct Adapter {
    pub(super) target: Rc<Target>,
    /// What it adds to the weight, and by which factor: α/r.
    pub(super) delta: Option<(Delta, f64)>,
    /// Tensors that it adds to the bias, and by which factors.
    pub(super) biases: Vec<(String, f64)>,
    pub(super) magnitude: Option<Magnitude>,
}

/// DoRA (Liu et al. 2024): the norms that the rows, or the columns, of the changed weight get.
pub(super) struct Magnitude {
    /// Its tensor: a number a row of the file's matrix, or a column.
    pub(super) name: String,
    pub(super) of_rows: bool,
}

impl Adapter {
    /// Adds the bias's part `index` at `scale`.
    pub(super) fn change_bias(
        &self,
        tensors: &Weights,
        scale: f64,
        index: usize,
        values: &mut [f32],
    ) -> Result<()> {
        for (name, factor) in &self.biases {
            let by = (scale * factor) as f32;
            let added = tensors.f32(name)?;
            let added = self.target.rows(index).into_iter().flat_map(|range| &added[range]);
            values.iter_mut().zip(added).for_each(|(value, added)| *value += by * added);
        }
        Ok(())
    }

    /// Changes the weight of part `index`; `under` gives what another layer's weight is without this.
    pub(super) fn change_weight(
        &self,
        tensors: &Weights,
        scale: f64,
        index: usize,
        values: &mut [f32],
        under: &dyn Fn(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        self.add(tensors, scale, index, values)?;
        let Some(Magnitude { name, of_rows }) = &self.magnitude else { return Ok(()) };
        let norms = tensors.f32(name)?;
        let part = &self.target.parts[index];
        let n_columns = values.len() / part.n_out();
        if *of_rows {
            let norms = self.target.rows(index).into_iter().flat_map(|range| &norms[range]);
            for (row, norm) in values.chunks_exact_mut(n_columns).zip(norms) {
                let by = f64::from(*norm) / square_sum(row).sqrt();
                for value in row {
                    *value = (f64::from(*value) * by) as f32;
                }
            }
            return Ok(());
        }
        // The norm of a column is over the rows of all layers that the file has as one matrix.
        let mut sums = vec![0.0; n_columns];
        for (other, part) in self.target.parts.iter().enumerate() {
            if other == index {
                add_squares(values, &mut sums);
            } else {
                let mut weight = under(&format!("{}.weight", part.layer))?;
                self.add(tensors, scale, other, &mut weight)?;
                add_squares(&weight, &mut sums);
            }
        }
        let by: Vec<f64> =
            norms.iter().zip(&sums).map(|(norm, sum)| f64::from(*norm) / sum.sqrt()).collect();
        for row in values.chunks_exact_mut(n_columns) {
            for (value, by) in row.iter_mut().zip(&by) {
                *value = (f64::from(*value) * by) as f32;
            }
        }
        Ok(())
    }

    fn add(&self, tensors: &Weights, scale: f64, index: usize, values: &mut [f32]) -> Result<()> {
        let Some((delta, factor)) = &self.delta else { return Ok(()) };
        let by = (scale * factor) as f32;
        let mut rest = values;
        for range in self.target.rows(index) {
            let added = delta.rows(tensors, range)?;
            let (now, later) = rest.split_at_mut(added.len());
            now.iter_mut().zip(added).for_each(|(value, added)| *value += by * added);
            rest = later;
        }
        Ok(())
    }
}

fn square_sum(row: &[f32]) -> f64 {
    row.iter().map(|value| f64::from(*value).powi(2)).sum()
}

fn add_squares(values: &[f32], sums: &mut [f64]) {
    for row in values.chunks_exact(sums.len()) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(*value).powi(2);
        }
    }
}
