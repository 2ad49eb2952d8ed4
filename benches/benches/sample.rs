//! Images by `ng-sample` against the same pipeline in Python's `diffusers`: from process start to PNG,
//! and one image after another in a process that is warm. Both load the embedded model, take 8 Euler
//! steps and use one thread.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::{median, program, table};
use serde_json::Value;

const PROMPT: &str = r#"red "CAT""#;
/// Pixels.
const SIDE: &str = "32";
const STEPS: &str = "8";
/// Threads of an operator.
const THREADS: &str = "1";
/// Processes started for a cold median.
const STARTS: usize = 5;
/// Images for a warm median; the first few are not counted.
const IMAGES: usize = 40;
const NOT_COUNTED: usize = 5;

/// Medians of one program, milliseconds.
struct Speed {
    /// From process start to PNG.
    cold: f64,
    /// An image after others: text, steps, decoder, PNG.
    warm: f64,
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the images")?;
    let export = folder.path().join("export");
    let mut command = Command::new(program::built("ng-export")?);
    let model = program::model();
    program::run(command.arg(&model).arg("--out").arg(&export))?;

    let peer =
        measure(|n| diffusers(n, &model, folder.path())).context("cannot measure diffusers")?;
    let ours =
        measure(|n| ng_sample(n, &export, folder.path())).context("cannot measure ng-sample")?;
    let row = |name: &str, Speed { cold, warm }: &Speed| {
        [name.to_owned(), format!("{cold:.0}"), format!("{warm:.1}")]
    };
    let times = |theirs: f64, ours: f64| format!("{:.1}×", theirs / ours);
    let ratio = ["ratio".to_owned(), times(peer.cold, ours.cold), times(peer.warm, ours.warm)];
    println!(
        "\nmilliseconds on {THREADS} thread, medians of {STARTS} starts and of {} images",
        IMAGES - NOT_COUNTED
    );
    let rows = [row("diffusers", &peer), row("ng-sample", &ours), ratio];
    table::print(["", "start to PNG", "warm image"], &rows);
    Ok(())
}

/// `command(n)` makes `n` images and prints one JSON object each, with its milliseconds by stage.
fn measure(command: impl Fn(usize) -> Result<Command>) -> Result<Speed> {
    // Once without counting, so that files are in memory for every start that counts.
    program::run(&mut command(1)?)?;
    let starts = (0..STARTS).map(|_| Ok(program::run(&mut command(1)?)?.seconds * 1e3));
    let cold = median(&starts.collect::<Result<Vec<f64>>>()?);
    let stdout = program::run(&mut command(IMAGES)?)?.stdout;
    let images = stdout.lines().map(milliseconds).collect::<Result<Vec<f64>>>()?;
    ensure!(images.len() == IMAGES, "{} images reported, {IMAGES} asked for", images.len());
    Ok(Speed { cold, warm: median(&images[NOT_COUNTED..]) })
}

/// Milliseconds of one image without loading the model.
fn milliseconds(line: &str) -> Result<f64> {
    let image: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
    let stages = image["milliseconds"].as_object().context("no milliseconds")?;
    let counted = stages.iter().filter(|(stage, _)| *stage != "load");
    let values = counted.map(|(_, value)| value.as_f64());
    values.sum::<Option<f64>>().context("milliseconds are not numbers")
}

fn ng_sample(n: usize, export: &Path, folder: &Path) -> Result<Command> {
    let mut command = Command::new(program::built("ng-sample")?);
    command.arg("--model").arg(export).args(["--prompt", PROMPT, "-W", SIDE, "-H", SIDE]);
    command.args(["--solver", "euler", "--steps", STEPS, "--threads", THREADS]);
    command.args(["--json", "-n", &n.to_string()]);
    command.arg("-o").arg(folder.join("ng-sample.png"));
    Ok(command)
}

fn diffusers(n: usize, model: &str, folder: &Path) -> Result<Command> {
    let mut command = Command::new(program::python()?);
    command.args(["-B", "benches/peers/diffusers_sample.py", model, "--prompt", PROMPT]);
    command.args(["--side", SIDE, "--steps", STEPS, "--threads", THREADS, "-n", &n.to_string()]);
    command.arg("-o").arg(folder.join("diffusers.png")).env("HF_HUB_OFFLINE", "1");
    Ok(command)
}
