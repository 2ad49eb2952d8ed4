//! Prompt files.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// Longest prompt, in bytes.
pub const MAX_PROMPT_BYTES: usize = 8 << 10;
/// Most prompts in a file.
pub const MAX_PROMPTS: usize = 100_000;

/// Reads a `.txt` file (one prompt a line) or a `.jsonl` file (one object a line, its `prompt` or
/// `text`; other fields are ignored). Blank lines are skipped.
///
/// # Errors
/// Names the file, and the line where there is one: another extension, no prompt in it, not UTF-8,
/// a line that is too long or not such an object, a prompt that [`check`] refuses.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let parse: fn(&str) -> Result<String> = match extension {
        Some("txt") => |line| Ok(line.to_owned()),
        Some("jsonl") => from_json,
        _ => bail!("{}: a prompt file must end in .txt or .jsonl", path.display()),
    };
    let file =
        File::open(path).with_context(|| format!("cannot read prompt file {}", path.display()))?;
    let mut reader = BufReader::new(file);
    let mut prompts = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        let place = || format!("{} line {number}", path.display());
        line.clear();
        // A JSON line may spend six bytes of escape on one of text.
        let limit = 8 * MAX_PROMPT_BYTES as u64;
        let n_bytes =
            reader.by_ref().take(limit).read_until(b'\n', &mut line).with_context(place)?;
        if n_bytes == 0 {
            break;
        }
        ensure!((n_bytes as u64) < limit, "{}: longer than {limit} bytes", place());
        let text =
            std::str::from_utf8(&line).ok().with_context(|| format!("{}: not UTF-8", place()))?;
        let text = text.trim_start_matches('\u{feff}').trim();
        if text.is_empty() {
            continue;
        }
        let prompt = parse(text).with_context(place)?;
        check(&prompt).with_context(place)?;
        ensure!(prompts.len() < MAX_PROMPTS, "{}: more than {MAX_PROMPTS} prompts", place());
        prompts.push(prompt);
    }
    ensure!(!prompts.is_empty(), "{} holds no prompt", path.display());
    Ok(prompts)
}

/// Refuses what no tokenizer or PNG text chunk should see: a prompt over [`MAX_PROMPT_BYTES`] or
/// with control characters other than tab and line feed. The empty prompt is fine.
pub fn check(prompt: &str) -> Result<()> {
    ensure!(
        prompt.len() <= MAX_PROMPT_BYTES,
        "the prompt has {} bytes; at most {MAX_PROMPT_BYTES} are allowed",
        prompt.len()
    );
    let control = prompt.chars().find(|c| c.is_control() && !matches!(c, '\t' | '\n'));
    match control {
        Some(c) => bail!("the prompt holds the control character {c:?}; remove it"),
        None => Ok(()),
    }
}

fn from_json(line: &str) -> Result<String> {
    #[derive(Deserialize)]
    struct Line {
        prompt: Option<String>,
        text: Option<String>,
    }
    let line: Line =
        serde_json::from_str(line).context("not a JSON object with a `prompt` or `text` string")?;
    line.prompt.or(line.text).context("the object has neither `prompt` nor `text`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(name: &str, content: &[u8]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(name);
        std::fs::write(&path, content)?;
        read(&path)
    }

    #[test]
    fn both_formats() -> Result<()> {
        let lines = read_as("p.txt", "\u{feff}red \"CAT\"\r\n\n  blue \"42\"".as_bytes())?;
        assert_eq!(lines, ["red \"CAT\"", "blue \"42\""]);
        let objects = b"{\"prompt\":\"a\",\"id\":3}\n\n{\"text\":\"\"}\n";
        assert_eq!(read_as("p.jsonl", objects)?, ["a", ""]);
        Ok(())
    }

    #[test]
    fn errors_name_the_line() {
        let cases: [(&str, &[u8], &str); 7] = [
            ("p.txt", b"\n \n", "holds no prompt"),
            ("p.csv", b"a", "must end in .txt or .jsonl"),
            ("p.txt", b"a\n\xff\n", "line 2: not UTF-8"),
            ("p.txt", b"a\x07b", "control character '\\u{7}'"),
            ("p.jsonl", b"{\"prompt\":\"a\"}\n{\"caption\":\"b\"}", "neither `prompt` nor `text`"),
            ("p.jsonl", b"[1]", "not a JSON object"),
            ("p.txt", &[b'x'; MAX_PROMPT_BYTES + 1], "at most 8192"),
        ];
        for (name, content, expected) in cases {
            let message = format!("{:#}", read_as(name, content).unwrap_err());
            assert!(message.contains(expected), "{expected} is not in: {message}");
            assert!(message.contains(name), "{name} is not in: {message}");
        }
        let second = format!("{:#}", read_as("p.jsonl", b"{\"text\":\"a\"}\n{").unwrap_err());
        assert!(second.contains("p.jsonl line 2"), "{second}");
        let endless = read_as("p.txt", &vec![b'x'; 1 << 20]).unwrap_err().to_string();
        assert!(endless.contains("line 1: longer than"), "{endless}");
    }
}
