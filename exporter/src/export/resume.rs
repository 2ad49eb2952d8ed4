//! Going on with an export that was interrupted: what must be the same, and what of it is kept.
//!
//! Kept are converted weights, byte for byte; graphs, links and small files are made again.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flow::checkpoint::read_bounded;
use flow::contents;

use super::{JOURNAL, Prepared};
use crate::external::DATA_FILE;

/// Everything that what is written depends on: the program, the options, and of each file its size, time of
/// change and place on the disk.
pub(super) fn fingerprint(prepared: &Prepared<'_>) -> Result<String> {
    let request = prepared.request;
    let mut text = format!(
        "{} {:?} {:?} {:?} {:?}\n",
        env!("CARGO_PKG_VERSION"),
        request.choice,
        request.placement,
        request.parts,
        request.loras
    );
    let mut files: Vec<PathBuf> =
        contents::of(&request.checkpoint)?.into_iter().map(|file| file.source).collect();
    for (lora, _) in &request.loras {
        if lora.is_dir() {
            let entries = fs::read_dir(lora).with_context(|| lora.display().to_string())?;
            files.extend(entries.flatten().map(|entry| entry.path()));
        } else {
            files.push(lora.clone());
        }
    }
    files.sort();
    for file in files {
        let found = fs::metadata(&file).with_context(|| file.display().to_string())?;
        let changed = (found.mtime(), found.mtime_nsec());
        let _ = writeln!(text, "{} {} {changed:?} {}", file.display(), found.len(), found.ino());
    }
    Ok(text)
}

/// Whether `folder` was left by an export of that `fingerprint`.
pub(super) fn fits(folder: &Path, fingerprint: &str) -> bool {
    read_bounded(&folder.join(JOURNAL)).is_ok_and(|text| text == fingerprint.as_bytes())
}

/// Says in `folder` what it is.
pub(super) fn begin(folder: &Path, fingerprint: &str) -> Result<()> {
    let path = folder.join(JOURNAL);
    fs::write(&path, fingerprint).with_context(|| format!("cannot write {}", path.display()))
}

/// Makes the folder of a graph, or leaves its weights alone there.
pub(super) fn clear(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != DATA_FILE && entry.file_name() != JOURNAL {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Bytes of weights that an earlier run left in `folder`.
pub(super) fn n_bytes(folder: &Path) -> u64 {
    let parts = fs::read_dir(folder).into_iter().flatten().flatten();
    parts
        .filter_map(|part| fs::metadata(part.path().join(DATA_FILE)).ok())
        .map(|found| found.len())
        .sum()
}

/// Removes from `folder` what only a later run would need.
pub(super) fn end(folder: &Path) -> Result<()> {
    let remove = |path: PathBuf| match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    };
    remove(folder.join(JOURNAL))?;
    let parts = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    parts.flatten().try_for_each(|part| {
        if part.path().is_dir() { remove(part.path().join(JOURNAL)) } else { Ok(()) }
    })
}
