//! Whether weights are those of a network.

use std::collections::BTreeSet;

use super::{CheckpointError, Dtype, Result, Weights};
use crate::ops::shapes::Manifest;

/// Misfits named in one message.
const MAX_MISFITS: usize = 4;
/// Parts of names in quantised files that are not read, and whose they are.
const QUANTISED: [(&str, &str); 3] = [
    (".quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    (".SCB", "bitsandbytes int8"),
];

impl Weights {
    /// Compares names, shapes and types with what the network uses; `ignored` names may be present.
    ///
    /// # Errors
    /// One message that lists what is missing, unexpected, mis-shaped or mis-typed, if that is much the
    /// first of it.
    pub fn check(&self, manifest: &Manifest, ignored: &[&str]) -> Result<()> {
        let quantised = |name: &str| QUANTISED.iter().find(|(part, _)| name.contains(part));
        if let Some((_, whose)) = self.names().find_map(quantised) {
            let why = format!("{whose} weights are not read: take bf16, fp8 or GGUF weights");
            return Err(CheckpointError::malformed(&self.path, why));
        }
        let mut list = Vec::new();
        for (name, shape) in manifest.entries() {
            match (self.shape(name), self.dtype(name)) {
                (Some(found), _) if found != shape => {
                    list.push(format!("{name} has shape {found:?} instead of {shape:?}"));
                }
                (Some(_), Some(Dtype::F32 | Dtype::F16 | Dtype::BF16)) => {}
                (Some(_), Some(dtype)) => {
                    list.push(format!("{name} has type {dtype:?} instead of a float"));
                }
                _ => list.push(format!("{name} {shape:?} is missing")),
            }
        }
        let known: BTreeSet<&str> =
            manifest.entries().map(|(name, _)| name).chain(ignored.iter().copied()).collect();
        list.extend(
            self.names().filter(|n| !known.contains(n)).map(|n| format!("{n} is unexpected")),
        );
        if list.is_empty() {
            return Ok(());
        }
        if list.len() > MAX_MISFITS {
            let n_more = list.len() - MAX_MISFITS;
            list.truncate(MAX_MISFITS);
            list.push(format!("and {n_more} more"));
        }
        Err(CheckpointError::Misfit { path: self.path.clone(), list: list.join("; ") })
    }
}
