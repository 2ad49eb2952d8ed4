//! What a run says: warnings always, notes unless it is to be quiet, details when they are asked for; all of it
//! in a file too, where one is named.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result};

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Warnings and errors.
    Quiet,
    /// And what runs, and how far it is.
    Usual,
    /// And every iteration, where no one watches a terminal.
    Verbose,
}

struct Log {
    level: Level,
    file: Option<Mutex<File>>,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Says so much from here on, and appends it to `file`.
///
/// # Errors
/// When the file cannot be opened.
pub fn open(level: Level, file: Option<&Path>) -> Result<()> {
    let opened = file.map(|path| {
        let file = File::options().append(true).create(true).open(path);
        file.with_context(|| format!("cannot open the log {}", path.display()))
    });
    let file = opened.transpose()?.map(Mutex::new);
    LOG.get_or_init(|| Log { level, file });
    Ok(())
}

/// How much is said.
pub(crate) fn level() -> Level {
    LOG.get().map_or(Level::Usual, |log| log.level)
}

/// Tells a person what should not be overlooked.
pub(crate) fn warn(text: &str) {
    let text = format!("warning: {text}");
    eprintln!("{text}");
    keep(&text);
}

/// Tells what runs.
pub(crate) fn note(text: &str) {
    if level() >= Level::Usual {
        eprintln!("{text}");
    }
    keep(text);
}

/// Appends `text` to the log file alone.
pub(crate) fn keep(text: &str) {
    if let Some(file) = LOG.get().and_then(|log| log.file.as_ref()) {
        let mut file = file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A full disk must not end the run that it would tell of.
        drop(writeln!(file, "{text}"));
    }
}
