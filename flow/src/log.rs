//! What a program says: warnings always, notes unless it is to be quiet, details when they are asked for; all of it
//! in a file too, where one is named. Of several processes that share a terminal one says all this, and the others
//! their errors alone.

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
/// What waits for the first line that is no error.
static HEADING: Mutex<Option<String>> = Mutex::new(None);
/// The file of a process that has stepped aside.
static ASIDE: OnceLock<Option<Mutex<File>>> = OnceLock::new();

/// Says so much from here on, and appends it to `file`.
///
/// # Errors
/// When the file cannot be opened.
pub fn open(level: Level, file: Option<&Path>) -> io::Result<()> {
    let file = opened(file)?;
    LOG.get_or_init(|| Log { level, file });
    Ok(())
}

/// Leaves the terminal and the log file to another process from here on: all but errors goes to `file` alone, or nowhere,
/// and errors there as well.
///
/// # Errors
/// When the file cannot be opened.
pub fn step_aside(file: Option<&Path>) -> io::Result<()> {
    let file = opened(file)?;
    ASIDE.get_or_init(|| file);
    Ok(())
}

fn opened(file: Option<&Path>) -> io::Result<Option<Mutex<File>>> {
    let opened = file.map(|path| File::options().append(true).create(true).open(path));
    Ok(opened.transpose()?.map(Mutex::new))
}

/// Whether another process speaks to people.
pub fn is_aside() -> bool {
    ASIDE.get().is_some()
}

/// How much is said.
pub fn level() -> Level {
    LOG.get().map_or(Level::Usual, |log| log.level)
}

/// Tells what runs before anything else is told, but for errors: where one ends the program at once, it is told alone.
pub fn heading(text: &str) {
    *HEADING.lock().unwrap_or_else(PoisonError::into_inner) = Some(text.to_owned());
}

fn begin() {
    let heading = HEADING.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(text) = heading {
        tell(&text, Level::Usual);
    }
}

/// Says `text` where so much is said, and keeps it otherwise.
fn tell(text: &str, from: Level) {
    if level() >= from && !is_aside() {
        say(text);
    } else {
        keep(text);
    }
}

/// Tells a person what should not be overlooked.
pub fn warn(text: &str) {
    begin();
    tell(&format!("warning: {text}"), Level::Quiet);
}

/// Tells what runs.
pub fn note(text: &str) {
    begin();
    tell(text, Level::Usual);
}

/// Tells what is under way, to those who want to know.
pub fn detail(text: &str) {
    if level() == Level::Verbose {
        begin();
        tell(text, Level::Verbose);
    }
}

/// One line on standard error, which may be gone together with the terminal, and in the log file.
pub fn say(text: &str) {
    drop(write_line(&mut io::stderr(), text));
    append(LOG.get().and_then(|log| log.file.as_ref()), text);
    append(ASIDE.get().and_then(Option::as_ref), text);
}

/// Appends `text` to a file alone: the log file, or that of a process that has stepped aside.
pub fn keep(text: &str) {
    let log = || LOG.get().and_then(|log| log.file.as_ref());
    append(ASIDE.get().map_or_else(log, Option::as_ref), text);
}

fn append(file: Option<&Mutex<File>>, text: &str) {
    if let Some(file) = file {
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
