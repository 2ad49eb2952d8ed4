//! Models by the names that they are published under.

use std::path::Path;

use anyhow::{Result, ensure};
use flow::known;
use flow::pipeline::{Pipeline, fetched};
use flow::usage::Usage;

/// The pipeline that a name or a folder stands for.
///
/// # Errors
/// When it is neither.
pub(super) fn open(model: &str) -> Result<Pipeline> {
    if let Some(pipeline) = Pipeline::known(model) {
        return Ok(pipeline);
    }
    let names: Vec<&str> = known::MODELS.iter().map(|(name, _)| *name).collect();
    let unknown = || {
        let fetch = fetched(Path::new(model)).map(|fetch| format!(": {fetch}"));
        let (names, fetch) = (names.join(", "), fetch.unwrap_or_default());
        Usage(format!("{model}: neither a pipeline folder nor one of {names}{fetch}"))
    };
    ensure!(Path::new(model).is_dir(), unknown());
    Ok(Pipeline::open(Path::new(model))?)
}
