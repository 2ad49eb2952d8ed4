//! The tiny random pipelines of `tests/fixtures`, exported and compared with what diffusers computed.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};

use flow::checkpoint::write_tensors;
use onnx::{Model, Options, Tensor};
use tempfile::TempDir;

use clap::ValueEnum;

use super::*;
use crate::external::MODEL_FILE;
use crate::target::Target;
use crate::verify::MAX_RELATIVE;
use crate::verify::pictures::Wanted;

/// Guided with transformers 5's tensor names, and unguided with those of FLUX.1's own files.
const FIXTURES: [&str; 2] = ["tiny-flux", "tiny-schnell"];

/// A copy of a fixture's pipeline with its case as reference, and an empty folder beside it.
struct Scratch {
    home: TempDir,
    request: Request,
}

impl Scratch {
    fn new(fixture: &str) -> Self {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(fixture);
        let home = tempfile::tempdir().unwrap();
        let checkpoint = home.path().join("checkpoint");
        copy_tree(&fixture.join("pipeline"), &checkpoint);
        fs::copy(fixture.join("case.safetensors"), checkpoint.join(flow::reference::FILE)).unwrap();
        let target = home.path().join("export");
        let request = Request {
            checkpoint,
            target,
            parts: Part::ALL.to_vec(),
            loras: Vec::new(),
            choice: Choice::default(),
            placement: Placement::Auto,
            replace: false,
            resume: false,
            verify: true,
            asked: Asked {
                max_error: None,
                min_psnr: None,
                max_gmsd: None,
                wanted: Wanted::Some(0),
            },
            threads: 1,
        };
        Self { home, request }
    }

    fn export(&self) -> Result<Vec<Summary>> {
        export(&self.request, &ProgressBar::hidden(), &|| false)
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        let left: Vec<_> = list(self.home.path()).unwrap();
        assert_eq!(left, std::slice::from_ref(&self.request.checkpoint));
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for path in list(from).unwrap() {
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_tree(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn every_component_agrees_with_diffusers() {
    for fixture in FIXTURES {
        let summaries = Scratch::new(fixture).export().unwrap();
        println!("{fixture}\n{}", Table(&summaries));
        assert_eq!(summaries.len(), Part::ALL.len());
        for summary in &summaries {
            let difference = summary.difference.expect("verified");
            assert!(
                difference.passes(MAX_RELATIVE),
                "{fixture} {}: {difference:?}",
                summary.part.folder()
            );
        }
    }
}

/// Figures of ONNX Runtime on the processor; bf16 is widened there.
#[test]
fn every_target_and_precision_computes_what_the_checkpoint_does() {
    let mut scratch = Scratch::new("tiny-flux");
    let mut n = 0;
    for &target in Target::value_variants() {
        for &precision in Precision::value_variants() {
            scratch.request.choice = Choice { target, precision, ..Choice::default() };
            scratch.request.replace = true;
            match scratch.export() {
                Ok(summaries) => println!("{target:?} {precision:?}\n{}", Table(&summaries)),
                Err(error) => {
                    let is_refused = target == Target::Cpu && precision == Precision::Fp8;
                    assert!(is_refused, "{target:?} {precision:?}: {error:#}");
                    n += 1;
                }
            }
        }
    }
    assert_eq!(n, 1, "the processor has no fp8");
    let report = fs::read_to_string(scratch.request.target.join("verification.md")).unwrap();
    assert!(report.contains("| transformer | block 0 |"), "{report}");
}

#[test]
fn what_is_beyond_its_limit_is_not_exported() {
    let mut scratch = Scratch::new("tiny-schnell");
    scratch.request.choice.precision = Precision::Int4;
    scratch.request.asked.max_error = Some(1e-3);
    let message = format!("{:#}", scratch.export().unwrap_err());
    assert!(message.contains("transformer at block 0") && message.contains("1e-3"), "{message}");
    scratch.assert_nothing_left();
}

#[test]
fn pictures_are_judged_and_shown() {
    let mut scratch = Scratch::new("tiny-flux");
    scratch.request.asked.wanted = Wanted::Some(2);
    (scratch.request.choice.precision, scratch.request.asked.min_psnr) =
        (Precision::Int4, Some(99.0));
    let message = format!("{:#}", scratch.export().unwrap_err());
    assert!(
        message.contains("the picture of a red") && message.contains("at least 99"),
        "{message}"
    );
    scratch.assert_nothing_left();
    let mut last = f64::INFINITY;
    scratch.request.asked.min_psnr = None;
    scratch.request.replace = true;
    for precision in [Precision::F32, Precision::F16, Precision::Int8, Precision::Int4] {
        scratch.request.choice.precision = precision;
        scratch.export().unwrap();
        let report = fs::read(scratch.request.target.join("verification.json")).unwrap();
        let report: Report = serde_json::from_slice(&report).unwrap();
        let pictures = report.pictures.unwrap();
        println!("{precision:?} {:?}", pictures.judged);
        assert_eq!(pictures.judged.len(), 2);
        assert!(pictures.judged[0].psnr < last, "{precision:?} is nearer than what is finer");
        last = pictures.judged[0].psnr;
        assert!(scratch.request.target.join("verification.png").is_file());
    }
}

#[test]
fn the_folder_is_optimums() {
    let scratch = Scratch::new("tiny-flux");
    scratch.export().unwrap();
    let open = |part: &str| {
        let path = scratch.request.target.join(part).join(MODEL_FILE);
        assert!(path.with_file_name("config.json").is_file());
        Model::open(path, &Options::default()).unwrap()
    };
    let names = |part: &str| {
        let model = open(part);
        let names = |ports: &[onnx::Port]| {
            ports.iter().map(|port| port.name.clone()).collect::<Vec<_>>().join(" ")
        };
        (names(model.inputs()), names(model.outputs()))
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(names("text_encoder"), pair("input_ids", "last_hidden_state pooler_output"));
    assert_eq!(names("text_encoder_2"), pair("input_ids", "last_hidden_state"));
    assert_eq!(names("vae_decoder"), pair("latent_sample", "sample"));
    assert_eq!(names("vae_encoder"), pair("sample", "latent_parameters"));
    let inputs = "hidden_states encoder_hidden_states pooled_projections timestep txt_ids img_ids \
                  guidance";
    assert_eq!(names("transformer"), pair(inputs, "out_hidden_states"));
    let transformer = open("transformer");
    assert_eq!(transformer.inputs()[0].shape, [None, None, Some(64)]);
    assert_eq!(transformer.inputs()[5].shape, [None, Some(3)]);
    assert_eq!(transformer.metadata("component").as_deref(), Some("transformer"));
    for rest in ["model_index.json", "tokenizer", "tokenizer_2", "scheduler/scheduler_config.json"]
    {
        assert!(scratch.request.target.join(rest).exists(), "{rest}");
    }
    Pipeline::open(&scratch.request.target).expect("an export reads as a pipeline");
}

#[test]
fn one_image_of_a_batch_is_that_image_alone() {
    let scratch = Scratch::new("tiny-schnell");
    scratch.export().unwrap();
    let reference = verify::stored(&scratch.request.checkpoint).unwrap().unwrap();
    let path = scratch.request.target.join("transformer").join(MODEL_FILE);
    let mut model = Model::open(path, &Options::default()).unwrap();
    let inputs: Vec<_> = model
        .inputs()
        .iter()
        .map(|port| {
            let view = reference.get(&format!("transformer.{}", port.name)).unwrap();
            let (mut shape, mut values) = (view.shape.to_vec(), view.to_f32().unwrap());
            if !port.name.ends_with("_ids") {
                assert_eq!(shape[0], 2);
                shape[0] = 1;
                values.truncate(values.len() / 2);
            }
            (port.name.clone(), Tensor::f32(shape, values).unwrap())
        })
        .collect();
    let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let alone = model.run(&inputs, &["out_hidden_states"]).unwrap().remove(0);
    let batch = reference.f32("transformer.out_hidden_states").unwrap();
    let difference = Difference::between(alone.as_f32().unwrap(), &batch[..batch.len() / 2]);
    assert_eq!(alone.shape[0], 1);
    assert!(difference.passes(MAX_RELATIVE), "{difference:?}");
}

#[test]
fn a_changed_weight_fails_verification_and_leaves_nothing() {
    let scratch = Scratch::new("tiny-schnell");
    let path = scratch.request.checkpoint.join(flow::reference::FILE);
    change(&path, "vae_decoder.sample");
    let message = scratch.export().unwrap_err().to_string();
    assert!(message.contains("vae_decoder by") && !message.contains("transformer"), "{message}");
    scratch.assert_nothing_left();
}

/// Raises the largest value of one tensor by a ten-thousandth.
fn change(path: &Path, name: &str) {
    let tensors = Weights::open_file(path).unwrap();
    let entries: Vec<_> = tensors
        .names()
        .map(|entry| {
            let view = tensors.get(entry).unwrap();
            let bytes: Cow<'_, [u8]> = if entry == name {
                let mut values = view.to_f32().unwrap();
                let largest = values.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                *largest.unwrap() *= 1.0001;
                values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
            } else {
                view.bytes
            };
            flow::checkpoint::Entry::raw(entry, view.shape, view.dtype, bytes)
        })
        .collect();
    write_tensors(path, &entries, &[]).unwrap();
}

#[test]
fn a_broken_checkpoint_leaves_nothing() {
    let scratch = Scratch::new("tiny-schnell");
    let weights = scratch.request.checkpoint.join("vae/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    fs::write(&weights, &whole[..whole.len() - 4]).unwrap();
    let message = format!("{:#}", scratch.export().unwrap_err());
    assert!(message.contains("vae/diffusion_pytorch_model.safetensors"), "{message}");
    scratch.assert_nothing_left();
}

/// At its first question, its last, and some between: weights, linked files, verification, pictures.
#[test]
fn an_interrupted_export_leaves_nothing() {
    let mut scratch = Scratch::new("tiny-schnell");
    scratch.request.placement = Placement::Linked;
    scratch.request.choice.precision = Precision::F32;
    scratch.request.asked.wanted = Wanted::Some(1);
    let n_asked = AtomicUsize::new(0);
    let stopped_at = |last: usize| {
        n_asked.store(0, Ordering::Relaxed);
        let stop = || n_asked.fetch_add(1, Ordering::Relaxed) >= last;
        export(&scratch.request, &ProgressBar::hidden(), &stop)
    };
    stopped_at(usize::MAX).unwrap();
    fs::remove_dir_all(&scratch.request.target).unwrap();
    let n = n_asked.load(Ordering::Relaxed);
    assert!(n > 200, "{n}");
    for last in [0, n / 7, n / 3, n / 2, n - n / 8, n - 1] {
        let message = format!("{:#}", stopped_at(last).unwrap_err());
        assert!(message.ends_with("interrupted: nothing was exported"), "{message}");
        scratch.assert_nothing_left();
    }
}

/// Every file of the export, `export.json` and sums too.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for path in list(folder).unwrap() {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn the_same_checkpoint_makes_the_same_bytes_stopped_or_not() {
    let mut scratch = Scratch::new("tiny-schnell");
    scratch.request.verify = false;
    scratch.request.replace = true;
    for precision in [Precision::F16, Precision::Int4] {
        scratch.request.choice.precision = precision;
        scratch.export().unwrap();
        let once = files(&scratch.request.target);
        assert!(once.len() > 15);
        scratch.export().unwrap();
        assert!(once == files(&scratch.request.target), "{precision:?}: two exports differ");
        scratch.request.resume = true;
        let bar = ProgressBar::hidden();
        let stopped = export(&scratch.request, &bar, &|| true).unwrap_err();
        assert!(stopped.to_string().contains("goes on from here"), "{stopped}");
        assert_eq!(list(scratch.home.path()).unwrap().len(), 3, "what was written is left");
        scratch.export().unwrap();
        assert!(once == files(&scratch.request.target), "{precision:?}: a resumed export differs");
        assert_eq!(list(scratch.home.path()).unwrap().len(), 2);
        scratch.request.resume = false;
    }
}

#[test]
fn what_was_left_by_other_options_is_not_gone_on_with() {
    let mut scratch = Scratch::new("tiny-schnell");
    (scratch.request.verify, scratch.request.resume) = (false, true);
    let stopped = export(&scratch.request, &ProgressBar::hidden(), &|| true);
    stopped.unwrap_err();
    scratch.request.choice.precision = Precision::Int8;
    scratch.export().unwrap();
    assert_eq!(list(scratch.home.path()).unwrap().len(), 2, "what does not fit is removed");
    let data = |export: &Path| fs::read(export.join("transformer/model.onnx_data")).unwrap();
    let resumed = data(&scratch.request.target);
    (scratch.request.replace, scratch.request.resume) = (true, false);
    scratch.export().unwrap();
    assert!(resumed == data(&scratch.request.target));
}

#[test]
fn a_plan_says_what_is_written_then_and_writes_nothing() {
    let mut scratch = Scratch::new("tiny-flux");
    scratch.request.verify = false;
    for precision in [Precision::F32, Precision::Bf16, Precision::Int4] {
        scratch.request.choice = Choice { precision, ..Choice::default() };
        scratch.request.parts = vec![Part::TextEncoder2, Part::Transformer];
        let planned = plan::plan(&scratch.request).unwrap().to_string();
        scratch.assert_nothing_left();
        let summaries = scratch.export().unwrap();
        let table = Table(&summaries).to_string();
        assert!(planned.starts_with(&table), "{planned}\n{table}");
        assert!(planned.contains("time: about") && planned.contains("free there"), "{planned}");
        assert!(!scratch.request.target.join("text_encoder").exists());
        fs::remove_dir_all(&scratch.request.target).unwrap();
    }
}

#[test]
fn an_export_is_verified_against_its_own_checkpoint_only() {
    let mut scratch = Scratch::new("tiny-flux");
    scratch.request.parts = vec![Part::TextEncoder];
    scratch.export().unwrap();
    let verified = |checkpoint: &Path| {
        let Request { target, asked, .. } = &scratch.request;
        verify::again(target, checkpoint, &[], asked, 1)
    };
    verified(&scratch.request.checkpoint).unwrap().check().unwrap();
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/signs");
    let message = verified(&other).err().unwrap().to_string();
    assert!(message.contains("was not made from") && message.contains("hidden_size"), "{message}");
    let absent = scratch.home.path().join("absent");
    let asked = &scratch.request.asked;
    let error = verify::again(&absent, &other, &[], asked, 1).err().unwrap();
    assert!(error.to_string().ends_with("absent: no such folder"), "{error:#}");
}

#[test]
fn the_checkpoint_is_never_the_target() {
    let mut scratch = Scratch::new("tiny-schnell");
    scratch.request.replace = true;
    for target in [scratch.request.checkpoint.clone(), scratch.home.path().to_owned()] {
        scratch.request.target = target;
        let error = scratch.export().unwrap_err();
        assert!(error.is::<Usage>() && error.to_string().contains("holds the checkpoint"));
    }
    scratch.assert_nothing_left();
}

fn list(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
}
