//! One row of a prompt file.

use serde_json::Value;

use super::{Parsed, Prompt, check, one_line};

/// Fields of a prompt's text; the first that is there counts. The last is UniGenBench's.
pub const TEXT_FIELDS: [&str; 4] = ["prompt", "text", "caption", "prompt_en"];
/// What verl says of the right answer.
pub const ANSWER: &str = "reward_model";

/// A prompt, and whether its text had to be changed to be one line.
pub(super) struct Row {
    pub(super) prompt: Prompt,
    pub(super) is_changed: bool,
}

/// The prompt in `text`.
pub(super) fn of_text(text: &str) -> Parsed<Row> {
    with_text(text, Prompt::default())
}

fn with_text(text: &str, prompt: Prompt) -> Parsed<Row> {
    let line = one_line(text);
    if line.is_empty() {
        return Err("the prompt is empty".into());
    }
    check(&line)?;
    let is_changed = line != text.trim();
    Ok(Row { prompt: Prompt { text: line, ..prompt }, is_changed })
}

/// The prompt that a string or an object is.
pub(super) fn parse(value: &Value) -> Parsed<Row> {
    let fields = match value {
        Value::String(text) => return of_text(text),
        Value::Object(fields) => fields,
        _ => return Err("expected a string or an object with `prompt`".into()),
    };
    let text = match TEXT_FIELDS.iter().find_map(|key| fields.get(*key)) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(messages)) => said(messages)?,
        Some(Value::Null) => return Err("the prompt is empty".into()),
        Some(_) => return Err("the prompt is not a string".into()),
        None => return Err("no field `prompt`, `text` or `caption`".into()),
    };
    let field = |keys: &[&str]| match keys.iter().find_map(|key| fields.get(*key)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(Some(text.trim().to_owned())),
        Some(_) => Err(format!("`{}` is not a string with something in it", keys[0])),
    };
    let (target, colour) = (field(&["target"])?, field(&["colour", "color"])?);
    let target = target.or_else(|| answer(value));
    with_text(&text, Prompt { target, colour, fields: fields.clone(), ..Prompt::default() })
}

/// What the user said last in a conversation: its text, or the texts of its parts.
fn said(messages: &[Value]) -> Parsed<String> {
    let by_user = messages.iter().rev().find(|message| message["role"] == "user");
    match by_user.map(|message| &message["content"]) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().filter_map(|part| part["text"].as_str());
            Ok(texts.collect::<Vec<_>>().join(" "))
        }
        _ => Err("the prompt is a conversation without a message by the user".into()),
    }
}

/// The right answer of verl's rows, where a rule finds it.
fn answer(value: &Value) -> Option<String> {
    let model = &value[ANSWER];
    let text = model["ground_truth"].as_str().filter(|_| model["style"] == "rule")?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}
