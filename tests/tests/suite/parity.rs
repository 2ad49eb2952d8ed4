//! Our programs against diffusers, transformers and their schedulers, by committed references.

use std::path::Path;

use flow::checkpoint::Weights;
use flow::schedule::{Schedule, Shift};
use flow::solver::{self, Solver, Step};
use flow::tokens::Tokenizers;
use serde::Deserialize;
use tests::difference::{absolute, relative};
use tests::fixture::{Fixture, PIPELINES, copy_folder, root};
use tests::program::{Ended, Program, typed};

/// Largest difference of final latents, as a share of the largest.
const LATENTS: f64 = 1e-4;
/// Largest difference of a pixel, of 255.
const PIXEL: f64 = 2.0;

/// Compares one image's latents and PNG with the case, and prints both figures.
fn assert_image(fixture: &Fixture, program: &str, index: usize, latents: &[f32], png: &Path) {
    let latents = relative(latents, &fixture.row("pipeline.latents", index));
    let image = image::open(png).expect("a PNG").to_rgb8();
    let size = (image.width() as usize, image.height() as usize);
    assert_eq!(size, (fixture.settings.width, fixture.settings.height));
    let found: Vec<f32> = image.as_raw().iter().map(|&byte| f32::from(byte)).collect();
    let expected: Vec<f32> =
        fixture.row("pipeline.image", index).iter().map(|&value| value * 255.0).collect();
    let pixel = absolute(&found, &expected);
    let name = fixture.name;
    println!("{name} {program} image {index}: latents {latents:.1e}, pixels {pixel:.2}/255");
    assert!(latents <= LATENTS, "{name} {program} image {index}: latents differ by {latents:.1e}");
    assert!(pixel <= PIXEL, "{name} {program} image {index}: pixels differ by {pixel:.2}/255");
}

#[test]
fn libtorch_draws_what_diffusers_draws() {
    for fixture in PIPELINES.map(Fixture::open) {
        let scratch = tempfile::tempdir().unwrap();
        let [noise, latents, png] = ["noise.safetensors", "latents.safetensors", "image.png"]
            .map(|n| scratch.path().join(n));
        for (index, prompt) in fixture.settings.prompts.iter().enumerate() {
            fixture.write_noise(&noise, index..index + 1);
            let mut command = Program::Train.command(["sample", "--solver", "euler"]);
            command.arg("--model").arg(&fixture.pipeline).args(["--prompt", prompt]);
            command.args(["--steps", &fixture.settings.steps.to_string()]).args(fixture.size());
            command.arg("--noise").arg(&noise).arg("--latents-out").arg(&latents);
            Ended::after(command.arg("--out").arg(&png)).succeeded();
            let latents = Weights::open_file(&latents).unwrap().f32("latents").unwrap();
            assert_image(&fixture, "ng-train", index, &latents, &png);
        }
    }
}

#[test]
fn exports_agree_with_libtorch_and_draw_what_diffusers_draws() {
    for fixture in PIPELINES.map(Fixture::open) {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| typed(&scratch.path().join(name));
        copy_folder(&fixture.pipeline, &scratch.path().join("model"));
        Program::Train.run(["reference", &at("model")]).succeeded();
        let export = ["--out", &at("export"), "--verify", &at("model")];
        let table = Program::Export.run(export).succeeded();
        println!("{}, libtorch against ONNX Runtime\n{table}", fixture.name);

        std::fs::write(at("prompts.txt"), fixture.settings.prompts.join("\n")).unwrap();
        let n = fixture.settings.prompts.len();
        fixture.write_noise(Path::new(&at("noise.safetensors")), 0..n);
        let (noise, latents) = (at("noise.safetensors"), at("latents.safetensors"));
        let steps = fixture.settings.steps.to_string();
        let mut command = Program::Sample.command(["--solver", "euler", "--steps", &steps]);
        command.args(["--model", &at("export"), "--prompts", &at("prompts.txt")]);
        command.args(["--noise", &noise, "--latents-out", &latents]).args(fixture.size());
        Ended::after(command.args(["--output", &at("images")])).succeeded();
        let latents = Weights::open_file(Path::new(&latents)).unwrap().f32("latents").unwrap();
        for (index, row) in latents.chunks(latents.len() / n).enumerate() {
            let png = at(&format!("images/{index:03}.png"));
            assert_image(&fixture, "ng-sample", index, row, Path::new(&png));
        }
    }
}

#[test]
fn prompts_become_the_ids_of_transformers() {
    for fixture in PIPELINES.map(Fixture::open) {
        let tokenizers = Tokenizers::open(&fixture.pipeline, None).unwrap();
        assert!(fixture.settings.tokens.len() > 4);
        for expected in &fixture.settings.tokens {
            let found = tokenizers.encode(&expected.prompt).unwrap();
            let (name, prompt) = (fixture.name, &expected.prompt);
            assert_eq!(found.clip, expected.tokenizer, "{name}, CLIP, {prompt:?}");
            assert_eq!(found.t5, expected.tokenizer_2, "{name}, T5, {prompt:?}");
        }
    }
}

/// `fixtures/schedules/case.json`: grids of diffusers and trajectories on a Gaussian.
#[derive(Deserialize)]
struct Schedulers {
    mean: f64,
    std: f64,
    start: Vec<f64>,
    cases: Vec<Scheduler>,
}

#[derive(Deserialize)]
struct Scheduler {
    #[serde(rename = "scheduler")]
    name: String,
    steps: usize,
    mu: Option<f64>,
    shift: Option<f64>,
    sigmas: Vec<f64>,
    trajectory: Vec<Vec<f64>>,
}

impl Schedulers {
    fn open() -> Self {
        let path = root().join("tests/fixtures/schedules/case.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// E[ε − x0 | `x_t` = x] for data N(mean, std²).
    fn velocity(&self, x: f64, t: f64) -> f64 {
        let data = (1.0 - t) * self.std * self.std;
        (t - data) / ((1.0 - t) * data + t * t) * (x - (1.0 - t) * self.mean) - self.mean
    }

    /// Largest difference from the case's trajectory, at any step from any start.
    fn difference(&self, case: &Scheduler, plan: &[Step]) -> f64 {
        assert_eq!(plan.len(), case.trajectory.len());
        let mut largest = 0.0;
        for (column, &start) in self.start.iter().enumerate() {
            let (mut x, mut x0_prev) = (start, 0.0);
            for (step, expected) in plan.iter().zip(&case.trajectory) {
                let v = self.velocity(x, step.t);
                let x0 = x - step.t * v;
                assert!(step.v_prev == 0.0, "neither solver looks back at velocities");
                x = step.x * x + step.v * v + step.x0_prev * x0_prev;
                x0_prev = x0;
                largest = f64::max(largest, (x - expected[column]).abs());
            }
        }
        largest
    }
}

impl Scheduler {
    fn schedule(&self) -> Schedule {
        let shift = match (self.mu, self.shift) {
            (Some(mu), None) => Shift::Mu(mu),
            (None, Some(shift)) => Shift::Factor(shift),
            other => panic!("mu or shift, not {other:?}"),
        };
        Schedule::new(self.steps, shift).unwrap()
    }

    fn grid_difference(&self) -> f64 {
        let schedule = self.schedule();
        assert_eq!(schedule.times().len(), self.sigmas.len());
        let pairs = schedule.times().iter().zip(&self.sigmas);
        pairs.fold(0.0, |largest, (a, b)| f64::max(largest, (a - b).abs()))
    }
}

#[test]
fn euler_is_the_scheduler_that_flux_pipelines_use() {
    let schedulers = Schedulers::open();
    let cases = schedulers.cases.iter().filter(|case| case.name == "FlowMatchEulerDiscrete");
    let mut n_cases = 0;
    for case in cases {
        let plan = solver::plan(Solver::Euler, &case.schedule());
        let (grid, path) = (case.grid_difference(), schedulers.difference(case, &plan));
        println!("Euler, {} steps: grid {grid:.1e}, trajectory {path:.1e}", case.steps);
        // The scheduler holds its grid in f32.
        assert!(grid < 2e-7 && path < 1e-6, "{} steps: {grid:.1e}, {path:.1e}", case.steps);
        n_cases += 1;
    }
    assert_eq!(n_cases, 7);
}

/// diffusers starts this scheduler at the largest of 1000 training times, a little below our t = 1, so
/// trajectories agree to about that difference of the grids; Euler's is several times as far away.
#[test]
fn dpm_solver_follows_the_scheduler_of_diffusers() {
    let schedulers = Schedulers::open();
    let cases = schedulers.cases.iter().filter(|case| case.name == "DPMSolverMultistep");
    let mut n_cases = 0;
    for case in cases {
        let difference =
            |solver| schedulers.difference(case, &solver::plan(solver, &case.schedule()));
        let (grid, path) = (case.grid_difference(), difference(Solver::Dpmpp2m));
        let euler = difference(Solver::Euler);
        println!(
            "DPM-Solver++, {} steps: grid {grid:.1e}, trajectory {path:.1e} (Euler {euler:.1e})",
            case.steps
        );
        assert!(grid < 1.1e-3 && path < 5e-4, "{} steps: {grid:.1e}, {path:.1e}", case.steps);
        assert!(euler > 5.0 * path, "{} steps: Euler is as close", case.steps);
        n_cases += 1;
    }
    assert_eq!(n_cases, 7);
}
