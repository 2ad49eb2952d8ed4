//! What to draw: prompt files, and the order in which a run goes through them.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::splitmix::SplitMix64;

/// Longest accepted prompt, and line of a prompt file, in bytes.
const MAX_LINE: usize = 8 * 1024;
/// Largest accepted prompt file, in bytes.
const MAX_FILE: u64 = 256 * 1024 * 1024;

/// Colour words that a prompt is searched for, in the spelling of the colour reward.
const COLOURS: [&str; 14] = [
    "red", "green", "blue", "black", "white", "yellow", "orange", "purple", "pink", "brown",
    "gray", "grey", "cyan", "magenta",
];

/// One request to the model, with what a reward may check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// What the model is conditioned on.
    pub text: String,
    /// The words the image should show; when absent, the quoted part of `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The colour the image should show; when absent, the first colour word of `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub colour: Option<String>,
}

impl Prompt {
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), target: None, colour: None }
    }

    /// The words to be rendered: `target`, or what stands between the first pair of double quotes.
    pub fn target_text(&self) -> Option<&str> {
        self.target.as_deref().or_else(|| {
            let (_, rest) = self.text.split_once('"')?;
            let (quoted, _) = rest.split_once('"')?;
            (!quoted.is_empty()).then_some(quoted)
        })
    }

    /// The colour to be shown: `colour`, or the first colour word outside of quotes, lower-case.
    pub fn colour_name(&self) -> Option<&str> {
        self.colour.as_deref().or_else(|| {
            self.text
                .split('"')
                .step_by(2)
                .flat_map(|part| part.split(|letter: char| !letter.is_alphanumeric()))
                .find_map(|word| COLOURS.into_iter().find(|name| word.eq_ignore_ascii_case(name)))
        })
    }
}

/// Reads a prompt file by its extension.
///
/// - `.txt`: one prompt a line, blank lines are skipped
/// - `.json`: a list of strings (as in the test set of `HPDv2`) or of objects
/// - `.jsonl`: one object or string a line
///
/// An object has `prompt`, `text` or `caption`, and may have `target` and `colour` (or `color`);
/// its other fields are ignored.
///
/// # Errors
/// One line naming the file and the line (or list entry) that is empty, too long, not UTF-8 or not
/// the expected JSON; also when the file holds no prompt.
pub fn read(path: &Path) -> Result<Vec<Prompt>> {
    let name = path.display();
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let parse = match extension.to_ascii_lowercase().as_str() {
        "txt" => parse_text,
        "json" => parse_json,
        "jsonl" => parse_json_lines,
        _ => bail!("{name}: a prompt file ends in .txt, .json or .jsonl"),
    };
    let size = fs::metadata(path).with_context(|| format!("opening {name}"))?.len();
    ensure!(size <= MAX_FILE, "{name}: {size} bytes, a prompt file has at most {MAX_FILE}");
    let bytes = fs::read(path).with_context(|| format!("reading {name}"))?;
    let text = utf8(&bytes).with_context(|| format!("reading {name}"))?;
    let prompts = parse(text).with_context(|| format!("reading {name}"))?;
    ensure!(!prompts.is_empty(), "{name} holds no prompt");
    Ok(prompts)
}

/// The order in which a run takes its prompts: all once an epoch, shuffled anew each epoch.
///
/// The order of an epoch follows from the seed and the epoch alone, so a run resumes from the number
/// of prompts it has taken.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    epoch: u64,
    permutation: Vec<usize>,
}

impl Order {
    /// # Panics
    /// If there are no prompts (`n` is zero).
    pub fn new(n: usize, seed: u64) -> Self {
        assert!(n > 0, "an order needs at least one prompt");
        Self { seed, epoch: 0, permutation: shuffled(n, seed, 0) }
    }

    /// The index, below n, of the prompt at `position` (counted from 0 over all epochs).
    pub fn at(&mut self, position: u64) -> usize {
        let n = self.permutation.len() as u64;
        let epoch = position / n;
        if epoch != self.epoch {
            self.permutation = shuffled(n as usize, self.seed, epoch);
            self.epoch = epoch;
        }
        self.permutation[(position % n) as usize]
    }
}

fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut permutation: Vec<usize> = (0..n).collect();
    SplitMix64::stream(seed, epoch).shuffle(&mut permutation);
    permutation
}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes)
        .map_err(|error| {
            let line = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
            anyhow::anyhow!("line {line}: not UTF-8")
        })
        .map(|text| text.strip_prefix('\u{feff}').unwrap_or(text))
}

fn parse_text(text: &str) -> Result<Vec<Prompt>> {
    numbered_lines(text)
        .map(|(number, line)| {
            let prompt = Prompt::new(line.trim());
            check(prompt).with_context(|| format!("line {number}"))
        })
        .collect()
}

fn parse_json_lines(text: &str) -> Result<Vec<Prompt>> {
    numbered_lines(text)
        .map(|(number, line)| {
            ensure!(line.len() <= MAX_LINE, "line {number}: longer than {MAX_LINE} bytes");
            let value = serde_json::from_str(line)
                .map_err(|error| anyhow::anyhow!("line {number}: not JSON: {error}"))?;
            from_json(&value).with_context(|| format!("line {number}"))
        })
        .collect()
}

fn parse_json(text: &str) -> Result<Vec<Prompt>> {
    let value: Value = serde_json::from_str(text).context("not JSON")?;
    let Value::Array(entries) = value else { bail!("line 1: expected a list of prompts") };
    entries
        .iter()
        .enumerate()
        .map(|(index, entry)| from_json(entry).with_context(|| format!("entry {}", index + 1)))
        .collect()
}

/// Lines with their numbers, from 1, without the blank ones.
fn numbered_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(|(_, l)| !l.trim().is_empty())
}

fn from_json(value: &Value) -> Result<Prompt> {
    let text = match value {
        Value::String(text) => text,
        Value::Object(fields) => {
            let text = ["prompt", "text", "caption"].iter().find_map(|key| fields.get(*key));
            match text {
                Some(Value::String(text)) => text,
                Some(_) => bail!("the prompt is not a string"),
                None => bail!("no field `prompt`, `text` or `caption`"),
            }
        }
        _ => bail!("expected a string or an object with `prompt`"),
    };
    let field = |keys: &[&str]| match keys.iter().find_map(|key| value.get(*key)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(Some(text.trim().to_owned())),
        Some(_) => bail!("`{}` is not a string with something in it", keys[0]),
    };
    let (target, colour) = (field(&["target"])?, field(&["colour", "color"])?);
    check(Prompt { text: text.trim().to_owned(), target, colour })
}

fn check(prompt: Prompt) -> Result<Prompt> {
    ensure!(!prompt.text.is_empty(), "the prompt is empty");
    ensure!(prompt.text.len() <= MAX_LINE, "the prompt is longer than {MAX_LINE} bytes");
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Prompt>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        read(&path)
    }

    #[test]
    fn target_and_colour_come_from_fields_or_from_the_text() {
        let plain = Prompt::new("a Red sign that says \"BLUE CAT\" and \"DOG\"");
        assert_eq!(plain.target_text(), Some("BLUE CAT"));
        assert_eq!(plain.colour_name(), Some("red"));
        let quoted_only = Prompt::new("the word \"green\", credited");
        assert_eq!(quoted_only.colour_name(), None);
        assert_eq!(Prompt::new("one \" quote").target_text(), None);
        let set = Prompt {
            target: Some("HI".into()),
            colour: Some("teal".into()),
            ..Prompt::new("blue \"NO\"")
        };
        assert_eq!((set.target_text(), set.colour_name()), (Some("HI"), Some("teal")));
    }

    #[test]
    fn every_layout_is_read() {
        let text = read_as("p.txt", "\u{feff}a cat\r\n\n  red \"HAT\"  \n").unwrap();
        assert_eq!(text, [Prompt::new("a cat"), Prompt::new("red \"HAT\"")]);
        let list = read_as("p.json", "[\"a cat\", {\"text\": \"a dog\", \"id\": 3}]").unwrap();
        assert_eq!(list, [Prompt::new("a cat"), Prompt::new("a dog")]);
        let lines = "{\"prompt\":\"x\",\"target\":\"HI\",\"color\":\"red\",\"tag\":{}}\n\n\"y\"\n{\"caption\":\"z\",\"target\":null}";
        let lines = read_as("p.jsonl", lines).unwrap();
        assert_eq!(lines[0].target.as_deref(), Some("HI"));
        assert_eq!(lines[0].colour.as_deref(), Some("red"));
        assert_eq!(lines[1..], [Prompt::new("y"), Prompt::new("z")]);
    }

    #[test]
    fn each_fault_is_one_line_with_file_and_place() {
        let long = format!("ok\n{}", "x".repeat(MAX_LINE + 1));
        let long_json = format!("\"ok\"\n\"{}\"", "x".repeat(MAX_LINE + 1));
        let cases: [(&str, &[u8], &str); 13] = [
            ("p.txt", b"", "holds no prompt"),
            ("p.txt", b"\n \n", "holds no prompt"),
            ("p.txt", b"ok\n\xff\xfe\n", "line 2: not UTF-8"),
            ("p.txt", long.as_bytes(), "line 2: the prompt is longer"),
            ("p.jsonl", long_json.as_bytes(), "line 2: longer than 8192"),
            ("p.jsonl", b"\"ok\"\n{\"prompt\":", "line 2: not JSON"),
            ("p.jsonl", b"{\"prompt\":\"  \"}", "line 1: the prompt is empty"),
            ("p.jsonl", b"{\"image\":\"a\"}", "line 1: no field `prompt`"),
            ("p.jsonl", b"{\"prompt\":\"a\",\"target\":7}", "line 1: `target` is not"),
            ("p.json", b"[\"a\",\n3]", "entry 2: expected a string"),
            ("p.json", b"{\"prompt\":\"a\"}", "expected a list"),
            ("p.json", b"[\"a\",\n", "line 2"),
            ("p.csv", b"a", ".txt, .json or .jsonl"),
        ];
        for (name, content, expected) in cases {
            let error = format!("{:#}", read_as(name, content).unwrap_err());
            assert!(error.contains(expected) && error.contains(name), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = format!("{:#}", read(Path::new("no/such.txt")).unwrap_err());
        assert!(error.contains("opening no/such.txt"), "{error}");
    }

    #[test]
    fn an_epoch_holds_every_prompt_once_and_epochs_differ() {
        let mut order = Order::new(50, 7);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|e| (0..50).map(|k| order.at(e * 50 + k)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn a_resumed_order_continues_where_the_run_stopped() {
        let mut whole = Order::new(13, 99);
        let all: Vec<usize> = (0..60).map(|position| whole.at(position)).collect();
        let mut resumed = Order::new(13, 99);
        assert_eq!((37..60).map(|p| resumed.at(p)).collect::<Vec<_>>(), all[37..]);
        assert_eq!(resumed.at(3), all[3]);
        let mut other = Order::new(13, 100);
        assert_ne!((0..13).map(|p| other.at(p)).collect::<Vec<_>>(), all[..13]);
    }
}
