//! Run configurations: a preset or a TOML file, single settings replaced by `--set key=value`.
//!
//! A configuration may name another preset as its `base` and say only what differs. An `algorithm` brings
//! its published settings, which go behind all that is said.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flow::checkpoint::read_bounded;
use flow::usage::Usage;
use serde::de::DeserializeOwned;

use crate::algorithm;

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../presets/", $name, ".toml")))),*]
    };
}

/// Presets of `ng-train align`.
pub const ALIGN_PRESETS: [(&str, &str); 31] = presets![
    "neighbor",
    "neighbor-paper-literal",
    "neighbor-sde-matched",
    "neighbor-ar-copo",
    "dance-grpo",
    "flow-grpo",
    "flow-grpo-fast",
    "mix-grpo",
    "mix-grpo-flash",
    "mix-grpo-flash-star",
    "branch-grpo",
    "diffusion-nft",
    "flow-dppo",
    "v-grpo",
    "awm",
    "signs",
    "signs-paper-literal",
    "signs-sde-matched",
    "signs-ar-copo",
    "signs-dance-grpo",
    "signs-flow-grpo",
    "signs-flow-grpo-fast",
    "signs-mix-grpo",
    "signs-mix-grpo-flash",
    "signs-mix-grpo-flash-star",
    "signs-branch-grpo",
    "signs-diffusion-nft",
    "signs-flow-dppo",
    "signs-v-grpo",
    "signs-awm",
    "emoji",
];

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
        Source::Preset(name) => (format!("preset {name}"), preset(name, presets)?.to_owned()),
        Source::File(path) => {
            let text = String::from_utf8(read_bounded(path)?)
                .with_context(|| format!("{}: not UTF-8", path.display()))?;
            (path.display().to_string(), text)
        }
    };
    let own = with_bases(parse(&name, &text)?, &name, presets)?;
    let mut table = own.clone();
    for setting in settings {
        apply(&mut table, setting)?;
    }
    whole(table, &name).map_err(|error| match whole::<T>(own, &name) {
        // Where the file alone reads, a setting is at fault.
        Ok(_) => anyhow!(Usage(format!("--set for {error}"))),
        Err(_) => error,
    })
}

/// The configuration of `table` and of the algorithm it names.
fn whole<T: DeserializeOwned>(table: toml::Table, name: &str) -> Result<T> {
    let table = match table.get("algorithm").and_then(toml::Value::as_str) {
        Some(algorithm) => {
            let found = algorithm::named(algorithm).with_context(|| name.to_owned());
            merged(parse(algorithm, found.map_err(|error| anyhow!("{error:#}"))?)?, table)
        }
        None => table,
    };
    let text = toml::to_string(&table).context("the settings are no TOML")?;
    toml::from_str(&text).map_err(|error| anyhow!("{name}: {}", error.message()))
}

/// `table` on top of the presets that it is based on.
fn with_bases(mut table: toml::Table, name: &str, presets: &[(&str, &str)]) -> Result<toml::Table> {
    for _ in 0..=presets.len() {
        let Some(base) = table.remove("base") else { return Ok(table) };
        let base = base.as_str().with_context(|| format!("{name}: base is no name of a preset"))?;
        table = merged(parse(base, preset(base, presets)?)?, table);
    }
    bail!("{name}: its bases go round in a circle")
}

/// `over` in front of `under`, table by table.
fn merged(mut under: toml::Table, over: toml::Table) -> toml::Table {
    for (key, value) in over {
        let value = match (under.remove(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => {
                toml::Value::Table(merged(under, over))
            }
            (_, value) => value,
        };
        under.insert(key, value);
    }
    under
}

fn preset<'a>(name: &str, presets: &[(&str, &'a str)]) -> Result<&'a str> {
    let found = presets.iter().find(|(known, _)| *known == name);
    found.map(|&(_, text)| text).ok_or_else(|| {
        let known: Vec<&str> = presets.iter().map(|(known, _)| *known).collect();
        anyhow!(Usage(format!("unknown preset {name:?}: there is {}", known.join(", "))))
    })
}

fn parse(name: &str, text: &str) -> Result<toml::Table> {
    text.parse().map_err(|error: toml::de::Error| {
        let before = error.span().map_or("", |span| &text[..span.start]);
        let line = before.matches('\n').count() + 1;
        anyhow!("{name}, line {line}: {}", error.message().replace('\n', ", "))
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
    use crate::run::config::AlignConfig;

    fn preset(settings: &[&str]) -> Result<AlignConfig> {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        read(&Source::Preset("signs"), &ALIGN_PRESETS, &settings)
    }

    /// B, optimiser steps an iteration and the level of the noise.
    fn numbers(config: &AlignConfig) -> (usize, usize, f64) {
        let setting = config.setting().unwrap();
        (setting.n_anchors, setting.n_updates, config.methods.sde.level)
    }

    #[test]
    fn every_preset_reads() {
        for (name, _) in ALIGN_PRESETS {
            let source = Source::Preset(name);
            read::<AlignConfig>(&source, &ALIGN_PRESETS, &[]).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn one_line_changes_the_algorithm_and_what_is_said_stays() {
        let signs = preset(&[]).unwrap();
        assert_eq!(numbers(&signs), (4, 4, 0.7));
        let dance = preset(&["algorithm=dance-grpo"]).unwrap();
        assert_eq!(numbers(&dance), (12, 3, 0.3));
        assert!(!dance.group.advantage.rescale && (dance.optimizer.eps - 1e-8).abs() < 1e-12);
        assert_eq!(dance.optimizer.learning_rate, signs.optimizer.learning_rate);
        let louder = preset(&["algorithm=dance-grpo", "sde.level=0.5", "updates=2"]).unwrap();
        assert_eq!(numbers(&louder), (12, 2, 0.5));
        let message = preset(&["algorithm=dance"]).unwrap_err().to_string();
        assert!(message.contains("dance-grpo") && message.contains("diffusion-nft"), "{message}");
        for (name, _) in algorithm::all() {
            preset(&[&format!("algorithm={name}")]).unwrap();
        }
    }

    #[test]
    fn a_file_may_say_only_what_differs_from_a_preset() {
        let folder = tempfile::tempdir().unwrap();
        let read_text = |text: &str| {
            let path = folder.path().join("mine.toml");
            std::fs::write(&path, text).unwrap();
            read::<AlignConfig>(&Source::File(&path), &ALIGN_PRESETS, &[])
        };
        let mine = "base = 'signs-dance-grpo'\niterations = 3\n[rollout]\nsteps = 9";
        let config = read_text(mine).unwrap();
        assert_eq!(
            (config.iterations, config.group.rollout.steps, config.group.rollout.batch),
            (3, 9, 96)
        );
        assert_eq!(config.training.algorithm, "dance-grpo");
        let message = read_text("base = 'sings'").unwrap_err().to_string();
        assert!(message.contains("signs"), "{message}");
        assert!(read_text("base = 3").is_err());
    }

    #[test]
    fn settings_replace_values() {
        let config = preset(&["iterations=7", "output=out/x", "rewards.0.weight=-1"]).unwrap();
        assert_eq!((config.iterations, config.group.rewards[0].weight), (7, -1.0));
        assert_eq!(config.output, Path::new("out/x"));
    }

    #[test]
    fn mistakes_are_named_with_what_would_fit() {
        let message = preset(&["iterationz=7"]).unwrap_err().to_string();
        assert!(message.contains("iterationz"), "{message}");
        let message = preset(&["iterations=many"]).unwrap_err().to_string();
        assert!(message.contains("many"), "{message}");
        assert!(preset(&["iterations"]).is_err());
        let unknown = read::<AlignConfig>(&Source::Preset("flox"), &ALIGN_PRESETS, &[]);
        assert!(unknown.unwrap_err().to_string().contains("signs"));
    }
}
