//! Weights of which each rank holds a part. A pass of the network puts a segment together before its use, the next
//! one meanwhile, and lets it go; gradients are added up over ranks as a pass leaves a segment. All ranks do each
//! pass together: one that has nothing to compute [attends](Parameters::attend).

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use anyhow::{Result, ensure};
use cluster::{Group, Pending, Reduce};
use tch::{Kind, Tensor};

use super::division::{own_part, padded};
use super::{Gradient, Parameters};
use crate::tensor::eager::{Eager, Named, dims};

/// What a pass does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    Forward,
    /// Forward, and back from the last segment, each of which is computed again.
    Training,
}

/// Other values of parameters, which [`Parameters::exchange`] swaps with those in use.
pub(crate) struct Others {
    /// As networks see them, a flat tensor a segment: whole, or this rank's part.
    pub(crate) flats: Rc<[Tensor]>,
    /// What ranks call them, from 1.
    number: usize,
}

/// This rank's parts, and the pass under way.
#[derive(Default)]
pub(super) struct Gathering {
    /// In the type networks compute in, one a segment; of f32 the masters themselves.
    seen: Vec<Tensor>,
    others: RefCell<Vec<Weak<[Tensor]>>>,
    /// Which of the others is in use; 0 for none.
    in_use: Cell<usize>,
    /// Segments to come, and the parts that they are put together from where those are others.
    course: RefCell<VecDeque<usize>>,
    source: RefCell<Option<Rc<[Tensor]>>>,
    in_flight: RefCell<Option<(usize, Pending)>>,
    /// A segment whose gradients are being added up.
    adding: RefCell<Option<(usize, Pending)>>,
    /// Sums over ranks and passes, of this rank's parts.
    gradients: RefCell<Vec<Option<Tensor>>>,
    /// Sums of each parameter as it was read.
    fingerprints: Vec<[i64; 2]>,
}

/// What a rank tells the others before a pass: that it attends, or the pass and whose values it is of.
const ATTENDS: i64 = 0;

fn code(pass: Pass, number: usize) -> i64 {
    1 + 2 * number as i64 + i64::from(pass == Pass::Training)
}

/// The pass that all ranks do now, by its code.
fn agreed(group: &Group, own: i64) -> Result<i64> {
    let told = group.all_gather(&Tensor::from_slice(&[own]))?;
    let told = Vec::<i64>::try_from(&told)?;
    let pass = told.iter().copied().max().unwrap_or(own);
    let odd = told.iter().position(|&other| other != ATTENDS && other != pass);
    ensure!(
        odd.is_none(),
        "rank {} is in another pass of the network than the others: {told:?}",
        odd.unwrap_or_default()
    );
    Ok(pass)
}

impl Gathering {
    /// Keeps this rank's part of a segment `whole`, as networks see it.
    pub(super) fn hold(&mut self, part: &Tensor, kind: Kind, fingerprints: Vec<[i64; 2]>) {
        self.seen.push(part.to_kind(kind));
        self.gradients.get_mut().push(None);
        self.fingerprints.extend(fingerprints);
    }

    pub(super) fn fingerprints(&self) -> Vec<[i64; 2]> {
        self.fingerprints.clone()
    }

    pub(super) fn seen(&self, index: usize) -> &Tensor {
        &self.seen[index]
    }

    /// What has been added up of segment `index`, which starts anew.
    pub(super) fn take_gradient(&self, index: usize) -> Result<Gradient> {
        self.settle()?;
        let sum = self.gradients.borrow_mut()[index].take();
        let values = sum.unwrap_or_else(|| self.seen[index].to_kind(Kind::Float).zeros_like());
        Ok(Gradient { offset: 0, values })
    }

    fn number(&self, flats: &Rc<[Tensor]>) -> usize {
        let mut others = self.others.borrow_mut();
        let free = others.iter().position(|other| other.strong_count() == 0);
        let index = free.unwrap_or(others.len());
        let other = Rc::downgrade(flats);
        match others.get_mut(index) {
            Some(before) => *before = other,
            None => others.push(other),
        }
        index + 1
    }

    fn set_out(&self, pass: i64) {
        let n = self.seen.len();
        let back = (pass - 1) % 2 == 1;
        *self.course.borrow_mut() = (0..n).chain((0..n - 1).rev().filter(|_| back)).collect();
        let number = ((pass - 1) / 2) as usize;
        let others = |number: usize| {
            self.others.borrow()[number - 1].upgrade().expect("all ranks keep the same values")
        };
        *self.source.borrow_mut() = (number > 0).then(|| others(number));
        *self.in_flight.borrow_mut() = None;
    }

    fn start(&self, group: &Group) -> Result<Option<(usize, Pending)>> {
        let Some(index) = self.course.borrow_mut().pop_front() else { return Ok(None) };
        let source = self.source.borrow();
        let parts = source.as_deref().unwrap_or(&self.seen);
        Ok(Some((index, group.start_all_gather(&parts[index])?)))
    }

    /// The whole of segment `wanted`, the next on the course, with padding behind it; that of the one after it
    /// begins.
    fn next(&self, group: &Group, wanted: usize) -> Result<Tensor> {
        let before = self.in_flight.borrow_mut().take();
        let now = if before.is_some() { before } else { self.start(group)? };
        let (index, pending) = now.expect("a pass has as many segments as its network");
        assert_eq!(index, wanted, "segments are used in the order of the pass");
        let whole = pending.wait()?;
        *self.in_flight.borrow_mut() = self.start(group)?;
        Ok(whole)
    }

    /// Starts to add the sum over ranks of `flat`, a whole segment and its padding, to the gradient of segment
    /// `index`; it travels while the segment before it computes.
    fn add(&self, group: &Group, index: usize, flat: &Tensor) -> Result<()> {
        let started = group.start_reduce_scatter(flat, Reduce::Sum)?;
        self.settle()?;
        *self.adding.borrow_mut() = Some((index, started));
        Ok(())
    }

    /// Waits for what is being added up.
    fn settle(&self) -> Result<()> {
        let Some((index, started)) = self.adding.borrow_mut().take() else { return Ok(()) };
        let part = started.wait()?;
        let sum = &mut self.gradients.borrow_mut()[index];
        *sum = Some(match sum.take() {
            Some(before) => before + part,
            None => part,
        });
        Ok(())
    }
}

impl Parameters {
    /// Whether each rank holds a part of what networks see.
    pub(crate) fn is_gathered(&self) -> bool {
        self.gathering.is_some()
    }

    /// Begins a pass, together with all ranks that hold a part; nothing to do where there are none.
    ///
    /// # Errors
    /// When a rank has failed, or is in another pass.
    pub(crate) fn begin(&self, pass: Pass) -> Result<()> {
        let Some(gathering) = &self.gathering else { return Ok(()) };
        let own = code(pass, gathering.in_use.get());
        gathering.set_out(agreed(&self.mesh.within, own)?);
        Ok(())
    }

    /// Takes part in the passes of other ranks until all have come here; nothing to do where none hold a part.
    /// It stands wherever ranks may have computed different numbers of passes, before they do anything else
    /// together.
    ///
    /// # Errors
    /// When a rank has failed.
    pub(crate) fn attend(&self) -> Result<()> {
        let Some(gathering) = &self.gathering else { return Ok(()) };
        loop {
            let pass = agreed(&self.mesh.within, ATTENDS)?;
            if pass == ATTENDS {
                return Ok(());
            }
            gathering.set_out(pass);
            let course: Vec<usize> = gathering.course.borrow().iter().copied().collect();
            let is_training = course.len() > self.segments.len();
            for (position, index) in course.into_iter().enumerate() {
                let whole = gathering.next(&self.mesh.within, index)?;
                if is_training && self.trainable && position + 1 >= self.segments.len() {
                    let nothing = Tensor::zeros(whole.size(), (Kind::Float, self.device));
                    drop(whole);
                    gathering.add(&self.mesh.within, index, &nothing)?;
                }
            }
        }
    }

    /// Adds the gradients that have reached segment `index` through `ops` to those of other ranks and passes;
    /// nothing to do where views keep their own.
    ///
    /// # Errors
    /// When the ranks cannot add them up.
    pub(crate) fn collect(&self, index: usize, ops: Eager<'_>) -> Result<()> {
        let Some(gathering) = self.gathering.as_ref().filter(|_| self.trainable) else {
            return Ok(());
        };
        let of = |place: &super::Place| {
            let grad = ops.views()[&place.name].grad();
            if grad.defined() {
                grad.detach().reshape([-1]).to_kind(Kind::Float)
            } else {
                Tensor::zeros([place.len()], (Kind::Float, self.device))
            }
        };
        let flat: Vec<Tensor> = self.segments[index].places.iter().map(of).collect();
        if flat.is_empty() {
            return Ok(());
        }
        drop(ops);
        let whole = padded(&self.mesh.within, &Tensor::cat(&flat, 0));
        gathering.add(&self.mesh.within, index, &whole)
    }

    /// Segment `index` put together, by name.
    pub(super) fn gathered(&self, gathering: &Gathering, index: usize) -> Result<Named> {
        let whole = gathering.next(&self.mesh.within, index)?;
        let view = |place: &super::Place| {
            let view = place.narrow(&whole).reshape(dims(&place.shape)).detach();
            (place.name.clone(), Rc::new(view.set_requires_grad(self.trainable)))
        };
        Ok(self.segments[index].places.iter().map(view).collect())
    }

    /// Values in place of those in use, like [`Parameters::seen`].
    pub(crate) fn others(&self, flats: Vec<Tensor>) -> Others {
        let flats: Rc<[Tensor]> = flats.into();
        let number = self.gathering.as_ref().map_or(0, |gathering| gathering.number(&flats));
        Others { flats, number }
    }

    /// Lets networks see the `others`; the second time, the values in use again. Where views are held the two are
    /// swapped, with the masters that share their storage, to the bit.
    ///
    /// # Panics
    /// Where parts are held, while still others are seen.
    pub(crate) fn exchange(&self, others: &Others) {
        self.version.set(self.version.get() + 1);
        let Some(gathering) = &self.gathering else { return self.swap(&others.flats) };
        let next = match gathering.in_use.get() {
            0 => others.number,
            before => {
                assert_eq!(before, others.number, "values are exchanged back before others");
                0
            }
        };
        gathering.in_use.set(next);
    }

    /// What networks see of this rank's part of a segment, or of a tensor like it: where views are held, the
    /// whole on every rank, and padding.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn shown(&self, part: &Tensor) -> Result<Tensor> {
        let part = part.to_kind(self.kind);
        if self.is_gathered() { Ok(part) } else { Ok(self.mesh.within.all_gather(&part)?) }
    }

    /// This rank's part of a segment that is `whole`.
    pub(super) fn own(&self, whole: &Tensor) -> Tensor {
        own_part(&self.mesh.within, whole).copy()
    }
}
