//! The engine on a real export: bits, batches, cancelling, LoRAs in slots.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Parser;
use flow::checkpoint::{Entry, write_tensors};
use indicatif::ProgressBar;
use sampler::{
    engine::{Engine, Finished, Memory, Options, Watch, is_cancelled},
    format::Format,
    progress::Progress,
    request::{Job, Request, Rng},
};
use tempfile::TempDir;

/// Keeps what happens; cancels its job after `stop` steps.
#[derive(Default)]
struct Seen {
    steps: Vec<(usize, usize, usize)>,
    preview: Option<(usize, usize)>,
    images: Vec<Result<Finished>>,
    stop: Option<(usize, onnx::Cancel)>,
}

impl Watch for Seen {
    fn step(&mut self, index: usize, progress: &mut Progress<'_>) {
        self.steps.push((index, progress.step, progress.of));
        let preview = progress.preview().unwrap();
        self.preview = Some((preview.width, preview.height));
        if let Some((after, cancel)) = &self.stop
            && progress.step == *after
        {
            cancel.cancel();
        }
    }

    fn done(&mut self, _: usize, image: Result<Finished>) {
        self.images.push(image);
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-schnell/pipeline")
}

fn export(options: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (fixture(), folder.path().join("export"));
    let mut typed = vec!["ng-export", from.to_str().unwrap(), "--out", to.to_str().unwrap()];
    typed.extend(options);
    let request = exporter::args::Args::parse_from(typed).request();
    exporter::export::export(&request, &ProgressBar::hidden(), &|| false).unwrap();
    folder
}

fn open(folder: &TempDir, threads: usize, memory: Memory) -> Engine {
    let options = Options { threads, memory, ..Options::default() };
    Engine::open(&folder.path().join("export"), &options).unwrap()
}

fn request(seed: u64) -> Request {
    Request {
        prompt: "a fox".into(),
        width: Some(48),
        height: Some(32),
        steps: Some(3),
        seed: Some(seed),
        ..Request::default()
    }
}

fn jobs(engine: &Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Job> {
    requests.into_iter().map(|request| engine.export().job(request).unwrap()).collect()
}

fn images(engine: &mut Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Vec<f32>> {
    let jobs = jobs(engine, requests);
    let mut seen = Seen::default();
    engine.generate(&jobs, &mut seen);
    seen.images.into_iter().map(|image| image.unwrap().latents).collect()
}

/// Largest difference.
fn far(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| f32::max(most, (a - b).abs()))
}

#[test]
fn bits_do_not_depend_on_company_threads_or_memory() {
    let folder = export(&[]);
    let mut engine = open(&folder, 1, Memory::Keep);
    let seven = images(&mut engine, (0..7).map(request));
    for (seed, expected) in seven.iter().enumerate() {
        assert!(images(&mut engine, [request(seed as u64)])[0] == *expected, "seed {seed} alone");
    }
    for (threads, memory) in [(2, Memory::Keep), (1, Memory::Release)] {
        let mut other = open(&folder, threads, memory);
        let found = images(&mut other, (0..7).map(request));
        assert!(found == seven, "{threads} threads, {memory:?}");
    }
    let together = Options { threads: 2, batch: 4, ..Options::default() };
    assert!(together.batches_exactly(&engine.precision()));
    let mut together = Engine::open(&folder.path().join("export"), &together).unwrap();
    assert!(images(&mut together, (0..7).map(request)) == seven, "in batches of four");
    let mapped = images(&mut open(&folder, 2, Memory::Low), [request(0)]);
    assert!(far(&mapped[0], &seven[0]) < 1e-4, "{}", far(&mapped[0], &seven[0]));
    assert!(seven[0] != seven[1]);
    let other_numbers = Request { rng: Rng::Torch, ..request(0) };
    assert!(images(&mut engine, [other_numbers])[0] != seven[0]);
}

#[test]
fn an_answer_of_another_shape_is_named() {
    let folder = export(&[]);
    let encoder = folder.path().join("export/text_encoder_2/model.onnx");
    std::fs::copy(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../onnx/tests/fixtures/scalar.onnx"),
        &encoder,
    )
    .unwrap();
    std::fs::remove_file(folder.path().join("export/SHA256SUMS")).unwrap();
    let mut engine = open(&folder, 1, Memory::Keep);
    let (jobs, mut seen) = (jobs(&engine, [request(0)]), Seen::default());
    engine.generate(&jobs, &mut seen);
    let said = format!("{:#}", seen.images.remove(0).unwrap_err());
    assert!(said.contains("text_encoder_2/model.onnx: output last_hidden_state"), "{said}");
    assert!(said.ends_with("has shape []"), "{said}");
}

#[test]
fn a_cancelled_job_ends_and_leaves_the_others_alone() {
    let folder = export(&[]);
    let mut engine = open(&folder, 1, Memory::Keep);
    let three = jobs(&engine, (0..3).map(request));
    let stop = Some((2, three[1].cancel.clone()));
    let mut seen = Seen { stop, ..Seen::default() };
    three[2].cancel.cancel();
    engine.generate(&three[..], &mut seen);
    // The second is cancelled while the first is made, the third before.
    let outcomes: Vec<bool> = seen.images.iter().map(Result::is_ok).collect();
    assert_eq!(outcomes, [true, false, false]);
    assert!(seen.images[1..].iter().all(|image| is_cancelled(image.as_ref().unwrap_err())));
    assert_eq!(seen.steps, [(0, 1, 3), (0, 2, 3), (0, 3, 3)]);
    assert_eq!(seen.preview, Some((48, 32)));
    assert_eq!(images(&mut engine, [request(0)]).len(), 1);
}

#[test]
fn a_batch_goes_on_without_those_that_are_cancelled() {
    let folder = export(&[]);
    let options = Options { threads: 1, batch: 4, ..Options::default() };
    let mut engine = Engine::open(&folder.path().join("export"), &options).unwrap();
    let alone = images(&mut engine, [request(0)]).remove(0);
    let other = Request { steps: Some(2), ..request(5) };
    let four = jobs(&engine, (0..3).map(request).chain([other]));
    four[2].cancel.cancel();
    let stop = Some((2, four[1].cancel.clone()));
    let mut seen = Seen { stop, ..Seen::default() };
    engine.generate(&four, &mut seen);
    // The third before it is begun, then the first, the second in the middle, and another plan.
    let outcomes: Vec<bool> = seen.images.iter().map(Result::is_ok).collect();
    assert_eq!(outcomes, [false, true, false, true]);
    assert!(seen.images[1].as_ref().unwrap().latents == alone, "the first is as if alone");
    let steps = [(0, 1, 3), (1, 1, 3), (0, 2, 3), (0, 3, 3), (3, 1, 2), (3, 2, 2)];
    assert_eq!(seen.steps, steps);
    // When all are cancelled the run they share is.
    let both = jobs(&engine, (0..2).map(request));
    for job in &both {
        job.cancel.cancel();
    }
    let mut seen = Seen::default();
    engine.generate(&both, &mut seen);
    assert!(seen.images.iter().all(|image| is_cancelled(image.as_ref().unwrap_err())));
}

#[test]
fn an_initial_image_is_kept_as_far_as_asked() {
    let folder = export(&[]);
    let mut engine = open(&folder, 1, Memory::Keep);
    let mut seen = Seen::default();
    let first = jobs(&engine, [request(4)]);
    engine.generate(&first, &mut seen);
    let picture = std::sync::Arc::new(seen.images.remove(0).unwrap().picture);
    let from = |strength| Request {
        init: Some(picture.clone()),
        strength: Some(strength),
        width: None,
        height: None,
        ..request(9)
    };
    let all = images(&mut engine, [from(1.0), request(9)]);
    assert!(all[0] == all[1], "a strength of 1 leaves nothing of it");
    let jobs = jobs(&engine, [from(0.67)]);
    assert_eq!((jobs[0].plan.len(), jobs[0].width), (2, 48));
    let error = engine.export().job(from(0.2)).unwrap_err();
    assert_eq!((error.field, error.why.contains("leaves none")), ("strength", true));
}

/// A LoRA given to a run makes the image of the same LoRA merged into the weights.
#[test]
fn a_lora_in_a_slot_is_the_merged_one() {
    let file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
    let layer = "transformer.transformer_blocks.0.attn.to_q";
    let values = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin() * 0.3).collect::<Vec<f32>>();
    let entries = [
        Entry::f32(format!("{layer}.lora_A.weight"), &[2, 24], &values(48)),
        Entry::f32(format!("{layer}.lora_B.weight"), &[24, 2], &values(48)),
    ];
    write_tensors(file.path(), &entries, &[]).unwrap();
    let merged = export(&["--lora", &format!("{}:0.5", file.path().display())]);
    let expected = images(&mut open(&merged, 1, Memory::Keep), [request(3)]).remove(0);

    let slots = export(&["--lora-slots"]);
    let mut engine = open(&slots, 1, Memory::Keep);
    let plain = images(&mut engine, [request(3)]).remove(0);
    engine.export().load_lora("style", file.path()).unwrap();
    let used = |scale| Request { loras: vec![("style".into(), scale)], ..request(3) };
    let found = images(&mut engine, [used(0.5), request(3)]);
    assert!(far(&found[0], &expected) < 1e-4, "{}", far(&found[0], &expected));
    assert!(far(&plain, &expected) > 1e-3, "the LoRA changes nothing");
    assert!(found[1] == plain, "a run without it is as it was");
    assert!(engine.export().unload_lora("style"));
    assert_eq!(engine.export().job(used(0.5)).unwrap_err().field, "loras");
    let without = open(&merged, 1, Memory::Release);
    let error = without.export().load_lora("style", file.path()).unwrap_err();
    assert!(error.to_string().contains("--lora-slots"), "{error}");
}

#[test]
fn a_picture_says_how_it_was_made() -> Result<()> {
    let folder = export(&[]);
    let engine = open(&folder, 1, Memory::Release);
    let job = engine.export().job(Request { rng: Rng::Torch, ..request(7) })?;
    let text = sampler::parameters::Parameters::of(&job, "m").text();
    let found = sampler::infotext::Infotext::parse(&text);
    assert_eq!((found.get("Seed"), found.get("RNG")), (Some("7"), Some("CPU")));
    assert_eq!((found.get("CFG scale"), found.get("Size")), (Some("1"), Some("48x32")));
    assert_eq!(Format::of(Path::new("x.webp")), Some(Format::WebP));
    Ok(())
}
