//! Run configurations: a preset or a TOML file, single settings replaced by `--set key=value`.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flow::checkpoint::read_bounded;
use serde::de::DeserializeOwned;

use crate::usage::Usage;

/// Presets of `ng-train align`.
pub const ALIGN_PRESETS: [(&str, &str); 2] = [
    ("neighbor", include_str!("../presets/neighbor.toml")),
    ("signs", include_str!("../presets/signs.toml")),
];
/// Presets of `ng-train pretrain`.
pub const PRETRAIN_PRESETS: [(&str, &str); 1] =
    [("signs", include_str!("../presets/signs-pretrain.toml"))];

/// Where a configuration comes from.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// A name in the command's list of presets.
    Preset(&'a str),
    /// A TOML file.
    File(&'a Path),
}

/// Reads a configuration and replaces settings: `key` is dotted, `value` is TOML or else a string.
///
/// # Errors
/// [`Usage`] when the preset is unknown or a setting does not fit; otherwise when the file is no TOML,
/// or a key or value of its does not fit. The message lists what would.
pub fn read<T: DeserializeOwned>(
    source: &Source<'_>,
    presets: &[(&str, &str)],
    settings: &[String],
) -> Result<T> {
    let (name, text) = match source {
        Source::Preset(name) => {
            let found = presets.iter().find(|(known, _)| known == name);
            let Some((_, text)) = found else {
                let known: Vec<&str> = presets.iter().map(|(known, _)| *known).collect();
                bail!(Usage(format!("unknown preset {name:?}: there is {}", known.join(", "))));
            };
            (format!("preset {name}"), (*text).to_owned())
        }
        Source::File(path) => {
            let text = String::from_utf8(read_bounded(path)?)
                .with_context(|| format!("{}: not UTF-8", path.display()))?;
            (path.display().to_string(), text)
        }
    };
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().map_or("", |span| &text[..span.start]);
        let line = before.matches('\n').count() + 1;
        anyhow!("{name}, line {line}: {}", error.message().replace('\n', ", "))
    })?;
    for setting in settings {
        apply(&mut table, setting)?;
    }
    let whole = toml::to_string(&table).context("the settings are no TOML")?;
    toml::from_str(&whole).map_err(|error| {
        let message = format!("{name}: {}", error.message());
        // Where the file alone reads, a setting is at fault.
        if toml::from_str::<T>(&text).is_ok() {
            anyhow!(Usage(format!("--set for {message}")))
        } else {
            anyhow!(message)
        }
    })
}

fn apply(table: &mut toml::Table, setting: &str) -> Result<()> {
    let Some((key, value)) = setting.split_once('=') else {
        bail!(Usage(format!(
            "invalid --set {setting:?}: key=value is needed, as in optimizer.learning_rate=1e-5"
        )));
    };
    let parsed = format!("value = {value}").parse::<toml::Table>().ok();
    let value = parsed
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    set(table, key, &key.split('.').collect::<Vec<_>>(), value)
}

/// Walks `path` (tables by name, lists by number) and puts `value` at its end.
fn set(table: &mut toml::Table, key: &str, path: &[&str], value: toml::Value) -> Result<()> {
    let (last, parents) = path.split_last().context("a key is not empty")?;
    let mut at = table;
    let mut parents = parents.iter().peekable();
    while let Some(name) = parents.next() {
        let entry =
            at.entry((*name).to_owned()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        let next = match entry {
            toml::Value::Array(list) => {
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
    at.insert((*last).to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::align::AlignConfig;

    fn preset(settings: &[&str]) -> Result<AlignConfig> {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        read(&Source::Preset("signs"), &ALIGN_PRESETS, &settings)
    }

    #[test]
    fn every_preset_reads() {
        for (name, _) in ALIGN_PRESETS {
            read::<AlignConfig>(&Source::Preset(name), &ALIGN_PRESETS, &[]).unwrap();
        }
        for (name, _) in PRETRAIN_PRESETS {
            let source = Source::Preset(name);
            read::<crate::pretrain::PretrainConfig>(&source, &PRETRAIN_PRESETS, &[]).unwrap();
        }
    }

    #[test]
    fn settings_replace_values() {
        let config = preset(&["iterations=7", "output=out/x", "rewards.0.weight=-1"]).unwrap();
        assert_eq!((config.iterations, config.rewards[0].weight), (7, -1.0));
        assert_eq!(config.output, Path::new("out/x"));
    }

    #[test]
    fn mistakes_are_named_with_what_would_fit() {
        let message = preset(&["iterationz=7"]).unwrap_err().to_string();
        assert!(message.contains("iterationz") && message.contains("iterations"), "{message}");
        let message = preset(&["iterations=many"]).unwrap_err().to_string();
        assert!(message.contains("many"), "{message}");
        assert!(preset(&["iterations"]).is_err());
        let unknown = read::<AlignConfig>(&Source::Preset("flox"), &ALIGN_PRESETS, &[]);
        assert!(unknown.unwrap_err().to_string().contains("signs"));
    }
}
