//! Parameters as flat storage: one tensor a segment (a network's block), and one view a name.
//!
//! The optimiser and the checkpoint see flat f32 tensors, the masters; networks see the views. Where compute
//! is narrower than f32, or ranks share the work, the views are copies that [`Parameters::refresh`] renews
//! after each step. Among ranks each holds a part of every master, as long as everybody's: the whole, with
//! zeros behind it up to a multiple of their number, is all parts in the order of ranks.
//! Parameters that do not train are held in the compute type, or left on disk and read a segment at a
//! time. What networks see may itself be divided, too, and is then put together a segment at a time.

mod division;
mod gathering;
mod learning;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result};
use cluster::Group;
use flow::checkpoint::{Dtype, Entry, Weights};
use flow::ops::shapes::Manifest;
use tch::{Device, Kind, Tensor, no_grad};

use self::division::fingerprint;
use self::gathering::Gathering;
pub(crate) use self::gathering::{Others, Pass};
use super::device::Compute;
use super::eager::{Eager, Named, Views, dims};
use super::stored::{bytes_of, kind_of, tensor};

/// Where a parameter lies in its segment.
struct Place {
    name: String,
    shape: Vec<usize>,
    offset: i64,
}

impl Place {
    fn len(&self) -> i64 {
        self.shape.iter().product::<usize>() as i64
    }

    /// This parameter's part of a flat tensor.
    fn narrow(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.len())
    }
}

/// The parameters of one block.
pub(crate) struct Segment {
    places: Vec<Place>,
    /// Values `[n]`, or this rank's part of them, f32 where they train; nothing where they stay on disk.
    pub(crate) master: Tensor,
}

/// What reached one parameter, or a rank's part of a segment.
pub(crate) struct Gradient {
    /// Where it begins in the master.
    offset: i64,
    /// Flat, in the type networks compute in.
    pub(crate) values: Tensor,
}

impl Gradient {
    /// What it moves of a flat tensor like the master.
    pub(crate) fn narrow(&self, flat: &Tensor) -> Tensor {
        flat.narrow(0, self.offset, self.values.numel() as i64)
    }
}

/// The ranks of a run as they divide what they hold.
#[derive(Clone)]
pub(crate) struct Mesh {
    pub(crate) all: Group,
    /// Those among whom a network is divided: all, or those of this node.
    pub(crate) within: Group,
    /// Those that hold the same part of it.
    pub(crate) across: Group,
}

impl Mesh {
    /// Everything is divided among all.
    pub(crate) fn flat(all: &Group) -> Self {
        Self { all: all.clone(), within: all.clone(), across: Group::alone() }
    }

    /// Everything is divided among the ranks of a node, whose tensors are on `device`.
    ///
    /// # Errors
    /// When nodes have different numbers of ranks, or a rank has failed.
    pub(crate) fn by_node(all: &Group, device: Device) -> Result<Self> {
        let [within, across] = all.by_node()?;
        within.open_device(device)?;
        across.open_device(device)?;
        Ok(Self { all: all.clone(), within, across })
    }
}

/// How parameters are held.
#[derive(Clone)]
pub(crate) enum Storage {
    /// In f32, divided among these ranks, so that they can train; in the compute type on each.
    Trainable(Group),
    /// Divided in the compute type as well, and put together a segment at a time.
    Divided { mesh: Mesh, trains: bool },
    /// In the compute type.
    Frozen,
    /// On disk, read a segment at a time: for networks larger than memory.
    Streamed,
}

/// Values that stand in place of a parameter's own, by its name.
pub(crate) type Changed = Box<dyn Fn(&str) -> Result<Option<Vec<f32>>>>;

/// The parameters of a network, in segments.
pub(crate) struct Parameters {
    pub(crate) segments: Vec<Segment>,
    views: RefCell<Named>,
    /// Gradients that libtorch did not find, by name.
    learned: RefCell<HashMap<String, Tensor>>,
    /// Where streamed values are.
    source: Option<Weights>,
    /// What stands in place of some of them.
    changed: Option<Changed>,
    device: Device,
    kind: Kind,
    trainable: bool,
    /// Who trains them together, among whom the masters are divided, and who has the same part.
    mesh: Mesh,
    /// What networks see of them, where that is divided.
    gathering: Option<Gathering>,
    /// How often the values have changed.
    version: Cell<u64>,
}

impl Parameters {
    /// Takes each manifest as one segment and its values from `value(name, shape)`, any float type. What may
    /// train is divided: of no more than one segment is the whole held in f32.
    pub(crate) fn build(
        manifests: &[Manifest],
        compute: Compute,
        storage: Storage,
        mut value: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let stored = match &storage {
            Storage::Trainable(_) | Storage::Divided { trains: true, .. } => Kind::Float,
            _ => compute.kind,
        };
        let is_compared = matches!(storage, Storage::Divided { trains: true, .. });
        let mut parameters = Self::empty(compute, storage);
        for manifest in manifests {
            let places = places(manifest);
            let master = Tensor::empty([manifest.n_elements() as i64], (stored, compute.device));
            for place in &places {
                let values = value(&place.name, &place.shape)
                    .with_context(|| format!("parameter {}", place.name))?;
                no_grad(|| place.narrow(&master).copy_(&values.reshape([-1])));
            }
            parameters.hold(Segment { places, master }, is_compared);
        }
        Ok(parameters)
    }

    /// [`Parameters::build`] with the values of a checkpoint that fits `manifests`.
    pub(crate) fn load(
        manifests: &[Manifest],
        weights: Weights,
        compute: Compute,
        storage: Storage,
    ) -> Result<Self> {
        if !matches!(storage, Storage::Streamed) {
            return Self::build(manifests, compute, storage, |name, _| {
                let values = tensor(&weights, name)?;
                weights.release();
                Ok(values)
            });
        }
        let nothing = || Tensor::empty([0], (compute.kind, compute.device));
        let segment = |manifest| Segment { places: places(manifest), master: nothing() };
        let segments = manifests.iter().map(segment).collect();
        Ok(Self { segments, source: Some(weights), ..Self::empty(compute, storage) })
    }

    fn empty(Compute { device, kind }: Compute, storage: Storage) -> Self {
        let is_gathered = matches!(storage, Storage::Divided { .. });
        let mesh = match storage {
            Storage::Trainable(group) => Mesh::flat(&group),
            Storage::Divided { mesh, .. } => mesh,
            Storage::Frozen | Storage::Streamed => Mesh::flat(&Group::alone()),
        };
        Self {
            segments: Vec::new(),
            views: RefCell::default(),
            learned: RefCell::default(),
            source: None,
            changed: None,
            device,
            kind,
            trainable: false,
            mesh,
            gathering: is_gathered.then(Gathering::default),
            version: Cell::new(0),
        }
    }

    /// Puts other values in place of some: now where they are held, else whenever they are read.
    ///
    /// # Errors
    /// When `changed` fails.
    ///
    /// # Panics
    /// Where ranks hold parts.
    pub(crate) fn change(&mut self, changed: Changed) -> Result<()> {
        if self.is_streamed() {
            self.changed = Some(changed);
            return Ok(());
        }
        assert!(self.mesh.within.world() == 1 && !self.is_gathered(), "whole values are changed");
        for segment in &self.segments {
            for place in &segment.places {
                if let Some(values) = changed(&place.name)? {
                    let values = Tensor::from_slice(&values);
                    no_grad(|| place.narrow(&segment.master).copy_(&values));
                }
            }
        }
        self.segments.iter().for_each(|segment| self.make_views(segment));
        self.version.set(self.version.get() + 1);
        Ok(())
    }

    /// Lets gradients accumulate on every view.
    ///
    /// # Panics
    /// When they were not loaded as [`Storage::Trainable`].
    pub(crate) fn train(&mut self) {
        assert!(
            self.source.is_none() && self.masters().all(|m| m.kind() == Kind::Float),
            "parameters in f32 train"
        );
        self.trainable = true;
        for view in self.views.get_mut().values_mut() {
            *view = Rc::new(view.detach().set_requires_grad(true));
        }
    }

    /// The interpreter over parameters that are held.
    pub(crate) fn ops(&self) -> Eager<'_> {
        Eager::new(Views::Held(self.views.borrow()), self.device, self.kind)
    }

    /// The interpreter over segment `index`, which is read now if it is on disk; where ranks hold parts, they put
    /// it together, in the order of the [pass](Parameters::begin) under way.
    ///
    /// # Errors
    /// When it cannot be read, or a rank has failed.
    pub(crate) fn segment(&self, index: usize) -> Result<Eager<'_>> {
        let views = match (&self.source, &self.gathering) {
            (Some(weights), _) => Views::Read(self.read(weights, index)?),
            (None, Some(gathering)) => Views::Read(self.gathered(gathering, index)?),
            (None, None) => Views::Held(self.views.borrow()),
        };
        Ok(Eager::new(views, self.device, self.kind))
    }

    fn read(&self, weights: &Weights, index: usize) -> Result<Named> {
        let places = &self.segments[index].places;
        let read = |place: &Place| {
            let changed = match &self.changed {
                Some(changed) => changed(&place.name)?,
                None => None,
            };
            let values = match changed {
                Some(values) => Tensor::from_slice(&values),
                None => tensor(weights, &place.name)?,
            };
            let values =
                values.reshape(dims(&place.shape)).to_device(self.device).to_kind(self.kind);
            Ok((place.name.clone(), Rc::new(values)))
        };
        let named = places.iter().map(read).collect();
        weights.release();
        named
    }

    /// Where they are and what networks compute in.
    pub(crate) fn compute(&self) -> Compute {
        Compute { device: self.device, kind: self.kind }
    }

    /// Changes with the values.
    pub(crate) fn version(&self) -> u64 {
        self.version.get()
    }

    /// Name, shape and values of each parameter that is held, as networks see it.
    pub(crate) fn values(&self) -> impl Iterator<Item = (&str, &[usize], Vec<f32>)> {
        self.segments.iter().flat_map(|segment| &segment.places).map(|place| {
            let flat = self.views.borrow()[&place.name].reshape([-1]).to_kind(Kind::Float);
            let values = Vec::try_from(&flat).expect("a tensor of f32");
            (&*place.name, &*place.shape, values)
        })
    }

    /// Whether gradients accumulate on them.
    pub(crate) fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// Whether they stay on disk.
    pub(crate) fn is_streamed(&self) -> bool {
        self.source.is_some()
    }

    /// Type of activations.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The sum over ranks of the gradients that have accumulated, a list a segment that covers its master in
    /// order; they start anew.
    ///
    /// # Errors
    /// When the ranks cannot add them up.
    ///
    /// # Panics
    /// While an interpreter over these parameters is in use.
    pub(crate) fn take_gradients(&self) -> Result<Vec<Vec<Gradient>>> {
        if let Some(gathering) = &self.gathering {
            let take = |index| Ok(vec![self.of_all(gathering.take_gradient(index)?)?]);
            return (0..self.segments.len()).map(take).collect();
        }
        let (mut views, mut learned) = (self.views.borrow_mut(), self.learned.borrow_mut());
        let mut take = |place: &Place| {
            let learned = learned.remove(&place.name);
            let view = views.get_mut(&place.name).expect("what trains is held");
            let grad = view.grad();
            // A leaf without a past: the next gradient to arrive is kept, not added to zeros.
            *view = Rc::new(view.detach().set_requires_grad(true));
            let found = grad.defined().then(|| grad.detach().reshape([-1]));
            let values = match (found, learned) {
                (Some(found), Some(learned)) => found + learned,
                (Some(values), None) | (None, Some(values)) => values,
                (None, None) => Tensor::zeros([place.len()], (Kind::Float, self.device)),
            };
            Gradient { offset: place.offset, values }
        };
        let lists =
            self.segments.iter().map(|segment| segment.places.iter().map(&mut take).collect());
        if self.mesh.within.world() == 1 { Ok(lists.collect()) } else { self.summed(lists) }
    }

    /// The parameter called `name`, if there is one and it is held.
    pub(crate) fn named(&self, name: &str) -> Option<Rc<Tensor>> {
        self.views.borrow().get(name).cloned()
    }

    /// The values of `flats` (the masters, or an average of them) as safetensors entries of `dtype`.
    pub(crate) fn entries<'a>(
        &'a self,
        flats: impl Iterator<Item = &'a Tensor>,
        dtype: Dtype,
    ) -> Result<Vec<Entry<'a>>> {
        let kind = kind_of(dtype)?;
        let mut entries = Vec::new();
        for (segment, flat) in self.segments.iter().zip(flats) {
            for place in &segment.places {
                entries.push(Entry::made(&place.name, &place.shape, dtype, move || {
                    Ok(bytes_of(&place.narrow(flat).to_kind(kind)))
                }));
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Takes other values, one flat tensor a segment, like the masters.
    ///
    /// # Errors
    /// As [`Parameters::refresh`].
    pub(crate) fn assign(&self, flats: &[Tensor]) -> Result<()> {
        for (master, flat) in self.masters().zip(flats) {
            no_grad(|| master.shallow_clone().copy_(flat));
        }
        self.refresh()
    }

    /// The masters of all segments: this rank's part of each.
    pub(crate) fn masters(&self) -> impl Iterator<Item = &Tensor> {
        self.segments.iter().map(|segment| &segment.master)
    }

    /// Takes a segment whose master is whole; keeps this rank's part of it, and fingerprints of the whole where ranks
    /// compare what they have read.
    fn hold(&mut self, mut segment: Segment, is_compared: bool) {
        let is_gathered = self.is_gathered();
        let fingerprints = if is_compared { segment.fingerprints() } else { Vec::new() };
        if !is_gathered {
            self.make_views(&segment);
        }
        if is_gathered || self.mesh.within.world() > 1 {
            segment.master = self.own(&segment.master);
        }
        if let Some(gathering) = &mut self.gathering {
            gathering.hold(&segment.master, self.kind, fingerprints);
        }
        self.segments.push(segment);
    }

    fn make_views(&self, segment: &Segment) {
        let mut views = self.views.borrow_mut();
        for place in &segment.places {
            let view = segment.view(place).detach().to_kind(self.kind);
            let view = if self.mesh.within.world() > 1 { view.copy() } else { view };
            views.insert(place.name.clone(), Rc::new(view));
        }
    }
}

impl Segment {
    /// Numbers of all its parameters.
    fn len(&self) -> i64 {
        self.places.last().map_or(0, |last| last.offset + last.len())
    }

    fn view(&self, place: &Place) -> Tensor {
        place.narrow(&self.master).reshape(dims(&place.shape))
    }

    /// Of each parameter, while the master is whole.
    fn fingerprints(&self) -> Vec<[i64; 2]> {
        self.places.iter().map(|place| fingerprint(&place.narrow(&self.master))).collect()
    }
}

fn places(manifest: &Manifest) -> Vec<Place> {
    let mut end = 0;
    let place = |(name, shape): (&str, &[usize])| {
        let offset = end;
        end += shape.iter().product::<usize>() as i64;
        Place { name: name.to_owned(), shape: shape.to_vec(), offset }
    };
    manifest.entries().map(place).collect()
}

/// The numbers of a tensor.
///
/// # Panics
/// When it is not contiguous, of f32 and on the processor.
///
/// # Safety
/// Others that share its storage must not be in use meanwhile.
#[expect(unsafe_code, reason = "libtorch's bindings only copy")]
pub(crate) unsafe fn numbers_of(tensor: &mut Tensor) -> &mut [f32] {
    let is_plain = tensor.kind() == Kind::Float && tensor.device() == Device::Cpu;
    assert!(is_plain && tensor.is_contiguous(), "{tensor:?} is not plain memory");
    match tensor.numel() {
        0 => &mut [],
        // SAFETY: from its address on, a contiguous tensor of f32 has `n` of them, initialised by the operator
        // that made it; its storage stays while the tensor is borrowed.
        n => unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<f32>(), n) },
    }
}

#[cfg(test)]
mod tests {
    use flow::ops::shapes::Shapes;
    use flow::ops::{Ops, ParamPath};

    use super::*;

    #[test]
    fn entries_are_rounded_to_the_type_asked_for() {
        let values = [1.0f32, -2.0, 1.0 + 3.0 / 512.0, 0.1];
        let shapes = Shapes::new();
        shapes.param(&ParamPath::root().at("w"), &[2, 2]);
        let parameters = Parameters::build(
            &[shapes.manifest()],
            Compute::CPU,
            Storage::Trainable(Group::alone()),
            |_, _| Ok(Tensor::from_slice(&values)),
        )
        .unwrap();
        for (dtype, expected) in
            [(Dtype::F32, values), (Dtype::BF16, [1.0, -2.0, 1.0 + 1.0 / 128.0, 0.100_097_656])]
        {
            let entries = parameters.entries(parameters.masters(), dtype).unwrap();
            let folder = tempfile::tempdir().unwrap();
            flow::checkpoint::write_sharded(folder.path(), "model", &entries, 1 << 20).unwrap();
            let weights = Weights::open(folder.path(), "model").unwrap();
            let view = weights.get("w").unwrap();
            assert_eq!((view.dtype, view.shape), (dtype, &[2, 2][..]));
            assert_eq!(weights.f32("w").unwrap(), expected);
        }
    }
}
