//! `ng-export` against the exporter of Hugging Face Optimum: from a checkpoint in bf16 to a folder for ONNX
//! Runtime in f32, and in bf16 by us alone, weights copied and in place. Random transformers of FLUX.1-dev's
//! width, of growing depth up to --depth=N, with the embedded model's text encoders and autoencoder. What Optimum
//! does not survive is told as that.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use benches::program::Cost;
use benches::{program, table, variant};
use serde_json::json;

/// Double-stream blocks of the largest transformer; of single-stream blocks there are twice as many, as in FLUX.
const DEPTH: u64 = 1;
const COLUMNS: [&str; 5] = ["", "seconds", "of processors", "peak, MB", "new on disk, MB"];

fn main() -> Result<()> {
    let asked = std::env::args().find_map(|word| word.strip_prefix("--depth=").map(str::parse));
    let depth = asked.transpose().context("--depth")?.unwrap_or(DEPTH);
    let home = tempfile::tempdir_in(program::root().join("target"))
        .context("cannot make a folder for the models")?;
    for depth in 1..=depth {
        measure(depth, home.path()).with_context(|| format!("depth {depth}"))?;
    }
    Ok(())
}

fn measure(depth: u64, home: &Path) -> Result<()> {
    let (checkpoint, out) = (home.join("checkpoint"), home.join("export"));
    variant::random(
        &checkpoint,
        &[
            ("transformer", "num_attention_heads", json!(24)),
            ("transformer", "attention_head_dim", json!(128)),
            ("transformer", "axes_dims_rope", json!([16, 56, 56])),
            ("transformer", "num_layers", json!(depth)),
            ("transformer", "num_single_layers", json!(2 * depth)),
        ],
    )?;
    let ours = |more: &[&str]| -> Result<Command> {
        let mut command = Command::new(program::built("ng-export")?);
        command.arg(&checkpoint).arg("--out").arg(&out).args(more);
        Ok(command)
    };
    let mut optimum = Command::new(program::python()?);
    optimum.args(["-B", "benches/peers/optimum_export.py"]).arg(&checkpoint).arg(&out);
    optimum.env("HF_HUB_OFFLINE", "1").env("PYTHONPATH", program::root().join(".runtime/optimum"));
    let mut rows = Vec::new();
    for (name, command) in [
        ("ng-export, f32", ours(&["--copy-weights"])?),
        ("ng-export, bf16", ours(&["--target", "cuda", "--precision", "bf16", "--copy-weights"])?),
        ("ng-export, bf16 in place", ours(&["--target", "cuda", "--precision", "bf16"])?),
        ("Optimum, f32", optimum),
    ] {
        let row = match program::cost(&command) {
            Ok(cost) => row(name, &cost, new_bytes(&out)?),
            Err(error) => {
                eprintln!("{name}: {error:#}");
                [name.into(), "failed".into(), String::new(), String::new(), String::new()]
            }
        };
        rows.push(row);
        if out.exists() {
            fs::remove_dir_all(&out)?;
        }
    }
    let n_bytes = fs::metadata(checkpoint.join("transformer/diffusion_pytorch_model.safetensors"));
    println!(
        "\n{depth} double-stream and {} single-stream blocks 3072 wide, {:.0} M parameters",
        2 * depth,
        n_bytes.map_or(0.0, |found| found.len() as f64) / 2e6
    );
    table::print(COLUMNS, &rows);
    fs::remove_dir_all(&checkpoint)?;
    Ok(())
}

fn row(name: &str, cost: &Cost, n_bytes: u64) -> [String; 5] {
    [
        name.into(),
        format!("{:.1}", cost.seconds),
        format!("{:.1}", cost.processor_seconds),
        format!("{:.0}", cost.peak / 1e6),
        format!("{:.0}", n_bytes as f64 / 1e6),
    ]
}

/// Bytes below `folder` that no other folder has, too.
fn new_bytes(folder: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut n_bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let found = entry.metadata()?;
        if found.is_dir() {
            n_bytes += new_bytes(&entry.path())?;
        } else if found.nlink() == 1 {
            n_bytes += found.len();
        }
    }
    Ok(n_bytes)
}
