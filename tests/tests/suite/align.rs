//! `ng-train align` on the embedded model against the pretrained reader: interruption, resumption,
//! controls and what it leaves behind. Runs are as short as they can be.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flow::checkpoint::Weights;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tests::fixture::{files_below, root};
use tests::program::{Ended, Program, typed};

/// The model that runs start from.
pub(crate) const MODEL: &str = "assets/signs";
/// Weights of the transformer in a pipeline folder.
pub(crate) const WEIGHTS: &str = "transformer/diffusion_pytorch_model.safetensors";
/// Files of a pipeline folder that a run writes itself or leaves behind: a README tells of its own model.
const MADE_ANEW: [&str; 4] =
    [WEIGHTS, "reference.safetensors", "training_state.safetensors", "README.md"];
/// A run of six iterations, a second or two long.
pub(crate) const SHORT: [&str; 10] = [
    "iterations=6",
    "prompts_per_iteration=2",
    "group_size=4",
    "anchors=2",
    "updates=2",
    "train_steps=2",
    "rollout.steps=4",
    "save_every=2",
    "validate_every=0",
    "rewards.0.std_floor=1e-6",
];
/// Longest wait for a file of a run.
const PATIENCE: Duration = Duration::from_mins(2);

/// Of [`SHORT`], what the algorithm of `settings` does not read.
fn unread(settings: &[&str]) -> &'static [&'static str] {
    let name = settings.iter().find_map(|setting| setting.strip_prefix("algorithm="));
    match name.unwrap_or_default() {
        "branch-grpo" | "refl" | "draft-lv" => &["anchors", "train_steps"],
        "diffusion-nft" | "v-grpo" | "awm" | "dgpo" => &["anchors"],
        name if name.starts_with("mix-") || name == "flow-grpo-fast" => &["train_steps"],
        _ => &[],
    }
}

/// The output folder of one run.
pub(crate) struct Run {
    home: TempDir,
}

impl Run {
    pub(crate) fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap() }
    }

    /// A folder for what belongs to it.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.home.path().join("run")
    }

    /// `ng-train align` of the preset with the settings of [`SHORT`] and `more`.
    pub(crate) fn command(&self, more: &[&str]) -> Command {
        let mut command = Program::Train.command(["align", "--preset", "signs"]);
        let places = [format!("model={MODEL}"), format!("output={}", typed(&self.folder()))];
        let unread = unread(more);
        let is_read =
            |setting: &&&str| !unread.iter().any(|key| setting.starts_with(&format!("{key}=")));
        let short = SHORT.iter().filter(is_read);
        let settings = short.chain(more).map(|&setting| setting.to_owned());
        for setting in settings.chain(places) {
            command.args(["--set", &setting]);
        }
        command
    }

    fn start(&self, more: &[&str]) -> Child {
        self.start_with(more, &[])
    }

    /// The same under way, with more `arguments`.
    pub(crate) fn start_with(&self, more: &[&str], arguments: &[&str]) -> Child {
        let mut command = self.command(more);
        command.args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Waits until `is_there` finds what it looks for while `child` runs.
    #[track_caller]
    pub(crate) fn wait_for(&self, child: &mut Child, is_there: impl Fn(&Path) -> bool) {
        let started = Instant::now();
        while !is_there(&self.folder()) {
            let status = child.try_wait().unwrap();
            assert!(status.is_none(), "the run ended before it could be interrupted: {status:?}");
            assert!(started.elapsed() < PATIENCE, "nothing after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Each step's metrics without those that measure time.
    pub(crate) fn metrics(&self) -> Vec<BTreeMap<String, Option<f64>>> {
        let text = fs::read_to_string(self.folder().join("metrics.jsonl")).unwrap();
        let mut steps: Vec<BTreeMap<String, Option<f64>>> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for step in &mut steps {
            step.retain(|name, _| name != "wall" && !name.starts_with("seconds/"));
        }
        steps
    }

    pub(crate) fn checkpoint(&self, iteration: usize) -> PathBuf {
        self.folder().join(format!("checkpoints/iteration-{iteration:06}"))
    }
}

#[track_caller]
fn value(step: &BTreeMap<String, Option<f64>>, name: &str) -> f64 {
    step.get(name).copied().flatten().unwrap_or_else(|| panic!("no finite {name} in {step:?}"))
}

/// Whether both files hold the same tensors to the bit.
#[track_caller]
pub(crate) fn same_tensors(a: &Path, b: &Path) -> bool {
    let [a, b] = [a, b].map(|path| Weights::open_file(path).unwrap());
    assert_eq!(a.names().collect::<Vec<_>>(), b.names().collect::<Vec<_>>());
    a.names().all(|name| {
        let (a, b) = (a.get(name).unwrap(), b.get(name).unwrap());
        a.shape == b.shape && a.dtype == b.dtype && a.bytes == b.bytes
    })
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let (whole, killed) = (Run::new(), Run::new());
    Ended::after(&mut whole.command(&[])).succeeded();

    let mut child = killed.start(&[]);
    killed.wait_for(&mut child, |_| killed.checkpoint(2).exists());
    child.kill().unwrap();
    assert_eq!(Ended::of(child).status.signal(), Some(9));
    assert!(!killed.folder().join("aligned").exists(), "the run was over already");
    Ended::after(killed.command(&[]).arg("--resume")).succeeded();

    let aligned = format!("aligned/{WEIGHTS}");
    let of = |file: &str| [&whole, &killed].map(|run| run.folder().join(file));
    let [a, b] = of(&aligned);
    assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap(), "the resumed run ended elsewhere");
    assert!(!same_tensors(&a, &root().join(MODEL).join(WEIGHTS)), "nothing was trained");
    let [a, b] = of("checkpoints/iteration-000006/training_state.safetensors");
    assert!(same_tensors(&a, &b), "optimiser or full weights differ");
    assert_eq!(whole.metrics(), killed.metrics());
    assert_eq!(whole.metrics().len(), 6);
}

#[test]
fn the_ratio_is_one_before_the_first_update() {
    let run = Run::new();
    Ended::after(&mut run.command(&["iterations=4", "optimizer.learning_rate=1e-4"])).succeeded();
    let (mut largest, mut moved) = (0.0, 0.0);
    for step in run.metrics() {
        largest = f64::max(largest, value(&step, "policy/log_ratio_first"));
        moved = f64::max(moved, value(&step, "policy/log_ratio_max"));
    }
    println!("|log ratio|: {largest:.1e} before the first updates, at most {moved:.1e} after");
    assert!(largest < 1e-5, "{largest:.1e}");
    assert!(moved > 10.0 * largest, "updates do not move the policy: {moved:.1e}");
}

#[test]
fn a_constant_reward_trains_nothing() {
    let run = Run::new();
    let config = run.home.path().join("constant.toml");
    let text = format!(
        "model = '{MODEL}'\noutput = '{}'\nprompts = 'assets/prompts/signs-train.txt'\n\
         sheet_prompts = 'assets/prompts/signs-held-out.txt'\niterations = 3\n\
         prompts_per_iteration = 2\ngroup_size = 4\nanchors = 2\nupdates = 2\n\
         [rollout]\nsteps = 4\n[optimizer]\nlearning_rate = 1e-3\n\
         [[rewards]]\nname = 'nothing'\nkind = 'constant'\nvalue = 0.5\nweight = 1.0\n",
        typed(&run.folder())
    );
    fs::write(&config, text).unwrap();
    Program::Train.run(["align", "--config", &typed(&config)]).succeeded();
    let before = root().join(MODEL).join(WEIGHTS);
    assert!(same_tensors(&before, &run.folder().join("aligned").join(WEIGHTS)));
    let steps = run.metrics();
    assert_eq!(steps.len(), 3);
    for step in &steps {
        for (name, expected) in
            [("reward/nothing", 0.5), ("advantage/flat_groups", 1.0), ("optimizer/updates", 0.0)]
        {
            assert_eq!(step.get(name), Some(&Some(expected)), "{name}");
        }
    }
}

#[test]
fn an_interrupted_run_saves_and_says_how_to_go_on() {
    let run = Run::new();
    // Nothing but the interrupt ends or saves it.
    let endless = ["iterations=100000", "save_every=100000"];
    let mut child = run.start(&endless);
    run.wait_for(&mut child, |folder| {
        fs::metadata(folder.join("metrics.jsonl")).is_ok_and(|metrics| metrics.len() > 0)
    });
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = Ended::of(child);
    assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("stopped after iteration") && last.contains("--resume"), "{last}");

    let done = run.metrics().len();
    assert!(run.checkpoint(done).join("training_state.safetensors").is_file(), "after {done}");
    assert!(!run.folder().join("aligned").exists());
    let total = format!("iterations={}", done + 2);
    Ended::after(run.command(&[&total]).arg("--resume")).succeeded();
    let steps: Vec<f64> = run.metrics().iter().map(|step| value(step, "step")).collect();
    let expected: Vec<f64> = (1..=done + 2).map(|step| step as f64).collect();
    assert_eq!(steps, expected);
    assert!(run.folder().join("aligned").join(WEIGHTS).is_file());
}

#[test]
fn a_run_is_never_overwritten_nor_resumed_with_other_settings() {
    let run = Run::new();
    Ended::after(&mut run.command(&["iterations=2"])).succeeded();
    let files = files_below(&run.folder());
    for (more, resume, expected) in [
        (vec!["iterations=2"], false, "--resume"),
        (vec!["iterations=4", "sigma=0.25", "rollout.batch=5"], true, "sigma was 0.5 and is 0.25"),
    ] {
        let mut command = run.command(&more);
        if resume {
            command.arg("--resume");
        }
        let ended = Ended::after(&mut command);
        assert_eq!(ended.status.code(), Some(1), "{more:?}");
        let n_lines = ended.stderr.lines().count();
        assert!(ended.stderr.starts_with("error: ") && n_lines == 1, "{}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{expected} is not in: {}", ended.stderr);
        let now = files_below(&run.folder());
        assert_eq!(now, files, "{more:?} left a file");
        assert_eq!(run.metrics().len(), 2);
    }
}

fn is_event_file(path: &Path) -> bool {
    path.to_string_lossy().contains("tfevents")
}

#[test]
fn a_run_leaves_a_whole_pipeline_and_its_records() {
    let run = Run::new();
    Ended::after(&mut run.command(&[])).succeeded();
    let (folder, model) = (run.folder(), root().join(MODEL));
    for file in ["config.toml", "metrics.jsonl", "curve.png", "samples/iteration-000000.png"] {
        assert!(folder.join(file).is_file(), "no {file}");
    }
    assert!(files_below(&folder).iter().any(|path| is_event_file(path)), "no TensorBoard file");
    let kept: Vec<PathBuf> = (1..=6).map(|i| run.checkpoint(i)).filter(|c| c.exists()).collect();
    assert_eq!(kept, [run.checkpoint(4), run.checkpoint(6)]);

    let carried: Vec<PathBuf> = files_below(&model)
        .into_iter()
        .filter(|file| !MADE_ANEW.contains(&&*file.to_string_lossy()))
        .collect();
    assert!(carried.len() > 10);
    let checkpoint = (run.checkpoint(6), "training_state.safetensors");
    for (copy, own) in [checkpoint, (folder.join("aligned"), "reference.safetensors")] {
        for file in &carried {
            let (before, after) = (fs::read(model.join(file)), fs::read(copy.join(file)));
            assert!(before.unwrap() == after.unwrap(), "{} changed", file.display());
        }
        assert!(copy.join(own).is_file(), "no {own} in {}", copy.display());
        let [before, after] =
            [&model, &copy].map(|folder| Weights::open_file(&folder.join(WEIGHTS)).unwrap());
        for name in before.names() {
            let (before, after) = (before.get(name).unwrap(), after.get(name).expect(name));
            assert_eq!((before.shape, before.dtype), (after.shape, after.dtype), "{name}");
        }
        assert_eq!(before.names().count(), after.names().count());
        let expected = carried.len() + 3;
        assert_eq!(files_below(&copy).len(), expected, "{:?}", files_below(&copy));
    }
    let export = typed(&run.home.path().join("export"));
    let aligned = typed(&folder.join("aligned"));
    let table = Program::Export.run([&aligned, "--verify", "--out", &export]).succeeded();
    println!("the aligned model, libtorch against ONNX Runtime\n{table}");
}

/// Adapters beside weights that stay on disk: the run leaves them alone in diffusers' file, resumes to
/// the bit, and both other programs take them.
#[test]
fn adapters_are_trained_resumed_sampled_and_merged() {
    let settings = ["lora.rank=4", "lora.alpha=8", "stream=true", "optimizer.learning_rate=1e-2"];
    let with = |n: &'static str| [&settings[..], &[n]].concat();
    let (whole, halves) = (Run::new(), Run::new());
    Ended::after(&mut whole.command(&with("iterations=4"))).succeeded();
    Ended::after(&mut halves.command(&with("iterations=2"))).succeeded();
    fs::remove_dir_all(halves.folder().join("aligned")).unwrap();
    Ended::after(halves.command(&with("iterations=4")).arg("--resume")).succeeded();
    let file = "aligned/pytorch_lora_weights.safetensors";
    assert!(same_tensors(&whole.folder().join(file), &halves.folder().join(file)));
    let aligned = whole.folder().join("aligned");
    let names: Vec<PathBuf> = files_below(&aligned).into_iter().collect();
    assert_eq!(names.len(), 3, "adapters, reference tensors and sums alone: {names:?}");

    let home = whole.home.path();
    let sample = |more: &[String], to: &str| {
        let out = home.join(to);
        let mut command = Program::Train.command(["sample", "--model", MODEL]);
        command.args(["--prompt", "red \"CAT\"", "-o", &typed(&out)]).args(more);
        Ended::after(&mut command).succeeded();
        fs::read(out).unwrap()
    };
    let base = sample(&[], "base.png");
    let adapted = sample(&["--lora".into(), typed(&aligned)], "adapted.png");
    let silent = sample(&["--lora".into(), format!("{}:0", typed(&aligned))], "silent.png");
    assert!(adapted != base && silent == base);

    let export = typed(&home.join("export"));
    let merge = ["--lora".to_owned(), typed(&aligned), "--verify".to_owned()];
    let mut command = Program::Export.command([MODEL, "--out", &export]);
    Ended::after(command.args(&merge)).succeeded();
    let half = format!("{}:0.5", typed(&aligned));
    let mut command = Program::Export.command([MODEL, "--out", &export, "--force"]);
    Ended::after(command.args(["--lora", &half, "--verify"])).succeeded();
}
