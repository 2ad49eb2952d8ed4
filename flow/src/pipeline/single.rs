//! Checkpoints in one file, as ComfyUI has them.

use std::collections::BTreeSet;
use std::path::Path;

use super::{Component, Pipeline, Result, names};
use crate::checkpoint::{CheckpointError, Weights};

/// What a checkpoint in one file holds.
pub struct Single {
    /// The pipeline that it was read as, with as many blocks as the file has and its kind of guidance.
    pub pipeline: Pipeline,
    /// The networks in it, by the names of diffusers and transformers, checked.
    pub networks: Vec<(Component, Weights)>,
    /// Names of tensors that are part of none.
    pub left: Vec<String>,
}

impl Pipeline {
    /// The networks in the one file at `path`, of the sizes of this pipeline's but for the number of blocks.
    ///
    /// # Errors
    /// When the file is broken, holds no network of a FLUX pipeline, or one that does not fit.
    pub fn in_file(&self, path: &Path) -> Result<Single> {
        let file = Weights::open_file(path)?;
        let mut pipeline = self.clone();
        let blocks = names::blocks(&file);
        if let Some(names::Blocks { double, single, guidance }) = blocks {
            pipeline.transformer.num_layers = double;
            pipeline.transformer.num_single_layers = single;
            pipeline.transformer.guidance_embeds = guidance;
        }
        let (mut networks, mut used) = (Vec::new(), BTreeSet::new());
        for component in Component::ALL.into_iter().filter(|part| names::holds(&file, *part)) {
            let manifest = pipeline.manifest(component);
            let weights = names::usual(Weights::open_file(path)?, component, &manifest)?;
            weights.check(&manifest, &[])?;
            used.extend(weights.stored_names().map(str::to_owned));
            networks.push((component, weights));
        }
        if networks.is_empty() {
            let first = file.names().next().unwrap_or("no tensor");
            let why = format!("no network of a FLUX pipeline is in it ({first}, …)");
            return Err(CheckpointError::malformed(path, why));
        }
        let left = file.names().filter(|name| !used.contains(*name)).map(str::to_owned).collect();
        Ok(Single { pipeline, networks, left })
    }
}
