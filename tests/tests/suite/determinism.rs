//! The same seed gives the same image: alone or in a batch, on one thread or two, from either program.

use flow::checkpoint::Weights;
use tempfile::TempDir;
use tests::difference::relative;
use tests::fixture::{Fixture, PIPELINES};
use tests::program::{Ended, Program, typed};

const PROMPT: &str = "a green \"OWL\"";
const SEED: usize = 5;
const IMAGES: usize = 3;

/// A fixture and its export.
struct Scratch {
    fixture: Fixture,
    folder: TempDir,
}

/// What a program drew: latents of all images in a row, and the pixels of each.
#[derive(PartialEq)]
struct Drawn {
    latents: Vec<f32>,
    images: Vec<Vec<u8>>,
}

impl Scratch {
    fn new(name: &'static str) -> Self {
        let (fixture, folder) = (Fixture::open(name), tempfile::tempdir().unwrap());
        let (pipeline, export) = (typed(&fixture.pipeline), typed(&folder.path().join("export")));
        Program::Export.run([pipeline.as_str(), "--out", &export]).succeeded();
        Self { fixture, folder }
    }

    /// Draws `n` images from `seed` on with DPM-Solver++, 8 steps.
    fn draw(&self, program: Program, threads: usize, seed: usize, n: usize) -> Drawn {
        let (model, out) = match program {
            Program::Sample => (self.folder.path().join("export"), "--output"),
            _ => (self.fixture.pipeline.clone(), "--out"),
        };
        let [latents, png] =
            ["latents.safetensors", "image.png"].map(|n| self.folder.path().join(n));
        let first = if program == Program::Train { vec!["sample"] } else { Vec::new() };
        let mut command = program.command_on(threads, first);
        command.arg("--model").arg(model).args(["--prompt", PROMPT]).args(self.fixture.size());
        command.args(["--seed", &seed.to_string(), "-n", &n.to_string(), "--steps", "8"]);
        command.arg("--latents-out").arg(&latents).arg(out).arg(&png);
        Ended::after(&mut command).succeeded();
        let images = (0..n).map(|index| {
            let numbered = self.folder.path().join(format!("image-{index:03}.png"));
            let path = if n == 1 { &png } else { &numbered };
            image::open(path).unwrap().to_rgb8().into_raw()
        });
        Drawn {
            latents: Weights::open_file(&latents).unwrap().f32("latents").unwrap(),
            images: images.collect(),
        }
    }
}

#[test]
fn an_image_depends_on_its_seed_and_not_on_the_batch_or_the_threads() {
    for name in PIPELINES {
        let scratch = Scratch::new(name);
        let batch = scratch.draw(Program::Sample, 1, SEED, IMAGES);
        assert!(batch == scratch.draw(Program::Sample, 1, SEED, IMAGES), "{name}: a second run");
        assert!(batch == scratch.draw(Program::Sample, 2, SEED, IMAGES), "{name}: two threads");
        let rows = batch.latents.chunks(batch.latents.len() / IMAGES);
        for (index, (row, image)) in rows.zip(&batch.images).enumerate() {
            for threads in [1, 2] {
                let alone = scratch.draw(Program::Sample, threads, SEED + index, 1);
                assert!(alone.latents == row, "{name}: latents {index} alone, {threads} threads");
                assert!(
                    &alone.images[0] == image,
                    "{name}: image {index} alone, {threads} threads"
                );
            }
        }
        assert!(batch.images[0] != batch.images[1], "{name}: seeds make no difference");
    }
}

#[test]
fn trainer_and_sampler_draw_the_same_from_a_seed() {
    for name in PIPELINES {
        let scratch = Scratch::new(name);
        let libtorch = scratch.draw(Program::Train, 1, SEED, IMAGES);
        let onnx = scratch.draw(Program::Sample, 1, SEED, IMAGES);
        let latents = relative(&onnx.latents, &libtorch.latents);
        let pixels = onnx
            .images
            .concat()
            .iter()
            .zip(libtorch.images.concat())
            .fold(0, |largest, (a, b)| u8::max(largest, a.abs_diff(b)));
        println!("{name}, ng-sample against ng-train: latents {latents:.1e}, pixels {pixels}/255");
        assert!(latents <= 1e-4, "{name}: latents differ by {latents:.1e}");
        assert!(pixels <= 2, "{name}: pixels differ by {pixels}");
    }
}
