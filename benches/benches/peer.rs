//! Seconds of an iteration of Neighbor GRPO by `ng-train` against the same in plain PyTorch with
//! diffusers (`peers/neighbor_grpo.py`): the embedded model, 4 prompts of 12 members, DPM-Solver++ 2M
//! with 8 steps, 4 anchors of 4 trained steps, an AdamW step an anchor, f32. The two take turns on one
//! thread, so that other work on the machine disturbs both alike; the reward is the size as JPEG and its
//! seconds are left out.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::align::{self, Cost};
use benches::{median, program, table};
use serde_json::Value;

/// Turns of both programs, and iterations of a turn after one that warms up.
const TURNS: usize = 5;
const ITERATIONS: usize = 5;
/// The peer's flags and our settings that mean the same.
const SHARED: [[&str; 3]; 8] = [
    ["--prompts-per-iteration", "prompts_per_iteration", "4"],
    ["--group", "group_size", "12"],
    ["--steps", "rollout.steps", "8"],
    ["--anchors", "anchors", "4"],
    ["--train-steps", "train_steps", "4"],
    ["--sigma", "sigma", "0.5"],
    ["--shift", "rollout.shift", "3.0"],
    ["--learning-rate", "optimizer.learning_rate", "5e-5"],
];
/// Ours alone: what the peer always does.
const OURS: [&str; 6] = [
    r#"rewards=[{name = "jpeg", kind = "jpeg", prefer = "small", weight = 1.0, std_floor = 1e-9}]"#,
    "judges=[]",
    "updates=4",
    "rollout.solver=dpmpp-2m",
    "optimizer.eps=1e-12",
    "optimizer.ema=0.0",
];
const PROMPTS: &str = "assets/prompts/signs-train.txt";
const STAGES: [&str; 4] = ["rollout", "decode", "update", "iteration"];

/// Seconds of each of [`STAGES`].
type Seconds = [f64; 4];

fn main() -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let turns = (0..TURNS)
        .map(|turn| Ok([ours(&folder.path().join(turn.to_string()))?, theirs()?]))
        .collect::<Result<Vec<[(Seconds, Work); 2]>>>()?;
    let work = &turns[0][0].1;
    for (_, other) in turns.iter().flatten() {
        ensure!(work == other, "not the same work: {work:?}, {other:?}");
    }
    let rows: Vec<[String; 5]> = STAGES
        .iter()
        .enumerate()
        .map(|(stage, name)| {
            let [ours, theirs] =
                [0, 1].map(|who| turns.iter().map(|turn| turn[who].0[stage]).collect::<Vec<_>>());
            let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| b / a).collect();
            let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            let most = ratios.iter().copied().fold(0.0, f64::max);
            [
                (*name).to_owned(),
                format!("{:.3}", median(&ours)),
                format!("{:.3}", median(&theirs)),
                format!("{:.2}×", median(&ratios)),
                format!("{least:.2} to {most:.2}"),
            ]
        })
        .collect();
    println!(
        "\nan iteration of 48 images on one thread, without rewards: medians of {TURNS} turns of \
         {ITERATIONS}; both: {work:?}"
    );
    table::print(["seconds", "ng-train", "diffusers", "ratio", "of the turns"], &rows);
    Ok(())
}

/// What both must do alike; passes an image follow from the sizes of groups, anchors and steps.
#[derive(Debug, PartialEq)]
struct Work {
    /// Network passes an image: forward in the rollout.
    rollout: f64,
    /// Forward and backward in the update.
    update: f64,
    /// Numbers that train.
    parameters: u64,
}

fn ours(folder: &Path) -> Result<(Seconds, Work)> {
    let shared: Vec<String> =
        SHARED.iter().map(|[_, setting, value]| format!("{setting}={value}")).collect();
    let prompts = format!("prompts={PROMPTS}");
    let mut settings: Vec<&str> = shared.iter().map(String::as_str).collect();
    settings.extend(OURS);
    settings.push(&prompts);
    let Cost { nfe: [old, new], seconds: [rollout, update, all], decode } =
        align::measure(&settings, ITERATIONS, folder).context("cannot measure ng-train")?;
    let weights = folder.join("aligned/transformer/diffusion_pytorch_model.safetensors");
    let parameters = n_numbers(&weights)
        .with_context(|| format!("cannot count what {} holds", weights.display()))?;
    let work = Work { rollout: old, update: new, parameters };
    Ok(([rollout, decode, update, all], work))
}

fn theirs() -> Result<(Seconds, Work)> {
    let mut command = Command::new(program::python()?);
    command.args(["-B", "benches/peers/neighbor_grpo.py", &program::model()]);
    command.args(SHARED.iter().flat_map(|[flag, _, value]| [flag, value]));
    command.args(["--prompts", PROMPTS, "--iterations", &ITERATIONS.to_string()]);
    command.args(["--threads", "1"]).env("HF_HUB_OFFLINE", "1");
    let stdout = program::run(&mut command).context("cannot measure the peer")?.stdout;
    let told: Value =
        serde_json::from_str(&stdout).with_context(|| format!("no JSON: {stdout}"))?;
    let number = |part: &str, name: &str| {
        told[part][name].as_f64().with_context(|| format!("no {part}.{name}: {stdout}"))
    };
    let mut seconds = [0.0; 4];
    for (value, stage) in seconds.iter_mut().zip(STAGES) {
        *value = number("seconds", stage)?;
    }
    let work = Work {
        rollout: number("nfe", "rollout")?,
        update: number("nfe", "update")?,
        parameters: told["parameters"].as_u64().with_context(|| format!("no count: {stdout}"))?,
    };
    Ok((seconds, work))
}

/// Numbers in a safetensors file: of all shapes in its header.
fn n_numbers(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&header)?;
    let shapes = header.values().filter_map(|tensor| tensor["shape"].as_array());
    Ok(shapes.map(|shape| shape.iter().filter_map(Value::as_u64).product::<u64>()).sum())
}
