//! Memory of a training pass against the depth of the network: blocks computed again from their inputs,
//! and all activations kept. Widths are those of the embedded model, on more tokens.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use benches::{program, table, variant};
use serde_json::{Value, json};

const DEPTHS: [usize; 4] = [4, 8, 16, 32];
/// Pixels; 4,096 tokens of the embedded model.
const SIZE: &str = "512x512";

fn main() -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the models")?;
    let mut rows = Vec::new();
    for depth in DEPTHS {
        let folder = home.path().join(depth.to_string());
        let half = json!(depth / 2);
        variant::configs(
            &folder,
            &[
                ("transformer", "num_layers", half.clone()),
                ("transformer", "num_single_layers", half),
            ],
        )?;
        let again = training_mb(&folder, &[])?;
        let kept = training_mb(&folder, &["--plain"])?;
        let ratio = format!("{:.1}×", kept / again);
        rows.push([depth.to_string(), format!("{again:.0}"), format!("{kept:.0}"), ratio]);
    }
    println!(
        "\nMB above the weights in forward and backward of adapters, {SIZE} pixels, one thread"
    );
    table::print(["blocks", "computed again", "all kept", ""], &rows);
    Ok(())
}

fn training_mb(model: &Path, flags: &[&str]) -> Result<f64> {
    let mut command = Command::new(program::built("ng-train")?);
    // Freed memory goes back at once; kept in a heap, it has holes between what stays.
    command.envs(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"].map(|name| (name, "131072")));
    command.args([
        "bench",
        "--threads",
        "1",
        "--json",
        "--repeats",
        "1",
        "--text-tokens",
        "64",
        "--lora-rank",
        "4",
    ]);
    command.args(["--size", SIZE, "--model"]).arg(model).args(flags);
    let report: Value = serde_json::from_str(&program::run(&mut command)?.stdout)?;
    let gb = report["rows"][0]["training_gb"].as_f64().context("no training_gb in the report")?;
    Ok(1e3 * gb)
}
