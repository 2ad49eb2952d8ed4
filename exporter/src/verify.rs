//! Written graphs against the checkpoint.
//!
//! [`blocks`] runs every stage of a graph in ONNX Runtime and the checkpoint itself in the interpreter of
//! `host/`; neither libtorch nor anything stored is needed. Where a checkpoint has reference tensors of the
//! trainer, `reference.safetensors`, whole graphs are compared with those as well ([`compare`]): for each
//! graph, inputs and the outputs that libtorch computed from them, named `<folder>.<input or output>`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::ValueEnum as _;
use flow::checkpoint::{Dtype, View, Weights};
use flow::checksums::Checksums;
use flow::log;
use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use flow::reference::{FILE, PRECISION};
use onnx::{ElementType, Model, Options, Port, Tensor};

use serde::{Deserialize, Serialize};

use crate::description::{self, Description};
use crate::external::MODEL_FILE;
use crate::part::Part;
use crate::precision::Precision;
use crate::verify::pictures::{Limits, Pictures, Wanted};
use crate::verify::report::{Found, Report};

pub mod blocks;
pub mod cut;
pub mod origin;
pub mod pictures;
pub mod reference;
pub mod report;
pub mod similarity;

/// Largest relative difference that passes: f32 rounding over a deep network.
pub const MAX_RELATIVE: f32 = 1e-5;
/// The same where the reference was computed in bf16.
const MAX_RELATIVE_BF16: f32 = 2e-2;

/// Largest relative difference that passes against `reference`.
pub fn limit(reference: &Weights) -> f32 {
    if reference.metadata(PRECISION) == Some("bf16") { MAX_RELATIVE_BF16 } else { MAX_RELATIVE }
}

/// How far a graph's outputs are from the reference: the worst of its outputs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// max |a − b|.
    pub absolute: f32,
    /// max |a − b| / max |b|.
    pub relative: f32,
}

impl Difference {
    /// Of values `a` from the expected `b`; infinite where either is not finite.
    pub fn between(a: &[f32], b: &[f32]) -> Self {
        let largest = |values: &mut dyn Iterator<Item = f32>| {
            values
                .map(f32::abs)
                .fold(0.0, |max: f32, x| if x.is_finite() { max.max(x) } else { f32::INFINITY })
        };
        let absolute = largest(&mut a.iter().zip(b).map(|(a, b)| a - b));
        let scale = largest(&mut b.iter().copied());
        let relative = if absolute == 0.0 { 0.0 } else { absolute / scale };
        Self { absolute, relative: if relative.is_nan() { f32::INFINITY } else { relative } }
    }

    /// Whether it is within `limit`.
    pub fn passes(self, limit: f32) -> bool {
        self.relative <= limit
    }

    /// The worse of both in each respect.
    #[must_use]
    pub fn worse(self, other: Self) -> Self {
        Self {
            absolute: self.absolute.max(other.absolute),
            relative: self.relative.max(other.relative),
        }
    }
}

/// The reference tensors of `checkpoint`, if it has some.
///
/// # Errors
/// When the file is not whole.
pub fn stored(checkpoint: &Path) -> Result<Option<Weights>> {
    let path = checkpoint.join(FILE);
    Ok(if path.is_file() { Some(Weights::open_file(&path)?) } else { None })
}

/// What is to be compared beside blocks, and other limits than an export's own.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Of relative errors.
    pub max_error: Option<f32>,
    /// Of pictures, dB.
    pub min_psnr: Option<f64>,
    /// Of pictures.
    pub max_gmsd: Option<f64>,
    /// How many pictures.
    pub wanted: Wanted,
}

impl Asked {
    /// Pictures of the export in `folder`, where they are wanted; says why there are none.
    ///
    /// # Errors
    /// As [`pictures::compare`].
    pub fn pictures(
        &self,
        folder: &Path,
        pipeline: &Pipeline,
        loras: &[Lora],
        precision: Precision,
        threads: usize,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Option<Pictures>> {
        let n = match self.wanted.count(pipeline, folder, precision) {
            Ok(n) => n,
            Err(why) => {
                if let Some(why) = why {
                    log::note(&format!("note: {why}"));
                }
                return Ok(None);
            }
        };
        let own = precision.limits();
        let limits = Limits {
            min_psnr: self.min_psnr.unwrap_or(own.min_psnr),
            max_gmsd: self.max_gmsd.unwrap_or(own.max_gmsd),
        };
        let made = pictures::compare(folder, pipeline, loras, n, limits, threads, check);
        made.context("cannot compare pictures").map(Some)
    }
}

/// What an earlier export in `folder` computes against `checkpoint` with `loras` merged, after its files were
/// compared with their SHA-256.
///
/// # Errors
/// When a file was changed, it was made from another checkpoint, other adapters were merged, or nothing can be
/// compared.
pub fn again(
    folder: &Path,
    checkpoint: &Path,
    loras: &[(PathBuf, f64)],
    asked: &Asked,
    threads: usize,
) -> Result<Report> {
    let description = Description::read(folder)?;
    let given = description::merged(loras);
    ensure!(
        given == description.merged,
        "{} has {:?} merged, but --lora gives {given:?}",
        folder.display(),
        description.merged
    );
    let pipeline = Pipeline::open(checkpoint)?;
    let is_here = |part: &Part| description.components.contains_key(part.folder());
    let parts: Vec<Part> = Part::ALL.into_iter().filter(is_here).collect();
    origin::check(folder, checkpoint, parts.iter().copied())?;
    if let Some(sums) = Checksums::open(folder)? {
        sums.check_all()?;
    }
    let layers = Layers::of(&pipeline);
    let open = |(path, scale): &(PathBuf, f64)| Ok(Lora::open(path, *scale, &layers)?);
    let loras = loras.iter().map(open).collect::<Result<Vec<_>>>()?;
    let mut report = Report::default();
    for part in parts {
        let stages = blocks::compare(folder, part, &pipeline, &loras, threads)?;
        report.graphs.push(Found::new(part, stages, &description, asked.max_error));
    }
    let precision = Precision::from_str(&description.precision, false);
    let precision = precision.map_err(|_| {
        anyhow!("{}: unknown precision {}", folder.display(), description.precision)
    })?;
    report.pictures = asked.pictures(folder, &pipeline, &loras, precision, threads, &|| Ok(()))?;
    Ok(report)
}

/// Runs the graph of `part` under `export` on the reference's inputs and compares every output.
///
/// # Errors
/// When the reference lacks a tensor or its shape differs, or ONNX Runtime is missing or fails.
pub fn compare(
    export: &Path,
    part: Part,
    reference: &Weights,
    threads: usize,
) -> Result<Difference> {
    let path = export.join(part.folder()).join(MODEL_FILE);
    let mut model = Model::open(&path, &Options { threads, ..Options::default() })?;
    let find = |port: &Port| {
        let name = format!("{}.{}", part.folder(), port.name);
        tensor(reference, &name, &port.element)
            .with_context(|| format!("{}: {name}", reference.path().display()))
    };
    let inputs = model.inputs().iter().map(find).collect::<Result<Vec<_>>>()?;
    let expected = model.outputs().iter().map(find).collect::<Result<Vec<_>>>()?;
    let names = |ports: &[Port]| ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>();
    let (input_names, output_names) = (names(model.inputs()), names(model.outputs()));
    let named: Vec<_> = input_names.iter().map(String::as_str).zip(&inputs).collect();
    let output_names: Vec<_> = output_names.iter().map(String::as_str).collect();
    let results = model.run(&named, &output_names)?;
    let mut worst = Difference { absolute: 0.0, relative: 0.0 };
    for ((name, result), expected) in output_names.iter().zip(&results).zip(&expected) {
        ensure!(
            result.shape == expected.shape,
            "{}.{name} has shape {:?}, but {:?} in {}",
            part.folder(),
            result.shape,
            expected.shape,
            reference.path().display()
        );
        worst = worst.worse(Difference::between(result.as_f32()?, expected.as_f32()?));
    }
    Ok(worst)
}

fn tensor(reference: &Weights, name: &str, element: &ElementType) -> Result<Tensor> {
    let view = reference.get(name).context("no such tensor")?;
    match (element, view.dtype) {
        (ElementType::I64, Dtype::I64) => Tensor::i64(view.shape, integers(&view)),
        (ElementType::F32, Dtype::F32) => {
            Tensor::f32(view.shape, view.to_f32().map_err(anyhow::Error::msg)?)
        }
        (wanted, found) => bail!("has type {found:?}, but the graph has {wanted}"),
    }
}

fn integers(view: &View<'_>) -> Vec<i64> {
    let bytes = view.bytes.chunks_exact(size_of::<i64>());
    bytes.map(|b| i64::from_le_bytes(b.try_into().expect("eight bytes"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_the_worst_element_over_the_largest_value() {
        let difference = Difference::between(&[1.0, -4.5, 2.0], &[1.0, -4.0, 2.25]);
        assert_eq!(difference, Difference { absolute: 0.5, relative: 0.125 });
        assert!(!difference.passes(MAX_RELATIVE));
        assert!(Difference::between(&[1.0, 2.0], &[1.0, 2.0]).passes(MAX_RELATIVE));
    }

    #[test]
    fn what_is_not_a_number_never_passes() {
        for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::INFINITY, f32::INFINITY)] {
            assert!(!Difference::between(&[a, 1.0], &[b, 1.0]).passes(MAX_RELATIVE), "{a} {b}");
        }
        assert!(!Difference::between(&[1e-9], &[0.0]).passes(MAX_RELATIVE));
    }
}
