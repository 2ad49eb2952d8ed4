//! What a folder holds: a checkpoint, or an export made from one.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Result;
use flow::checksums::Checksums;
use flow::pipeline::{Component, Pipeline};

use crate::description::{self, Description};
use crate::external::MODEL_FILE;
use crate::part::Part;

/// A description of the pipeline in `folder`, a line a fact.
///
/// # Errors
/// When it is no pipeline, or a file that it must have cannot be read.
pub fn inspect(folder: &Path) -> Result<String> {
    let pipeline = Pipeline::open(folder)?;
    let is_export = Part::ALL.iter().any(|part| graph(folder, *part).is_file());
    let mut text = String::new();
    let config = &pipeline.transformer;
    let _ = writeln!(
        text,
        "{}: {} of {} double-stream and {} single-stream blocks, width {}, images of {} pixels{}",
        folder.display(),
        if is_export { "export" } else { "checkpoint" },
        config.num_layers,
        config.num_single_layers,
        config.width(),
        pipeline.default_size(),
        if config.guidance_embeds { ", guided" } else { "" }
    );
    if is_export {
        export(&mut text, folder)?;
    } else {
        checkpoint(&mut text, &pipeline);
    }
    let _ = writeln!(text, "schedule: {:?}", pipeline.scheduler);
    let sums = match Checksums::open(folder)? {
        Some(list) => format!("SHA-256 of {} files in SHA256SUMS", list.files().count()),
        None => "no SHA256SUMS".into(),
    };
    let _ = writeln!(text, "hashes: {sums}");
    Ok(text)
}

fn graph(folder: &Path, part: Part) -> std::path::PathBuf {
    folder.join(part.folder()).join(MODEL_FILE)
}

fn checkpoint(text: &mut String, pipeline: &Pipeline) {
    for component in Component::ALL {
        let line = match pipeline.weights(component) {
            Err(error) => format!("unusable: {error}"),
            Ok(weights) => {
                let mut types: BTreeMap<String, usize> = BTreeMap::new();
                let (mut n_parameters, mut n_bytes) = (0, 0);
                for name in weights.names().map(ToOwned::to_owned).collect::<Vec<_>>() {
                    if let Some((_, _, dtype)) = weights.in_place(&name) {
                        *types.entry(format!("{dtype:?}")).or_default() += 1;
                    } else {
                        *types.entry("converted on reading".into()).or_default() += 1;
                    }
                }
                n_parameters += pipeline.manifest(component).n_elements();
                for file in weights.files() {
                    n_bytes += file.metadata().map_or(0, |found| found.len());
                }
                let types: Vec<String> = types.iter().map(|(t, n)| format!("{n} {t}")).collect();
                format!(
                    "{n_parameters} parameters, {:.2} MB in {} files; tensors: {}",
                    n_bytes as f64 / 1e6,
                    weights.files().count(),
                    types.join(", ")
                )
            }
        };
        let _ = writeln!(text, "{}: {line}", component.folder());
    }
}

fn export(text: &mut String, folder: &Path) -> Result<()> {
    let known = folder.join(description::FILE).is_file();
    let description = if known { Description::read(folder)? } else { Description::default() };
    if known {
        let _ = writeln!(
            text,
            "target {}, precision {}; runs on {}",
            description.target,
            description.precision,
            runs_on(&description.target)
        );
    } else {
        let _ =
            writeln!(text, "no {}: written by Optimum or an earlier ng-export", description::FILE);
    }
    for part in Part::ALL {
        let name = part.folder();
        let Ok(found) = fs::metadata(graph(folder, part)) else {
            let _ = writeln!(text, "{name}: missing");
            continue;
        };
        let Some(component) = description.components.get(name) else {
            let _ = writeln!(text, "{name}: {MODEL_FILE} of {} bytes", found.len());
            continue;
        };
        let mut operators: Vec<_> = component.operators.iter().collect();
        operators.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        let operators: Vec<String> =
            operators.iter().map(|(operator, n)| format!("{operator} {n}")).collect();
        let _ = writeln!(
            text,
            "{name}: {} parameters, arithmetic {}, opset {}, ir {}, {:.2} MB and {:.2} MB linked; {}",
            component.parameters,
            component.arithmetic,
            component.opset,
            component.ir,
            component.bytes as f64 / 1e6,
            component.linked_bytes as f64 / 1e6,
            operators.join(", ")
        );
    }
    for (file, scale) in &description.merged {
        let _ = writeln!(text, "merged: {file} at {scale}");
    }
    let slots = description.lora_slots.map_or(0, |slots| slots.layers.len());
    let _ = writeln!(text, "LoRA slots: {slots} layers");
    let verified = folder.join(crate::verify::report::MARKDOWN);
    let _ = writeln!(
        text,
        "verification: {}",
        if verified.is_file() { "verification.md" } else { "none; ng-export verify makes one" }
    );
    Ok(())
}

fn runs_on(target: &str) -> &'static str {
    match target {
        "cpu" => "ONNX Runtime 1.31 on a processor",
        "cuda" => "ONNX Runtime 1.31's CUDA provider",
        "tensorrt" => "TensorRT 10.15 or later, or ONNX Runtime's provider of it",
        "tensorrt-rtx" => "TensorRT for RTX on consumer GPUs; not on H100, H800 or H200",
        "portable" => "any runtime of its opset",
        _ => "what Optimum runs it on",
    }
}
