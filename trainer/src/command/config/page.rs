//! The page of all settings.

use std::fmt::Write;

use anyhow::Result;

use super::kind::Kind;
use crate::algorithm;
use crate::run::config::AlignConfig;
use crate::run::schema::Entry;
use crate::run::settings::{self, ALIGN_PRESETS, Source};

/// Everything on one page.
pub(super) fn document() -> Result<String> {
    let mut text = String::from(
        "# Settings\n\n\
         This page is printed by `ng-train config explain`; a test holds it to that.\n\
         What `ng-train align` reads comes first, [comparisons](#ng-train-compare) and \
         [pretraining](#ng-train-pretrain) last.\n\
         A run is a TOML file (`--config`) or a preset (`--preset`), and `--set KEY=VALUE` replaces one setting.\n\
         A file may name a preset as its `base` and say only what differs.\n\
         `N` stands for a number from 0, `[kind]` for a table with that `kind`; judges are tables as rewards.\n",
    );
    let entries = Kind::Align.entries();
    text += &sections(&entries, "##", "The run")?;
    text += "\n## Which algorithm reads what\n\n\
             A setting that is not read is refused; the table is of every algorithm with its authors' settings, and other\n\
             settings may leave one unread (`sde.window` leaves `train_steps` so).\n\n";
    text += &readers(&entries)?;
    for (kind, title) in [(Kind::Compare, "The comparison"), (Kind::Pretrain, "The training")] {
        writeln!(text, "\n## ng-train {}", kind.name())?;
        text += &sections(&kind.entries(), "###", title)?;
    }
    Ok(text)
}

/// One setting.
pub(super) fn line(entry: &Entry) -> String {
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

/// A section a table, with headings that begin with `marks`; that of the outermost is `title`.
fn sections(entries: &[Entry], marks: &str, title: &str) -> Result<String> {
    let (mut text, mut table) = (String::new(), None);
    for entry in entries {
        let of = entry.key.rsplit_once('.').map_or("", |(table, _)| table);
        let of = if entry.key.ends_with(']') { entry.key.as_str() } else { of };
        if table != Some(of) {
            writeln!(text, "\n{marks} {}\n", if of.is_empty() { title } else { of })?;
            table = Some(of);
        }
        if entry.key.ends_with(']') {
            writeln!(text, "{}\n", entry.about)?;
        } else {
            writeln!(text, "{}", line(entry))?;
        }
    }
    Ok(text)
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
