//! Masters divided among ranks, and what networks see of them.

use std::ops::Range;

use anyhow::Result;
use cluster::{Group, Pending, Reduce};
use tch::{Kind, Tensor, no_grad};

use super::{Gradient, Mesh, Parameters, Segment};
use crate::tensor::eager::dims;

/// As many numbers are made whole ones at a time.
const NUMBERS_AT_ONCE: i64 = 1 << 22;

/// A rank's part of a segment, without the padding.
pub(crate) struct Span {
    pub(crate) own: Range<usize>,
    /// Numbers of all ranks.
    pub(crate) whole: usize,
}

impl Parameters {
    /// Of the gradients of each segment, this rank's part of their sum over ranks; the next segment is made ready
    /// while one is on its way.
    pub(super) fn summed(
        &self,
        lists: impl Iterator<Item = Vec<Gradient>>,
    ) -> Result<Vec<Vec<Gradient>>> {
        let within = &self.mesh.within;
        let part = |pending: Pending| {
            Ok::<_, anyhow::Error>(vec![Gradient { offset: 0, values: pending.wait()? }])
        };
        let (mut parts, mut before) = (Vec::with_capacity(self.segments.len()), None);
        for list in lists {
            let flat: Vec<Tensor> =
                list.into_iter().map(|gradient| gradient.values.to_kind(Kind::Float)).collect();
            let whole = if flat.is_empty() {
                Tensor::zeros([0], (Kind::Float, self.device))
            } else {
                padded(within, &Tensor::cat(&flat, 0))
            };
            drop(flat);
            let pending = within.start_reduce_scatter(&whole, Reduce::Sum)?;
            if let Some(pending) = before.replace(pending) {
                parts.push(part(pending)?);
            }
        }
        parts.extend(before.map(part).transpose()?);
        Ok(parts)
    }

    /// The sum of a gradient's parts of all ranks that hold the same one.
    pub(super) fn of_all(&self, mut part: Gradient) -> Result<Gradient> {
        self.mesh.across.all_reduce(&mut part.values, Reduce::Sum)?;
        Ok(part)
    }

    /// Whether what networks see are the masters themselves.
    pub(crate) fn shares_storage(&self) -> bool {
        self.kind == Kind::Float && (self.mesh.within.world() == 1 || self.is_gathered())
    }

    /// Renews what networks see after the masters changed; nothing to do where they share storage.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn refresh(&self) -> Result<()> {
        self.version.set(self.version.get() + 1);
        if self.shares_storage() || !self.trainable {
            return Ok(());
        }
        // One after the other: loading holds a segment above what a rank keeps, and no more.
        for (index, segment) in self.segments.iter().enumerate() {
            let shown = self.shown(&segment.master)?;
            match &self.gathering {
                Some(gathering) => {
                    no_grad(|| gathering.seen(index).shallow_clone().copy_(&shown));
                }
                None => self.show(segment, &shown),
            }
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
    pub(super) fn swap(&self, wholes: &[Tensor]) {
        for (index, other) in wholes.iter().enumerate() {
            let seen = self.seen_of(index).copy();
            self.show(&self.segments[index], other);
            no_grad(|| other.shallow_clone().copy_(&seen));
        }
    }

    /// What networks see, a copy of each segment `[n]`, or of this rank's part of it.
    pub(crate) fn seen(&self) -> impl Iterator<Item = Tensor> {
        (0..self.segments.len()).map(|index| self.seen_of(index).copy())
    }

    /// Of each parameter as networks see it, in order, what tells it from another; where ranks hold parts, as it was
    /// read.
    pub(crate) fn fingerprints(&self) -> Vec<[i64; 2]> {
        if let Some(gathering) = &self.gathering {
            return gathering.fingerprints();
        }
        let places = self.segments.iter().flat_map(|segment| &segment.places);
        places.map(|place| fingerprint(&self.views.borrow()[&place.name].detach())).collect()
    }

    fn seen_of(&self, index: usize) -> Tensor {
        let segment = &self.segments[index];
        if self.shares_storage() {
            return segment.master.shallow_clone();
        }
        if let Some(gathering) = &self.gathering {
            return gathering.seen(index).shallow_clone();
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

    /// Where this rank's parts lie, one a segment.
    pub(crate) fn spans(&self) -> impl Iterator<Item = Span> {
        let (rank, world) = (self.mesh.within.rank(), self.mesh.within.world());
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

    /// The ranks that train them together, and how they divide them.
    pub(crate) fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// All ranks that train them together.
    pub(crate) fn group(&self) -> &Group {
        &self.mesh.all
    }
}

/// The sum of `values`' bits as whole numbers, and that of their squares, both modulo 2^64: unlike a sum of the values
/// themselves, the same on every device and in every order.
pub(super) fn fingerprint(values: &Tensor) -> [i64; 2] {
    let as_bits = if values.kind().elt_size_in_bytes() == 2 { Kind::Int16 } else { Kind::Int };
    let sums = values.reshape([-1]).split(NUMBERS_AT_ONCE, 0).into_iter().map(|part| {
        let bits = part.view_dtype(as_bits).to_kind(Kind::Int64);
        Tensor::stack(&[bits.sum(Kind::Int64), bits.square().sum(Kind::Int64)], 0)
    });
    let zero = Tensor::zeros([2], (Kind::Int64, values.device()));
    let total = sums.fold(zero, |total, sum| total + sum);
    [0, 1].map(|index| total.int64_value(&[index]))
}

/// `whole` `[n]` with zeros behind it, up to a multiple of the ranks.
pub(super) fn padded(group: &Group, whole: &Tensor) -> Tensor {
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
