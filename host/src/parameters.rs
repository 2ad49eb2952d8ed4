//! What a network computes with.

use std::collections::HashMap;
use std::sync::OnceLock;

use flow::ops::ParamPath;

use crate::product::{Matrix, panels};
use crate::tensor::Tensor;

/// Tensors by their names in a checkpoint.
#[derive(Debug, Default)]
pub struct Parameters(HashMap<String, Parameter>);

/// One of them.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) tensor: Tensor,
    panels: OnceLock<Vec<f32>>,
}

impl FromIterator<(String, Tensor)> for Parameters {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(tensors: I) -> Self {
        let parameter = |tensor| Parameter { tensor, panels: OnceLock::new() };
        Self(tensors.into_iter().map(|(name, tensor)| (name, parameter(tensor))).collect())
    }
}

impl Parameters {
    pub(crate) fn named(&self, path: &ParamPath) -> &Parameter {
        // The manifest check at the border leaves no way for a name to be absent.
        self.0.get(path.as_str()).unwrap_or_else(|| panic!("no parameter {path}"))
    }
}

impl Parameter {
    /// The values `[n, …]` as products read them.
    pub(crate) fn panels(&self) -> &[f32] {
        self.panels.get_or_init(|| {
            let (values, n) = (self.tensor.values(), self.tensor.shape()[0]);
            panels(Matrix::Rows(values), n, values.len() / n)
        })
    }
}
