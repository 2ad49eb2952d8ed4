//! The places where settings are said, one in front of the other, and which of them is to blame.

use std::fmt;
use std::ops::Index;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use flow::usage::Usage;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::schema::Fault;

/// A place where settings are said.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// The published settings of an algorithm.
    Algorithm(String),
    /// A run that ships with the program.
    Preset(String),
    /// A TOML file.
    File(PathBuf),
    /// One setting of the command line.
    Set(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Algorithm(name) => write!(f, "algorithm {name}"),
            Self::Preset(name) => write!(f, "preset {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Set(setting) => write!(f, "--set {setting}"),
        }
    }
}

/// What is said in one place.
pub(crate) struct Layer {
    pub(crate) origin: Origin,
    /// A setting of the command line is one key.
    said: Said,
}

enum Said {
    Table { table: Table, text: String },
    One { key: String, value: Value },
}

impl Layer {
    /// That of a TOML text.
    pub(crate) fn parsed(origin: Origin, text: String) -> Result<Self> {
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = line_of(&text, error.span().map_or(0, |span| span.start));
            anyhow!(Usage(format!(
                "{origin}, line {line}: {}",
                error.message().replace('\n', ", ")
            )))
        })?;
        if matches!(origin, Origin::Preset(_)) {
            table.iter_mut().filter(|(key, _)| *key != "output").for_each(|(_, value)| find(value));
        }
        Ok(Self { origin, said: Said::Table { table, text } })
    }

    /// That of `key=value`.
    pub(crate) fn set(setting: &str) -> Result<Self> {
        let Some((key, value)) = setting.split_once('=') else {
            bail!(Usage(format!(
                "invalid --set {setting:?}: key=value is needed, as in optimizer.learning_rate=1e-5"
            )));
        };
        let parsed = format!("value = {value}").parse::<Table>().ok();
        let value = parsed
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| Value::String(value.to_owned()));
        let (key, origin) = (key.trim().to_owned(), Origin::Set(setting.to_owned()));
        Ok(Self { origin, said: Said::One { key, value } })
    }

    /// What it says of `key`, itself or as part of a table.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        match &self.said {
            Said::Table { table, .. } => {
                let (first, rest) = split(key);
                at(table.get(first)?, rest)
            }
            Said::One { key: own, value } => {
                let rest = key.strip_prefix(own.as_str())?;
                if rest.is_empty() { Some(value) } else { at(value, rest.strip_prefix('.')?) }
            }
        }
    }

    /// Takes `key` out of a table.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        match &mut self.said {
            Said::Table { table, .. } => table.remove(key),
            Said::One { .. } => None,
        }
    }

    /// Every setting that it says; lists count as one.
    pub(crate) fn leaves(&self) -> Vec<(String, Value)> {
        match &self.said {
            Said::Table { table, .. } => leaves(table),
            Said::One { key, value: Value::Table(table) } => {
                let inner = leaves(table).into_iter();
                inner.map(|(name, value)| (format!("{key}.{name}"), value)).collect()
            }
            Said::One { key, value } => vec![(key.clone(), value.clone())],
        }
    }

    /// Where in it `key` stands.
    fn place(&self, key: &str) -> String {
        let line = match &self.said {
            Said::Table { text, .. } if matches!(self.origin, Origin::File(_)) => line(text, key),
            _ => None,
        };
        line.map_or_else(|| self.origin.to_string(), |line| format!("{}, line {line}", self.origin))
    }
}

/// All that is said, from the bottom to the top.
pub(crate) struct Layers(Vec<Layer>);

impl Index<usize> for Layers {
    type Output = Layer;

    fn index(&self, index: usize) -> &Layer {
        &self.0[index]
    }
}

impl Layers {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self(layers)
    }

    pub(crate) fn all(&self) -> std::slice::Iter<'_, Layer> {
        self.0.iter()
    }

    pub(crate) fn insert(&mut self, place: usize, layer: Layer) {
        self.0.insert(place, layer);
    }

    /// What the configuration itself is called.
    pub(crate) fn name(&self) -> String {
        let own = self.0.iter().rev().find(|layer| !matches!(layer.origin, Origin::Set(_)));
        own.map(|layer| layer.origin.to_string()).unwrap_or_default()
    }

    /// All of them, each in front of those below.
    pub(crate) fn merged(&self) -> Result<Table> {
        let mut merged = Table::new();
        for layer in &self.0 {
            match &layer.said {
                Said::Table { table, .. } => merge(&mut merged, table),
                Said::One { key, value } => {
                    let path: Vec<&str> = key.split('.').collect();
                    put(&mut merged, key, &path, value.clone())?;
                }
            }
        }
        Ok(merged)
    }

    /// Where `key` is said.
    pub(crate) fn origin(&self, key: &str) -> Option<String> {
        let layer = self.0.iter().rev().find(|layer| layer.get(key).is_some())?;
        Some(layer.place(key))
    }

    /// Whether nothing above `index` says `key`.
    pub(crate) fn is_last(&self, index: usize, key: &str) -> bool {
        self.0[index + 1..].iter().all(|layer| layer.get(key).is_none())
    }

    /// Whether whoever says a setting at `index` could know that it is not read: its `cause` is the algorithm,
    /// which stands at `place`, or another setting, said no later by someone else.
    pub(crate) fn is_asked(&self, index: usize, cause: &str, place: usize) -> bool {
        match cause {
            "algorithm" => index > place,
            cause => {
                let by = self.0.iter().rposition(|layer| layer.get(cause).is_some());
                let is_shipped =
                    matches!(self.0[index].origin, Origin::Preset(_) | Origin::Algorithm(_));
                !is_shipped || by.is_none_or(|by| by < index)
            }
        }
    }

    /// The error of `fault`: where, which setting, what.
    pub(crate) fn blame(&self, fault: &Fault) -> anyhow::Error {
        let Fault { key, what } = fault;
        let said = self.0.iter().rev().find(|layer| {
            // What is missing from a table is missing where the table is.
            let table = key.rsplit_once('.').map(|(table, _)| table);
            layer.get(key).is_some() || table.is_some_and(|table| layer.get(table).is_some())
        });
        let place = said.map_or_else(|| self.name(), |layer| layer.place(key));
        anyhow!(Usage(format!("{place}: {key}: {what}")))
    }

    /// `error` of a check, which begins with a key, with the place where that is said.
    pub(crate) fn explained(&self, error: &anyhow::Error) -> anyhow::Error {
        let message = format!("{error:#}");
        let key = message.split([' ', ':', ']']).next().unwrap_or_default();
        match self.origin(key) {
            Some(place) => anyhow!(Usage(format!("{place}: {message}"))),
            None => anyhow!(Usage(format!("{}: {message}", self.name()))),
        }
    }
}

/// Every setting of `table` by its dotted key; lists count as one.
pub(crate) fn leaves(table: &Table) -> Vec<(String, Value)> {
    let below = |(key, value): (&String, &Value)| match value {
        Value::Table(table) => {
            let inner = leaves(table).into_iter();
            inner.map(|(name, value)| (format!("{key}.{name}"), value)).collect()
        }
        other => vec![(key.clone(), other.clone())],
    };
    table.iter().flat_map(below).collect()
}

/// Puts `over` in front of `under`, table by table.
fn merge(under: &mut Table, over: &Table) {
    for (key, value) in over {
        match (under.get_mut(key), value) {
            (Some(Value::Table(under)), Value::Table(over)) => merge(under, over),
            _ => _ = under.insert(key.clone(), value.clone()),
        }
    }
}

/// Walks `path` (tables by name, lists by number) and puts `value` at its end.
fn put(table: &mut Table, key: &str, path: &[&str], value: Value) -> Result<()> {
    let (last, parents) = path.split_last().context("a key is not empty")?;
    let mut at = table;
    let mut parents = parents.iter().peekable();
    while let Some(name) = parents.next() {
        let entry = at.entry((*name).to_owned()).or_insert_with(|| Value::Table(Table::new()));
        let next = match entry {
            Value::Array(list) => {
                let index = parents.next().and_then(|name| name.parse::<usize>().ok());
                let n = list.len();
                index
                    .and_then(|index| list.get_mut(index))
                    .ok_or_else(|| Usage(format!("--set {key}: {name} takes a number below {n}")))?
            }
            other => other,
        };
        at = next
            .as_table_mut()
            .ok_or_else(|| Usage(format!("--set {key}: {name} has no entries")))?;
    }
    match (at.get_mut(*last), value) {
        (Some(Value::Table(under)), Value::Table(over)) => merge(under, &over),
        (_, value) => _ = at.insert((*last).to_owned(), value),
    }
    Ok(())
}

fn split(key: &str) -> (&str, &str) {
    key.split_once('.').unwrap_or((key, ""))
}

fn at<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    if key.is_empty() {
        return Some(value);
    }
    let (first, rest) = split(key);
    let next = match value {
        Value::Table(table) => table.get(first)?,
        Value::Array(list) => list.get(first.parse::<usize>().ok()?)?,
        _ => return None,
    };
    at(next, rest)
}

/// The line of `text` in which `key`, or as much of it as there is, stands.
fn line(text: &str, key: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let (first, mut rest) = split(key);
    let (name, mut value) = document.get_ref().get_key_value(first)?;
    let mut start = name.span().start;
    while !rest.is_empty() {
        let (first, after) = split(rest);
        let found = match value.get_ref() {
            DeValue::Table(table) => {
                table.get_key_value(first).map(|(name, value)| (name.span().start, value))
            }
            DeValue::Array(list) => {
                let item = first.parse().ok().and_then(|index: usize| list.get(index));
                item.map(|value| (value.span().start, value))
            }
            _ => None,
        };
        let Some((next, below)) = found else { break };
        (start, value, rest) = (next, below, after);
    }
    Some(line_of(text, start))
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at.min(text.len())].matches('\n').count() + 1
}

/// Paths of a preset that are not in the working folder are looked up where the program's assets lie: beside
/// it, or in a folder above.
fn find(value: &mut Value) {
    match value {
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| find(value)),
        Value::Array(list) => list.iter_mut().for_each(find),
        Value::String(text) if text.contains('/') && !Path::new(text).exists() => {
            let program = std::env::current_exe().unwrap_or_default();
            let place = program.ancestors().skip(1).map(|folder| folder.join(&*text));
            if let Some(found) = place.into_iter().find(|path| path.exists()) {
                *text = found.display().to_string();
            }
        }
        _ => {}
    }
}
