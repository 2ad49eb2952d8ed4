//! A checkpoint folder as an ONNX folder.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::Weights;
use flow::checksums;
use flow::contents::{self, Belonging};
use flow::log;
use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use flow::staged::{self, Staged};
use flow::tokens::Tokenizers;
use flow::usage::Usage;
use indicatif::ProgressBar;

use crate::description::{self, Description};
use crate::external::data::JOURNAL;
use crate::external::{self, Linked, Mode, Output, Placement, Written};
use crate::graph::Graph;
use crate::networks::record;
use crate::part::Part;
use crate::precision::{Choice, Precision};
use crate::publish::check_target;
use crate::verify::report::{Found, Report};
use crate::verify::{self, Asked, Difference, blocks};
use crate::weights::Source;

pub mod plan;
mod resume;

/// What to export, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A diffusers FLUX pipeline folder.
    pub checkpoint: PathBuf,
    /// Folder to make.
    pub target: PathBuf,
    /// Graphs to make.
    pub parts: Vec<Part>,
    /// Adapters to merge into the transformer and the text encoders, and their scales.
    pub loras: Vec<(PathBuf, f64)>,
    /// Target and precision.
    pub choice: Choice,
    /// Whether weights may stay in the checkpoint's files.
    pub placement: Placement,
    /// Whether an earlier export there is replaced.
    pub replace: bool,
    /// Whether an interrupted export is left, and one that was left is gone on with.
    pub resume: bool,
    /// Whether the graphs must compute what the checkpoint does.
    pub verify: bool,
    /// What is compared then, and other limits than the precision's.
    pub asked: Asked,
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

/// Says whether the work is to end. It is asked between any two pieces of work.
pub type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

/// A table of what was written, one graph a row.
pub struct Table<'a>(pub &'a [Summary]);

/// Folders of a checkpoint that an export takes over as they are.
const COPIED: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];

/// What an export is made from, all of it checked but weights.
struct Prepared<'a> {
    request: &'a Request,
    pipeline: Pipeline,
    loras: Vec<Lora>,
    graphs: Vec<(Part, Graph)>,
    rest: Vec<Belonging>,
}

/// Exports the graphs asked for, the configs and tokenizers; `bar` counts weights.
/// The target appears when everything was written and, if asked for, verified.
///
/// # Errors
/// When the checkpoint cannot be read, the target must not or cannot be written, a graph differs
/// from its reference, or `stop` says so. Nothing is left behind then, but for [`Request::resume`] what was
/// written until `stop`, under a hidden name.
pub fn export(request: &Request, bar: &ProgressBar, stop: Stop<'_>) -> Result<Vec<Summary>> {
    let prepared = Prepared::open(request, bar)?;
    let mut staged = if request.resume {
        let left = resume::fingerprint(&prepared)?;
        let staged = Staged::resume(&request.target, |folder| resume::fits(folder, &left))?;
        resume::begin(staged.path(), &left)?;
        staged
    } else {
        Staged::begin(&request.target)?
    };
    prepared.check_space(staged.path())?;
    let n_parameters = |(_, graph): &(Part, Graph)| graph.n_parameters() as u64;
    bar.set_length(prepared.graphs.iter().map(n_parameters).sum());
    let filled = prepared.fill(&mut staged, bar, stop);
    if filled.is_err() && request.resume && stop() {
        staged.leave();
        bail!("interrupted: the same command goes on from here");
    }
    let summaries = filled?;
    if request.resume {
        resume::end(staged.path())?;
    }
    check_target(&request.target, request.replace)?;
    staged.publish(request.replace)?;
    Ok(summaries)
}

impl<'a> Prepared<'a> {
    fn open(request: &'a Request, bar: &ProgressBar) -> Result<Self> {
        let dialects = request.parts.iter().map(|&part| Ok((part, request.choice.dialect(part)?)));
        let dialects = dialects.collect::<Result<Vec<_>>>()?;
        let pipeline = Pipeline::open(&request.checkpoint)?;
        bar.suspend(|| pipeline.notices().iter().for_each(|notice| eprintln!("note: {notice}")));
        let loras = open_loras(&request.loras, &pipeline, bar)?;
        check_apart(&request.checkpoint, &request.target)?;
        check_target(&request.target, request.replace)?;
        // What is copied is read once before the work: an export without tokenizers is of no use.
        Tokenizers::open(&request.checkpoint, None)?;
        let rest = rest(&request.checkpoint)?;
        COPIED.iter().try_for_each(|folder| pipeline.check_folder(folder))?;
        let graphs =
            dialects.into_iter().map(|(part, d)| (part, record(&pipeline, part, d))).collect();
        Ok(Self { request, pipeline, loras, graphs, rest })
    }

    /// What an export would write, without reading or writing it.
    fn count(&self) -> Result<Vec<Summary>> {
        let count = |(part, graph): &(Part, Graph)| {
            let weights = self.pipeline.unread_weights(part.component())?;
            let source = self.source(*part, &weights);
            let folder = self.request.target.join(part.folder());
            let (summary, _) =
                self.make(*part, graph, source, &folder, Mode::Counted, &mut |_| Ok(()))?;
            Ok(summary)
        };
        self.graphs.iter().map(count).collect()
    }

    fn source<'b>(&'b self, part: Part, weights: &'b Weights) -> Source<'b> {
        Source { weights, loras: &self.loras, component: part.component() }
    }

    fn make(
        &self,
        part: Part,
        graph: &Graph,
        source: Source<'_>,
        folder: &Path,
        mode: Mode,
        advance: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<(Summary, external::Made)> {
        let (n_nodes, n_parameters) = (graph.nodes.len(), graph.n_parameters());
        let metadata = description::metadata(part, &self.request.choice, graph, &self.pipeline)?;
        let (name, placement) = (part.folder(), self.request.placement);
        let output = Output { folder, name, placement, metadata: &metadata, mode };
        let made = external::write(&output, graph.clone(), source, advance)?;
        let written = made.written;
        Ok((Summary { part, n_nodes, n_parameters, written, difference: None }, made))
    }

    /// Bytes of what is written beside graphs and weights.
    fn rest_bytes(&self) -> u64 {
        let size = |file: &Belonging| fs::metadata(&file.source).map_or(0, |found| found.len());
        self.rest.iter().map(size).sum()
    }

    fn check_space(&self, folder: &Path) -> Result<()> {
        let Some(n_free) = staged::free_bytes(folder) else { return Ok(()) };
        let n_needed = self.count()?.iter().map(|summary| summary.written.n_bytes).sum::<u64>()
            + self.rest_bytes();
        let n_held = resume::n_bytes(folder);
        ensure!(
            n_needed <= n_free + n_held,
            "{}: the export needs {}, but only {} are free there",
            self.request.target.display(),
            megabytes(n_needed - n_held),
            megabytes(n_free)
        );
        Ok(())
    }

    fn fill(&self, staged: &mut Staged, bar: &ProgressBar, stop: Stop<'_>) -> Result<Vec<Summary>> {
        let mut description = Description::new(&self.request.choice, &self.request.loras);
        let mut summaries = Vec::with_capacity(self.graphs.len());
        let mut linked = Vec::new();
        for (part, graph) in &self.graphs {
            bar.set_message(part.folder());
            bar.suspend(|| log::detail(&format!("writing {}", part.folder())));
            description.add(*part, graph);
            let mut advance = |n: usize| {
                bar.inc(n as u64);
                check_stop(stop)
            };
            let (summary, made) = self.part(*part, graph, staged.path(), bar, &mut advance)?;
            if let Some(sum) = made.data {
                staged.know(format!("{}/{}", part.folder(), external::DATA_FILE), sum);
            }
            linked.extend(made.linked.into_iter().map(|file| (*part, file)));
            description.written(*part, summary.written);
            summaries.push(summary);
        }
        bar.set_message("reading linked weights");
        self.scan(&linked, staged, &|n| {
            bar.inc(n as u64);
            check_stop(stop)
        })?;
        for file in &self.rest {
            copy(&file.source, &staged.path().join(&file.path))?;
        }
        description.write(staged.path())?;
        if self.request.verify {
            let verifying = Verifying { prepared: self, stop };
            verifying.run(staged.path(), &description, &mut summaries, bar)?;
        }
        Ok(summaries)
    }

    fn part(
        &self,
        part: Part,
        graph: &Graph,
        root: &Path,
        bar: &ProgressBar,
        advance: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<(Summary, external::Made)> {
        let folder = root.join(part.folder());
        let mode = if self.request.resume { Mode::Resumed } else { Mode::Written };
        let created = match mode {
            Mode::Resumed => resume::clear(&folder),
            _ => fs::create_dir(&folder),
        };
        created.with_context(|| format!("cannot create {}", folder.display()))?;
        let component = part.component().folder();
        let config = self.pipeline.dir.join(component).join("config.json");
        copy(&config, &folder.join("config.json"))?;
        let weights = self.pipeline.unread_weights(part.component())?;
        bar.suspend(|| {
            for notice in weights.notices() {
                log::note(&format!("note: {notice}"));
            }
        });
        let source = self.source(part, &weights);
        let made = self.make(part, graph, source, &folder, mode, advance)?;
        if let Some(sums) = self.pipeline.checksums() {
            let is_linked = |file: &str| {
                let path = self.pipeline.dir.join(file);
                made.1.linked.iter().any(|linked| linked.file == path)
            };
            let is_here =
                |file: &str| Path::new(file).starts_with(component) && !checksums::is_config(file);
            sums.check_where(|file| is_here(file) && !is_linked(file))?;
        }
        Ok(made)
    }

    /// Reads every linked file once: its numbers must be finite, its sum the checkpoint's where that lists it.
    fn scan(
        &self,
        linked: &[(Part, Linked)],
        staged: &mut Staged,
        advance: &(dyn Fn(usize) -> Result<()> + Sync),
    ) -> Result<()> {
        let files: Vec<&Linked> = linked.iter().map(|(_, file)| file).collect();
        let sums = external::scan(&files, advance)?;
        for ((part, file), sum) in linked.iter().zip(sums) {
            let listed = file.file.strip_prefix(&self.pipeline.dir).ok().and_then(Path::to_str);
            if let (Some(sums), Some(listed)) = (self.pipeline.checksums(), listed) {
                sums.compare(listed, sum)?;
            }
            staged.know(format!("{}/{}", part.folder(), file.name), sum);
        }
        Ok(())
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
        bar.suspend(|| {
            for line in lora.lines() {
                log::note(&line);
            }
        });
        Ok(lora)
    };
    loras.iter().map(open).collect()
}

/// A verification of what was written.
struct Verifying<'a> {
    prepared: &'a Prepared<'a>,
    stop: Stop<'a>,
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
        let Prepared { request, pipeline, loras, .. } = self.prepared;
        let (mut report, threads) = (Report::default(), request.threads);
        for summary in &mut *summaries {
            let part = summary.part;
            let stage = format!("verifying {}", part.folder());
            bar.suspend(|| log::detail(&stage));
            bar.set_message(stage);
            let stages = blocks::compare(folder, part, pipeline, loras, threads)?;
            summary.difference = stages.last().map(|stage| stage.chained);
            report.graphs.push(Found::new(part, stages, description, request.asked.max_error));
            check_stop(self.stop)?;
        }
        bar.set_message("painting");
        let check = || check_stop(self.stop);
        let precision = request.choice.precision;
        report.pictures = bar.suspend(|| {
            request.asked.pictures(folder, pipeline, loras, precision, threads, &check)
        })?;
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
        let request = self.prepared.request;
        if request.choice.precision != Precision::F32 {
            return Ok(None);
        }
        match request.loras.as_slice() {
            [] => verify::stored(&request.checkpoint),
            [(path, 1.0)] if path.is_dir() => verify::stored(path),
            _ => Ok(None),
        }
    }
}

fn check_stop(stop: Stop<'_>) -> Result<()> {
    ensure!(!stop(), "interrupted: nothing was exported");
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
        Usage(format!("{} holds the checkpoint itself: choose another --out", target.display()))
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
