//! Images by `ng-sample` against the same weights in Python's `diffusers` and in Optimum on ONNX Runtime:
//! from process start to PNG, one image after another in a process that is warm, a step, memory and what
//! has to be installed. The embedded model at its own size, and a random FLUX of 302 M parameters at
//! 512×512 with FLUX's 1024 image tokens. Euler, f32, one thread. The three take turns, so that other work
//! on the machine disturbs all alike.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use benches::{median, program, table, variant};
use serde_json::{Value, json};

const PROMPT: &str = r#"red "CAT""#;
/// Prints the largest resident memory of a command in bytes, after what it printed itself.
const PEAK: &str = "import resource, subprocess, sys\n\
                    subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n\
                    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)";

/// What is measured of one model.
struct Case {
    name: &'static str,
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
        random: false,
        side: 32,
        steps: [8, 2],
        turns: 5,
        images: 25,
        not_counted: 5,
    },
    Case {
        name: "a random FLUX of 302 M parameters",
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
}

const MAKERS: [(&str, Maker); 3] =
    [("ng-sample", Maker::Ours), ("diffusers", Maker::Diffusers), ("Optimum", Maker::Optimum)];
/// Columns of the table.
const COLUMNS: [&str; 6] =
    ["", "start to PNG, ms", "image, ms", "step, ms", "MB resident", "MB installed"];

/// Where the model lies.
struct Folders {
    checkpoint: PathBuf,
    export: PathBuf,
    images: PathBuf,
}

fn main() -> Result<()> {
    for case in &CASES {
        measure(case).with_context(|| format!("cannot measure {}", case.name))?;
    }
    Ok(())
}

fn measure(case: &Case) -> Result<()> {
    let home = tempfile::tempdir().context("cannot make a folder for the images")?;
    let folders = case.folders(home.path())?;
    let turn = |_| MAKERS.map(|(_, maker)| case.turn(maker, &folders)).into_iter().collect();
    // Once without counting, so that files are in memory for every start that counts.
    for (_, maker) in MAKERS {
        program::run(&mut case.command(maker, &folders, 1, 1)?)?;
    }
    let turns = (0..case.turns).map(turn).collect::<Result<Vec<Vec<[f64; 3]>>>>()?;
    let mut rows = Vec::new();
    for (index, (name, maker)) in MAKERS.into_iter().enumerate() {
        let of = |column: usize| turns.iter().map(|turn| turn[index][column]).collect::<Vec<_>>();
        let memory = peak_memory(&case.command(maker, &folders, case.steps[1], 1)?)?;
        let [start, image, step] = [0, 1, 2].map(|column| format!("{:.1}", median(&of(column))));
        rows.push([
            name.into(),
            start,
            image,
            step,
            megabytes(memory),
            megabytes(installed(maker)?),
        ]);
    }
    for (index, (name, _)) in MAKERS.into_iter().enumerate().skip(1) {
        let ratio = |column: usize| {
            let of_turns = turns.iter().map(|turn| turn[index][column] / turn[0][column]);
            format!("{:.2}×", median(&of_turns.collect::<Vec<f64>>()))
        };
        let of_rows = |column: usize| -> Result<String> {
            let [theirs, ours]: [f64; 2] = [rows[index][column].parse()?, rows[0][column].parse()?];
            Ok(format!("{:.1}×", theirs / ours))
        };
        rows.push([
            format!("{name} / ng-sample"),
            ratio(0),
            ratio(1),
            ratio(2),
            of_rows(4)?,
            of_rows(5)?,
        ]);
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

fn megabytes(bytes: f64) -> String {
    format!("{:.0}", bytes / 1e6)
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
        Ok(Folders { checkpoint, export, images: home.to_owned() })
    }

    /// Milliseconds from start to PNG, of a warm image, and of a step.
    fn turn(&self, maker: Maker, folders: &Folders) -> Result<[f64; 3]> {
        let [steps, fewer] = self.steps;
        let cold = program::run(&mut self.command(maker, folders, steps, 1)?)?.seconds * 1e3;
        let warm = |steps: usize| -> Result<f64> {
            let stdout =
                program::run(&mut self.command(maker, folders, steps, self.images)?)?.stdout;
            let images = stdout.lines().map(milliseconds).collect::<Result<Vec<f64>>>()?;
            ensure!(images.len() == self.images, "{} images, not {}", images.len(), self.images);
            Ok(median(&images[self.not_counted..]))
        };
        let (image, shorter) = (warm(steps)?, warm(fewer)?);
        Ok([cold, image, (image - shorter) / (steps - fewer) as f64])
    }

    /// Makes `n` images and prints one JSON object each, with its milliseconds by stage.
    fn command(&self, maker: Maker, folders: &Folders, steps: usize, n: usize) -> Result<Command> {
        let Folders { checkpoint, export, images } = folders;
        let (side, steps) = (self.side.to_string(), steps.to_string());
        let mut command = match maker {
            Maker::Ours => {
                let mut command = Command::new(program::built("ng-sample")?);
                command.arg("--model").arg(export).args(["-W", &side, "-H", &side]);
                command.args(["--solver", "euler", "--json"]);
                command
            }
            Maker::Diffusers | Maker::Optimum => {
                let mut command = peer(maker)?;
                let model = if matches!(maker, Maker::Optimum) { export } else { checkpoint };
                command.arg(model).args(["--side", &side]);
                command
            }
        };
        command.args(["--prompt", PROMPT, "--steps", &steps, "--threads", "1"]);
        command.args(["-n", &n.to_string()]).arg("-o").arg(images.join("image.png"));
        Ok(command)
    }
}

fn peer(maker: Maker) -> Result<Command> {
    let mut command = Command::new(program::python()?);
    command.args(["-B", "benches/peers/diffusers_sample.py"]).env("HF_HUB_OFFLINE", "1");
    if matches!(maker, Maker::Optimum) {
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

/// Largest resident memory of `command`, in bytes.
fn peak_memory(command: &Command) -> Result<f64> {
    let mut measured = Command::new(program::python()?);
    measured.args(["-c", PEAK]).arg(command.get_program()).args(command.get_args());
    measured.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Ok(program::run(&mut measured)?.stdout.trim().parse()?)
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
