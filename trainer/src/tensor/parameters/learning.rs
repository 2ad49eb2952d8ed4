//! Gradients that libtorch does not find.

use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::{Parameters, numbers_of};

impl Parameters {
    /// Lends the values that networks see to `of`, by name.
    ///
    /// # Panics
    /// Where they are not held in f32 on the processor.
    #[expect(unsafe_code, reason = "libtorch's bindings only copy")]
    pub(crate) fn lend<R>(&self, of: impl FnOnce(&host::Weights<'_>) -> R) -> R {
        let views = self.views.borrow();
        let mut lent: Vec<(&String, Tensor)> =
            views.iter().map(|(name, view)| (name, view.shallow_clone())).collect();
        // SAFETY: values change between passes alone, and this one lasts until `of` returns.
        let lent =
            lent.iter_mut().map(|(name, view)| (name.as_str(), &*unsafe { numbers_of(view) }));
        of(&lent.collect())
    }

    /// Adds to the gradients what each part of a batch has learnt, in order.
    #[expect(unsafe_code, reason = "libtorch's bindings only copy")]
    pub(crate) fn learn(&self, parts: &[host::Learned]) {
        let mut learned = self.learned.borrow_mut();
        for place in self.segments.iter().flat_map(|segment| &segment.places) {
            let zeros = || Tensor::zeros([place.len()], (Kind::Float, self.device));
            learned.entry(place.name.clone()).or_insert_with(zeros);
        }
        let sums: Vec<(&String, &mut [f32])> = learned
            .iter_mut()
            // SAFETY: they are ours alone.
            .map(|(name, sums)| (name, unsafe { numbers_of(sums) }))
            .collect();
        sums.into_par_iter().with_max_len(1).for_each(|(name, sums)| {
            for part in parts {
                part.add_to(name, sums);
            }
        });
    }
}
