//! What to draw: prompts and the files they stand in.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::CheckpointError;

/// What is wrong, and where in the file.
type Parsed<T> = Result<T, String>;

/// Longest accepted prompt, and line of a prompt file, in bytes.
const MAX_LINE: usize = 8 * 1024;
/// Largest accepted prompt file, in bytes.
const MAX_FILE: u64 = 256 * 1024 * 1024;

/// Most line ends and commas of a prompt file: a byte on disk can be a hundred in memory.
const MAX_PARTS: usize = 20_000_000;

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
    /// All that the prompt's object says in its file, for a reward server.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub fields: Map<String, Value>,
}

impl Prompt {
    /// A prompt of text alone.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    /// About how much memory it takes.
    pub fn n_bytes(&self) -> usize {
        let fields = self.fields.iter().map(|(name, value)| name.len() + text_bytes(value) + 100);
        size_of::<Self>() + self.text.len() + fields.sum::<usize>()
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
/// its other fields are for reward servers.
///
/// # Errors
/// One line naming the file and the line (or list entry) that is empty, too long, not UTF-8 or not
/// the expected JSON; also when the file holds no prompt.
pub fn read(path: &Path) -> Result<Vec<Prompt>, CheckpointError> {
    let malformed = |why: String| CheckpointError::malformed(path, why);
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let parse = match extension.to_ascii_lowercase().as_str() {
        "txt" => parse_text,
        "json" => parse_json,
        "jsonl" => parse_json_lines,
        _ => return Err(malformed("a prompt file ends in .txt, .json or .jsonl".into())),
    };
    let metadata = fs::metadata(path).map_err(CheckpointError::io(path))?;
    if !metadata.is_file() {
        return Err(malformed(
            "is no regular file: give a file instead of a pipe or device".into(),
        ));
    }
    let size = metadata.len();
    if size > MAX_FILE {
        return Err(malformed(format!("{size} bytes, a prompt file has at most {MAX_FILE}")));
    }
    let bytes = fs::read(path).map_err(CheckpointError::io(path))?;
    let n_parts = bytes.iter().filter(|byte| matches!(byte, b'\n' | b',')).count();
    if n_parts > MAX_PARTS {
        return Err(malformed(format!("more than {MAX_PARTS} lines and fields")));
    }
    let prompts = utf8(&bytes).and_then(parse).map_err(malformed)?;
    if prompts.is_empty() {
        return Err(malformed("holds no prompt".into()));
    }
    Ok(prompts)
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}

/// Refuses what no tokenizer or PNG text chunk should see: more than 8 KiB, or control characters other
/// than tab and line feed. The empty prompt is fine.
///
/// # Errors
/// Says what is wrong with it.
pub fn check(text: &str) -> Result<(), String> {
    if text.len() > MAX_LINE {
        return Err(format!("the prompt is longer than {MAX_LINE} bytes"));
    }
    match text.chars().find(|c| c.is_control() && !matches!(c, '\t' | '\n')) {
        Some(c) => Err(format!("the prompt holds the control character {c:?}; remove it")),
        None => Ok(()),
    }
}

/// A prompt from a string, or from an object as [`read`] describes it.
///
/// # Errors
/// Says what is wrong with it.
pub fn from_json(value: &Value) -> Result<Prompt, String> {
    let text = match value {
        Value::String(text) => text,
        Value::Object(fields) => {
            let text = ["prompt", "text", "caption"].iter().find_map(|key| fields.get(*key));
            match text {
                Some(Value::String(text)) => text,
                Some(_) => return Err("the prompt is not a string".into()),
                None => return Err("no field `prompt`, `text` or `caption`".into()),
            }
        }
        _ => return Err("expected a string or an object with `prompt`".into()),
    };
    let field = |keys: &[&str]| match keys.iter().find_map(|key| value.get(*key)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(Some(text.trim().to_owned())),
        Some(_) => Err(format!("`{}` is not a string with something in it", keys[0])),
    };
    let (target, colour) = (field(&["target"])?, field(&["colour", "color"])?);
    let fields = value.as_object().cloned().unwrap_or_default();
    checked(Prompt { text: text.trim().to_owned(), target, colour, fields })
}

fn utf8(bytes: &[u8]) -> Parsed<&str> {
    std::str::from_utf8(bytes)
        .map_err(|error| {
            let line = bytes[..error.valid_up_to()].split(|byte| *byte == b'\n').count();
            format!("line {line}: not UTF-8")
        })
        .map(|text| text.strip_prefix('\u{feff}').unwrap_or(text))
}

fn parse_text(text: &str) -> Parsed<Vec<Prompt>> {
    numbered_lines(text)
        .map(|(number, line)| {
            checked(Prompt::new(line.trim())).map_err(|why| format!("line {number}: {why}"))
        })
        .collect()
}

fn parse_json_lines(text: &str) -> Parsed<Vec<Prompt>> {
    let parse = |line: &str| {
        if line.len() > MAX_LINE {
            return Err(format!("longer than {MAX_LINE} bytes"));
        }
        let value = serde_json::from_str(line).map_err(|error| format!("not JSON: {error}"))?;
        from_json(&value)
    };
    numbered_lines(text)
        .map(|(number, line)| parse(line).map_err(|why| format!("line {number}: {why}")))
        .collect()
}

fn parse_json(text: &str) -> Parsed<Vec<Prompt>> {
    let value: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {error}"))?;
    let Value::Array(entries) = value else {
        return Err("line 1: expected a list of prompts".into());
    };
    let numbered = entries.iter().enumerate();
    numbered
        .map(|(at, entry)| from_json(entry).map_err(|why| format!("entry {}: {why}", at + 1)))
        .collect()
}

/// Lines with their numbers, from 1, without the blank ones.
fn numbered_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(|(_, l)| !l.trim().is_empty())
}

/// A prompt of a file must also say something.
fn checked(prompt: Prompt) -> Parsed<Prompt> {
    if prompt.text.is_empty() {
        return Err("the prompt is empty".into());
    }
    check(&prompt.text)?;
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<Prompt>, CheckpointError> {
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
        assert_eq!(list[0], Prompt::new("a cat"));
        assert_eq!((&*list[1].text, list[1].fields["id"].as_i64()), ("a dog", Some(3)));
        let lines = "{\"prompt\":\"x\",\"target\":\"HI\",\"color\":\"red\",\"tag\":{}}\n\n\"y\"\n{\"caption\":\"z\",\"target\":null}";
        let lines = read_as("p.jsonl", lines).unwrap();
        assert_eq!(lines[0].target.as_deref(), Some("HI"));
        assert_eq!(lines[0].colour.as_deref(), Some("red"));
        assert_eq!(lines[1], Prompt::new("y"));
        assert_eq!((&*lines[2].text, &lines[2].target), ("z", &None));
    }

    #[test]
    fn each_fault_is_one_line_with_file_and_place() {
        let long = format!("ok\n{}", "x".repeat(MAX_LINE + 1));
        let long_json = format!("\"ok\"\n\"{}\"", "x".repeat(MAX_LINE + 1));
        let cases: [(&str, &[u8], &str); 14] = [
            ("p.txt", b"a\x07b", "control character '\\u{7}'"),
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
            let error = read_as(name, content).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(name), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        let error = read(Path::new("no/such.txt")).unwrap_err().to_string();
        assert!(error.contains("no/such.txt"), "{error}");
    }
}
