//! The measured model with other networks: wider, deeper, without weights of its own.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::program;

/// What is changed: a folder of the model, a key of its config, and the new value.
pub type Change<'a> = (&'a str, &'a str, Value);

/// Fills `folder` with the configs and tokenizers of [`program::model`], `changes` made.
///
/// # Errors
/// When a file cannot be read or written.
pub fn configs(folder: &Path, changes: &[Change<'_>]) -> Result<()> {
    let model = program::root().join(program::model());
    copy(&model, folder)?;
    for (component, key, value) in changes {
        let path = folder.join(component).join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config[key] = value.clone();
        fs::write(&path, config.to_string())?;
    }
    Ok(())
}

/// Such a model at `out` with random weights.
///
/// # Errors
/// When a file cannot be written or `ng-train init` fails.
pub fn random(out: &Path, changes: &[Change<'_>]) -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the configs")?;
    configs(home.path(), changes)?;
    let mut command = Command::new(program::built("ng-train")?);
    command.args(["init", "--like"]).arg(home.path()).arg("--out").arg(out);
    program::run(&mut command).map(|_| ())
}

/// Everything but weights and the lists of their files.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            copy(&path, &to.join(name))?;
        } else if !name.to_string_lossy().contains(".safetensors") {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}
