//! Seconds of an iteration of Neighbor GRPO by `ng-train` against the same in plain PyTorch with
//! diffusers (`peers/neighbor_grpo.py`): the embedded model and random ones of more width and tokens,
//! groups of 12 members, DPM-Solver++ 2M with 8 steps, 4 anchors of 4 trained steps, one AdamW step, f32.
//! The two take turns on one thread, so that other work on the machine disturbs both alike; the reward is
//! the size as JPEG and its seconds are left out.
//!
//! `cargo bench -p benches --bench peer -- --updates=4` makes an AdamW step an anchor.

use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::align::{self, Cost};
use benches::{median, program, table, variant};
use serde_json::{Value, json};

/// What is measured at one size.
struct Size {
    name: &'static str,
    /// Heads, their width, double and single blocks of a random transformer; none for the model itself.
    transformer: Option<[usize; 4]>,
    /// Width and height of an image in pixels.
    side: usize,
    prompts: usize,
    /// Turns of both programs, and iterations of a turn after one that warms up.
    turns: usize,
    iterations: usize,
}

const SIZES: [Size; 3] = [
    Size { name: "the model", transformer: None, side: 32, prompts: 4, turns: 5, iterations: 5 },
    Size {
        name: "512 wide",
        transformer: Some([8, 64, 2, 4]),
        side: 64,
        prompts: 1,
        turns: 3,
        iterations: 2,
    },
    Size {
        name: "1536 wide",
        transformer: Some([12, 128, 1, 2]),
        side: 64,
        prompts: 1,
        turns: 3,
        iterations: 1,
    },
];
/// Members of a group.
const GROUP: usize = 12;
/// The peer's flags and our settings that mean the same.
const SHARED: [[&str; 3]; 6] = [
    ["--steps", "rollout.steps", "8"],
    ["--anchors", "anchors", "4"],
    ["--train-steps", "train_steps", "4"],
    ["--sigma", "sigma", "0.5"],
    ["--shift", "rollout.shift", "3.0"],
    ["--learning-rate", "optimizer.learning_rate", "5e-5"],
];
/// Ours alone: what the peer always does.
const OURS: [&str; 5] = [
    r#"rewards=[{name = "jpeg", kind = "jpeg", prefer = "small", weight = 1.0, std_floor = 1e-9}]"#,
    "judges=[]",
    "rollout.solver=dpmpp-2m",
    "optimizer.eps=1e-12",
    "optimizer.ema=0.0",
];
const PROMPTS: &str = "assets/prompts/signs-train.txt";
const STAGES: [&str; 4] = ["rollout", "decode", "update", "iteration"];

/// Seconds of each of [`STAGES`].
type Seconds = [f64; 4];

fn main() -> Result<()> {
    let updates = env::args().find_map(|arg| arg.strip_prefix("--updates=").map(str::to_owned));
    let updates = updates.as_deref().unwrap_or("1");
    println!("optimiser steps an iteration: {updates}");
    for size in &SIZES {
        compare(size, updates).with_context(|| format!("cannot measure {}", size.name))?;
    }
    Ok(())
}

fn compare(size: &Size, updates: &str) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a folder for the runs")?;
    let model = size.model(folder.path())?;
    let run = folder.path().join("run");
    // One picture a sheet: what a run draws is no part of what is measured.
    let sheet = folder.path().join("sheet.txt");
    fs::write(&sheet, "red \"CAT\"\n")?;
    let turns = (0..size.turns)
        .map(|_| {
            let ours = ours(size, updates, &model, &sheet, &run)?;
            Ok([ours, theirs(size, updates, &model)?])
        })
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
        "\n{}, {side}×{side} pixels: an iteration of {} images on one thread, without rewards: medians of {} \
         turns of {}; both: {work:?}",
        size.name,
        GROUP * size.prompts,
        size.turns,
        size.iterations,
        side = size.side,
    );
    table::print(["seconds", "ng-train", "diffusers", "ratio", "of the turns"], &rows);
    Ok(())
}

impl Size {
    /// The model's folder, made under `home` where it is a random one.
    fn model(&self, home: &Path) -> Result<PathBuf> {
        let Some([heads, width, double, single]) = self.transformer else {
            return Ok(program::root().join(program::model()));
        };
        let model = home.join("model");
        // Axes of the rotary embedding in FLUX's proportions.
        let axes = [width / 8, width * 7 / 16, width * 7 / 16];
        variant::random(
            &model,
            &[
                ("transformer", "num_attention_heads", json!(heads)),
                ("transformer", "attention_head_dim", json!(width)),
                ("transformer", "axes_dims_rope", json!(axes)),
                ("transformer", "num_layers", json!(double)),
                ("transformer", "num_single_layers", json!(single)),
            ],
        )?;
        Ok(model)
    }
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

fn ours(
    size: &Size,
    updates: &str,
    model: &Path,
    sheet: &Path,
    folder: &Path,
) -> Result<(Seconds, Work)> {
    let shared = SHARED.map(|[_, setting, value]| format!("{setting}={value}"));
    let side = size.side;
    let own = [
        format!("prompts={PROMPTS}"),
        format!("sheet_prompts={}", sheet.display()),
        format!("prompts_per_iteration={}", size.prompts),
        format!("group_size={GROUP}"),
        format!("updates={updates}"),
        format!("rollout.size=[{side},{side}]"),
    ];
    let settings: Vec<&str> = shared.iter().chain(&own).map(String::as_str).chain(OURS).collect();
    let Cost { nfe: [old, new], seconds: [rollout, update, all], decode } =
        align::measure(model, &settings, size.iterations, folder)
            .context("cannot measure ng-train")?;
    let weights = folder.join("aligned/transformer/diffusion_pytorch_model.safetensors");
    let parameters = n_numbers(&weights)
        .with_context(|| format!("cannot count what {} holds", weights.display()))?;
    fs::remove_dir_all(folder)?;
    let work = Work { rollout: old, update: new, parameters };
    Ok(([rollout, decode, update, all], work))
}

fn theirs(size: &Size, updates: &str, model: &Path) -> Result<(Seconds, Work)> {
    let mut command = Command::new(program::python()?);
    command.args(["-B", "benches/peers/neighbor_grpo.py"]).arg(model);
    command.args(SHARED.iter().flat_map(|[flag, _, value]| [flag, value]));
    for (flag, number) in [
        ("--prompts-per-iteration", size.prompts),
        ("--group", GROUP),
        ("--size", size.side),
        ("--iterations", size.iterations),
        ("--threads", 1),
    ] {
        command.args([flag, &number.to_string()]);
    }
    command.args(["--prompts", PROMPTS, "--updates", updates]).env("HF_HUB_OFFLINE", "1");
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
