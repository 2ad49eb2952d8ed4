//! Prompt files, read row by row: what is wrong with one row is told and costs that row alone.

use std::fmt::Display;
use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use super::row::{Row, of_text, parse};
use super::{Parsed, Prompt, table};
use crate::checkpoint::{CheckpointError, open_for_reading};

/// Largest accepted prompt file, in bytes.
pub const MAX_FILE: u64 = 256 * 1024 * 1024;
/// What the names of prompt files end in.
pub const ENDS: [&str; 5] = ["txt", "json", "jsonl", "csv", "tsv"];
/// Most line ends, commas and tabs of a prompt file: a byte on disk can be a hundred in memory.
const MAX_PARTS: usize = 20_000_000;

/// The prompts of a file, and what was made of its other rows.
#[derive(Debug, Default)]
pub struct Prompts {
    /// In the order of the file, with those that it has twice.
    pub prompts: Vec<Prompt>,
    left_out: Tally,
    changed: Tally,
}

/// How many rows, and the first of them.
#[derive(Debug, Default)]
struct Tally {
    n: usize,
    first: String,
}

impl Tally {
    fn add(&mut self, first: impl FnOnce() -> String) {
        if self.n == 0 {
            self.first = first();
        }
        self.n += 1;
    }
}

impl Prompts {
    /// Adds the row `value` that stands at `place`, or counts it where it is no prompt.
    pub fn push(&mut self, place: impl Display, value: Parsed<&Value>) {
        self.add(place, value.and_then(parse));
    }

    fn add(&mut self, place: impl Display, row: Parsed<Row>) {
        match row {
            Ok(Row { prompt, is_changed }) => {
                if is_changed {
                    self.changed.add(|| place.to_string());
                }
                self.prompts.push(prompt);
            }
            Err(why) => self.left_out.add(|| format!("{place}: {why}")),
        }
    }

    /// What people should know of the rows, a sentence each.
    pub fn notices(&self) -> Vec<String> {
        let Self { left_out, changed, .. } = self;
        let first = |tally: &Tally| {
            if tally.n > 1 { format!("first {}", tally.first) } else { tally.first.clone() }
        };
        let of = |tally: &Tally| if tally.n == 1 { "row" } else { "rows" };
        let mut notices = Vec::new();
        if left_out.n > 0 {
            notices.push(format!("{} {} left out ({})", left_out.n, of(left_out), first(left_out)));
        }
        if changed.n > 0 {
            notices.push(format!(
                "{} {} with line breaks or control characters inside, which became blanks or went ({})",
                changed.n,
                of(changed),
                first(changed)
            ));
        }
        notices
    }

    /// These, if there are any.
    ///
    /// # Errors
    /// Says that there are none, and what was wrong with the first row.
    pub fn any(self) -> Parsed<Self> {
        match (self.prompts.is_empty(), self.left_out.n) {
            (false, _) => Ok(self),
            (true, 0) => Err("holds no prompt".into()),
            (true, _) => Err(format!("holds no prompt: {}", self.left_out.first)),
        }
    }
}

/// Reads a prompt file by its extension.
///
/// - `.txt`: one prompt a line, blank lines are skipped
/// - `.json`: a list of strings (as in the test set of `HPDv2`) or of objects
/// - `.jsonl`: one object or string a line
/// - `.csv`, `.tsv`: objects, whose fields the first line names
///
/// An object has `prompt`, `text`, `caption` or `prompt_en`, a string or a conversation whose last message
/// by the user counts, and may have `target` and `colour` (or `color`); its other fields are for reward
/// servers. Rows that are no prompt (empty, too long, not JSON) are left out and counted. In the others line
/// breaks become blanks, and control characters go.
///
/// # Errors
/// One line naming the file, when it is not of such a kind or holds no prompt.
pub fn read(path: &Path) -> Result<Prompts, CheckpointError> {
    let malformed = |why: String| CheckpointError::malformed(path, why);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let extension = extension.to_ascii_lowercase();
    fs::metadata(path).map_err(CheckpointError::io(path))?;
    if !ENDS.contains(&&*extension) {
        return Err(malformed(format!("a prompt file ends in .{}", ENDS.join(", ."))));
    }
    let mut file = open_for_reading(path)?;
    let size = file.metadata().map_err(CheckpointError::io(path))?.len();
    check_size(size).map_err(malformed)?;
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_FILE).read_to_end(&mut bytes).map_err(CheckpointError::io(path))?;
    of_bytes(&extension, &bytes).map_err(malformed)
}

fn check_size(size: u64) -> Parsed<()> {
    if size > MAX_FILE {
        return Err(format!("{size} bytes, a prompt file has at most {MAX_FILE}"));
    }
    Ok(())
}

/// As [`read`], of what a file whose name ends in `extension`, one of [`ENDS`], would hold.
///
/// # Errors
/// What is wrong with it, of which no name is known.
pub fn of_bytes(extension: &str, bytes: &[u8]) -> Parsed<Prompts> {
    check_size(bytes.len() as u64)?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err("is UTF-16: save it as UTF-8".into());
    }
    let n_parts = bytes.iter().filter(|byte| matches!(byte, b'\n' | b',' | b'\t')).count();
    if n_parts > MAX_PARTS {
        return Err(format!("more than {MAX_PARTS} lines and fields"));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let read = match extension {
        "json" => parse_json(bytes),
        "jsonl" => Ok(lines(bytes, |line| {
            let value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
            parse(&value)
        })),
        "csv" => table::parse(bytes, b','),
        "tsv" => table::parse(bytes, b'\t'),
        _ => Ok(lines(bytes, of_text)),
    };
    read.and_then(Prompts::any)
}

fn parse_json(bytes: &[u8]) -> Parsed<Prompts> {
    let value: Value =
        serde_json::from_slice(bytes).map_err(|error| format!("not JSON: {error}"))?;
    let Value::Array(entries) = value else {
        return Err("line 1: expected a list of prompts".into());
    };
    let mut prompts = Prompts::default();
    for (at, entry) in entries.iter().enumerate() {
        prompts.push(format_args!("entry {}", at + 1), Ok(entry));
    }
    Ok(prompts)
}

/// Every line that is not blank, with its number from 1.
fn lines(bytes: &[u8], row: impl Fn(&str) -> Parsed<Row>) -> Prompts {
    let mut prompts = Prompts::default();
    for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = std::str::from_utf8(line).map(str::trim);
        if line != Ok("") {
            let row = line.map_err(|_| "not UTF-8".to_owned()).and_then(&row);
            prompts.add(format_args!("line {}", at + 1), row);
        }
    }
    prompts
}

#[cfg(test)]
mod tests;
