//! Dense tensors in row-major order.

use anyhow::{Context, Result, bail, ensure};

/// A dense row-major tensor. Made by [`Tensor::f32`] and [`Tensor::i64`], which check that the
/// shape holds as many elements as there are.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Data,
}

/// The elements of a [`Tensor`], last dimension fastest.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

impl Data {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::I64(data) => data.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Tensor {
    /// A tensor of 32-bit floats; an error if `shape` does not hold exactly `data.len()` elements.
    pub fn f32(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Result<Self> {
        let shape = shape.into();
        check_length(&shape, data.len())?;
        Ok(Self { shape, data: Data::F32(data) })
    }

    /// A tensor of 64-bit integers; an error if `shape` does not hold exactly `data.len()`
    /// elements.
    pub fn i64(shape: impl Into<Vec<usize>>, data: Vec<i64>) -> Result<Self> {
        let shape = shape.into();
        check_length(&shape, data.len())?;
        Ok(Self { shape, data: Data::I64(data) })
    }

    /// The elements as floats; an error if they are integers.
    pub fn as_f32(&self) -> Result<&[f32]> {
        match &self.data {
            Data::F32(data) => Ok(data),
            Data::I64(_) => bail!("tensor of shape {:?} holds i64, not f32", self.shape),
        }
    }

    /// The elements as integers; an error if they are floats.
    pub fn as_i64(&self) -> Result<&[i64]> {
        match &self.data {
            Data::I64(data) => Ok(data),
            Data::F32(_) => bail!("tensor of shape {:?} holds f32, not i64", self.shape),
        }
    }

    /// Like [`Tensor::as_f32`], giving up the tensor instead of lending it.
    pub fn into_f32(self) -> Result<Vec<f32>> {
        match self.data {
            Data::F32(data) => Ok(data),
            Data::I64(_) => bail!("tensor of shape {:?} holds i64, not f32", self.shape),
        }
    }
}

fn check_length(shape: &[usize], len: usize) -> Result<()> {
    let n_elements = shape
        .iter()
        .try_fold(1usize, |product, &dim| product.checked_mul(dim))
        .with_context(|| format!("shape {shape:?} has more elements than a tensor can hold"))?;
    ensure!(n_elements == len, "shape {shape:?} holds {n_elements} elements, not {len}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_and_length_must_agree() {
        assert!(Tensor::f32([2, 3], vec![0.0; 6]).is_ok());
        assert!(Tensor::i64([], vec![7]).is_ok());
        let short = Tensor::f32([2, 3], vec![0.0; 5]).unwrap_err().to_string();
        assert_eq!(short, "shape [2, 3] holds 6 elements, not 5");
        assert!(Tensor::i64([usize::MAX, 2], vec![]).is_err());
    }

    #[test]
    fn elements_are_lent_as_what_they_are() -> Result<()> {
        let floats = Tensor::f32([2], vec![1.0, 2.0])?;
        let integers = Tensor::i64([2], vec![1, 2])?;
        assert_eq!(floats.as_f32()?, [1.0, 2.0]);
        assert_eq!(integers.as_i64()?, [1, 2]);
        assert!(floats.as_i64().is_err());
        assert!(integers.as_f32().is_err());
        assert!(integers.into_f32().is_err());
        Ok(())
    }
}
