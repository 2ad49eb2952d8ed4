//! Parameters as flat storage: one f32 tensor a segment (a network's block), and one view a name.
//!
//! The optimiser and the checkpoint see flat tensors; networks see the views. Where compute is narrower
//! than f32, the views are copies that [`Parameters::refresh`] renews after each step.

use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Context, Result};
use flow::checkpoint::{Entry, Weights};
use flow::ops::shapes::Manifest;
use tch::{Device, Kind, Tensor, no_grad};

use crate::eager::{Eager, dims};

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
}

/// The parameters of one block.
pub(crate) struct Segment {
    places: Vec<Place>,
    /// f32 values, `[n]`.
    pub(crate) master: Tensor,
}

/// The parameters of a network, in segments.
pub(crate) struct Parameters {
    pub(crate) segments: Vec<Segment>,
    views: HashMap<String, Rc<Tensor>>,
    device: Device,
    kind: Kind,
    trainable: bool,
}

impl Parameters {
    /// Takes each manifest as one segment and its values from `value(name, shape)`, as f32.
    pub(crate) fn build(
        manifests: &[Manifest],
        device: Device,
        kind: Kind,
        mut value: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut segments = Vec::with_capacity(manifests.len());
        for manifest in manifests {
            let mut places = Vec::new();
            let mut flat: Vec<f32> = Vec::with_capacity(manifest.n_elements());
            for (name, shape) in manifest.entries() {
                let offset = flat.len() as i64;
                flat.extend(value(name, shape).with_context(|| format!("parameter {name}"))?);
                places.push(Place { name: name.to_owned(), shape: shape.to_vec(), offset });
            }
            segments.push(Segment { places, master: Tensor::from_slice(&flat).to_device(device) });
        }
        let views = HashMap::new();
        let mut parameters = Self { segments, views, device, kind, trainable: false };
        parameters.make_views();
        Ok(parameters)
    }

    /// [`Parameters::build`] with the values of a checkpoint.
    pub(crate) fn load(
        manifests: &[Manifest],
        weights: &Weights,
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        Self::build(manifests, device, kind, |name, _| Ok(weights.f32(name)?))
    }

    /// Lets gradients accumulate on every view.
    pub(crate) fn train(&mut self) {
        self.trainable = true;
        self.make_views();
    }

    /// The interpreter over these parameters.
    pub(crate) fn ops(&self) -> Eager<'_> {
        Eager::new(&self.views, self.device, self.kind)
    }

    /// Type of activations.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Gathers the accumulated gradients into one flat f32 tensor a segment and clears them.
    pub(crate) fn take_gradients(&self) -> Vec<Tensor> {
        no_grad(|| {
            self.segments
                .iter()
                .map(|segment| {
                    let flat = segment.master.zeros_like();
                    for place in &segment.places {
                        let mut grad = self.views[&place.name].grad();
                        if grad.defined() {
                            let values = grad.reshape([-1]).to_kind(Kind::Float);
                            flat.narrow(0, place.offset, place.len()).copy_(&values);
                            let _ = grad.zero_();
                        }
                    }
                    flat
                })
                .collect()
        })
    }

    /// Renews the views after the masters changed; nothing to do where they share storage.
    pub(crate) fn refresh(&self) {
        if self.kind == Kind::Float {
            return;
        }
        no_grad(|| {
            for segment in &self.segments {
                for place in &segment.places {
                    self.views[&place.name].shallow_clone().copy_(&segment.view(place));
                }
            }
        });
    }

    /// The values of `flats` (the masters, or an average of them) as safetensors entries.
    pub(crate) fn entries<'a>(
        &'a self,
        flats: impl Iterator<Item = &'a Tensor>,
    ) -> Result<Vec<Entry<'a>>> {
        let mut entries = Vec::new();
        for (segment, flat) in self.segments.iter().zip(flats) {
            let values = Vec::<f32>::try_from(&flat.to_device(Device::Cpu))?;
            for place in &segment.places {
                let range = place.offset as usize..(place.offset + place.len()) as usize;
                entries.push(Entry::f32(&place.name, &place.shape, &values[range]));
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// The masters of all segments.
    pub(crate) fn masters(&self) -> impl Iterator<Item = &Tensor> {
        self.segments.iter().map(|segment| &segment.master)
    }

    fn make_views(&mut self) {
        for segment in &self.segments {
            for place in &segment.places {
                let view = segment.view(place).detach().to_kind(self.kind);
                let view = view.set_requires_grad(self.trainable);
                self.views.insert(place.name.clone(), Rc::new(view));
            }
        }
    }
}

impl Segment {
    fn view(&self, place: &Place) -> Tensor {
        self.master.narrow(0, place.offset, place.len()).reshape(dims(&place.shape))
    }
}
