//! What a verification found, as a table, and as files in the export's folder.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use flow::checkpoint::write_atomically;
use serde::{Deserialize, Serialize};

use super::blocks::Stage;
use super::pictures::{Judged, PNG, Pictures};
use crate::description::Description;
use crate::part::Part;

/// For people.
pub const MARKDOWN: &str = "verification.md";
/// For programs.
pub const JSON: &str = "verification.json";

/// What was found of one graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Its folder.
    pub component: String,
    /// Largest relative error that passes.
    pub max_error: f32,
    /// From its inputs to its outputs.
    pub stages: Vec<Stage>,
}

/// What was found of all graphs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One a graph.
    pub graphs: Vec<Found>,
    /// Pictures, where they were made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pictures: Option<Pictures>,
}

impl Found {
    /// Stages of the graph of `part`, judged by `max_error` or else by what the export says of itself.
    pub fn new(
        part: Part,
        stages: Vec<Stage>,
        description: &Description,
        max_error: Option<f32>,
    ) -> Self {
        let component = part.folder().to_owned();
        let own = description.components.get(&component).map_or(0.0, |known| known.max_error);
        Self { max_error: max_error.unwrap_or(own), component, stages }
    }

    /// Stages beyond the limit, with their relative errors.
    fn beyond(&self) -> impl Iterator<Item = (&str, f32)> {
        let worst = |stage: &Stage| {
            let passes = stage.alone.passes(self.max_error) && stage.chained.passes(self.max_error);
            (!passes).then(|| stage.alone.relative.max(stage.chained.relative))
        };
        self.stages.iter().filter_map(move |stage| Some((stage.name.as_str(), worst(stage)?)))
    }
}

impl Report {
    /// # Errors
    /// When a graph is beyond its limit: names its first stage that is.
    pub fn check(&self) -> Result<()> {
        let mut failed: Vec<String> = self
            .graphs
            .iter()
            .filter_map(|found| {
                let (stage, error) = found.beyond().next()?;
                let (component, limit) = (&found.component, found.max_error);
                Some(format!("{component} at {stage} by {error:.1e} (at most {limit:.0e})"))
            })
            .collect();
        if let Some(Pictures { limits, judged, .. }) = &self.pictures {
            let beyond = |one: &&Judged| {
                // What is not a number is beyond.
                !(one.psnr >= limits.min_psnr && one.gmsd <= limits.max_gmsd)
            };
            failed.extend(judged.iter().find(beyond).map(|Judged { prompt, psnr, gmsd }| {
                format!(
                    "the picture of {prompt} with PSNR {psnr:.1} dB (at least {}) and GMSD {gmsd:.3} (at most \
                     {})",
                    limits.min_psnr, limits.max_gmsd
                )
            }));
        }
        if failed.is_empty() {
            return Ok(());
        }
        bail!("the export differs from the checkpoint: {}", failed.join(", "))
    }

    /// The same as a table in Markdown, a stage a row.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| component | stage | largest error | relative | chained | relative | limit |\n\
             |---|---|---:|---:|---:|---:|---:|\n",
        );
        for found in &self.graphs {
            for Stage { name, alone, chained } in &found.stages {
                let _ = writeln!(
                    text,
                    "| {} | {name} | {:.1e} | {:.1e} | {:.1e} | {:.1e} | {:.0e} |",
                    found.component,
                    alone.absolute,
                    alone.relative,
                    chained.absolute,
                    chained.relative,
                    found.max_error
                );
            }
        }
        if let Some(Pictures { limits, side, steps, judged }) = &self.pictures {
            let _ = writeln!(
                text,
                "\nPictures of {side} pixels, {steps} steps, at least {} dB, GMSD at most {}:\n\n\
                 | prompt | PSNR, dB | GMSD |\n|---|---:|---:|",
                limits.min_psnr, limits.max_gmsd
            );
            for Judged { prompt, psnr, gmsd } in judged {
                let _ = writeln!(text, "| {prompt} | {psnr:.1} | {gmsd:.4} |");
            }
        }
        text
    }

    /// Writes both files into `folder`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = format!(
            "# Verification\n\n\
             Each stage of each graph ran in ONNX Runtime on the processor; the checkpoint ran in plain Rust in \
             f32.\n\
             `largest error` is of a stage given what the checkpoint computed before it, `chained` given what \
             the graph computed; relative is to the largest value.\n\
             Where a graph computes in bf16, the processor computed in f32 from its weights.\n\n{}{}",
            self.table(),
            if self.pictures.is_some() {
                format!(
                    "\nThe checkpoint's, the export's, four times the difference:\n\n![]({PNG})\n"
                )
            } else {
                String::new()
            }
        );
        write_atomically(&folder.join(MARKDOWN), text.as_bytes())?;
        let mut json = serde_json::to_vec_pretty(self).context("cannot write the report")?;
        json.push(b'\n');
        Ok(write_atomically(&folder.join(JSON), &json)?)
    }
}
