//! What settings there are, read from the types and doc comments of the structs that hold them; tables are
//! held against it before they are read, so that a mistake is told by its key and in plain words.

use std::collections::BTreeMap;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value};
use toml::Table;

/// Names of settings, and what they take.
pub(crate) struct Schema(Value);

/// A setting that does not fit.
#[derive(Debug, PartialEq)]
pub(crate) struct Fault {
    /// Its dotted key.
    pub(crate) key: String,
    /// What is wrong.
    pub(crate) what: String,
}

/// One setting as people read of it.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Its dotted key; `N` stands for a number from 0.
    pub(crate) key: String,
    /// What it takes, in plain words.
    pub(crate) takes: String,
    /// Its default, as TOML; nothing where it is required or may be left out.
    pub(crate) default: Option<String>,
    /// Whether it must be given.
    pub(crate) required: bool,
    /// What it is.
    pub(crate) about: String,
    /// Values it may have, and what they mean.
    pub(crate) choices: Vec<(String, String)>,
}

impl Schema {
    /// That of `T`.
    pub(crate) fn of<T: JsonSchema>() -> Self {
        Self(SchemaGenerator::default().into_root_schema_for::<T>().into())
    }

    /// Refuses a setting that is unknown, of the wrong kind or missing.
    pub(crate) fn check(&self, table: &Table) -> Result<(), Fault> {
        self.check_table(&self.0, table, "")
    }

    /// All settings, those of tables after the others.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.list(&self.0, "", &mut entries);
        entries
    }

    fn check_table(&self, node: &Value, table: &Table, path: &str) -> Result<(), Fault> {
        let (fields, required) = self.fields(node, table, path)?;
        for (name, value) in table {
            let key = joined(path, name);
            let Some(field) = fields.get(&**name) else {
                let known = fields.keys().copied();
                return Err(Fault {
                    key,
                    what: format!("there is no such setting{}", meant(name, known)),
                });
            };
            self.check_value(field, value, key)?;
        }
        match required.iter().find(|name| !table.contains_key(**name)) {
            Some(name) => {
                let takes = self.takes(fields[name]);
                Err(Fault { key: joined(path, name), what: format!("missing: {takes}") })
            }
            None => Ok(()),
        }
    }

    /// Fields of a table, with those of its kind where it has kinds, and the names of those it must have.
    fn fields<'a>(
        &'a self,
        node: &'a Value,
        table: &Table,
        path: &str,
    ) -> Result<(BTreeMap<&'a str, &'a Value>, Vec<&'a str>), Fault> {
        let node = self.resolved(node);
        let (mut fields, mut required) = own_fields(node);
        let kinds = kinds(node);
        if !kinds.is_empty() {
            let known = || kinds.iter().map(|(name, _)| *name);
            let listed = known().collect::<Vec<_>>().join(", ");
            let fault = |what| Fault { key: joined(path, "kind"), what };
            let kind =
                table.get("kind").ok_or_else(|| fault(format!("missing: one of {listed}")))?;
            let kind = kind
                .as_str()
                .ok_or_else(|| fault(format!("{kind} where one of {listed} belongs")))?;
            let Some((_, of_kind)) = kinds.iter().find(|(name, _)| *name == kind) else {
                return Err(fault(format!("there is no {kind:?}{}", meant(kind, known()))));
            };
            let (more, needed) = own_fields(of_kind);
            fields.extend(more);
            required.extend(needed);
        }
        Ok((fields, required))
    }

    fn check_value(&self, node: &Value, value: &toml::Value, key: String) -> Result<(), Fault> {
        let node = self.resolved(node);
        let choices = choices(node);
        if !choices.is_empty() {
            let known = || choices.iter().map(|(name, _)| name.as_str());
            return match value.as_str() {
                Some(text) if known().any(|name| name == text) => Ok(()),
                Some(text) => Err(Fault {
                    key,
                    what: format!("there is no {text:?}{}", meant(text, known())),
                }),
                None => Err(self.misfit(node, value, key)),
            };
        }
        let fits = types(node).into_iter().any(|kind| match kind {
            "integer" => value.is_integer(),
            "number" => value.is_integer() || value.is_float(),
            "boolean" => value.is_bool(),
            "string" => value.is_str(),
            "array" => value.is_array(),
            "object" => value.is_table(),
            _ => false,
        });
        let least = node["minimum"].as_i64();
        if !fits || value.as_integer().is_some_and(|n| least.is_some_and(|least| n < least)) {
            return Err(self.misfit(node, value, key));
        }
        match value {
            toml::Value::Table(table) => self.check_table(node, table, &key),
            toml::Value::Array(list) => {
                let length = node["minItems"].as_u64().filter(|_| node["maxItems"].is_u64());
                if length.is_some_and(|n| n != list.len() as u64) {
                    return Err(self.misfit(node, value, key));
                }
                let each = |(index, value): (String, &toml::Value)| {
                    self.check_value(&node["items"], value, joined(&key, &index))
                };
                list.iter()
                    .enumerate()
                    .map(|(index, value)| (index.to_string(), value))
                    .try_for_each(each)
            }
            _ => Ok(()),
        }
    }

    fn misfit(&self, node: &Value, value: &toml::Value, key: String) -> Fault {
        Fault { key, what: format!("{value} where {} belongs", self.takes(node)) }
    }

    /// What a value must be, in plain words.
    fn takes(&self, node: &Value) -> String {
        let node = self.resolved(node);
        let choices = choices(node);
        if !choices.is_empty() {
            let names: Vec<&str> = choices.iter().map(|(name, _)| name.as_str()).collect();
            return format!("one of {}", names.join(", "));
        }
        let one = |kind: &str| match kind {
            "integer" if node["minimum"].as_i64() == Some(0) => {
                "a whole number from 0 up".to_owned()
            }
            "integer" => "a whole number".to_owned(),
            "number" => "a number".to_owned(),
            "boolean" => "true or false".to_owned(),
            "string" => "text".to_owned(),
            "array" => {
                let item = self.takes(&node["items"]);
                let item = item.trim_start_matches("a ").trim_start_matches("one of ");
                match node["minItems"].as_u64() {
                    Some(n) if node["maxItems"].is_u64() => format!("a list of {n} of: {item}"),
                    _ => format!("a list of: {item}"),
                }
            }
            _ => "a table".to_owned(),
        };
        types(node).first().map_or_else(|| "a table".to_owned(), |kind| one(kind))
    }

    /// Follows references, and what may be left out to what it is where it is not.
    fn resolved<'a>(&'a self, node: &'a Value) -> &'a Value {
        if let Some(name) = node["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
            return self.resolved(&self.0["$defs"][name]);
        }
        match node["anyOf"].as_array().and_then(|nodes| nodes.iter().find(|n| n["type"] != "null"))
        {
            Some(node) => self.resolved(node),
            None => node,
        }
    }

    fn list(&self, node: &Value, path: &str, entries: &mut Vec<Entry>) {
        let node = self.resolved(node);
        let (fields, required) = own_fields(node);
        let mut below = Vec::new();
        for (name, field) in fields {
            let inner = self.resolved(field);
            let is_table = |node: &Value| {
                node["properties"].is_object()
                    || node["oneOf"].is_array() && choices(node).is_empty()
            };
            let items = self.resolved(&inner["items"]);
            let (is_list, is_table) = (is_table(items), is_table(inner));
            let key = joined(path, name);
            entries.push(Entry {
                takes: if is_list { "a list of tables".to_owned() } else { self.takes(field) },
                default: if is_table || is_list {
                    None
                } else {
                    field.get("default").and_then(shown)
                },
                required: required.contains(&name),
                about: about(field),
                choices: choices(inner),
                key: key.clone(),
            });
            // Judges are rewards.
            if is_list && name != "judges" {
                below.push((items, format!("{key}.N")));
            } else if is_table && !is_list {
                below.push((inner, key));
            }
        }
        // A kind within a kind takes the same.
        let kinds = if path.contains('[') { Vec::new() } else { kinds(node) };
        for (kind, node) in kinds {
            let path = format!("{path}[{kind}]");
            entries.push(Entry {
                key: path.clone(),
                takes: "a kind".to_owned(),
                default: None,
                required: false,
                about: about(node),
                choices: Vec::new(),
            });
            let own: Vec<(&str, &Value)> =
                own_fields(node).0.into_iter().filter(|(name, _)| *name != "kind").collect();
            let of_kind = Value::Object(Map::from_iter([
                (
                    "properties".to_owned(),
                    own.iter().map(|(n, f)| ((*n).to_owned(), (*f).clone())).collect(),
                ),
                ("required".to_owned(), node["required"].clone()),
            ]));
            self.list(&of_kind, &path, entries);
        }
        for (node, path) in below {
            self.list(node, &path, entries);
        }
    }
}

/// Properties and required names of a node.
fn own_fields(node: &Value) -> (BTreeMap<&str, &Value>, Vec<&str>) {
    let fields = node["properties"].as_object().into_iter().flatten();
    let required = node["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    (fields.map(|(name, field)| (name.as_str(), field)).collect(), required.collect())
}

/// Kinds of a table, each with its own fields.
fn kinds(node: &Value) -> Vec<(&str, &Value)> {
    let variants = node["oneOf"].as_array().into_iter().flatten();
    let kind = |node| Some((as_kind(node)?, node));
    variants.filter_map(kind).collect()
}

fn as_kind(node: &Value) -> Option<&str> {
    node["properties"]["kind"]["const"].as_str()
}

/// Texts that a value may be, and what they mean.
fn choices(node: &Value) -> Vec<(String, String)> {
    let named = |node: &Value| Some((node["const"].as_str()?.to_owned(), about(node)));
    let one_of = node["oneOf"].as_array().into_iter().flatten().filter_map(named);
    let plain = node["enum"].as_array().into_iter().flatten();
    one_of
        .chain(plain.filter_map(|name| Some((name.as_str()?.to_owned(), String::new()))))
        .collect()
}

fn types(node: &Value) -> Vec<&str> {
    match &node["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => {
            kinds.iter().filter_map(Value::as_str).filter(|k| *k != "null").collect()
        }
        _ if node["properties"].is_object() || node["oneOf"].is_array() => vec!["object"],
        _ => Vec::new(),
    }
}

/// A doc comment on one line, without the marks of links.
fn about(node: &Value) -> String {
    let text = node["description"].as_str().unwrap_or_default();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace("[`", "`").replace("`]", "`")
}

/// A default as TOML.
fn shown(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        other => toml::Value::try_from(other).ok().map(|value| value.to_string()),
    }
}

fn joined(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// "did you mean", and else what there is.
pub(crate) fn meant<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    let near = known.iter().map(|other| (strsim::damerau_levenshtein(name, other), *other)).min();
    match near {
        Some((distance, other)) if distance <= 1 + name.len() / 4 => {
            format!(": did you mean {other}?")
        }
        _ => {
            let tops: Vec<&str> = known.into_iter().filter(|name| !name.contains('.')).collect();
            format!("; there is {}", tops.join(", "))
        }
    }
}
