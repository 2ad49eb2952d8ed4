//! Masters divided among ranks, and what networks see put together from the parts.

use std::ops::Range;

use anyhow::Result;
use cluster::{Group, Reduce};
use tch::{Kind, Tensor, no_grad};

use super::{Gradient, Parameters, Segment};
use crate::tensor::eager::dims;

/// A rank's part of a segment, without the padding.
pub(crate) struct Span {
    pub(crate) own: Range<usize>,
    /// Numbers of all ranks.
    pub(crate) whole: usize,
}

impl Parameters {
    /// This rank's part of the sum over ranks of a segment's gradients.
    pub(super) fn summed(&self, list: Vec<Gradient>) -> Result<Gradient> {
        let flat: Vec<Tensor> =
            list.into_iter().map(|gradient| gradient.values.to_kind(Kind::Float)).collect();
        let whole = padded(&self.group, &Tensor::cat(&flat, 0));
        drop(flat);
        Ok(Gradient { offset: 0, values: self.group.reduce_scatter(&whole, Reduce::Sum)? })
    }

    /// Whether the views are the masters themselves.
    pub(crate) fn shares_storage(&self) -> bool {
        self.kind == Kind::Float && self.group.world() == 1
    }

    /// Renews the views after the masters changed; nothing to do where they share storage.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn refresh(&self) -> Result<()> {
        self.version.set(self.version.get() + 1);
        if self.shares_storage() || !self.trainable {
            return Ok(());
        }
        for segment in &self.segments {
            let whole = self.whole(&segment.master.to_kind(self.kind))?;
            self.show(segment, &whole);
        }
        Ok(())
    }

    /// Lets networks see `whole` `[n]` as the values of `segment`.
    fn show(&self, segment: &Segment, whole: &Tensor) {
        let views = self.views.borrow();
        no_grad(|| {
            for place in &segment.places {
                let shape = dims(&place.shape);
                views[&place.name].shallow_clone().copy_(&place.narrow(whole).reshape(shape));
            }
        });
    }

    /// Swaps what networks see with `wholes`, one flat tensor a segment in the type networks compute in; twice
    /// restores both to the bit. Masters that share the views' storage are swapped with them.
    pub(crate) fn exchange(&self, wholes: &[Tensor]) {
        self.version.set(self.version.get() + 1);
        for (segment, other) in self.segments.iter().zip(wholes) {
            let seen = self.seen_of(segment).copy();
            self.show(segment, other);
            no_grad(|| other.shallow_clone().copy_(&seen));
        }
    }

    /// What networks see, a copy of each segment `[n]`.
    pub(crate) fn seen(&self) -> impl Iterator<Item = Tensor> {
        self.segments.iter().map(|segment| self.seen_of(segment).copy())
    }

    /// What networks see of each parameter, in order.
    pub(crate) fn seen_of_each(&self) -> impl Iterator<Item = Tensor> {
        let places = self.segments.iter().flat_map(|segment| &segment.places);
        places.map(|place| self.views.borrow()[&place.name].detach())
    }

    fn seen_of(&self, segment: &Segment) -> Tensor {
        if self.shares_storage() {
            return segment.master.shallow_clone();
        }
        let views = self.views.borrow();
        let flat: Vec<Tensor> =
            segment.places.iter().map(|place| views[&place.name].detach().reshape([-1])).collect();
        if flat.is_empty() {
            Tensor::zeros([0], (self.kind, self.device))
        } else {
            Tensor::cat(&flat, 0)
        }
    }

    /// The whole of a master, or of a tensor like it, from this rank's part: `[n]` on every rank, and padding.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn whole(&self, part: &Tensor) -> Result<Tensor> {
        Ok(self.group.all_gather(part)?)
    }

    /// Where this rank's parts lie, one a segment.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> {
        let (rank, world) = (self.group.rank(), self.group.world());
        self.segments.iter().map(move |segment| {
            let whole = segment.len() as usize;
            let each = whole.div_ceil(world);
            Span { own: whole.min(rank * each)..whole.min((rank + 1) * each), whole }
        })
    }

    /// Names and shapes of each segment's parameters, in the order in which their numbers lie.
    pub(crate) fn layout(&self) -> Vec<Vec<(String, Vec<usize>)>> {
        let names = |segment: &Segment| {
            let places = segment.places.iter();
            places.map(|place| (place.name.clone(), place.shape.clone())).collect()
        };
        self.segments.iter().map(names).collect()
    }

    /// Among whom the masters are divided.
    pub(crate) fn group(&self) -> &Group {
        &self.group
    }
}

/// `whole` `[n]` with zeros behind it, up to a multiple of the ranks.
fn padded(group: &Group, whole: &Tensor) -> Tensor {
    let (n, world) = (whole.numel() as i64, group.world() as i64);
    whole.constant_pad_nd([0, (world - n % world) % world])
}

/// This rank's part of `whole` `[n]`, which is all of it where the rank is alone.
pub(super) fn own_part(group: &Group, whole: &Tensor) -> Tensor {
    if group.world() == 1 {
        return whole.shallow_clone();
    }
    let padded = padded(group, whole);
    let n = padded.numel() as i64 / group.world() as i64;
    padded.narrow(0, group.rank() as i64 * n, n)
}
