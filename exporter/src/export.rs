//! A checkpoint folder as an ONNX folder.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::Weights;
use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use flow::staged::Staged;
use flow::tokens::Tokenizers;
use indicatif::ProgressBar;

use crate::external::{self, Source};
use crate::graph::Graph;
use crate::parts::Part;
use crate::publish::check_target;
use crate::verify::{self, Difference};

/// What to export, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// A diffusers FLUX pipeline folder.
    pub checkpoint: PathBuf,
    /// Folder to make.
    pub target: PathBuf,
    /// Adapters to merge into the transformer and the text encoders, and their scales.
    pub loras: Vec<(PathBuf, f64)>,
    /// Whether an earlier export there is replaced.
    pub replace: bool,
    /// Whether the graphs must reproduce the checkpoint's reference tensors.
    pub verify: bool,
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
    /// Size of its files.
    pub n_bytes: u64,
    /// Distance from the reference, when it was verified.
    pub difference: Option<Difference>,
}

/// A table of what was written, one graph a row.
pub struct Table<'a>(pub &'a [Summary]);

/// Folders of a checkpoint that an export takes over as they are.
const COPIED: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];

/// Exports a whole pipeline: every graph, the configs and tokenizers; `bar` counts bytes of weights.
/// The target appears when everything was written and, if asked for, verified.
///
/// # Errors
/// When the checkpoint cannot be read, the target must not or cannot be written, a graph differs
/// from its reference, or `stop` was set. Nothing is left behind then.
pub fn export(request: &Request, bar: &ProgressBar, stop: &AtomicBool) -> Result<Vec<Summary>> {
    let pipeline = Pipeline::open(&request.checkpoint)?;
    let loras = open_loras(request, &pipeline, bar)?;
    let reference =
        if request.verify { Some(verify::reference(reference(request)?)?) } else { None };
    check_apart(&request.checkpoint, &request.target)?;
    check_target(&request.target, request.replace)?;
    // What is copied is read once before the work: an export without tokenizers is of no use.
    Tokenizers::open(&request.checkpoint, None)?;
    let staged = Staged::begin(&request.target)?;
    let graphs = Part::ALL.map(|part| (part, part.graph(&pipeline)));
    let n_parameters: usize = graphs.iter().map(|(_, graph)| count(graph)).sum();
    bar.set_length((n_parameters * size_of::<f32>()) as u64);

    let mut summaries = Vec::with_capacity(graphs.len());
    for (part, graph) in graphs {
        bar.set_message(part.folder());
        summaries.push(write_part(&pipeline, part, graph, &loras, staged.path(), bar, stop)?);
    }
    copy_rest(&request.checkpoint, staged.path())?;
    if let Some(reference) = &reference {
        for summary in &mut summaries {
            bar.set_message(format!("verifying {}", summary.part.folder()));
            let difference =
                verify::compare(staged.path(), summary.part, reference, request.threads)?;
            summary.difference = Some(difference);
            check_stop(stop)?;
        }
        check_differences(&summaries, reference)?;
    }
    check_target(&request.target, request.replace)?;
    staged.publish(request.replace)?;
    Ok(summaries)
}

fn write_part(
    pipeline: &Pipeline,
    part: Part,
    graph: Graph,
    loras: &[Lora],
    root: &Path,
    bar: &ProgressBar,
    stop: &AtomicBool,
) -> Result<Summary> {
    let folder = root.join(part.folder());
    fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let config = pipeline.dir.join(part.component().folder()).join("config.json");
    copy(&config, &folder.join("config.json"))?;
    let weights = pipeline.weights(part.component())?;
    bar.suspend(|| weights.notices().iter().for_each(|notice| eprintln!("note: {notice}")));
    let source = Source { weights: &weights, loras, component: part.component() };
    let (n_nodes, n_parameters) = (graph.nodes.len(), count(&graph));
    let metadata = [
        ("component", part.folder().to_owned()),
        (
            "linear_weights",
            "[n_in, n_out], transposed from the checkpoint's tensor of that name".into(),
        ),
        ("time", "timestep is the flow time: 1 is noise, 0 is data".into()),
        ("vae.scaling_factor", pipeline.vae.scaling_factor.to_string()),
        ("vae.shift_factor", pipeline.vae.shift().to_string()),
    ];
    let mut advance = |n_bytes: usize| {
        bar.inc(n_bytes as u64);
        check_stop(stop)
    };
    let n_bytes = external::write(&folder, part.folder(), graph, source, &metadata, &mut advance)?;
    Ok(Summary { part, n_nodes, n_parameters, n_bytes, difference: None })
}

/// The adapters to merge; says what each is.
fn open_loras(request: &Request, pipeline: &Pipeline, bar: &ProgressBar) -> Result<Vec<Lora>> {
    let layers = Layers::of(pipeline);
    let open = |(path, scale): &(PathBuf, f64)| {
        let lora = Lora::open(path, *scale, &layers)?;
        bar.suspend(|| lora.lines().iter().for_each(|line| eprintln!("{line}")));
        Ok(lora)
    };
    request.loras.iter().map(open).collect()
}

/// The folder whose reference tensors the export must reproduce: the checkpoint's, or that of the one
/// LoRA merged as it was trained.
fn reference(request: &Request) -> Result<&Path> {
    match request.loras.as_slice() {
        [] => Ok(&request.checkpoint),
        [(path, 1.0)] if path.is_dir() => Ok(path),
        _ => bail!(
            "--verify with --lora: only for one LoRA folder at scale 1, as `ng-train align` writes it \
             with its reference tensors"
        ),
    }
}

fn count(graph: &Graph) -> usize {
    graph.parameters.iter().map(crate::graph::Parameter::len).sum()
}

fn check_stop(stop: &AtomicBool) -> Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted: nothing was exported");
    Ok(())
}

fn check_differences(summaries: &[Summary], reference: &Weights) -> Result<()> {
    let limit = verify::limit(reference);
    let failed: Vec<_> = summaries
        .iter()
        .filter_map(|summary| Some((summary.part.folder(), summary.difference?)))
        .filter(|(_, difference)| !difference.passes(limit))
        .map(|(folder, d)| format!("{folder} by {:.1e} ({:.1e} relative)", d.absolute, d.relative))
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
fn copy_rest(checkpoint: &Path, target: &Path) -> Result<()> {
    copy(&checkpoint.join("model_index.json"), &target.join("model_index.json"))?;
    for folder in COPIED {
        copy_folder(&checkpoint.join(folder), &target.join(folder))?;
    }
    for path in list(checkpoint)? {
        let name = path.file_name().unwrap_or_default();
        if path.is_file() && name.to_string_lossy().starts_with("LICENSE") {
            copy(&path, &target.join(name))?;
        }
    }
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
    for path in list(from)? {
        let hidden =
            path.file_name().map(OsStr::to_string_lossy).is_none_or(|n| n.starts_with('.'));
        if path.is_file() && !hidden {
            copy(&path, &to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = fs::copy(from, to);
    copied.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verified = self.0.iter().any(|summary| summary.difference.is_some());
        write!(f, "{:<16}{:>8}{:>16}{:>12}", "component", "nodes", "parameters", "size")?;
        writeln!(f, "{}", if verified { "  difference   relative" } else { "" })?;
        for summary in self.0 {
            let Summary { part, n_nodes, n_parameters, n_bytes, difference } = summary;
            write!(
                f,
                "{:<16}{n_nodes:>8}{n_parameters:>16}{:>12}",
                part.folder(),
                megabytes(*n_bytes)
            )?;
            if let Some(Difference { absolute, relative }) = difference {
                write!(f, "{absolute:>12.1e}{relative:>11.1e}")?;
            }
            writeln!(f)?;
        }
        let sum = |of: fn(&Summary) -> u64| self.0.iter().map(of).sum::<u64>();
        writeln!(
            f,
            "{:<16}{:>8}{:>16}{:>12}",
            "total",
            sum(|s| s.n_nodes as u64),
            sum(|s| s.n_parameters as u64),
            megabytes(sum(|s| s.n_bytes))
        )
    }
}

fn megabytes(n_bytes: u64) -> String {
    format!("{:.2} MB", n_bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests;
