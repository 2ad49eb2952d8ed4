//! What each program refuses: the exit code, one line that names the culprit, nothing left behind.

mod typed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flow::checkpoint::{Entry, Weights, write_tensors};
use tempfile::TempDir;
use tests::fixture::{Fixture, copy_folder, entries_below};
use tests::program::{Ended, Program, typed};

const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
/// The tensor that broken models miss or have in another shape.
const TENSOR: &str = "x_embedder.weight";

/// A mistake and what must be said about it. In `arguments` and `says`, `@` is the scratch folder.
struct Mistake {
    arguments: &'static str,
    code: i32,
    says: &'static [&'static str],
    /// ONNX Runtime is looked for where there is none.
    without_runtime: bool,
}

const fn mistake(arguments: &'static str, code: i32, says: &'static [&'static str]) -> Mistake {
    Mistake { arguments, code, says, without_runtime: false }
}

/// A folder with models and files that are wrong in one way each.
struct Scratch {
    home: TempDir,
}

impl Scratch {
    fn new() -> Self {
        let fixture = Fixture::open("tiny-schnell");
        let scratch = Self { home: tempfile::tempdir().unwrap() };
        for name in [
            "model",
            "truncated",
            "missing",
            "misshaped",
            "mistyped",
            "no-folder",
            "absurd",
            "pickled",
        ] {
            copy_folder(&fixture.pipeline, &scratch.path(name));
        }
        cut(&scratch.path("truncated").join(VAE));
        fs::remove_dir_all(scratch.path("no-folder/text_encoder_2")).unwrap();
        rewrite(&scratch.path("missing").join(TRANSFORMER), |entry| entry.name != TENSOR);
        rewrite(&scratch.path("misshaped").join(TRANSFORMER), |entry| {
            if entry.name == TENSOR {
                entry.shape.reverse();
            }
            true
        });
        rewrite(&scratch.path("mistyped").join(TRANSFORMER), |entry| {
            if entry.name == TENSOR {
                let n = entry.shape.iter().product();
                *entry = Entry::i64(TENSOR, &entry.shape, &vec![0; n]);
            }
            true
        });
        let config = scratch.path("absurd/transformer/config.json");
        let text = fs::read_to_string(&config).unwrap();
        let absurd = text.replace("\"num_layers\": 1,", "\"num_layers\": 4000000000000,");
        assert_ne!(text, absurd);
        fs::write(&config, absurd).unwrap();
        let weights = scratch.path("pickled").join(VAE);
        fs::rename(&weights, weights.with_extension("bin")).unwrap();
        fs::write(scratch.path("empty.txt"), "\n").unwrap();
        fs::write(scratch.path("file"), "").unwrap();
        fs::write(scratch.path("broken.toml"), "model = 'a'\nseed = \n").unwrap();
        fs::write(scratch.path("wrong.toml"), "modell = 'a'\n").unwrap();
        fs::write(scratch.path("plain.txt"), "a blue cat\n").unwrap();
        let factor = Entry::f32("transformer.x_embedder.lora_A.weight", &[1], &[0.0]);
        write_tensors(&scratch.path("lora.safetensors"), &[factor], &[]).unwrap();
        scratch
    }

    /// The same with exports of the model: whole, without a graph, with too few weights.
    fn with_exports() -> Self {
        let scratch = Self::new();
        let [model, export] = ["model", "export"].map(|name| typed(&scratch.path(name)));
        Program::Export.run([&model, "--out", &export]).succeeded();
        for name in ["no-graph", "cut-graph"] {
            copy_folder(&scratch.path("export"), &scratch.path(name));
        }
        fs::remove_file(scratch.path("no-graph/vae_decoder/model.onnx")).unwrap();
        cut(&scratch.path("cut-graph/transformer/model.onnx_data"));
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn resolved(&self, text: &str) -> String {
        text.replace('@', &typed(self.home.path()))
    }

    fn command(&self, program: Program, mistake: &Mistake) -> Command {
        let typed = mistake.arguments.split_whitespace().map(|word| self.resolved(word));
        let mut command = program.command(typed);
        if mistake.without_runtime {
            command.env("ORT_DYLIB_PATH", "/nonexistent/libonnxruntime.so");
        }
        command
    }

    /// Makes every mistake and tells about all that are not refused as they should be.
    #[track_caller]
    fn assert_refused(&self, program: Program, mistakes: &[Mistake]) {
        let before = entries_below(self.home.path());
        let mut wrong = Vec::new();
        for mistake in mistakes {
            let ended = Ended::after(&mut self.command(program, mistake));
            let mut complaints = self.complaints(mistake, &ended);
            let now = entries_below(self.home.path());
            let new: Vec<&PathBuf> = now.iter().filter(|path| !before.contains(path)).collect();
            if !new.is_empty() {
                complaints.push(format!("it left {new:?}"));
            }
            if !complaints.is_empty() {
                let said = format!("{}: {}", ended.status, ended.stderr);
                let complaints = complaints.join("; ");
                wrong.push(format!(
                    "{} {}\n  {complaints}\n  {said}",
                    program.name(),
                    mistake.arguments
                ));
            }
        }
        let n = wrong.len();
        assert!(wrong.is_empty(), "{n} of {}:\n{}", mistakes.len(), wrong.join("\n"));
    }

    fn complaints(&self, mistake: &Mistake, ended: &Ended) -> Vec<String> {
        let mut complaints = Vec::new();
        if ended.status.code() != Some(mistake.code) {
            complaints.push(format!("the exit code is not {}", mistake.code));
        }
        if !ended.stderr.starts_with("error: ") {
            complaints.push("standard error does not begin with `error: `".to_owned());
        }
        // The argument parser adds a hint to its line.
        let from_parser = ended.stderr.contains("--help");
        if ended.stderr.lines().count() != 1 && !from_parser {
            complaints.push("it is not one line".to_owned());
        }
        for part in mistake.says.iter().map(|part| self.resolved(part)) {
            if !ended.stderr.contains(&part) {
                complaints.push(format!("`{part}` is not said"));
            }
        }
        complaints
    }
}

/// Takes the last bytes off a file.
fn cut(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 8]).unwrap();
}

/// Writes a safetensors file anew with the tensors that `keep` keeps, as it leaves them.
fn rewrite(path: &Path, keep: impl Fn(&mut Entry<'_>) -> bool) {
    let weights = Weights::open_file(path).unwrap();
    let mut entries: Vec<Entry<'static>> = weights
        .names()
        .map(|name| {
            let view = weights.get(name).unwrap();
            Entry::raw(name, view.shape, view.dtype, view.bytes.to_vec())
        })
        .collect();
    entries.retain_mut(|entry| keep(entry));
    write_tensors(path, &entries, &[]).unwrap();
}

/// The same three flags everywhere: quiet keeps results and errors, the log has all that is said.
#[test]
fn every_program_says_as_much_as_it_is_asked_to() {
    let home = tempfile::tempdir().unwrap();
    let model = typed(&Fixture::open("tiny-schnell").pipeline);
    let (log, export) = (home.path().join("log"), typed(&home.path().join("export")));
    let image = typed(&home.path().join("a.png"));
    let runs: [(Program, &[&str], &str); 2] = [
        (Program::Export, &[&model, "--out", &export], "writing vae_decoder"),
        (Program::Sample, &["--model", &export, "--prompt", "a", "-o", &image], "reading prompts"),
    ];
    for (program, arguments, detail) in runs {
        let with = |more: &[&str]| program.run([arguments, more].concat());
        let verbose = with(&["-v", "--log", &typed(&log)]);
        assert!(verbose.stderr.contains(detail), "{program:?}: {}", verbose.stderr);
        let result = verbose.succeeded();
        let logged = fs::read_to_string(&log).unwrap();
        assert!(logged.contains(detail), "{program:?}: {logged}");
        assert!(logged.contains(result.lines().next().unwrap()), "{program:?}: {logged}");
        let force: &[&str] = if program == Program::Export { &["--force"] } else { &[] };
        let quiet = with(&[force, &["-q"]].concat());
        assert_eq!(quiet.stderr, "", "{program:?}");
        assert_eq!(quiet.succeeded().is_empty(), result.is_empty());
    }
    for program in Program::ALL {
        let help = program.run(["--help"]).succeeded();
        for flag in ["-q, --quiet", "-v, --verbose", "--log <FILE>"] {
            assert!(help.contains(flag), "{program:?} has no {flag}");
        }
        assert!(help.contains(&format!("Usage: {} ", program.name())), "{help}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut command = Program::Train.command(["config", "explain"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait_with_output().unwrap().status.success());
}

/// A copy of the program that asks for a library which nobody has.
#[test]
fn ng_train_says_what_to_do_without_libtorch() {
    let home = tempfile::tempdir().unwrap();
    let (program, proper) = (Program::Train.path(), Program::Train.proper());
    let mut bytes = fs::read(&proper).unwrap();
    let (name, absent) = (b"libtorch_cpu.so\0", b"libtorch_cpX.so\0");
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(absent);
    for (from, contents) in [(&program, None), (&proper, Some(bytes))] {
        let to = home.path().join(from.file_name().unwrap());
        fs::copy(from, &to).unwrap();
        if let Some(bytes) = contents {
            fs::write(&to, bytes).unwrap();
        }
    }
    let ended = Ended::after(Command::new(home.path().join("ng-train")).arg("--version"));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let is_one_line = ended.stderr.starts_with("error: ") && ended.stderr.lines().count() == 1;
    assert!(is_one_line, "{}", ended.stderr);
    // The copy lies where no libtorch is, so that it misses the others, too.
    for part in ["libtorch_cpX.so", "not found: run `make runtime`"] {
        assert!(ended.stderr.contains(part), "{}", ended.stderr);
    }
    let version = Program::Train.run(["--version"]).succeeded();
    assert!(version.starts_with("ng-train "), "{version}");
}

#[test]
fn ng_train_refuses_with_one_line() {
    Scratch::new().assert_refused(
        Program::Train,
        &[
            mistake("reference @/absent", 1, &["@/absent: no such folder"]),
            mistake(
                "reference @/truncated",
                1,
                &["@/truncated/vae/diffusion_pytorch_model.safetensors"],
            ),
            mistake("reference @/missing", 1, &["@/missing/transformer", TENSOR, "missing"]),
            mistake("reference @/misshaped", 1, &["@/misshaped/transformer", TENSOR, "[64, "]),
            mistake("reference @/mistyped", 1, &["@/mistyped/transformer", TENSOR, "I64"]),
            mistake("reference @/absurd", 1, &["@/absurd/transformer/config.json", "num_layers"]),
            mistake("reference @/pickled", 1, &["@/pickled/vae", "ng-train convert"]),
            mistake("convert @/file @/b.safetensors", 2, &["@/file"]),
            mistake("convert @/absent.pt @/b.safetensors", 1, &["@/absent.pt"]),
            mistake("sample --model @/model --prompt a --out @/a.jpg", 2, &["@/a.jpg", ".png"]),
            mistake("sample --model @/lora.safetensors --prompt a", 1, &["a LoRA", "--lora"]),
            mistake("embed --import @/absent.json --out @/cache", 1, &["@/absent.json"]),
            mistake("embed --out @/cache", 2, &["--model", "--prompts"]),
            mistake(
                "embed --model @/model --prompts @/empty.txt --out @/cache",
                1,
                &["@/empty.txt", "holds no prompt"],
            ),
            mistake("bench --model flux.9", 2, &["flux.9", "flux.1-dev"]),
            mistake("bench --model @/model --size 100", 2, &["--size", "1024x768"]),
            mistake("reference @/model --precision fp8", 2, &["fp8", "bf16"]),
            mistake("reference @/no-folder", 1, &["@/no-folder/text_encoder_2"]),
            mistake("sample --model @/absent --prompt a --out @/a.png", 1, &["@/absent"]),
            mistake("sample --model @/model --prompt a --steps 0", 2, &["--steps", "0"]),
            mistake("sample --model @/model --prompt a --out @/a.png -n 0", 2, &["--count", "0"]),
            mistake("sample --model @/model --prompt a --solver ddim", 2, &["ddim", "euler"]),
            mistake("sample --model @/model --prompt a -W 33 -H 32", 2, &["33x32", "16"]),
            mistake(
                "sample --model @/model --prompt a --noise @/absent.safetensors",
                1,
                &["@/absent.safetensors"],
            ),
            mistake("sample --model @/model --prompt a --out @/file/a.png", 1, &["@/file"]),
            mistake("reference @/model --device tpu", 2, &["tpu", "cuda"]),
            mistake("signs @/model", 1, &["@/model"]),
            mistake("signs @/images -n 0", 2, &["-n", "0"]),
        ],
    );
}

#[test]
fn ng_train_align_refuses_with_one_line() {
    const SIGNS: &str = "align --preset signs --set output=@/run --set model=@/model";
    Scratch::new().assert_refused(
        Program::Train,
        &[
            mistake("align --preset sings", 2, &["sings", "signs"]),
            mistake(
                "align --preset signs --set iterationz=3",
                2,
                &["--set iterationz=3", "did you mean iterations?"],
            ),
            mistake("align --preset signs --set iterations=many", 2, &["many", "--set"]),
            mistake("align --preset signs --set iterations", 2, &["iterations", "key=value"]),
            mistake(
                "align --preset signs --set rewards.7.weight=1",
                2,
                &["rewards.7.weight", "below 2"],
            ),
            mistake("align --preset signs --set iterations=0", 2, &["iterations = 0"]),
            mistake("align --preset signs --set updates=3", 2, &["updates = 3", "anchors = 4"]),
            mistake(
                "align --preset signs --set sde.level=0.3",
                2,
                &["sde.level", "under neighbor", "does not read"],
            ),
            mistake("config explain rollout.stepz", 2, &["did you mean rollout.steps?"]),
            mistake(
                "pretrain --preset signs --set flow.batchz=3",
                2,
                &["flow.batchz", "did you mean batch?"],
            ),
            mistake("align --config @/absent.toml", 1, &["@/absent.toml"]),
            mistake("align", 2, &["--preset <NAME>|--config <FILE>"]),
            mistake("align --config @/broken.toml", 2, &["@/broken.toml", "line 2"]),
            mistake(
                "align --config @/wrong.toml",
                2,
                &["@/wrong.toml, line 1", "did you mean model?"],
            ),
            mistake("align --preset signs --set output=@/run --set model=@/missing", 1, &[TENSOR]),
            Mistake { without_runtime: true, ..mistake(SIGNS, 1, &["\"ocr\"", "ORT_DYLIB_PATH"]) },
        ],
    );
}

/// Before the model is loaded and the folder begun.
#[test]
fn ng_train_align_checks_what_it_will_need_later() {
    let run = "align --preset signs --set output=@/run --set";
    let told = &["validation", "\"a blue cat\" has no text"];
    let mistakes = [
        (format!("{run} prompts=@/empty.txt"), 1, &["@/empty.txt", "holds no prompt"]),
        (format!("{run} model=@/model --set output=@/file/run"), 1, &["@/file/run", ""]),
        (format!("{run} output=@/file --dry-run"), 1, &["@/file", "is a file"]),
        (format!("{run} lora.targets=[\"q\"] --dry-run"), 1, &["lora.targets: no layer", "[q]"]),
        (format!("{run} rewards.0.weight=0 --set rewards.1.weight=0"), 2, &["rewards", "weight"]),
        (format!("{run} rollout.size=[33,32]"), 2, &["rollout.size", "33x32"]),
        (format!("{run} validation.prompts=@/plain.txt"), 1, told),
        (format!("{run} validation.prompts=@/plain.txt --dry-run"), 1, told),
        (format!("{run} embeddings=@/model"), 1, &["embeddings: @/model", "no embedding of"]),
    ];
    let mistakes = mistakes.map(|(line, code, says)| mistake(line.leak(), code, says));
    Scratch::new().assert_refused(Program::Train, &mistakes);
}

#[test]
fn ng_train_eval_refuses_with_one_line() {
    Scratch::new().assert_refused(
        Program::Train,
        &[
            mistake(
                "eval --preset signs --model @/absent --out @/eval --prompts assets/prompts/signs-train.txt",
                1,
                &["@/absent"],
            ),
            mistake(
                "eval --preset signs --model @/model --out @/eval --prompts @/empty.txt",
                1,
                &["@/empty.txt", "holds no prompt"],
            ),
            mistake(
                "eval --preset signs --model @/file --out @/eval --prompts assets/prompts/signs-train.txt",
                2,
                &["@/file is a LoRA", "before it"],
            ),
        ],
    );
}

#[test]
fn ng_export_refuses_with_one_line() {
    Scratch::new().assert_refused(
        Program::Export,
        &[
            mistake("@/absent --out @/out", 1, &["@/absent: no such folder"]),
            mistake(
                "@/truncated --out @/out",
                1,
                &["@/truncated/vae/diffusion_pytorch_model.safetensors"],
            ),
            mistake("@/missing --out @/out", 1, &["@/missing/transformer", TENSOR, "missing"]),
            mistake("@/misshaped --out @/out", 1, &["@/misshaped/transformer", TENSOR, "[64, "]),
            mistake("@/mistyped --out @/out", 1, &["@/mistyped/transformer", TENSOR, "I64"]),
            mistake("@/absurd --out @/out", 1, &["@/absurd/transformer/config.json", "num_layers"]),
            mistake("@/pickled --out @/out", 1, &["@/pickled/vae", "ng-train convert"]),
            mistake("@/no-folder --out @/out", 1, &["@/no-folder/text_encoder_2"]),
            mistake("@/model --out @/file/out", 1, &["@/file"]),
            mistake("@/model --out @/missing", 1, &["@/missing", "--force"]),
            mistake(
                "@/model --out @/out --lora @/absent.safetensors",
                1,
                &["@/absent.safetensors"],
            ),
            mistake("@/model --out @/out --lora @/model/vae", 1, &["@/model/vae"]),
            mistake("@/model --out @/out --precision fp8", 2, &["target cpu", "choose int8"]),
            mistake(
                "@/model --out @/out --target tensorrt --attention multi-head",
                2,
                &["standard"],
            ),
            mistake("@/model --out @/out --block-size 48 --precision int4", 2, &["48", "from 16"]),
            mistake("@/model", 2, &["--out"]),
        ],
    );
}

#[test]
fn ng_export_refuses_to_verify_without_onnx_runtime() {
    let scratch = Scratch::new();
    Program::Train.run(["reference", &typed(&scratch.path("model"))]).succeeded();
    let arguments = "@/model --out @/out --verify";
    let mistake =
        Mistake { without_runtime: true, ..mistake(arguments, 1, &["ORT_DYLIB_PATH", "unset it"]) };
    scratch.assert_refused(Program::Export, &[mistake]);
}

#[test]
fn ng_sample_refuses_with_one_line() {
    const FOX: &str = "--model @/export --prompt fox --output @/a.png";
    Scratch::with_exports().assert_refused(
        Program::Sample,
        &[
            mistake(
                "--model @/absent --prompt fox --output @/a.png",
                1,
                &["@/absent: no such folder"],
            ),
            mistake(
                "--model @/model --prompt fox --output @/a.png",
                1,
                &["model.onnx", "ng-export"],
            ),
            mistake(
                "--model @/no-graph --prompt fox --output @/a.png",
                1,
                &["vae_decoder/model.onnx"],
            ),
            mistake(
                "--model @/cut-graph --prompt fox --output @/a.png",
                1,
                &["@/cut-graph/transformer"],
            ),
            mistake("--model @/export --prompts @/empty.txt --output @/a.png", 1, &["@/empty.txt"]),
            mistake(
                "--model @/export --prompts @/absent.txt --output @/a.png",
                1,
                &["@/absent.txt"],
            ),
            mistake("--model @/export --prompt fox --output @/file/a.png", 1, &["@/file"]),
            mistake(
                "--model @/export --prompt fox --output @/a.png --steps 0",
                2,
                &["--steps", "0"],
            ),
            mistake(
                "--model @/export --prompt fox --output @/a.png --width 33",
                2,
                &["33x64", "16"],
            ),
            mistake(
                "--model @/export --prompt fox --output @/a.png --guidance 2",
                2,
                &["--guidance"],
            ),
            mistake(
                "--model @/export --prompt fox --output @/a.png --noise @/export/model_index.json",
                1,
                &["@/export/model_index.json"],
            ),
            mistake("--prompt fox --output @/a.png", 2, &["--model"]),
            Mistake { without_runtime: true, ..mistake(FOX, 1, &["ORT_DYLIB_PATH", "unset it"]) },
        ],
    );
}
