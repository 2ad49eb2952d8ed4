//! What tells whether a file is the one it was: its name, size and time of change.

use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result};
use serde_json::Value;

/// `NAME, N bytes, changed at T ns` of the file `path`, or of each file below the folder `path` in the
/// order of their names; hidden ones are left out.
///
/// # Errors
/// When it cannot be read.
pub(super) fn of(path: &Path) -> Result<Vec<String>> {
    let mut stamps = Vec::new();
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    visit(path, &name, &mut stamps).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(stamps)
}

/// Those of every file or folder that is named somewhere in `settings`.
///
/// # Errors
/// When one cannot be read.
pub(super) fn of_named(settings: &Value) -> Result<Vec<String>> {
    let each = |values: &mut dyn Iterator<Item = &Value>| {
        let stamps = values.map(of_named).collect::<Result<Vec<_>>>()?;
        Ok(stamps.concat())
    };
    match settings {
        Value::String(text) if Path::new(text).exists() => of(Path::new(text)),
        Value::Array(values) => each(&mut values.iter()),
        Value::Object(fields) => each(&mut fields.values()),
        _ => Ok(Vec::new()),
    }
}

fn visit(path: &Path, name: &str, stamps: &mut Vec<String>) -> Result<()> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_dir() {
        let changed = metadata.modified()?.duration_since(UNIX_EPOCH)?.as_nanos();
        stamps.push(format!("{name}, {} bytes, changed at {changed} ns", metadata.len()));
        return Ok(());
    }
    let mut names = fs::read_dir(path)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<String>>>()?;
    names.retain(|below| !below.starts_with('.'));
    names.sort();
    for below in names {
        visit(&path.join(&below), &format!("{name}/{below}"), stamps)?;
    }
    Ok(())
}
