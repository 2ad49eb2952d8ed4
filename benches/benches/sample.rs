//! Images by `ng-sample` against the same weights in Python's `diffusers` and in Optimum on ONNX Runtime,
//! which runs its own export and ours: from process start to PNG, one image after another in a process that
//! is warm, a step, memory and what has to be installed. The embedded model at its own size, and a random
//! FLUX of 302 M parameters at 512×512 with FLUX's 1024 image tokens. Euler, f32, one thread. All take turns,
//! so that other work on the machine disturbs them alike.
//!
//! `cargo bench -p benches --bench sample -- --case=embedded` (or `random`) measures one of the two.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::{median, program, table, variant};
use serde_json::{Value, json};

const PROMPT: &str = r#"red "CAT""#;

/// What is measured of one model.
struct Case {
    name: &'static str,
    /// As `--case` has it.
    word: &'static str,
    random: bool,
    /// Pixels.
    side: usize,
    /// Of an image, and of the shorter one that is taken away to see a step.
    steps: [usize; 2],
    turns: usize,
    /// Images of a turn, those at the beginning that are not counted among them.
    images: usize,
    not_counted: usize,
}

const CASES: [Case; 2] = [
    Case {
        name: "the embedded model",
        word: "embedded",
        random: false,
        side: 32,
        steps: [8, 2],
        turns: 3,
        images: 25,
        not_counted: 5,
    },
    Case {
        name: "a random FLUX of 302 M parameters",
        word: "random",
        random: true,
        side: 512,
        steps: [3, 1],
        turns: 3,
        images: 1,
        not_counted: 0,
    },
];

/// Who makes the images.
#[derive(Clone, Copy)]
enum Maker {
    Ours,
    Diffusers,
    Optimum,
    /// On our export.
    OptimumOnOurs,
}

const MAKERS: [(&str, Maker); 4] = [
    ("ng-sample", Maker::Ours),
    ("diffusers", Maker::Diffusers),
    ("Optimum", Maker::Optimum),
    ("Optimum on our export", Maker::OptimumOnOurs),
];
/// Columns of the table.
const COLUMNS: [&str; 6] =
    ["", "start to PNG, ms", "image, ms", "step, ms", "MB resident", "MB installed"];

/// Where the model lies.
struct Folders {
    checkpoint: PathBuf,
    export: PathBuf,
    optimum: PathBuf,
    images: PathBuf,
}

/// Milliseconds from start to PNG, of a warm image and of a step, and bytes of resident memory.
type Turn = [f64; 4];

fn main() -> Result<()> {
    let word = env::args().find_map(|arg| arg.strip_prefix("--case=").map(str::to_owned));
    let chosen = CASES.iter().filter(|case| word.as_ref().is_none_or(|word| word == case.word));
    let chosen: Vec<&Case> = chosen.collect();
    ensure!(!chosen.is_empty(), "no such case: embedded and random are there");
    for case in chosen {
        measure(case).with_context(|| format!("cannot measure {}", case.name))?;
    }
    Ok(())
}

fn measure(case: &Case) -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the images")?;
    let folders = case.folders(home.path())?;
    let turn = |_| MAKERS.map(|(_, maker)| case.turn(maker, &folders)).into_iter().collect();
    // Once without counting, so that files are in memory for every start that counts; those of a large model
    // were written just now.
    for (_, maker) in MAKERS.into_iter().filter(|_| case.images > 1) {
        program::run(&mut case.command(maker, &folders, 1, 1)?)?;
    }
    let turns = (0..case.turns).map(turn).collect::<Result<Vec<Vec<Turn>>>>()?;
    let installed =
        MAKERS.iter().map(|&(_, maker)| installed(maker)).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (index, (name, _)) in MAKERS.into_iter().enumerate() {
        let of =
            |column: usize| median(&turns.iter().map(|t| t[index][column]).collect::<Vec<_>>());
        let [start, image, step] = [0, 1, 2].map(|column| format!("{:.1}", of(column)));
        let [memory, size] = [of(3), installed[index]].map(|bytes| format!("{:.0}", bytes / 1e6));
        rows.push([name.into(), start, image, step, memory, size]);
    }
    for (index, (name, _)) in MAKERS.into_iter().enumerate().skip(1) {
        let ratio = |column: usize| {
            let of_turns = turns.iter().map(|turn| turn[index][column] / turn[0][column]);
            format!("{:.2}×", median(&of_turns.collect::<Vec<f64>>()))
        };
        let size = format!("{:.1}×", installed[index] / installed[0]);
        let name = format!("{name} / ng-sample");
        rows.push([name, ratio(0), ratio(1), ratio(2), ratio(3), size]);
    }
    println!(
        "\n{}: {side}×{side} pixels, {} Euler steps, f32, one thread; medians of {} turns of {} images",
        case.name,
        case.steps[0],
        case.turns,
        case.images - case.not_counted,
        side = case.side,
    );
    table::print(COLUMNS, &rows);
    Ok(())
}

impl Case {
    fn folders(&self, home: &Path) -> Result<Folders> {
        let mut checkpoint = program::root().join(program::model());
        if self.random {
            checkpoint = home.join("model");
            // FLUX's proportions at a third of its width, and a decoder that makes 8 pixels of a cell.
            variant::random(
                &checkpoint,
                &[
                    ("transformer", "num_attention_heads", json!(8)),
                    ("transformer", "attention_head_dim", json!(128)),
                    ("transformer", "axes_dims_rope", json!([16, 56, 56])),
                    ("transformer", "num_layers", json!(3)),
                    ("transformer", "num_single_layers", json!(12)),
                    ("vae", "block_out_channels", json!([8, 16, 32, 48])),
                    ("vae", "down_block_types", json!(vec!["DownEncoderBlock2D"; 4])),
                    ("vae", "up_block_types", json!(vec!["UpDecoderBlock2D"; 4])),
                ],
            )?;
        }
        let export = home.join("export");
        let mut command = Command::new(program::built("ng-export")?);
        command.arg(&checkpoint).arg("--out").arg(&export).args(["--precision", "f32"]);
        program::run(&mut command)?;
        let optimum = home.join("optimum");
        program::run(peer(Maker::Optimum)?.arg(&checkpoint).arg("--export").arg(&optimum))?;
        Ok(Folders { checkpoint, export, optimum, images: home.to_owned() })
    }

    fn turn(&self, maker: Maker, folders: &Folders) -> Result<Turn> {
        let [steps, fewer] = self.steps;
        let of = |stdout: &str| -> Result<f64> {
            let images = stdout.lines().map(milliseconds).collect::<Result<Vec<f64>>>()?;
            Ok(median(images.get(self.not_counted..).context("too few images")?))
        };
        let cold = program::run(&mut self.command(maker, folders, steps, 1)?)?;
        let image = if self.images == 1 {
            of(&cold.stdout)?
        } else {
            of(&program::run(&mut self.command(maker, folders, steps, self.images)?)?.stdout)?
        };
        let short = program::cost(&self.command(maker, folders, fewer, self.images)?)?;
        let step = (image - of(&short.stdout)?) / (steps - fewer) as f64;
        Ok([cold.seconds * 1e3, image, step, short.peak])
    }

    /// Makes `n` images and prints one JSON object each, with its milliseconds by stage.
    fn command(&self, maker: Maker, folders: &Folders, steps: usize, n: usize) -> Result<Command> {
        let Folders { checkpoint, export, optimum, images } = folders;
        let (side, steps) = (self.side.to_string(), steps.to_string());
        let mut command = match maker {
            Maker::Ours => {
                let mut command = Command::new(program::built("ng-sample")?);
                command.arg("--model").arg(export).args(["-W", &side, "-H", &side]);
                command.args(["--solver", "euler", "--json"]);
                command
            }
            Maker::Diffusers | Maker::Optimum | Maker::OptimumOnOurs => {
                let mut command = peer(maker)?;
                command.arg(match maker {
                    Maker::Diffusers => checkpoint,
                    Maker::Optimum => optimum,
                    _ => export,
                });
                command.args(["--side", &side]);
                command
            }
        };
        if matches!(maker, Maker::Ours) {
            // The peers encode the prompt for each image: here each has another.
            let file = images.join(format!("{n}.txt"));
            let lines = (0..n).map(|i| format!("{PROMPT} {i}\n"));
            fs::write(&file, lines.collect::<String>()).context("cannot write the prompts")?;
            command.arg("--prompts").arg(file);
        } else {
            command.args(["--prompt", PROMPT, "-n", &n.to_string()]);
        }
        command.args(["--steps", &steps, "--threads", "1", "-o"]).arg(images.join("image.png"));
        Ok(command)
    }
}

fn peer(maker: Maker) -> Result<Command> {
    let mut command = Command::new(program::python()?);
    command.args(["-B", "benches/peers/diffusers_sample.py"]).env("HF_HUB_OFFLINE", "1");
    if matches!(maker, Maker::Optimum | Maker::OptimumOnOurs) {
        command.arg("--optimum").env("PYTHONPATH", program::root().join(".runtime/optimum"));
    }
    Ok(command)
}

/// Milliseconds of one image without loading the model.
fn milliseconds(line: &str) -> Result<f64> {
    let image: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
    let stages = image["milliseconds"].as_object().context("no milliseconds")?;
    let counted = stages.iter().filter(|(stage, _)| *stage != "load");
    let values = counted.map(|(_, value)| value.as_f64());
    values.sum::<Option<f64>>().context("milliseconds are not numbers")
}

/// Bytes of what has to be installed besides the model: for the peers their Python packages as PyPI has
/// them, without Python itself.
fn installed(maker: Maker) -> Result<f64> {
    if matches!(maker, Maker::Ours) {
        let library = program::root().join(".runtime/lib/libonnxruntime.so");
        let files = [program::built("ng-sample")?, library];
        let sizes = files.iter().map(|file| Ok(fs::metadata(file)?.len() as f64));
        return sizes.sum();
    }
    let stdout = program::run(peer(maker)?.args(["-", "--install-size"]))?.stdout;
    Ok(stdout.trim().parse()?)
}
