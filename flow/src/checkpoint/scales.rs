//! Weights in eight bits with a scale beside them, as ComfyUI and compressed-tensors write them.
//!
//! `X.weight` is then `X.scale_weight` (or `X.weight_scale`) times its numbers, in f32; one scale, or one a row.

use std::borrow::Cow;

use serde::Deserialize;

use super::stored::Coding;
use super::{CheckpointError, Dtype, Place, Result, View, Weights};

/// Last parts of the names of scales.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];
/// Last parts of names beside scaled weights that change no weight: scales of activations, and marks.
const BESIDE: [&str; 4] = ["scale_input", "input_scale", "scaled_fp8", COMFY];
/// What ComfyUI says of a layer, as JSON in bytes.
const COMFY: &str = "comfy_quant";

#[derive(Deserialize)]
struct Comfy {
    format: String,
}

impl Weights {
    /// Gives each weight of eight bits its scale, and takes the scales out of the list of names.
    pub(super) fn attach_scales(&mut self) -> Result<()> {
        let scaled = |name: &str| {
            let layer = SCALES.iter().find_map(|end| name.strip_suffix(end)?.strip_suffix('.'))?;
            let weight = format!("{layer}.weight");
            self.is_fp8(&weight).then(|| (weight, name.to_owned()))
        };
        let pairs: Vec<(String, String)> =
            self.places.keys().filter_map(|name| scaled(name)).collect();
        if pairs.is_empty() && !self.places.keys().any(|name| beside(name)) {
            return Ok(());
        }
        self.check_formats()?;
        for (weight, scale) in pairs {
            let Some(by) = self.places.remove(&scale) else { continue };
            let n: usize = by.shape.iter().product();
            let n_rows = self.places[&weight].rows.len();
            let is_float =
                matches!(self.dtype_of(&by), Some(Dtype::F32 | Dtype::F16 | Dtype::BF16));
            if (n != 1 && n != n_rows) || !is_float {
                let why = format!(
                    "{scale} has shape {:?}: one number is read, or one a row of {weight}",
                    by.shape
                );
                return Err(CheckpointError::malformed(&self.path, why));
            }
            let place = self.places.get_mut(&weight).expect("found above");
            place.scale = Some((by.shard, by.stored));
        }
        self.places.retain(|name, _| !beside(name));
        Ok(())
    }

    /// Refuses layers of formats that are more than eight bits with a scale.
    fn check_formats(&self) -> Result<()> {
        for name in self.places.keys().filter(|name| name.ends_with(COMFY)) {
            let view = self.get(name).map(|view| view.bytes.into_owned()).unwrap_or_default();
            let format = serde_json::from_slice(&view).map(|Comfy { format }| format);
            let format = format.unwrap_or_else(|_| "unknown".into());
            if !format.starts_with("float8_e") {
                let why = format!(
                    "{name} says {format}: of ComfyUI's quantised formats only float8 is read"
                );
                return Err(CheckpointError::malformed(&self.path, why));
            }
        }
        Ok(())
    }

    fn is_fp8(&self, name: &str) -> bool {
        let place = self.places.get(name);
        let stored = place.and_then(|place| self.shards[place.shard].tensors.get(&place.stored));
        stored.is_some_and(|stored| {
            matches!(stored.coding, Coding::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2))
        })
    }

    fn dtype_of(&self, place: &Place) -> Option<Dtype> {
        Some(self.shards[place.shard].tensors.get(&place.stored)?.coding.dtype())
    }

    /// `view` times its scale, in f32.
    pub(super) fn scaled<'a>(
        &self,
        view: &View<'a>,
        place: &Place,
        (shard, name): &(usize, String),
    ) -> View<'a> {
        let shard = &self.shards[*shard];
        let scale = shard.tensors.get(name).map(|stored| {
            let bytes = stored.coding.widened(Cow::Borrowed(shard.bytes(stored)));
            View { dtype: stored.coding.dtype(), shape: &[], bytes }.to_f32().unwrap_or_default()
        });
        let scale = scale.unwrap_or_default();
        let mut values = view.to_f32().unwrap_or_default();
        let n_columns = values.len() / place.rows.len().max(1);
        let rows = place.parts().flatten();
        for (row, values) in rows.zip(values.chunks_mut(n_columns.max(1))) {
            let by = if scale.len() == 1 { scale[0] } else { scale[row] };
            for value in values {
                *value *= by;
            }
        }
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        View { dtype: Dtype::F32, shape: view.shape, bytes: Cow::Owned(bytes) }
    }
}

fn beside(name: &str) -> bool {
    BESIDE.iter().any(|end| {
        name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}
