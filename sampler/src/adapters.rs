//! LoRAs that are given to each run of the transformer, where the export has slots for them.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, bail, ensure};
use flow::{
    lora::{Factors, Layers, Lora},
    pipeline::Pipeline,
};
use onnx::Tensor;
use serde::Deserialize;

/// Inputs that the transformer may be given: `LAYER.a` `[r, n_in]` and `LAYER.b` `[n_out, r]`, as
/// `export.json` lists them.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Slots {
    /// What follows a layer's path in the name of A.
    pub a: String,
    /// What follows a layer's path in the name of B.
    pub b: String,
    /// `[n_out, n_in]` of each layer.
    pub layers: BTreeMap<String, [usize; 2]>,
}

/// A LoRA in memory.
#[derive(Debug)]
pub struct Adapter {
    /// Unlike that of every other, also after another file was loaded under the same name.
    id: u64,
    /// What requests call it.
    pub name: String,
    /// What it is, a sentence each.
    pub lines: Vec<String>,
    layers: BTreeMap<String, Factors>,
}

/// LoRAs by the names that requests use; any thread may load and let go of some.
#[derive(Debug, Default)]
pub struct Adapters {
    loaded: RwLock<BTreeMap<String, Arc<Adapter>>>,
}

/// A LoRA and the scale it is used at.
pub type Scaled = (Arc<Adapter>, f64);

impl Adapters {
    /// Reads `path`, a LoRA of any trainer, to be called `name`.
    ///
    /// # Errors
    /// When it is none, is not of this model, or changes what has no slot.
    pub fn load(
        &self,
        name: &str,
        path: &Path,
        pipeline: &Pipeline,
        slots: Option<&Slots>,
    ) -> Result<Arc<Adapter>> {
        let adapter = Arc::new(Adapter::open(name, path, pipeline, slots)?);
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        loaded.insert(name.to_owned(), adapter.clone());
        Ok(adapter)
    }

    /// Lets go of the one called `name`; false if there is none. Jobs that have it keep it.
    pub fn unload(&self, name: &str) -> bool {
        self.loaded.write().unwrap_or_else(PoisonError::into_inner).remove(name).is_some()
    }

    /// The one called `name`.
    pub fn get(&self, name: &str) -> Option<Arc<Adapter>> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// All names, in order.
    pub fn names(&self) -> Vec<String> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

impl Adapter {
    fn open(name: &str, path: &Path, pipeline: &Pipeline, slots: Option<&Slots>) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let slots = slots.with_context(|| {
            let folder = pipeline.dir.display();
            format!("{folder} has no slots for LoRAs: make it with `ng-export --lora-slots`")
        })?;
        let lora = Lora::open(path, 1.0, &Layers::of(pipeline))?;
        ensure!(
            lora.is_low_rank(),
            "{}: more than A and B of the transformer's layers, which no slot takes: merge it with \
             `ng-export --lora`",
            path.display()
        );
        let mut layers = BTreeMap::new();
        for (layer, _) in lora.ranks() {
            let Some(&[n_out, n_in]) = slots.layers.get(layer) else {
                bail!("{}: layer {layer} has no slot in the export", path.display());
            };
            let factors = lora.factors(layer)?.context("a rank has factors")?;
            let fits =
                factors.a.len() == factors.rank * n_in && factors.b.len() == factors.rank * n_out;
            ensure!(fits, "{}: layer {layer} does not fit its slot", path.display());
            layers.insert(layer.to_owned(), factors);
        }
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, name: name.to_owned(), lines: lora.lines(), layers })
    }
}

/// What tells one set of LoRAs from another.
pub fn key(loras: &[Scaled]) -> Vec<(u64, u64)> {
    loras.iter().map(|(adapter, scale)| (adapter.id, scale.to_bits())).collect()
}

/// The transformer's inputs for `loras` together: their ranks side by side.
///
/// # Errors
/// Never in practice: shapes were checked.
pub fn inputs(loras: &[Scaled], slots: &Slots) -> Result<Vec<(String, Tensor)>> {
    let mut found = Vec::new();
    for (layer, &[n_out, n_in]) in &slots.layers {
        let of_layer: Vec<(&Factors, f32)> = loras
            .iter()
            .filter_map(|(adapter, scale)| Some((adapter.layers.get(layer)?, *scale as f32)))
            .collect();
        let rank: usize = of_layer.iter().map(|(factors, _)| factors.rank).sum();
        if rank == 0 {
            continue;
        }
        let a = of_layer.iter().flat_map(|(factors, _)| &factors.a).copied().collect();
        let row = |row: usize| {
            of_layer.iter().flat_map(move |(factors, scale)| {
                let row = &factors.b[row * factors.rank..(row + 1) * factors.rank];
                row.iter().map(move |value| scale * value)
            })
        };
        let b = (0..n_out).flat_map(row).collect();
        found.push((format!("{layer}.{}", slots.a), Tensor::f32([rank, n_in], a)?));
        found.push((format!("{layer}.{}", slots.b), Tensor::f32([n_out, rank], b)?));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(id: u64, rank: usize, value: f32) -> Arc<Adapter> {
        let factors = Factors { rank, a: vec![value; rank * 3], b: vec![value; 2 * rank] };
        let layers = [("layer".to_owned(), factors)].into();
        Arc::new(Adapter { id, name: id.to_string(), lines: Vec::new(), layers })
    }

    #[test]
    fn several_stand_side_by_side() -> Result<()> {
        let layers = [("layer".to_owned(), [2, 3]), ("other".to_owned(), [4, 4])].into();
        let slots = Slots { a: "A".into(), b: "B".into(), layers };
        let loras = [(adapter(0, 1, 1.0), 0.5), (adapter(1, 2, 3.0), 2.0)];
        let inputs = inputs(&loras, &slots)?;
        assert_eq!(inputs.len(), 2);
        let (name, a) = &inputs[0];
        assert_eq!((name.as_str(), &a.shape[..]), ("layer.A", &[3, 3][..]));
        assert_eq!(a.as_f32()?, [1., 1., 1., 3., 3., 3., 3., 3., 3.]);
        let (name, b) = &inputs[1];
        assert_eq!((name.as_str(), &b.shape[..]), ("layer.B", &[2, 3][..]));
        assert_eq!(b.as_f32()?, [0.5, 6.0, 6.0, 0.5, 6.0, 6.0]);
        assert_ne!(key(&loras[..1]), key(&[(loras[0].0.clone(), 1.0)]));
        Ok(())
    }
}
