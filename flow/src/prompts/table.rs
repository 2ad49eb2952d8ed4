//! Prompts in a table of text.

use serde_json::{Map, Value};

use super::row::TEXT_FIELDS;
use super::{Parsed, Prompts};

/// The rows of a table whose first names the columns, in any case; `by` stands between two of them.
pub(super) fn parse(bytes: &[u8], by: u8) -> Parsed<Prompts> {
    let mut reader = csv::ReaderBuilder::new().delimiter(by).flexible(true).from_reader(bytes);
    let header = reader.headers().map_err(|error| error.to_string())?;
    let names: Vec<String> = header.iter().map(|name| name.trim().to_ascii_lowercase()).collect();
    if !TEXT_FIELDS.iter().any(|known| names.iter().any(|name| name == known)) {
        let why = no_column(names.iter().map(String::as_str));
        return Err(format!("{why}; or give a .jsonl or .txt file"));
    }
    let mut prompts = Prompts::default();
    for (at, record) in reader.records().enumerate() {
        let row = match record {
            Err(error) => Err(error.to_string()),
            Ok(record) if record.len() > names.len() => {
                let (n, known) = (record.len(), names.len());
                Err(format!("{n} fields under {known} names: put text with commas in quotes"))
            }
            Ok(record) => fields(&names, &record),
        };
        prompts.push(format_args!("row {}", at + 1), row.as_ref().map_err(Clone::clone));
    }
    Ok(prompts)
}

/// What a row says under each name.
fn fields(names: &[String], record: &csv::StringRecord) -> Parsed<Value> {
    let filled = names.iter().zip(record).filter(|(_, text)| !text.trim().is_empty());
    let fields: Map<_, _> = filled.map(|(name, text)| (name.clone(), text.into())).collect();
    if TEXT_FIELDS.iter().any(|name| fields.contains_key(*name)) {
        Ok(Value::Object(fields))
    } else {
        Err("the prompt is empty".into())
    }
}

/// Says that a table with these `columns` has none of prompts.
pub fn no_column<'a>(columns: impl Iterator<Item = &'a str>) -> String {
    let known = TEXT_FIELDS.map(|name| format!("`{name}`"));
    let found: Vec<&str> = columns.take(20).collect();
    format!("no column {} among {}", known.join(", "), found.join(", "))
}
