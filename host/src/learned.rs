//! What reached parameters.

use std::collections::HashMap;

use flow::ops::ParamPath;

use crate::product::{Added, Matrix, panels, product, turned};
use crate::slopes;
use crate::tensor::Tensor;

/// Rows of a product at a time, which stay in a core's cache while the other factor passes by.
const STRIP: usize = 96;

/// What reached the parameters of a network in one [`Passage`](crate::Passage), by name, not yet added up.
#[derive(Default)]
pub struct Learned(HashMap<String, Vec<Share>>);

/// What reached a parameter where a network used it.
pub(crate) enum Share {
    /// `dyᵀ·x`, of rows `dy` `[m, n]` and `x` `[m, k]`.
    Product { dy: Tensor, x: Tensor },
    /// The sum of these rows.
    Rows(Tensor),
}

impl Learned {
    /// Adds what reached the parameter `name` to `sums`, as many numbers as it has.
    pub fn add_to(&self, name: &str, sums: &mut [f32]) {
        for share in self.0.get(name).into_iter().flatten() {
            match share {
                Share::Product { dy, x } => {
                    let (m, n, k) = (dy.shape()[0], dy.width(), x.width());
                    let x = panels(Matrix::Columns(x.values()), k, m);
                    for (strip, sums) in sums.chunks_mut(STRIP * k).enumerate() {
                        let dy = turned(dy.values(), n, strip * STRIP, sums.len() / k);
                        product(sums, &dy, m, Matrix::Panels(&x), Added::Out, k);
                    }
                }
                Share::Rows(dy) => slopes::bias(sums, dy.values()),
            }
        }
    }

    pub(crate) fn keep(&mut self, path: &ParamPath, share: Share) {
        self.0.entry(path.as_str().to_owned()).or_default().push(share);
    }
}
