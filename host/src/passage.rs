//! What a network did, to be walked back.

use std::collections::HashMap;

use flow::ops::ParamPath;

use crate::learned::{Learned, Share};
use crate::tensor::Tensor;

/// Values of parameters by their names in a checkpoint, row-major.
pub type Weights<'a> = HashMap<&'a str, &'a [f32]>;

/// A network's steps to a value.
pub struct Passage {
    pub(crate) steps: Vec<Step>,
    pub(crate) value: Tensor,
    /// The step that made the value, where it depends on the weights.
    pub(crate) last: Option<usize>,
}

/// Carries what reached a step's result on to its inputs and parameters.
pub(crate) type Step = Box<dyn FnOnce(Vec<f32>, &mut Back<'_>) + Send>;

/// A walk back: what has reached each step, and the parameters.
pub(crate) struct Back<'a> {
    weights: &'a Weights<'a>,
    reached: Vec<Option<Vec<f32>>>,
    learned: Learned,
}

impl Passage {
    /// What was computed.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// What reaches the parameters when `dy` reaches the value. `weights` are those that it was computed with.
    pub fn back(self, weights: &Weights<'_>, dy: Vec<f32>) -> Learned {
        let Self { mut steps, last, .. } = self;
        let reached = steps.iter().map(|_| None).collect();
        let mut back = Back { weights, reached, learned: Learned::default() };
        back.reach(last, dy);
        while let Some(step) = steps.pop() {
            if let Some(dy) = back.reached[steps.len()].take() {
                step(dy, &mut back);
            }
        }
        back.learned
    }
}

impl<'a> Back<'a> {
    pub(crate) fn weight(&self, path: &ParamPath) -> &'a [f32] {
        named(self.weights, path)
    }

    pub(crate) fn reach(&mut self, step: Option<usize>, dy: Vec<f32>) {
        let Some(step) = step else { return };
        match &mut self.reached[step] {
            Some(sums) => sums.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy),
            reached => *reached = Some(dy),
        }
    }

    /// What has reached a step of `n` values so far.
    pub(crate) fn sums(&mut self, step: usize, n: usize) -> &mut [f32] {
        self.reached[step].get_or_insert_with(|| vec![0.0; n])
    }

    pub(crate) fn keep(&mut self, path: &ParamPath, share: Share) {
        self.learned.keep(path, share);
    }
}

pub(crate) fn named<'a>(weights: &Weights<'a>, path: &ParamPath) -> &'a [f32] {
    // The manifest check at the border leaves no way for a name to be absent.
    weights.get(path.as_str()).copied().unwrap_or_else(|| panic!("no parameter {path}"))
}
