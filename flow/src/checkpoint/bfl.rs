//! A FLUX transformer in BFL's names, whose fused layers are divided on reading and joined on writing.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckpointError, Dtype, Entry, Place, Result, Values, Weights};
use crate::naming::{self, Layer};
use crate::ops::shapes::Manifest;

/// Most blocks of a kind that names are looked through for.
const MAX_BLOCKS: usize = 4096;

impl Weights {
    /// Weights in BFL's names after `prefix`, by the names of diffusers; the rows of fused layers are divided
    /// as `manifest` says. What is no part of a FLUX transformer keeps its name.
    ///
    /// # Errors
    /// Names the first tensor whose rows are not those of its layers.
    pub fn from_bfl(mut self, prefix: &str, manifest: &Manifest) -> Result<Self> {
        let known: BTreeMap<&str, &[usize]> = manifest.entries().collect();
        let double = self.n_blocks(&format!("{prefix}double_blocks"));
        let single = self.n_blocks(&format!("{prefix}single_blocks"));
        for layer in naming::layers(double, single) {
            for &[bfl, leaf] in layer.leaves() {
                let fused = format!("{prefix}{}.{bfl}", layer.bfl);
                let Some(place) = self.places.remove(&fused) else { continue };
                let names = diffusers_names(&layer, leaf);
                let heights: Option<Vec<usize>> = match &names[..] {
                    [_] => Some(vec![place.rows.len()]),
                    several => several
                        .iter()
                        .map(|name| known.get(&**name).and_then(|shape| shape.first().copied()))
                        .collect(),
                };
                let n_rows = heights.iter().flatten().sum::<usize>();
                let Some(heights) = heights.filter(|_| n_rows == place.rows.len()) else {
                    let shape = &place.shape;
                    let why =
                        format!("{fused} has shape {shape:?}, config.json wants {n_rows} rows");
                    return Err(CheckpointError::malformed(&self.path, why));
                };
                let mut start = place.rows.start;
                for (name, height) in names.into_iter().zip(heights) {
                    let rows = start..start + height;
                    start = rows.end;
                    let mut shape = place.shape.clone();
                    if let Some(n) = shape.first_mut() {
                        *n = height;
                    }
                    let halves_swapped = layer.halves_swapped;
                    let place = Place { shape, rows, halves_swapped, ..place.clone() };
                    self.places.insert(name, place);
                }
            }
        }
        Ok(self)
    }

    /// The tensors of a FLUX transformer as one file in BFL's names has them, fused and in its order of rows.
    ///
    /// # Errors
    /// Names a tensor that BFL has no name for, or layers to be fused that are not of one type.
    pub fn bfl_entries(&self) -> Result<Vec<Entry<'_>>> {
        let malformed = |why: String| Err(CheckpointError::malformed(&self.path, why));
        let mut left: BTreeSet<String> = self.names().map(str::to_owned).collect();
        let mut entries = Vec::new();
        let [double, single] =
            ["transformer_blocks", "single_transformer_blocks"].map(|kind| self.n_blocks(kind));
        for layer in naming::layers(double, single) {
            for &[bfl, leaf] in layer.leaves() {
                let names = diffusers_names(&layer, leaf);
                for name in &names {
                    left.remove(name);
                }
                let shapes: Vec<&[usize]> =
                    names.iter().filter_map(|name| self.shape(name)).collect();
                let [first, ..] = shapes[..] else { continue };
                let dtype = self.dtype(&names[0]).unwrap_or(Dtype::F32);
                if !names.iter().all(|name| self.dtype(name) == Some(dtype)) {
                    return malformed(format!("{} are not all of one type", names.join(", ")));
                }
                let mut shape = first.to_vec();
                let heights = shapes.iter().filter_map(|shape| shape.first());
                let n_rows = heights.sum();
                if let Some(n) = shape.first_mut() {
                    *n = n_rows;
                }
                let (name, layer) = (format!("{}.{bfl}", layer.bfl), layer.clone());
                let values = Values::Made(Box::new(move || {
                    let views = names.iter().filter_map(|name| self.get(name));
                    let mut bytes: Vec<u8> =
                        views.flat_map(|view| view.bytes.into_owned()).collect();
                    layer.reorder(&mut bytes);
                    Ok(bytes)
                }));
                entries.push(Entry { name, shape, dtype, values });
            }
        }
        match left.first() {
            Some(name) => malformed(format!("{name} has no name in BFL's files")),
            None => Ok(entries),
        }
    }

    /// Blocks whose names begin with `kind` and an index.
    pub(crate) fn n_blocks(&self, kind: &str) -> usize {
        let index = |name: &str| {
            name.strip_prefix(kind)?.strip_prefix('.')?.split('.').next()?.parse::<usize>().ok()
        };
        let indices = self.names().filter_map(index);
        indices.filter(|&at| at < MAX_BLOCKS).max().map_or(0, |at| at + 1)
    }
}

fn diffusers_names(layer: &Layer, leaf: &str) -> Vec<String> {
    layer.diffusers.iter().map(|layer| format!("{layer}.{leaf}")).collect()
}
