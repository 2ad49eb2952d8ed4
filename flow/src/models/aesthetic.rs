//! The linear head that turns an embedding into a score: LAION's aesthetic predictor, and the end of
//! ImageReward.
//!
//! Source: `MLP` of christophschuhmann/improved-aesthetic-predictor; `B` batch, `D` width. There is no
//! activation between its layers: dropout stood there while it was trained.

use crate::ops::{Ops, ParamPath};

/// Place in the list of layers, and width of the result.
const LAYERS: [(usize, usize); 5] = [(0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)];

/// Scores `[B, 1]` of `x` `[B, D]`. LAION's takes vectors of length 1 of CLIP ViT-L/14.
pub fn score<O: Ops>(ops: &O, path: &ParamPath, x: &O::Tensor, width: usize) -> O::Tensor {
    let layers = path.at("layers");
    let step = |(x, n_in): (O::Tensor, usize), (place, n_out): (usize, usize)| {
        (ops.linear(&layers.at(place), &x, n_in, n_out, true), n_out)
    };
    LAYERS.into_iter().fold((x.clone(), width), step).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::shapes::Shapes;

    #[test]
    fn it_has_the_published_number_of_parameters() {
        let shapes = Shapes::new();
        assert_eq!(score(&shapes, &ParamPath::root(), &vec![2, 768], 768), [2, 1]);
        assert_eq!(shapes.manifest().n_elements(), 927_969);
    }
}
