//! What a program says: warnings always, notes unless it is to be quiet, details when they are asked for; all of it
//! in a file too, where one is named.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Warnings and errors.
    Quiet,
    /// And what runs, and how far it is.
    Usual,
    /// And every step, and in it what is under way.
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
pub fn open(level: Level, file: Option<&Path>) -> io::Result<()> {
    let opened = file.map(|path| File::options().append(true).create(true).open(path));
    let file = opened.transpose()?.map(Mutex::new);
    LOG.get_or_init(|| Log { level, file });
    Ok(())
}

/// How much is said.
pub fn level() -> Level {
    LOG.get().map_or(Level::Usual, |log| log.level)
}

/// Tells a person what should not be overlooked.
pub fn warn(text: &str) {
    say(&format!("warning: {text}"));
}

/// Tells what runs.
pub fn note(text: &str) {
    if level() >= Level::Usual {
        say(text);
    } else {
        keep(text);
    }
}

/// Tells what is under way, to those who want to know.
pub fn detail(text: &str) {
    if level() == Level::Verbose {
        say(text);
    }
}

/// One line on standard error, which may be gone together with the terminal, and in the log file.
pub fn say(text: &str) {
    drop(write_line(&mut io::stderr(), text));
    keep(text);
}

/// Appends `text` to the log file alone.
pub fn keep(text: &str) {
    if let Some(file) = LOG.get().and_then(|log| log.file.as_ref()) {
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk must not end the run that it would tell of.
        drop(write_line(&mut *file, text));
    }
}

/// In one piece, since other processes write to the same place.
fn write_line(out: &mut impl Write, text: &str) -> io::Result<()> {
    out.write_all(format!("{text}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a piece at a time, and counts them.
    struct Pieces(usize);

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += 1;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_one_piece() {
        let mut pieces = Pieces(0);
        write_line(&mut pieces, "iteration 4").unwrap();
        assert_eq!(pieces.0, 1);
    }
}
