//! What to draw: prompts and the files they stand in.

mod file;
mod row;
mod table;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use file::{ENDS, MAX_FILE, Prompts, of_bytes, read};
pub use row::{ANSWER, TEXT_FIELDS};
pub use table::no_column;

/// What is wrong, and where in the file.
type Parsed<T> = Result<T, String>;

/// Longest accepted prompt, in bytes.
const MAX_LINE: usize = 8 * 1024;

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

/// `text` as one line: trimmed, its line breaks of any kind blanks, without other control characters.
///
/// What prompt files hold is read so, and embeddings are kept under such texts.
pub fn one_line(text: &str) -> String {
    let is_break =
        |c| matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let lines = text.split(is_break).map(str::trim).filter(|line| !line.is_empty());
    let one = lines.collect::<Vec<_>>().join(" ");
    one.chars().filter(|c| !c.is_control() || *c == '\t').collect::<String>().trim().to_owned()
}

/// A prompt from a string, or from an object as [`read`] describes it.
///
/// # Errors
/// Says what is wrong with it.
pub fn from_json(value: &Value) -> Result<Prompt, String> {
    row::parse(value).map(|row| row.prompt)
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_text_becomes_one_line() {
        for (text, line) in [
            (" a red fox\t", "a red fox"),
            ("a\r\nb\n\nc", "a b c"),
            ("a\u{2028}b\u{0}\u{7f}", "a b"),
            ("a  b\tc", "a  b\tc"),
            ("\u{0} \u{85}", ""),
        ] {
            assert_eq!(one_line(text), line, "{text:?}");
        }
    }
}
