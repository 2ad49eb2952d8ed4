//! What each precision costs: held-out prompts of a model, drawn by `ng-sample` from its export in each precision
//! with the same seeds, compared with those in f32 and read by the OCR reward of `ng-train score`. Sizes are
//! those of the transformer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::{program, table};
use exporter::verify::similarity::{gmsd, psnr};
use flow::picture::Picture;
use serde_json::Value;

const PROMPTS: &str = "assets/prompts/signs-held-out.txt";
/// Flags of `ng-export`; the first is what the others are compared with.
const PRECISIONS: [&[&str]; 7] = [
    &["f32"],
    &["f16"],
    &["bf16"],
    &["int8"],
    &["int4"],
    &["int4", "--modulation", "same"],
    &["fp8", "--target", "portable"],
];
const COLUMNS: [&str; 7] =
    ["", "read exactly", "PSNR, dB", "least", "GMSD", "largest", "transformer, MB"];

fn main() -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the pictures")?;
    let mut right = Vec::new();
    let mut rows = Vec::new();
    for flags in PRECISIONS {
        let (export, drawn) = (home.path().join("export"), home.path().join("drawn"));
        let mut command = Command::new(program::built("ng-export")?);
        command.arg(program::model()).args(["--force", "--out"]).arg(&export);
        program::run(command.arg("--precision").args(flags))?;
        let mut command = Command::new(program::built("ng-sample")?);
        command.args(["--prompts", PROMPTS, "--model"]).arg(&export).arg("-o").arg(&drawn);
        program::run(&mut command)?;
        let pictures = pictures(&drawn)?;
        if right.is_empty() {
            right.clone_from(&pictures);
        }
        ensure!(pictures.len() == right.len(), "not as many pictures");
        let pairs = || right.iter().zip(&pictures);
        let psnrs: Vec<f64> = pairs().map(|(a, b)| psnr(a, b).min(100.0)).collect();
        let gmsds: Vec<f64> = pairs().map(|(a, b)| gmsd(a, b)).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        rows.push([
            flags.join(" "),
            format!("{} of {}", n_exact(&drawn)?, pictures.len()),
            format!("{:.1}", mean(&psnrs)),
            format!("{:.1}", psnrs.iter().copied().fold(f64::INFINITY, f64::min)),
            format!("{:.4}", mean(&gmsds)),
            format!("{:.4}", gmsds.iter().copied().fold(0.0, f64::max)),
            format!("{:.1}", n_bytes(&export.join("transformer"))? as f64 / 1e6),
        ]);
    }
    println!("\n{}, 8 steps, seed 0, {} of each precision", program::model(), right.len());
    table::print(COLUMNS, &rows);
    Ok(())
}

/// Those in `folder`, by name.
fn pictures(folder: &Path) -> Result<Vec<Picture>> {
    let open = |path: &PathBuf| {
        let image = image::open(path)?.into_rgb8();
        let (width, height) = (image.width() as usize, image.height() as usize);
        Ok(Picture { width, height, rgb: image.into_raw() })
    };
    let found = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>();
    let mut files = found?;
    files.sort();
    files.iter().map(open).collect()
}

/// How many pictures in `folder` show the word of their prompt.
fn n_exact(folder: &Path) -> Result<usize> {
    let mut command = Command::new(program::built("ng-train")?);
    command.args(["score", "--preset", "signs", "--set", "judges=[]", "--prompts", PROMPTS]);
    let told = program::run(command.arg(folder))?.stdout;
    let mut n = 0;
    for line in told.lines() {
        let line: BTreeMap<String, Value> = serde_json::from_str(line)?;
        let exact = line.get("scores").and_then(|scores| scores["exact"].as_f64());
        n += usize::from(exact.context("no score `exact`")? == 1.0);
    }
    Ok(n)
}

fn n_bytes(folder: &Path) -> Result<u64> {
    let sizes = fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
    sizes.sum()
}
