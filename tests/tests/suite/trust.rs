//! What a run and its folder survive: kills, damage, company, signals, a server that goes away.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use flow::checkpoint::{Entry, Weights, write_tensors};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tests::fixture::{copy_folder, entries_below, root};
use tests::program::{Ended, Program, typed};

use crate::align::{MODEL, Run, SHORT};

/// State of a checkpoint.
const STATE: &str = "training_state.safetensors";
/// Sums of a finished folder.
const SUMS: &str = "SHA256SUMS";

/// Everything a finished run has made, by its sums.
fn sums(run: &Run) -> [String; 2] {
    let aligned = run.folder().join("aligned").join(SUMS);
    let state = run.checkpoint(6).join(STATE);
    let state = fs::read(state).unwrap();
    // The state names the output folder, which differs.
    let length = u64::from_le_bytes(state[..8].try_into().unwrap()) as usize;
    let numbers = state[8 + length..].iter().fold(0_u64, |sum, &byte| {
        sum.wrapping_mul(1_099_511_628_211).wrapping_add(u64::from(byte))
    });
    [fs::read_to_string(aligned).unwrap(), numbers.to_string()]
}

/// Hidden names anywhere in the output folder.
fn hidden(folder: &Path) -> Vec<PathBuf> {
    let mut entries = entries_below(folder);
    entries.retain(|entry| entry.file_name().unwrap().to_string_lossy().starts_with('.'));
    entries
}

/// Changes one bit of `file`, `from_end` bytes before its end.
fn flip(file: &Path, from_end: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
    let (at, mut byte) = (file.metadata().unwrap().len() - from_end, [0]);
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn kills_while_saving_lose_nothing_and_leave_nothing() {
    let (whole, killed) = (Run::new(), Run::new());
    Ended::after(&mut whole.command(&["save_every=1"])).succeeded();
    let saving = |folder: &Path| {
        let checkpoints = fs::read_dir(folder.join("checkpoints"));
        let mut names = checkpoints.into_iter().flatten().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_string_lossy().starts_with(".iteration"))
    };
    for _ in 0..3 {
        let mut child = killed.start_with(&["save_every=1"], &["--resume"]);
        killed.wait_for(&mut child, saving);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(!hidden(&killed.folder()).is_empty(), "nothing was half-written");
    let ended = Ended::after(killed.command(&["save_every=1"]).arg("--resume"));
    assert!(ended.stderr.contains("unfinished files and folders"), "{}", ended.stderr);
    ended.succeeded();
    assert_eq!(hidden(&killed.folder()), [] as [PathBuf; 0]);
    assert_eq!(sums(&whole), sums(&killed), "equal runs are equal to the byte");
    assert_eq!(whole.metrics(), killed.metrics());
}

/// Something bad that happens to a run's folder.
type Damage = fn(&Run);

#[test]
fn a_damaged_checkpoint_is_passed_over_and_said() {
    let run = Run::new();
    Ended::after(&mut run.command(&[])).succeeded();
    let (right, newest) = (sums(&run), run.checkpoint(6));
    let damages: [(Damage, &str); 5] = [
        (|run| flip(&run.checkpoint(6).join(STATE), 4000), "training_state.safetensors: damaged"),
        (|run| flip(&run.checkpoint(6).join("vae/config.json"), 9), "vae/config.json: damaged"),
        (
            |run| fs::write(run.checkpoint(6).join(STATE), b"short").unwrap(),
            "training_state.safetensors: damaged",
        ),
        (
            |run| fs::remove_file(run.checkpoint(6).join("model_index.json")).unwrap(),
            "model_index.json: missing",
        ),
        // The right state of another iteration, in a folder without sums.
        (
            |run| {
                fs::copy(run.checkpoint(4).join(STATE), run.checkpoint(6).join(STATE)).unwrap();
                fs::remove_file(run.checkpoint(6).join(SUMS)).unwrap();
            },
            "is the state of iteration 4, not of 6",
        ),
    ];
    for (damage, says) in damages {
        fs::remove_dir_all(run.folder().join("aligned")).unwrap();
        damage(&run);
        let ended = Ended::after(run.command(&[]).arg("--resume"));
        let warnings: Vec<&str> =
            ended.stderr.lines().filter(|line| line.starts_with("warning: ")).collect();
        let [warning] = warnings[..] else { panic!("one warning: {}", ended.stderr) };
        assert!(warning.contains(says) && warning.contains("iteration-000004"), "{warning}");
        ended.succeeded();
        assert_eq!(sums(&run), right, "after {says}");
    }
    // With every checkpoint damaged there is nothing to go on from, and nothing is begun anew unasked.
    fs::remove_dir_all(run.folder().join("aligned")).unwrap();
    for checkpoint in [&newest, &run.checkpoint(4)] {
        flip(&checkpoint.join(STATE), 4000);
    }
    let ended = Ended::after(run.command(&[]).arg("--resume"));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("no checkpoint is whole"), "{}", ended.stderr);
    // Without a list of sums nobody knows.
    fs::remove_file(newest.join(SUMS)).unwrap();
    let ended = Ended::after(run.command(&[]).arg("--resume"));
    let says =
        "iteration-000006/SHA256SUMS: missing, so whether this checkpoint is damaged is not known";
    assert!(ended.stderr.contains(says), "{}", ended.stderr);
    ended.succeeded();
}

/// One command line serves a job that is queued again and again.
#[test]
fn resume_begins_goes_on_and_is_content() {
    let run = Run::new();
    let once = |more: &[&str]| Ended::after(run.command(more).arg("--resume"));
    once(&["iterations=2"]).succeeded();
    let done = once(&["iterations=2"]);
    assert!(done.stderr.contains("all 2 iterations are done"), "{}", done.stderr);
    assert_eq!(done.succeeded().trim(), typed(&run.folder().join("aligned")));
    // A finished model that was damaged is written again.
    flip(&run.folder().join("aligned/vae/config.json"), 9);
    once(&["iterations=2"]).succeeded();
    let metrics = run.folder().join("metrics.jsonl");
    fs::write(&metrics, "{\"step\":1,\n").unwrap();
    let ended = once(&["iterations=4"]);
    assert!(ended.stderr.contains("2 of the first 2 iterations are missing"), "{}", ended.stderr);
    ended.succeeded();
    assert_eq!(run.metrics().len(), 2);
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn a_folder_has_one_run_and_every_signal_saves() {
    let run = Run::new();
    let endless = ["iterations=100000", "save_every=100000"];
    let goes_on = |from: usize| {
        move |folder: &Path| {
            let metrics = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
            metrics.lines().count() > from
        }
    };
    let mut done = 0;
    for (name, kind) in
        [("SIGHUP", Signal::HUP), ("SIGUSR1", Signal::USR1), ("Ctrl-C", Signal::INT)]
    {
        let mut child = run.start_with(&endless, &["--resume"]);
        run.wait_for(&mut child, goes_on(done));
        if done == 0 {
            for arguments in [&["--resume"][..], &[]] {
                let second = Ended::after(run.command(&endless).args(arguments));
                assert_eq!(second.status.code(), Some(1));
                let holder = format!("another run (process {})", child.id());
                assert!(second.stderr.contains(&holder), "{}", second.stderr);
                assert_eq!(second.stderr.lines().count(), 1, "{}", second.stderr);
            }
        }
        signal(&child, kind);
        signal(&child, kind);
        let ended = Ended::of(child);
        assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
        let answer = ended.stderr.lines().find(|line| line.starts_with(name));
        let answer = answer.unwrap_or_else(|| panic!("{name}: {}", ended.stderr));
        assert!(answer.contains("stopping: waits for"), "{answer}");
        let now = run.metrics().len();
        assert!(now > done && run.checkpoint(now).join(STATE).is_file(), "{name} after {now}");
        done = now;
    }
}

/// What a library does where memory is gone, and the system where a mapped file was cut short.
#[test]
fn what_ends_a_program_unasked_is_one_line() {
    for (kind, line) in [
        (
            Signal::ABORT,
            "error: ended by a library, most likely out of memory: lower rollout.batch",
        ),
        (Signal::BUS, "error: a file was cut short while it was read"),
    ] {
        let run = Run::new();
        let mut child = run.start_with(&["iterations=100000"], &["--resume"]);
        run.wait_for(&mut child, |folder| folder.join("metrics.jsonl").exists());
        signal(&child, kind);
        let ended = Ended::of(child);
        assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with(line), "{}", ended.stderr);
    }
}

/// Answers so many requests, then nobody is there. The number of the request and the length of an image say its
/// score.
pub(crate) fn server(
    address: &str,
    n_answers: usize,
    score: impl Fn(usize, usize) -> f64 + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    answering(address, n_answers, move |call, request| {
        let images = request["images"].as_array().unwrap();
        let length = |image: &Value| image.as_str().unwrap().len();
        let scores: Vec<f64> = images.iter().map(|image| score(call, length(image))).collect();
        serde_json::json!({ "scores": scores })
    })
}

/// Answers so many requests in JSON, by their number and what they say, then nobody is there.
pub(crate) fn answering(
    address: &str,
    n_answers: usize,
    answer: impl Fn(usize, &Value) -> Value + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let answering = thread::spawn(move || {
        for (call, stream) in listener.incoming().take(n_answers).enumerate() {
            let mut stream = stream.unwrap();
            let (mut request, mut part) = (Vec::new(), [0; 1 << 12]);
            let body = loop {
                let n = stream.read(&mut part).unwrap();
                assert!(n > 0, "the request ends early");
                request.extend_from_slice(&part[..n]);
                let text = String::from_utf8_lossy(&request).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.lines().find_map(|line| {
                    line.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok()
                });
                if length.is_some_and(|length| body.len() >= length) {
                    break body.to_owned();
                }
            };
            let answer = answer(call, &serde_json::from_str(&body).unwrap()).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", answer.len());
            stream
                .write_all(format!("{head}Connection: close\r\n\r\n{answer}").as_bytes())
                .unwrap();
        }
    });
    (address, answering)
}

/// Two groups an iteration are two requests. Of two ranks one is answered in the fourth; both save.
#[test]
fn a_server_that_goes_away_costs_no_iteration() {
    goes_away(1, 6, "iteration 4: reward \"far\" failed");
    goes_away(2, 7, ": reward \"far\" failed");
}

fn goes_away(n_ranks: usize, n_answers: usize, expected: &str) {
    let run = Run::new();
    let (address, answering) = server("127.0.0.1:0", n_answers, |_, length| length as f64);
    let rewards = format!(
        "rewards=[{{name='far', kind='server', url='http://{address}/', weight=1, retries=0, patience=0}}]"
    );
    let command = |more: &[&str]| {
        let mut command = Program::Train.command(["align", "--preset", "signs", "--resume"]);
        let settings: Vec<&str> =
            SHORT.iter().filter(|setting| !setting.starts_with("rewards.")).copied().collect();
        let places = [format!("model={MODEL}"), format!("output={}", typed(&run.folder()))];
        let settings = settings.iter().chain(more).map(|&setting| setting.to_owned());
        for setting in settings.chain(places).chain([rewards.clone()]) {
            command.args(["--set", &setting]);
        }
        if n_ranks > 1 {
            command.args(["--processes", &n_ranks.to_string()]);
        }
        command
    };
    let ended = Ended::after(&mut command(&["save_every=100"]));
    answering.join().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let said = ended.stderr.lines().filter(|line| line.contains(expected));
    let saved = said
        .filter(|line| line.contains("iteration 4") && line.contains("saved after iteration 3"));
    assert_eq!(saved.count(), n_ranks, "{}", ended.stderr);
    assert!(run.checkpoint(3).join("SHA256SUMS").is_file());
    let (_, answering) = server(&address.to_string(), 6, |_, length| length as f64);
    Ended::after(&mut command(&["save_every=100"])).succeeded();
    answering.join().unwrap();
    assert_eq!(run.metrics().len(), 6);
}

#[test]
fn only_what_belongs_is_carried_and_what_stays_is_one_file() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model");
    copy_folder(&root().join(MODEL), &model);
    fs::write(model.join("flux1-dev.safetensors"), vec![0; 1 << 16]).unwrap();
    fs::write(model.join("vae/dev.png"), "").unwrap();
    let run = Run::new();
    let places = format!("model={}", typed(&model));
    let more = ["iterations=2", "save_every=1"];
    let command = || {
        let mut command = run.command(&more);
        command.args(["--set", &places]);
        command
    };
    let secret = home.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    symlink(&secret, model.join("LICENSE")).unwrap();
    let refused = Ended::after(&mut command());
    assert!(refused.stderr.contains("LICENSE: is a link to"), "{}", refused.stderr);
    assert!(!run.folder().exists());
    fs::remove_file(model.join("LICENSE")).unwrap();
    Ended::after(&mut command()).succeeded();
    let made = [run.checkpoint(1), run.checkpoint(2), run.folder().join("aligned")];
    let weights = "text_encoder_2/model.safetensors";
    let inode = |folder: &PathBuf| fs::metadata(folder.join(weights)).unwrap().ino();
    for folder in &made {
        assert!(
            !folder.join("flux1-dev.safetensors").exists() && !folder.join("vae/dev.png").exists()
        );
        assert_eq!(inode(folder), inode(&made[0]));
    }
    assert_ne!(inode(&made[0]), inode(&model), "the model itself is not shared");
}

#[test]
fn what_is_not_finite_is_neither_scored_nor_written() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("model");
    copy_folder(&root().join(MODEL), &model);
    let file = model.join("vae/diffusion_pytorch_model.safetensors");
    let weights = Weights::open_file(&file).unwrap();
    let entries: Vec<Entry<'_>> = weights
        .names()
        .map(|name| {
            let (view, mut values) = (weights.get(name).unwrap(), weights.f32(name).unwrap());
            if name == "decoder.conv_in.weight" {
                values[7] = f32::NAN;
            }
            Entry::f32(name, view.shape, &values)
        })
        .collect();
    write_tensors(&file, &entries, &[]).unwrap();
    drop(entries);
    let run = Run::new();
    let ended = Ended::after(run.command(&[]).args(["--set", &format!("model={}", typed(&model))]));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("decoded pixels are not finite"), "{}", ended.stderr);
    assert!(!run.folder().join("aligned").exists() && !run.folder().join("checkpoints").exists());
    let out = home.path().join("a.png");
    let latents = home.path().join("latents.safetensors");
    let sampled = ["sample", "--model", &typed(&model), "--prompt", "a", "-o", &typed(&out)];
    let more = ["--latents-out", &typed(&latents)];
    let ended = Program::Train.run(sampled.into_iter().chain(more));
    assert!(ended.status.code() == Some(1) && !out.exists(), "{}", ended.stderr);
    assert!(!latents.exists());
    let ended = Program::Train.run(["reference", &typed(&model)]);
    assert!(
        ended.stderr.contains("vae: answers with numbers that are not finite"),
        "{}",
        ended.stderr
    );
}

/// Each was a panic, an abort, gigabytes, or a run that trains nonsense.
#[test]
fn absurd_settings_are_one_line() {
    let run = Run::new();
    for (setting, names) in [
        ("lora.rank=1000000", "lora.rank"),
        ("group_size=1000000000", "group_size"),
        ("rollout.size=[1000000,1000000]", "rollout.size"),
        ("prompts_per_iteration=100000000", "prompts_per_iteration"),
        ("optimizer.ema=1", "optimizer.ema"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate"),
        ("rewards.0.std_floor=nan", "std_floor"),
        ("keep=0", "keep"),
    ] {
        let ended = Ended::after(&mut run.command(&[setting]));
        assert_eq!(ended.status.code(), Some(2), "{setting}: {}", ended.stderr);
        let lines = ended.stderr.lines().count();
        assert!(lines == 1 && ended.stderr.contains(names), "{setting}: {}", ended.stderr);
        assert!(!run.folder().exists(), "{setting}");
    }
}

/// Damage by other hands while a run goes on does not end it.
#[test]
fn metrics_that_vanish_begin_anew() {
    let run = Run::new();
    let mut child = run.start_with(&["iterations=8"], &[]);
    run.wait_for(&mut child, |folder| folder.join("checkpoints/iteration-000002").exists());
    fs::remove_file(run.folder().join("metrics.jsonl")).unwrap();
    thread::sleep(Duration::from_millis(1));
    Ended::of(child).succeeded();
    assert!((1..8).contains(&run.metrics().len()));
}
