//! `ng-train eval` on a tiny pipeline and adapters for it: what it compares, and what it does not do
//! twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use flow::checkpoint::{Entry, Weights, write_tensors};
use flow::lora;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use tempfile::TempDir;
use tests::fixture::{Fixture, PIPELINES, copy_folder, files_below};
use tests::program::{Ended, Program, typed};

const LAYER: &str = "transformer_blocks.0.attn.to_q";
const PROMPTS: [&str; 5] = ["a red fox", "a blue owl", "a green cat", "a black dog", "a white hen"];
/// Drawn and scored quickly.
const SETTINGS: [&str; 4] = [
    "rewards=[{name='small', kind='jpeg', prefer='small', weight=1}, \
     {name='large', kind='jpeg', prefer='large', weight=1}]",
    "judges=[]",
    "rollout.steps=2",
    "rollout.batch=2",
];
/// Longest wait for an image.
const PATIENCE: Duration = Duration::from_mins(2);

/// One model of `eval.json`.
#[derive(Debug, Deserialize, PartialEq)]
struct Column {
    model: String,
    means: Vec<(String, f64)>,
    per_prompt: Vec<Vec<f64>>,
    wins: Vec<Wins>,
}

impl Column {
    /// The same pictures up to rounding: a pixel that rounds the other way is a few bytes of a JPEG file.
    fn assert_near(&self, other: &Self) {
        let pairs = self.per_prompt.iter().zip(&other.per_prompt);
        for (a, b) in pairs.flat_map(|(a, b)| a.iter().zip(b)) {
            assert!((a - b).abs() < 0.02, "{:?} and {:?}", self.per_prompt, other.per_prompt);
        }
        assert_eq!(self.per_prompt.len(), other.per_prompt.len());
    }
}

#[derive(Debug, Deserialize, PartialEq)]
struct Wins {
    against: String,
    metric: String,
    share: f64,
    share_error: Option<f64>,
    difference: f64,
}

/// A pipeline, adapters for it, prompts, and the folder of a comparison.
struct Comparison {
    home: TempDir,
    fixture: Fixture,
}

impl Comparison {
    fn new() -> Self {
        let this =
            Self { home: tempfile::tempdir().unwrap(), fixture: Fixture::open(PIPELINES[0]) };
        let weights = "transformer/diffusion_pytorch_model.safetensors";
        let weights = Weights::open_file(&this.fixture.pipeline.join(weights)).unwrap();
        let shape = weights.get(&format!("{LAYER}.weight")).unwrap().shape.to_vec();
        let (rows, columns) = (shape[0], shape[1]);
        let [a, b]: [Vec<f32>; 2] =
            [columns, rows].map(|n| (0..n).map(|i| (i as f32 * 0.7).sin() * 3.0).collect());
        let entries = vec![
            Entry::f32(format!("{LAYER}.{}", lora::A), &[1, columns], &a),
            Entry::f32(format!("{LAYER}.{}", lora::B), &[rows, 1], &b),
        ];
        lora::write(Path::new(&this.lora()), entries).unwrap();
        fs::write(this.home.path().join("prompts.txt"), PROMPTS.join("\n")).unwrap();
        this
    }

    fn base(&self) -> String {
        typed(&self.fixture.pipeline)
    }

    fn lora(&self) -> String {
        typed(&self.home.path().join("aligned"))
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("eval")
    }

    fn command(&self, models: &[&str], more: &[&str]) -> Command {
        let mut command = Program::Train.command(["eval", "--preset", "signs"]);
        let size = format!(
            "rollout.size=[{},{}]",
            self.fixture.settings.width, self.fixture.settings.height
        );
        for setting in SETTINGS.iter().chain([&&*size]) {
            command.args(["--set", setting]);
        }
        for model in models {
            command.args(["--model", model]);
        }
        command.args(["--prompts", &typed(&self.home.path().join("prompts.txt"))]);
        command.args(["--out", &typed(&self.folder()), "--seed", "7"]).args(more);
        command
    }

    /// Runs it and reads what came of it.
    fn run(&self, models: &[&str], more: &[&str]) -> Vec<Column> {
        Ended::after(&mut self.command(models, more)).succeeded();
        serde_json::from_slice(&fs::read(self.folder().join("eval.json")).unwrap()).unwrap()
    }

    /// Images of all contestants, with the time each was written.
    fn images(&self) -> BTreeMap<PathBuf, SystemTime> {
        let mut files = files_below(&self.folder());
        files.retain(|file| {
            file.components().count() == 2 && file.extension().is_some_and(|ending| ending == "png")
        });
        let written = |file: &PathBuf| self.folder().join(file).metadata().unwrap().modified();
        files.into_iter().map(|file| (file.clone(), written(&file).unwrap())).collect()
    }
}

#[test]
fn a_lora_is_compared_on_the_same_noise_and_wins_are_counted() {
    let comparison = Comparison::new();
    let (base, lora) = (comparison.base(), comparison.lora());
    let silent = format!("{lora}:0");
    let columns = comparison.run(&[&base, &lora, &silent], &["--set", "rollout.batch=1"]);
    let models: Vec<&str> = columns.iter().map(|column| &*column.model).collect();
    assert_eq!(models, [&base, &lora, &silent]);
    let [plain, adapted, same] = &columns[..] else { panic!("{columns:?}") };
    // Adapters at scale 0 change nothing, in no bit: what is compared is computed by one path.
    assert_eq!(plain.per_prompt, same.per_prompt);
    assert!(plain.per_prompt.iter().zip(&adapted.per_prompt).all(|(a, b)| a != b));

    let n = PROMPTS.len() as f64;
    for (metric, [name, turned]) in [["small", "large"], ["large", "small"]].iter().enumerate() {
        let pairs = adapted.per_prompt.iter().zip(&plain.per_prompt);
        let won = pairs.filter(|(a, b)| a[metric] > b[metric]).count() as f64;
        let found = |column: &Column, against: &str, name: &str| {
            let wins = column.wins.iter().find(|w| w.against == against && w.metric == name);
            let Wins { share, share_error, difference, .. } = wins.unwrap();
            (*share, share_error.unwrap(), *difference)
        };
        let (share, error, difference) = found(adapted, &base, name);
        assert!((share - won / n).abs() < 1e-9, "{name}: {share} is not {won} of {n}");
        assert!((error - (share * (1.0 - share) / (n - 1.0)).sqrt()).abs() < 1e-9);
        let means = adapted.means[metric].1 - plain.means[metric].1;
        assert!((difference - means).abs() < 1e-6, "{difference} is not {means}");
        assert!((found(adapted, &base, turned).0 - (1.0 - share)).abs() < 1e-9);
        assert_eq!(found(same, &base, name), (0.5, 0.0, 0.0));
        assert!((found(same, &lora, name).0 - (1.0 - share)).abs() < 1e-9);
    }
    let table = fs::read_to_string(comparison.folder().join("eval.md")).unwrap();
    let header = "| model | small | large |\n| --- | ---: | ---: |\n";
    assert!(table.starts_with(header) && table.contains("| 0.500 ± 0.000 |"), "{table}");

    // The same image as `sample` draws.
    let drawn = comparison.home.path().join("drawn.png");
    let mut command = Program::Train.command(["sample", "--model", &base, "--lora", &lora]);
    command.args(["--prompt", PROMPTS[2], "--seed", "9", "--steps", "2", "--shift", "3"]);
    Ended::after(command.args(comparison.fixture.size()).args(["-o", &typed(&drawn)])).succeeded();
    let drawn = fs::read(drawn).unwrap();
    let images = comparison.images();
    let found: Vec<&PathBuf> = images
        .keys()
        .filter(|file| fs::read(comparison.folder().join(file)).unwrap() == drawn)
        .collect();
    let [found] = found[..] else { panic!("not one image like it: {found:?}") };
    let name = found.to_str().unwrap();
    assert!(name.starts_with("aligned-") && name.ends_with("/00002-0.png"), "{name}");
}

#[test]
fn a_folder_of_runs_is_each_of_them() {
    let comparison = Comparison::new();
    let (base, lora, runs) = (comparison.base(), comparison.lora(), comparison.home.path());
    for (name, place) in [("b", "run/aligned"), ("a", "checkpoints/iteration-000002")] {
        copy_folder(Path::new(&lora), &runs.join("runs").join(name).join(place));
    }
    let name = |place: &str| typed(&runs.join("runs").join(place));
    let models = [&*base, &name("b"), &name("a/checkpoints")];
    let ended = Ended::after(&mut comparison.command(&models, &[]));
    let note = format!("note: {}: takes run/aligned\n", name("b"));
    assert!(ended.stderr.contains(&note), "{}", ended.stderr);
    ended.succeeded();
    let columns: Vec<Column> =
        serde_json::from_slice(&fs::read(comparison.folder().join("eval.json")).unwrap()).unwrap();
    let found: Vec<&str> = columns.iter().map(|column| &*column.model).collect();
    let each = [&*base, &name("b/run/aligned"), &name("a/checkpoints/iteration-000002")];
    assert_eq!(found, each);
    assert_eq!(columns[1].per_prompt, columns[2].per_prompt);
    assert_ne!(columns[0].per_prompt, columns[1].per_prompt);

    let empty = name("a");
    let ended = Ended::after(&mut comparison.command(&[&base, &empty], &[]));
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("not a pipeline folder"), "{}", ended.stderr);
}

#[test]
fn what_is_known_is_not_made_again() {
    let comparison = Comparison::new();
    let (base, lora) = (comparison.base(), comparison.lora());
    let models = [&*base, &*lora];
    let columns = comparison.run(&models, &[]);
    let images = comparison.images();
    assert_eq!(images.len(), 2 * PROMPTS.len());
    assert_eq!(comparison.run(&models, &[]), columns);
    assert_eq!(comparison.images(), images);

    // What is lost comes back the same, together with the rest of its batch and nothing else.
    let pixels = |file: &Path| fs::read(comparison.folder().join(file)).unwrap();
    let lost = images.keys().find(|file| file.ends_with("00002-0.png")).unwrap();
    let before: Vec<Vec<u8>> = images.keys().map(|file| pixels(file)).collect();
    fs::remove_file(comparison.folder().join(lost)).unwrap();
    for folder in images.keys().map(|file| file.parent().unwrap()) {
        let scores = comparison.folder().join(folder).join("scores.json");
        if scores.exists() {
            fs::remove_file(scores).unwrap();
        }
    }
    assert_eq!(comparison.run(&models, &[]), columns);
    let again = comparison.images();
    assert_eq!(again.keys().map(|file| pixels(file)).collect::<Vec<_>>(), before);
    let anew: Vec<&PathBuf> = again.keys().filter(|&file| again[file] != images[file]).collect();
    assert_eq!(anew, [lost, &lost.with_file_name("00003-0.png")]);

    // Scores that are there are taken as they are.
    let scores = comparison.folder().join(lost).with_file_name("scores.json");
    let text = fs::read_to_string(&scores).unwrap();
    let first = text.split_once("[[").unwrap().1.split_once(']').unwrap().0.to_owned();
    fs::write(&scores, text.replacen(&first, "1234.5", 1)).unwrap();
    let told = format!("{:?}", comparison.run(&models, &[]));
    assert!(told.contains("1234.5") && comparison.images() == again, "{told}");

    // More images a prompt: those that are there stay. Another file: its own images.
    let more = comparison.run(&models, &["--images", "2"]);
    let twice = comparison.images();
    assert_eq!(twice.len(), 2 * images.len());
    assert!(again.iter().all(|(file, written)| twice[file] == *written));
    assert_ne!(more[0].means, columns[0].means);
    // Fewer again: the first of each, and scores of the others stay.
    for fewer in [&[][..], &["--processes", "2"]] {
        assert_eq!(comparison.run(&models, fewer), columns);
    }
    let file = fs::File::options().append(true).open(Path::new(&lora).join(lora::FILE)).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    comparison.run(&models, &["--images", "2"]);
    assert_eq!(comparison.images().len(), twice.len() + images.len());
}

#[test]
fn embeddings_stand_for_text_encoders_and_weights_may_stay_on_disk() {
    let comparison = Comparison::new();
    let place = |name: &str| typed(&comparison.home.path().join(name));
    let (base, deaf, cache) = (comparison.base(), place("deaf"), place("cache"));
    copy_folder(Path::new(&base), Path::new(&deaf));
    forget(&Path::new(&deaf).join("text_encoder_2/model.safetensors"));
    let whole = ["--set", "rollout.batch=5"];
    let columns = comparison.run(&[&base, &deaf], &whole);
    assert_ne!(columns[0].per_prompt, columns[1].per_prompt);

    let embedded = format!("embeddings={cache}");
    let more = [&whole[..], &["--set", &embedded, "--set", "stream=true"]].concat();
    let ended = Ended::after(&mut comparison.command(&[&deaf], &more));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let says = format!("error: {cache}: no embedding of {:?}: run `ng-train embed`", PROMPTS[0]);
    assert_eq!(ended.stderr.trim_end(), says);

    let prompts = place("prompts.txt");
    let embed = ["embed", "--model", &base, "--prompts", &prompts, "--out", &cache];
    Program::Train.run(embed).succeeded();
    let ended = Ended::after(&mut comparison.command(&[&deaf], &more));
    assert!(ended.stderr.contains("made by other text encoders"), "{}", ended.stderr);
    for file in files_below(Path::new(&cache)) {
        unmark(&Path::new(&cache).join(file));
    }
    comparison.run(&[&deaf], &more)[0].assert_near(&columns[0]);
}

/// Lets a file of embeddings tell nothing of what made it, as those of another program.
fn unmark(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let mark = b"\"encoders\"";
    let at = bytes.windows(mark.len()).position(|window| window == mark).unwrap();
    bytes[at + 1] = b'E';
    fs::write(path, bytes).unwrap();
}

/// Makes every value of a file 0.
fn forget(path: &Path) {
    let weights = Weights::open_file(path).unwrap();
    let zero = |name| {
        let view = weights.get(name).unwrap();
        Entry::raw(name, view.shape, view.dtype, vec![0; view.bytes.len()])
    };
    let entries: Vec<Entry<'_>> = weights.names().map(zero).collect();
    write_tensors(path, &entries, &[]).unwrap();
}

#[test]
fn several_processes_find_what_one_finds() {
    let comparison = Comparison::new();
    let prompts: Vec<String> = (0..40).map(|i| format!("{} {i}", PROMPTS[i % 5])).collect();
    fs::write(comparison.home.path().join("prompts.txt"), prompts.join("\n")).unwrap();
    let (base, lora) = (comparison.base(), comparison.lora());
    let pixels = || -> Vec<(PathBuf, Vec<u8>)> {
        let images = comparison.images().into_keys();
        images
            .map(|file| (file.clone(), fs::read(comparison.folder().join(file)).unwrap()))
            .collect()
    };
    let columns = comparison.run(&[&base, &lora], &[]);
    let alone = pixels();
    fs::remove_dir_all(comparison.folder()).unwrap();
    assert_eq!(comparison.run(&[&base, &lora], &["--processes", "3"]), columns);
    assert!(pixels() == alone);
    let files = files_below(&comparison.folder());
    let is_part = |file: &&PathBuf| file.to_string_lossy().contains("scores-rank");
    assert_eq!(files.iter().find(is_part), None);
    assert!(files.contains(&PathBuf::from("logs/rank-002.log")), "{files:?}");
}

#[test]
fn votes_of_the_page_need_nothing_else() {
    let home = TempDir::new().unwrap();
    let file = home.path().join("votes.json");
    let votes = r#"{"kind": "ng-votes", "version": 1, "models": ["base", "tuned"], "wins": {},
        "votes": [{"prompt": "a", "seed": 1, "winner": "tuned", "left": "base", "seconds": 1.5}]}"#;
    fs::write(&file, votes).unwrap();
    let text = Program::Train.run(["eval", "--votes", &typed(&file)]).succeeded();
    assert!(text.contains("| tuned | base | votes | 1.000"), "{text}");
}

#[test]
fn a_stopped_comparison_goes_on() {
    stops_and_goes_on(&[]);
    stops_and_goes_on(&["--processes", "2"]);
}

fn stops_and_goes_on(shared: &[&str]) {
    let (whole, stopped) = (Comparison::new(), Comparison::new());
    let many = ["--images", "24"];
    let base = whole.base();
    let columns = whole.run(&[&base], &many);

    let mut command = stopped.command(&[&base], &[&many, shared].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !stopped.folder().exists() || stopped.images().is_empty() {
        assert!(started.elapsed() < PATIENCE && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    let ended = Ended::of(child);
    assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
    assert!(ended.stderr.contains("the same command continues"), "{}", ended.stderr);
    let some = stopped.images();
    assert!(some.len() < 24 * PROMPTS.len(), "it was over before it could be stopped");

    assert_eq!(stopped.run(&[&base], &many), columns);
    let all = stopped.images();
    assert_eq!(all.len(), 24 * PROMPTS.len());
    assert!(some.iter().all(|(file, written)| all[file] == *written), "made twice");
}
