//! A checkpoint folder as an ONNX folder.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::Weights;
use flow::contents::{self, Belonging};
use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use flow::staged::Staged;
use flow::tokens::Tokenizers;
use indicatif::ProgressBar;

use crate::description::{self, Description};
use crate::external::{self, Placement, Written};
use crate::graph::Graph;
use crate::networks::record;
use crate::part::Part;
use crate::precision::{Choice, Precision};
use crate::publish::check_target;
use crate::verify::report::{Found, Report};
use crate::verify::{self, Difference, blocks};
use crate::weights::Source;

/// What to export, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A diffusers FLUX pipeline folder.
    pub checkpoint: PathBuf,
    /// Folder to make.
    pub target: PathBuf,
    /// Adapters to merge into the transformer and the text encoders, and their scales.
    pub loras: Vec<(PathBuf, f64)>,
    /// Target and precision.
    pub choice: Choice,
    /// Whether weights may stay in the checkpoint's files.
    pub placement: Placement,
    /// Whether an earlier export there is replaced.
    pub replace: bool,
    /// Whether the graphs must compute what the checkpoint does.
    pub verify: bool,
    /// Another limit of relative errors than the precision's.
    pub max_error: Option<f32>,
    /// Threads of ONNX Runtime in verification.
    pub threads: usize,
}

/// What was written for one graph.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Which graph.
    pub part: Part,
    /// Nodes of the graph.
    pub n_nodes: usize,
    /// Elements of all its weights.
    pub n_parameters: usize,
    /// Sizes of its files.
    pub written: Written,
    /// Distance from the reference, when it was verified.
    pub difference: Option<Difference>,
}

/// A table of what was written, one graph a row.
pub struct Table<'a>(pub &'a [Summary]);

/// Folders of a checkpoint that an export takes over as they are.
const COPIED: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];

/// Exports a whole pipeline: every graph, the configs and tokenizers; `bar` counts weights.
/// The target appears when everything was written and, if asked for, verified.
///
/// # Errors
/// When the checkpoint cannot be read, the target must not or cannot be written, a graph differs
/// from its reference, or `stop` was set. Nothing is left behind then.
pub fn export(request: &Request, bar: &ProgressBar, stop: &AtomicBool) -> Result<Vec<Summary>> {
    let dialects = Part::ALL.map(|part| Ok((part, request.choice.dialect(part)?)));
    let dialects = dialects.into_iter().collect::<Result<Vec<_>>>()?;
    let pipeline = Pipeline::open(&request.checkpoint)?;
    let loras = open_loras(&request.loras, &pipeline, bar)?;
    check_apart(&request.checkpoint, &request.target)?;
    check_target(&request.target, request.replace)?;
    // What is copied is read once before the work: an export without tokenizers is of no use.
    Tokenizers::open(&request.checkpoint, None)?;
    let rest = rest(&request.checkpoint)?;
    COPIED.iter().try_for_each(|folder| pipeline.check_folder(folder))?;
    let staged = Staged::begin(&request.target)?;
    let graphs: Vec<_> =
        dialects.into_iter().map(|(part, d)| (part, record(&pipeline, part, d))).collect();
    bar.set_length(graphs.iter().map(|(_, graph)| graph.n_parameters() as u64).sum());

    let mut description = Description::new(&request.choice, &request.loras);
    let mut summaries = Vec::with_capacity(graphs.len());
    for (part, graph) in graphs {
        bar.set_message(part.folder());
        description.add(part, &graph);
        let mut advance = |n: usize| {
            bar.inc(n as u64);
            check_stop(stop)
        };
        let writing =
            Writing { pipeline: &pipeline, loras: &loras, root: staged.path(), request, bar };
        let summary = writing.part(part, graph, &mut advance)?;
        description.written(part, summary.written);
        summaries.push(summary);
    }
    for file in &rest {
        copy(&file.source, &staged.path().join(&file.path))?;
    }
    description.write(staged.path())?;
    if request.verify {
        let verifying = Verifying { pipeline: &pipeline, loras: &loras, request, stop };
        verifying.run(staged.path(), &description, &mut summaries, bar)?;
    }
    check_target(&request.target, request.replace)?;
    staged.publish(request.replace)?;
    Ok(summaries)
}

/// Where parts come from and go to.
struct Writing<'a> {
    pipeline: &'a Pipeline,
    loras: &'a [Lora],
    root: &'a Path,
    request: &'a Request,
    bar: &'a ProgressBar,
}

impl Writing<'_> {
    fn part(
        &self,
        part: Part,
        graph: Graph,
        advance: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Summary> {
        let folder = self.root.join(part.folder());
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let component = self.pipeline.dir.join(part.component().folder());
        copy(&component.join("config.json"), &folder.join("config.json"))?;
        let weights = self.pipeline.weights(part.component())?;
        self.bar
            .suspend(|| weights.notices().iter().for_each(|notice| eprintln!("note: {notice}")));
        let source = Source { weights: &weights, loras: self.loras, component: part.component() };
        let (n_nodes, n_parameters) = (graph.nodes.len(), graph.n_parameters());
        let metadata = description::metadata(part, &self.request.choice, &graph, self.pipeline)?;
        let placement = self.request.placement;
        let written =
            external::write(&folder, part.folder(), graph, source, placement, &metadata, advance)?;
        Ok(Summary { part, n_nodes, n_parameters, written, difference: None })
    }
}

/// The adapters to merge; says what each is.
fn open_loras(
    loras: &[(PathBuf, f64)],
    pipeline: &Pipeline,
    bar: &ProgressBar,
) -> Result<Vec<Lora>> {
    let layers = Layers::of(pipeline);
    let open = |(path, scale): &(PathBuf, f64)| {
        let lora = Lora::open(path, *scale, &layers)?;
        bar.suspend(|| lora.lines().iter().for_each(|line| eprintln!("{line}")));
        Ok(lora)
    };
    loras.iter().map(open).collect()
}

/// A verification of what was written.
struct Verifying<'a> {
    pipeline: &'a Pipeline,
    loras: &'a [Lora],
    request: &'a Request,
    stop: &'a AtomicBool,
}

impl Verifying<'_> {
    /// Adds differences to `summaries` and the report to `folder`.
    fn run(
        &self,
        folder: &Path,
        description: &Description,
        summaries: &mut [Summary],
        bar: &ProgressBar,
    ) -> Result<()> {
        let (mut report, threads) = (Report::default(), self.request.threads);
        for summary in &mut *summaries {
            let part = summary.part;
            bar.set_message(format!("verifying {}", part.folder()));
            let stages = blocks::compare(folder, part, self.pipeline, self.loras, threads)?;
            summary.difference = stages.last().map(|stage| stage.chained);
            report.0.push(Found::new(part, stages, description, self.request.max_error));
            check_stop(self.stop)?;
        }
        report.check().context("nothing was exported")?;
        if let Some(reference) = self.reference()? {
            let mut found = Vec::new();
            for summary in &*summaries {
                found.push((
                    summary.part,
                    verify::compare(folder, summary.part, &reference, threads)?,
                ));
            }
            check_differences(&found, &reference)?;
        }
        report.write(folder)
    }

    /// What the trainer stored of the checkpoint, or of the one adapter merged as it was trained.
    fn reference(&self) -> Result<Option<Weights>> {
        if self.request.choice.precision != Precision::F32 {
            return Ok(None);
        }
        match self.request.loras.as_slice() {
            [] => verify::stored(&self.request.checkpoint),
            [(path, 1.0)] if path.is_dir() => verify::stored(path),
            _ => Ok(None),
        }
    }
}

fn check_stop(stop: &AtomicBool) -> Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted: nothing was exported");
    Ok(())
}

fn check_differences(found: &[(Part, Difference)], reference: &Weights) -> Result<()> {
    let limit = verify::limit(reference);
    let failed: Vec<_> = found
        .iter()
        .filter(|(_, difference)| !difference.passes(limit))
        .map(|(part, d)| {
            format!("{} by {:.1e} ({:.1e} relative)", part.folder(), d.absolute, d.relative)
        })
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!(
        "the graphs differ from {} by more than {limit:.0e}: {}; nothing was exported: if the weights \
         have changed since, make that file again with `ng-train reference`",
        reference.path().display(),
        failed.join(", ")
    )
}

/// The target must not be the checkpoint or a folder around it.
fn check_apart(checkpoint: &Path, target: &Path) -> Result<()> {
    let (Ok(checkpoint), Ok(target)) = (checkpoint.canonicalize(), target.canonicalize()) else {
        return Ok(());
    };
    ensure!(
        !checkpoint.starts_with(&target),
        "{} holds the checkpoint itself: choose another --out",
        target.display()
    );
    Ok(())
}

/// Tokenizers, schedule, pipeline index and licences.
fn rest(checkpoint: &Path) -> Result<Vec<Belonging>> {
    let mut files = contents::of(checkpoint)?;
    files.retain(|file| file.component().is_none_or(|folder| COPIED.contains(&folder)));
    Ok(files)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = to.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::copy(from, to));
    copied.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verified = self.0.iter().any(|summary| summary.difference.is_some());
        let [component, nodes, parameters, written, linked] =
            ["component", "nodes", "parameters", "written", "linked"];
        write!(f, "{component:<16}{nodes:>8}{parameters:>16}{written:>14}{linked:>14}")?;
        writeln!(f, "{}", if verified { "  difference   relative" } else { "" })?;
        let row = |f: &mut fmt::Formatter<'_>, name, nodes, parameters, written: Written| {
            let sizes = [written.n_bytes, written.n_linked].map(megabytes);
            write!(f, "{name:<16}{nodes:>8}{parameters:>16}{:>14}{:>14}", sizes[0], sizes[1])
        };
        let mut total = (0, 0, Written::default());
        for summary in self.0 {
            let Summary { part, n_nodes, n_parameters, written, difference } = summary;
            row(f, part.folder(), *n_nodes, *n_parameters, *written)?;
            total.0 += n_nodes;
            total.1 += n_parameters;
            total.2.n_bytes += written.n_bytes;
            total.2.n_linked += written.n_linked;
            if let Some(Difference { absolute, relative }) = difference {
                write!(f, "{absolute:>12.1e}{relative:>11.1e}")?;
            }
            writeln!(f)?;
        }
        row(f, "total", total.0, total.1, total.2)?;
        writeln!(f)
    }
}

fn megabytes(n_bytes: u64) -> String {
    format!("{:.2} MB", n_bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests;
