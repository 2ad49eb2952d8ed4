//! What settings there are, which runs ship, and where the settings of a run come from.

mod kind;
mod page;

use anyhow::{Result, bail};
use flow::usage::Usage;
use toml::{Table, Value};

use self::kind::Kind;
use crate::algorithm;
use crate::run::layers::leaves;
use crate::run::schema::{Entry, meant};
use crate::run::settings::{self, Source};

/// Prints the presets and the algorithms that ship, each with what its file says first.
pub(super) fn list() {
    for kind in Kind::ALL {
        let of = kind.name();
        println!("presets of {of} (ng-train {of} --preset, or base in a file of that kind):");
        for (name, text) in kind.presets() {
            println!("  {name:<28}{}", first_sentence(text));
        }
        println!();
    }
    println!("algorithms (algorithm):");
    for (name, text) in algorithm::all() {
        println!("  {name:<28}{}", first_sentence(text));
    }
}

/// Prints every setting that a run, a comparison or a pretraining reads, and where it is said.
///
/// # Errors
/// As [`Kind::of`], [`settings::align`] and [`settings::resolved`].
pub(super) fn show(source: &Source<'_>, said: &[String]) -> Result<()> {
    let (kind, source) = match source {
        Source::Preset(typed) => {
            let (kind, name) = Kind::of(typed)?;
            for other in Kind::ALL.into_iter().filter(|other| *other != kind && other.has(name)) {
                let (own, of) = (kind.name(), other.name());
                println!("# this is {own}'s preset; --preset {of}:{name} shows {of}'s");
            }
            (kind, &Source::Preset(name))
        }
        Source::File(_) => (Kind::Align, source),
    };
    if kind == Kind::Align {
        let run = settings::align(source, said)?;
        for note in &run.notes {
            println!("# {note}");
        }
        print_settings(&run.config.resolved()?, |key| run.origin(key));
    } else {
        let (table, layers) = kind.resolved(source, said)?;
        print_settings(&table, |key| layers.origin(key));
    }
    Ok(())
}

fn print_settings(table: &Table, origin: impl Fn(&str) -> Option<String>) {
    for (key, value) in leaves(table) {
        let origin = origin(&key).unwrap_or_else(|| "default".to_owned());
        if let Some(list) = value.as_array().filter(|list| list.iter().any(Value::is_table)) {
            for (index, item) in list.iter().enumerate() {
                println!("{key}.{index} = {item} # {origin}");
            }
        } else {
            println!("{key} = {value} # {origin}");
        }
    }
}

/// Prints what the settings are that begin with `key`, as Markdown.
///
/// # Errors
/// [`Usage`] when there are none.
pub(super) fn explain(key: Option<&str>) -> Result<()> {
    let Some(key) = key else {
        print!("{}", page::document()?);
        return Ok(());
    };
    let found = explained(key)?;
    for (kind, entries) in &found {
        if found.len() > 1 || *kind != Kind::Align {
            println!("Of {}:", kind.name());
        }
        for entry in entries {
            println!("{}", page::line(entry).trim_start_matches("- "));
        }
    }
    Ok(())
}

/// The settings that begin with `key`, by the kinds that have some.
fn explained(key: &str) -> Result<Vec<(Kind, Vec<Entry>)>> {
    let wanted = general(key);
    let (mut found, mut known) = (Vec::new(), Vec::new());
    for kind in Kind::ALL {
        let (asked, others): (Vec<_>, Vec<_>) = kind.entries().into_iter().partition(|entry| {
            begins(&entry.key, &wanted) || begins(&without_kinds(&entry.key), &wanted)
        });
        known.extend(others.into_iter().map(|entry| entry.key));
        if !asked.is_empty() {
            found.push((kind, asked));
        }
    }
    if found.is_empty() {
        known.sort_unstable();
        known.dedup();
        let meant = meant(&wanted, known.iter().map(String::as_str));
        bail!(Usage(format!("there is no setting {key:?}{meant}")));
    }
    Ok(found)
}

/// `key` as entries have it: `N` for a number, and rewards for judges.
fn general(key: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let part = |part| if is_number(part) { "N" } else { part };
    let key = key.split('.').map(part).collect::<Vec<_>>().join(".");
    match key.strip_prefix("judges.") {
        Some(rest) => format!("rewards.{rest}"),
        None => key,
    }
}

/// Whether `key` is `table` or lies in it.
fn begins(key: &str, table: &str) -> bool {
    let rest = key.strip_prefix(table);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// `key` as a file spells it, where a table's kind is no part of the name.
fn without_kinds(key: &str) -> String {
    let parts = key.split('[').map(|part| part.split_once(']').map_or(part, |(_, rest)| rest));
    parts.collect()
}

/// The first sentence of the comment at the top of `text`.
fn first_sentence(text: &str) -> String {
    let comment = text.lines().map_while(|line| line.strip_prefix("# "));
    let comment = comment.collect::<Vec<_>>().join(" ");
    let starts = comment.match_indices(char::is_uppercase).map(|(at, _)| at);
    let end = starts
        .filter_map(|at| comment[..at].strip_suffix(' '))
        .find(|text| text.ends_with(['.', '?']));
    end.unwrap_or(&comment).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_settings_is_what_the_program_prints() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
        let (found, printed) = (std::fs::read_to_string(page).unwrap(), page::document().unwrap());
        let differs = found.lines().count() != printed.lines().count()
            || found.lines().zip(printed.lines()).any(|(a, b)| a != b);
        assert!(!differs, "`ng-train config explain > docs/settings.md` renews it");
    }

    #[test]
    fn settings_are_explained_as_they_are_spelled() {
        let keys = |key: &str| {
            let found = explained(key).unwrap();
            let of = |(kind, entries): &(Kind, Vec<Entry>)| {
                entries.iter().map(|entry| format!("{}:{}", kind.name(), entry.key)).collect()
            };
            found.iter().flat_map::<Vec<String>, _>(of).collect::<Vec<_>>()
        };
        assert_eq!(keys("rewards.0.weight"), ["align:rewards.N.weight"]);
        assert_eq!(keys("judges.12.weight"), ["align:rewards.N.weight"]);
        assert_eq!(keys("rewards.0.prefer"), ["align:rewards.N[jpeg].prefer"]);
        assert_eq!(keys("tables.0.runs.1.name"), ["compare:tables.N.runs.N.name"]);
        assert_eq!(keys("model"), ["align:model", "pretrain:model"]);
        for key in ["passes", "hacked", "difference", "images", "autoencoder.kl_weight"] {
            assert_eq!(keys(key).len(), 1, "{key}");
        }
        let solver = &explained("rollout.solver").unwrap()[0].1[0];
        assert_eq!(solver.takes, "one of dpmpp-2m, dpmpp-2m-k, euler, heun, unipc");
        let error = explained("rollout.stepz").unwrap_err();
        assert!(error.is::<Usage>() && error.to_string().ends_with("did you mean rollout.steps?"));
    }

    #[test]
    fn presets_of_every_kind_are_shown() {
        for kind in Kind::ALL {
            for (name, _) in kind.presets() {
                let typed = format!("{}:{name}", kind.name());
                assert_eq!(Kind::of(&typed).unwrap(), (kind, *name));
                show(&Source::Preset(&typed), &[]).unwrap();
            }
        }
        assert_eq!(Kind::of("signs").unwrap(), (Kind::Align, "signs"));
        assert_eq!(Kind::of("rivals").unwrap(), (Kind::Compare, "rivals"));
        for (typed, says) in [("rivalz", "mean rivals?"), ("pretrain:rivals", "signs")] {
            let error = show(&Source::Preset(typed), &[]).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(says), "{error}");
        }
    }
}
