//! What settings there are, which runs ship, and where the settings of a run come from.

use std::fmt::Write;

use anyhow::{Result, bail};
use flow::usage::Usage;

use crate::algorithm;
use crate::run::config::AlignConfig;
use crate::run::layers::leaves;
use crate::run::schema::{Entry, Schema, meant};
use crate::run::settings::{self, ALIGN_PRESETS, Source};

/// Prints the runs and the algorithms that ship, each with what its file says first.
pub(super) fn list() {
    println!("presets (--preset, or base in a file):");
    for (name, text) in ALIGN_PRESETS {
        println!("  {name:<28}{}", first_sentence(text));
    }
    println!("\nalgorithms (algorithm):");
    for (name, text) in algorithm::all() {
        println!("  {name:<28}{}", first_sentence(text));
    }
}

/// Prints every setting that a run reads, and where it is said.
///
/// # Errors
/// As [`settings::align`].
pub(super) fn show(source: &Source<'_>, said: &[String]) -> Result<()> {
    let run = settings::align(source, said)?;
    for note in &run.notes {
        println!("# {note}");
    }
    for (key, value) in leaves(&run.config.resolved()?) {
        let origin = run.origin(&key).unwrap_or_else(|| "default".to_owned());
        if let Some(list) = value.as_array().filter(|list| list.iter().any(toml::Value::is_table)) {
            for (index, item) in list.iter().enumerate() {
                println!("{key}.{index} = {item} # {origin}");
            }
        } else {
            println!("{key} = {value} # {origin}");
        }
    }
    Ok(())
}

/// Prints what the settings are that begin with `key`, as Markdown.
///
/// # Errors
/// [`Usage`] when there are none.
pub(super) fn explain(key: Option<&str>) -> Result<()> {
    let entries = Schema::of::<AlignConfig>().entries();
    let Some(key) = key else {
        print!("{}", document(&entries)?);
        return Ok(());
    };
    let is_asked = |entry: &&Entry| {
        let rest = entry.key.strip_prefix(key);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let found: Vec<&Entry> = entries.iter().filter(is_asked).collect();
    if found.is_empty() {
        let known = entries.iter().map(|entry| entry.key.as_str());
        bail!(Usage(format!("there is no setting {key:?}{}", meant(key, known))));
    }
    for entry in found {
        println!("{}", line(entry).trim_start_matches("- "));
    }
    Ok(())
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

/// Everything on one page.
fn document(entries: &[Entry]) -> Result<String> {
    let mut text = String::from(
        "# Settings of `ng-train align`\n\n\
         This page is printed by `ng-train config explain`; a test holds it to that.\n\
         A run is a TOML file (`--config`) or a preset (`--preset`), and `--set KEY=VALUE` replaces one setting.\n\
         A file may name a preset as its `base` and say only what differs.\n\
         `N` stands for a number from 0, `[kind]` for a table with that `kind`; judges are tables as rewards.\n",
    );
    let mut table = None;
    for entry in entries {
        let of = entry.key.rsplit_once('.').map_or("", |(table, _)| table);
        let of = if entry.key.ends_with(']') { entry.key.as_str() } else { of };
        if table != Some(of) {
            let title = if of.is_empty() { "The run" } else { of };
            writeln!(text, "\n## {title}\n")?;
            table = Some(of);
        }
        if entry.key.ends_with(']') {
            writeln!(text, "{}\n", entry.about)?;
        } else {
            writeln!(text, "{}", line(entry))?;
        }
    }
    text += "\n## Which algorithm reads what\n\n\
             A setting that is not read is refused; the table is of every algorithm with its authors' settings, and other\n\
             settings may leave one unread (`sde.window` leaves `train_steps` so).\n\n";
    text += &readers(entries)?;
    Ok(text)
}

fn line(entry: &Entry) -> String {
    let default = match &entry.default {
        Some(default) => format!(", default {default}"),
        None if entry.required => ", required".to_owned(),
        None => String::new(),
    };
    let mut text = format!("- `{}` ({}{default}): {}", entry.key, entry.takes, entry.about);
    for (name, about) in entry.choices.iter().filter(|(_, about)| !about.is_empty()) {
        text.extend(["\n  - `", name, "`: ", about]);
    }
    text
}

/// A table of settings that differ against algorithms with their published settings.
fn readers(entries: &[Entry]) -> Result<String> {
    let mut names = Vec::new();
    let mut runs = Vec::new();
    for (name, _) in algorithm::all() {
        let setting = format!("algorithm={name}");
        names.push(name);
        let source = Source::Preset("signs");
        // Its rewards may be none for the algorithm.
        runs.push(settings::read::<AlignConfig>(&source, &ALIGN_PRESETS, &[setting])?);
    }
    let mut text =
        format!("| setting | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(names.len()));
    for entry in entries.iter().filter(|entry| !entry.takes.contains("table")) {
        let read = runs.iter().map(|run| Ok(run.ignores(&entry.key)?.is_none()));
        let read = read.collect::<Result<Vec<bool>>>()?;
        if read.contains(&false) {
            let cells: Vec<&str> =
                read.iter().map(|&read| if read { "read" } else { "–" }).collect();
            writeln!(text, "| `{}` | {} |", entry.key, cells.join(" | "))?;
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_settings_is_what_the_program_prints() {
        let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
        let (found, printed) = (
            std::fs::read_to_string(page).unwrap(),
            document(&Schema::of::<AlignConfig>().entries()),
        );
        let printed = printed.unwrap();
        let differs = found.lines().count() != printed.lines().count()
            || found.lines().zip(printed.lines()).any(|(a, b)| a != b);
        assert!(!differs, "`ng-train config explain > docs/settings.md` renews it");
    }
}
