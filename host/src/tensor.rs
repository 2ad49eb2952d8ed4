//! Dense tensors.

use std::sync::Arc;

/// Values in row-major order. Cloning and reshaping share them.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    values: Arc<Vec<f32>>,
}

impl Tensor {
    /// # Panics
    /// When there are not as many values as `shape` says.
    pub fn new(shape: &[usize], values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values of {shape:?}");
        Self { shape: shape.to_vec(), values: Arc::new(values) }
    }

    /// Length of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// All values, the last axis fastest.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, without a copy where nothing shares them.
    pub(crate) fn into_values(self) -> Vec<f32> {
        Arc::try_unwrap(self.values).unwrap_or_else(|shared| shared.to_vec())
    }

    /// Length of the last axis.
    pub(crate) fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// The same values in another shape.
    pub(crate) fn shaped(&self, shape: &[usize]) -> Self {
        assert_eq!(self.values.len(), shape.iter().product::<usize>(), "{:?}", self.shape);
        Self { shape: shape.to_vec(), values: self.values.clone() }
    }

    /// Axis `i` of the result is axis `axes[i]` of this.
    pub(crate) fn permuted(&self, axes: &[usize]) -> Self {
        let strides = strides(&self.shape);
        let shape: Vec<usize> = axes.iter().map(|&axis| self.shape[axis]).collect();
        let steps: Vec<usize> = axes.iter().map(|&axis| strides[axis]).collect();
        let mut values = Vec::with_capacity(self.values.len());
        let (width, step) = (shape[shape.len() - 1], steps[steps.len() - 1]);
        for [start] in offsets(&shape, [&steps]) {
            if step == 1 {
                values.extend_from_slice(&self.values[start..start + width]);
            } else {
                values.extend((0..width).map(|i| self.values[start + i * step]));
            }
        }
        Self::new(&shape, values)
    }

    /// Joins along `axis`.
    pub(crate) fn joined(parts: &[&Self], axis: usize) -> Self {
        let mut shape = parts[0].shape.clone();
        shape[axis] = parts.iter().map(|part| part.shape[axis]).sum();
        let inner: usize = shape[axis + 1..].iter().product();
        let mut values = Vec::with_capacity(shape.iter().product());
        for outer in 0..shape[..axis].iter().product() {
            for part in parts {
                let length = part.shape[axis] * inner;
                values.extend_from_slice(&part.values[outer * length..][..length]);
            }
        }
        Self::new(&shape, values)
    }

    /// Entries `from..from + length` of `axis`.
    pub(crate) fn narrowed(&self, axis: usize, from: usize, length: usize) -> Self {
        let mut shape = self.shape.clone();
        let inner: usize = shape[axis + 1..].iter().product();
        let (whole, part) = (shape[axis] * inner, length * inner);
        shape[axis] = length;
        let mut values = Vec::with_capacity(shape.iter().product());
        for outer in 0..shape[..axis].iter().product() {
            values.extend_from_slice(&self.values[outer * whole + from * inner..][..part]);
        }
        Self::new(&shape, values)
    }
}

/// Distance of neighbours along each axis.
pub(crate) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    strides
}

/// Where each row (along the last axis) of `shape` begins, in every tensor that has `steps` from one entry
/// to the next.
pub(crate) fn offsets<const N: usize>(
    shape: &[usize],
    steps: [&[usize]; N],
) -> impl Iterator<Item = [usize; N]> {
    let outer = shape.len() - 1;
    let rows: usize = shape[..outer].iter().product();
    let mut index = vec![0; outer];
    let mut at = [0; N];
    (0..rows).map(move |_| {
        let row = at;
        for axis in (0..outer).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                (0..N).for_each(|n| at[n] += steps[n][axis]);
                break;
            }
            (0..N).for_each(|n| at[n] -= steps[n][axis] * (shape[axis] - 1));
            index[axis] = 0;
        }
        row
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(shape: &[usize]) -> Tensor {
        Tensor::new(shape, (0..shape.iter().product()).map(|i| i as f32).collect())
    }

    #[test]
    fn axes_change_places() {
        let x = counted(&[2, 3, 4]);
        let turned = x.permuted(&[2, 0, 1]);
        assert_eq!(turned.shape(), [4, 2, 3]);
        assert_eq!(turned.values()[..7], [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 1.0]);
        assert_eq!(turned.permuted(&[1, 2, 0]), x);
        assert_eq!(
            x.permuted(&[1, 0, 2]).values()[..8],
            [0.0, 1.0, 2.0, 3.0, 12.0, 13.0, 14.0, 15.0]
        );
    }

    #[test]
    fn parts_join_again() {
        let x = counted(&[2, 3, 4]);
        for axis in 0..3 {
            let n = x.shape()[axis];
            let parts = [x.narrowed(axis, 0, 1), x.narrowed(axis, 1, n - 1)];
            assert_eq!(Tensor::joined(&[&parts[0], &parts[1]], axis), x);
        }
        assert_eq!(x.narrowed(1, 1, 1).values(), [4.0, 5.0, 6.0, 7.0, 16.0, 17.0, 18.0, 19.0]);
    }

    #[test]
    fn rows_that_repeat_have_no_step() {
        let starts: Vec<[usize; 2]> = offsets(&[2, 3, 4], [&[12, 4, 1], &[0, 1, 0]]).collect();
        assert_eq!(starts, [[0, 0], [4, 1], [8, 2], [12, 0], [16, 1], [20, 2]]);
    }
}
