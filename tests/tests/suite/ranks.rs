//! `ng-train align` shared by several processes: what they learn together is what one learns, a run goes on
//! on another number of them, and one that ends takes the others along.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flow::checkpoint::Weights;
use rustix::process::{Pid, Signal, kill_process};
use tests::program::{Ended, Program, typed};

use crate::align::{MODEL, Run, SHORT, WEIGHTS, same_tensors};
use crate::trust::{answering, server};

/// A reward that costs nothing, and a rate at which one update can be seen.
pub(crate) const CHEAP: [&str; 3] = [
    "rewards=[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]",
    "judges=[]",
    "optimizer.learning_rate=1e-4",
];

fn shared(run: &Run, n: usize, more: &[&str]) -> Command {
    let mut command = run.command(&[&CHEAP[..], more].concat());
    if n > 1 {
        command.args(["--processes", &n.to_string()]);
    }
    command
}

/// AdamW's first moments after the first update of `world` ranks, which are its gradient but for a factor.
fn gradient(run: &Run, world: usize) -> Vec<Vec<f32>> {
    let files: Vec<Weights> =
        states(run, 1, world).iter().map(|path| Weights::open_file(path).unwrap()).collect();
    let segments = (0..).map(|index| format!("m.{index}"));
    let segments = segments.take_while(|name| files[0].get(name).is_some());
    segments.map(|name| files.iter().flat_map(|file| file.f32(&name).unwrap()).collect()).collect()
}

/// ‖a − b‖/‖a‖; b may be longer by what makes it even.
fn away(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = || a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    let [of_a, between] = [0.0, 1.0].map(|share| {
        pairs().map(|(a, b)| (f64::from(*a) - share * f64::from(*b)).powi(2)).sum::<f64>().sqrt()
    });
    between / of_a
}

/// Whole groups on each rank, and the members of one or two groups on several.
#[test]
fn ranks_learn_what_one_process_learns() {
    let cases: [(usize, &[&str]); 7] = [
        (2, &["algorithm=neighbor"]),
        (2, &["algorithm=neighbor", "ranks.shard=all"]),
        (2, &["algorithm=flow-grpo", "sde.kl=0.01", "ranks.shard=all", "prompts_per_iteration=1"]),
        (2, &["algorithm=diffusion-nft", "lora.rank=4", "ranks.shard=all"]),
        (4, &["algorithm=dance-grpo", "lora.rank=4", "prompts_per_iteration=1"]),
        (3, &["algorithm=diffusion-nft", "optimizer.ema=0.5", "group_size=6"]),
        (2, &["algorithm=branch-grpo", "prompts_per_iteration=1", "rollout.steps=5"]),
    ];
    for (world, case) in cases {
        let of_seed = |seed: &String| {
            let settings = [&["iterations=1", "updates=1", seed], case].concat();
            let runs = [1, world].map(|n| {
                let run = Run::new();
                Ended::after(&mut shared(&run, n, &settings)).succeeded();
                (run.metrics().remove(0), gradient(&run, n))
            });
            // A pixel that a rounding has moved is another reward: there is nothing to compare.
            let rewards = runs.each_ref().map(|(metrics, _)| metrics["reward_std/jpeg"]);
            (rewards[0] == rewards[1]).then_some(runs)
        };
        let seeds = (0..5).map(|seed| format!("seed={seed}"));
        let mut compared = seeds.filter_map(|seed| of_seed(&seed));
        let [(one, of_one), (several, of_several)] = compared.next().expect("rewards alike");
        assert_eq!(one.keys().collect::<Vec<_>>(), several.keys().collect::<Vec<_>>(), "{case:?}");
        let off = away(&of_one, &of_several);
        println!("{case:?} on {world}: the gradient is {off:.1e} away");
        assert!(off <= 1e-6, "{case:?} on {world}: {off:e}");
        for name in ["optimizer/grad_norm", "reward/jpeg", "advantage/norm", "nfe/update"] {
            let [one, several] = [one[name].unwrap(), several[name].unwrap()];
            let off = (one - several).abs();
            assert!(off <= 1e-6 * one.abs(), "{case:?} on {world}: {name} {one} {several}");
        }
    }
}

/// Files of the state in the checkpoint of `iteration`, by rank.
fn states(run: &Run, iteration: usize, world: usize) -> Vec<PathBuf> {
    let name = |rank| match world {
        1 => "training_state.safetensors".to_owned(),
        _ => format!("training_state-{rank:05}-of-{world:05}.safetensors"),
    };
    (1..=world).map(|rank| run.checkpoint(iteration).join(name(rank))).collect()
}

#[test]
fn a_run_goes_on_on_as_many_ranks_to_the_bit_and_on_another_number() {
    let (whole, parts) = (Run::new(), Run::new());
    let settings = ["optimizer.ema=0.5", "keep=1"];
    let shared = |run: &Run, n: usize, iterations: &'static str| {
        shared(run, n, &[&settings[..], &[iterations]].concat())
    };
    Ended::after(&mut shared(&whole, 2, "iterations=4")).succeeded();
    Ended::after(&mut shared(&parts, 2, "iterations=2")).succeeded();
    let of = |run: &Run| run.folder().join("aligned").join(WEIGHTS);
    let alone = Run::new();
    let divided = Run::new();
    for copy in [&alone, &divided] {
        tests::fixture::copy_folder(&parts.folder(), &copy.folder());
    }
    for (run, n, shard) in [(&parts, 2, "states"), (&alone, 1, "states"), (&divided, 2, "all")] {
        fs::remove_dir_all(run.folder().join("aligned")).unwrap();
        let mut shared = shared(run, n, "iterations=4");
        shared.arg("--resume").arg("--set").arg(format!("ranks.shard={shard}"));
        Ended::after(&mut shared).succeeded();
    }
    let [one, two] = [&whole, &parts].map(|run| states(run, 4, 2));
    for (one, two) in one.iter().zip(&two) {
        assert!(same_tensors(one, two), "{} differs", one.display());
    }
    assert!(same_tensors(&of(&whole), &of(&parts)), "two ranks went on elsewhere");
    // Later a pixel that a rounding has moved may be another reward.
    let norm = |run: &Run| run.metrics()[2]["optimizer/grad_norm"].unwrap();
    for (run, who) in [(&alone, "one process"), (&divided, "ranks that divide weights")] {
        let difference = (norm(run) / norm(&whole) - 1.0).abs();
        assert!(difference < 1e-6, "{who} went on elsewhere: {difference:e}");
    }
}

#[test]
fn a_checkpoint_of_several_processes_is_consolidated_and_a_damaged_one_passed_over() {
    let run = Run::new();
    let settings = ["iterations=4", "lora.rank=4", "optimizer.ema=0.5"];
    Ended::after(&mut shared(&run, 2, &settings)).succeeded();
    let (last, file) = (run.checkpoint(4), "pytorch_lora_weights.safetensors");
    let out = run.folder().join("consolidated");
    let consolidate =
        |from: &Path| Program::Train.run(["consolidate", &typed(from), "--out", &typed(&out)]);
    consolidate(&last).succeeded();
    assert!(same_tensors(&out.join(file), &run.folder().join("aligned").join(file)));
    let said = consolidate(&last).stderr;
    assert!(said.contains("consolidated exists"), "{said}");
    fs::remove_dir_all(&out).unwrap();
    let said = consolidate(&run.folder()).stderr;
    assert!(said.contains("holds no state of a run"), "{said}");

    let state = states(&run, 4, 2).remove(1);
    let mut bytes = fs::read(&state).unwrap();
    let at = bytes.len() - 5;
    bytes[at] ^= 4;
    fs::write(&state, bytes).unwrap();
    let said = consolidate(&last).stderr;
    assert!(said.contains("training_state-00002-of-00002.safetensors: damaged"), "{said}");
    assert!(!out.exists());
    fs::remove_dir_all(run.folder().join("aligned")).unwrap();
    let ended = Ended::after(shared(&run, 2, &settings).arg("--resume"));
    let said = &ended.stderr;
    assert_eq!(said.matches("training_state-00002-of-00002.safetensors: damaged").count(), 1);
    assert!(said.contains("going on from") && said.contains("iteration-000002"), "{said}");
    ended.succeeded();
    consolidate(&last).succeeded();
}

#[test]
fn prompts_that_cannot_be_shared_are_refused() {
    let run = Run::new();
    let ended = Ended::after(&mut shared(&run, 2, &["prompts_per_iteration=3"]));
    assert_eq!(ended.status.code(), Some(1));
    let expected =
        "prompts_per_iteration = 3: 2 ranks cannot share them evenly; the nearest is 2 or 4";
    assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    let compares = "rewards=[{name = 'better', kind = 'pairwise', weight = 1.0, judge = {kind = 'jpeg', prefer = \
                    'small'}}]";
    let ended = Ended::after(&mut shared(&run, 2, &["prompts_per_iteration=1", compares]));
    assert_eq!(ended.status.code(), Some(1));
    let expected = "reward \"better\" compares the images of a group, which 2 ranks with 1 prompts share: take 2 \
                    prompts_per_iteration or fewer ranks";
    assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    assert!(!run.folder().exists());
}

/// Process numbers of the ranks that `launcher` has started, by rank.
fn ranks_of(launcher: &Child) -> Vec<i32> {
    let path = format!("/proc/{0}/task/{0}/children", launcher.id());
    let children = fs::read_to_string(path).unwrap_or_default();
    let mut ranks: Vec<(usize, i32)> = children
        .split_whitespace()
        .filter_map(|pid| {
            let variables = fs::read_to_string(format!("/proc/{pid}/environ")).ok()?;
            let rank = variables.split('\0').find_map(|variable| variable.strip_prefix("RANK="))?;
            Some((rank.parse().ok()?, pid.parse().ok()?))
        })
        .collect();
    ranks.sort_unstable();
    ranks.into_iter().map(|(_, pid)| pid).collect()
}

#[test]
fn a_killed_rank_ends_the_run_and_is_named() {
    let run = Run::new();
    let mut command = shared(&run, 2, &["iterations=1000000", "save_every=1000000"]);
    let launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    let metrics = run.folder().join("metrics.jsonl");
    while fs::read_to_string(&metrics).unwrap_or_default().is_empty() {
        assert!(started.elapsed() < Duration::from_mins(2), "no iteration");
        std::thread::sleep(Duration::from_millis(10));
    }
    let ranks = ranks_of(&launcher);
    assert_eq!(ranks.len(), 2);
    kill_process(Pid::from_raw(ranks[1]).unwrap(), Signal::KILL).unwrap();
    let ended = Ended::of(launcher);
    assert_eq!(ended.status.code(), Some(137), "{}", ended.stderr);
    for expected in ["on rank 0: rank 1 has ended", "error: rank 1 was killed by signal 9"] {
        assert!(ended.stderr.contains(expected), "`{expected}` is not in: {}", ended.stderr);
    }
}

/// A run of `n` ranks under way, of which `command` has no end.
fn under_way(run: &Run, command: &mut Command, is_there: impl Fn(&Path) -> bool) -> Child {
    let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    run.wait_for(&mut launcher, is_there);
    launcher
}

/// One line on the terminal answers a signal, whoever gets it; the others' answers are in their logs.
#[test]
fn an_orderly_stop_is_answered_once_and_is_no_error() {
    for to_all in [false, true] {
        let run = Run::new();
        let mut command = shared(&run, 2, &["iterations=1000000", "save_every=1000000"]);
        let launcher = under_way(&run, &mut command, |folder| {
            fs::metadata(folder.join("metrics.jsonl")).is_ok_and(|metrics| metrics.len() > 0)
        });
        let (ranks, launcher_id) = (ranks_of(&launcher), launcher.id() as i32);
        let others = if to_all { &ranks[..] } else { &[] };
        // Ctrl-C reaches all processes of a terminal, and is passed on by the launcher, too.
        let kind = if to_all { Signal::INT } else { Signal::TERM };
        for &process in [launcher_id].iter().chain(others) {
            kill_process(Pid::from_raw(process).unwrap(), kind).unwrap();
        }
        let ended = Ended::of(launcher);
        assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
        assert!(!ended.stderr.contains("error: "), "{}", ended.stderr);
        let answers: Vec<&str> =
            ended.stderr.lines().filter(|line| line.contains("stopping")).collect();
        let [answer] = answers[..] else { panic!("one answer: {}", ended.stderr) };
        assert!(answer.contains("the end of the"), "{answer}");
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("stopped after iteration"), "{last}");
        let log = fs::read_to_string(run.folder().join("logs/rank-001.log")).unwrap();
        for expected in ["stopping: waits for", "stopped after iteration"] {
            assert!(log.contains(expected), "`{expected}` is not in the log: {log}");
        }
        assert!(run.checkpoint(run.metrics().len()).join("SHA256SUMS").is_file());
    }
}

/// The server answers the first iteration, two groups, or before it a validation of two prompts, and nobody after that.
#[test]
fn ranks_that_wait_for_a_reward_or_a_judge_stop_and_save() {
    let far = "name='far', kind='server', patience=5";
    for is_judge in [false, true] {
        let run = Run::new();
        let (address, answering) = server("127.0.0.1:0", 2, |_, length| length as f64);
        let far = format!("{far}, url='http://{address}/'");
        let own = if is_judge {
            let jpeg = "rewards=[{name='jpeg', kind='jpeg', prefer='small', weight=1}]";
            let judges = format!("judges=[{{{far}, weight=0}}]");
            vec![jpeg.to_owned(), judges, "validate_every=1".into(), "validation={count=2}".into()]
        } else {
            let rewards = format!("rewards=[{{{far}, weight=1}}]");
            vec![rewards, "judges=[]".into(), "validate_every=0".into()]
        };
        let mut command =
            Program::Train.command(["align", "--preset", "signs", "--processes", "2"]);
        let places = [format!("model={MODEL}"), format!("output={}", typed(&run.folder()))];
        let left = |setting: &&&str| {
            !["rewards.", "validate_every"].iter().any(|start| setting.starts_with(start))
        };
        let short = SHORT.iter().filter(left).map(|&setting| setting.to_owned());
        let more = own.into_iter().chain(["save_every=100".to_owned()]);
        for setting in short.chain(more).chain(places) {
            command.args(["--set", &setting]);
        }
        let stages = run.home().join("stages");
        command.args(["-v", "--log", &typed(&stages)]);
        let launcher = under_way(&run, &mut command, |folder| {
            let says = |file: &Path| fs::read_to_string(file).unwrap_or_default();
            [stages.clone(), folder.join("logs/rank-001.log")]
                .iter()
                .all(|file| says(file).contains("reward \"far\" is away"))
        });
        answering.join().unwrap();
        kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
        let ended = Ended::of(launcher);
        assert_eq!(ended.status.code(), Some(130), "{}", ended.stderr);
        assert!(!ended.stderr.contains("error: "), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("is away").count(), 1, "{}", ended.stderr);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("stopped after iteration 1 of 6"), "{last}");
        assert!(run.checkpoint(1).join("SHA256SUMS").is_file());
    }
}

/// Of four batches of a validation the judge answers the first badly, while the other rank has two to draw, for which
/// it needs this one where weights are divided.
#[test]
fn a_judge_that_fails_on_one_rank_is_named_however_weights_are_held() {
    for shard in ["ranks.shard=states", "ranks.shard=all"] {
        let run = Run::new();
        let (address, answering) = answering(
            "127.0.0.1:0",
            3,
            |call, _| serde_json::json!({ "scores": if call == 0 { vec![] } else { vec![0.5] } }),
        );
        let judge = format!(
            "judges=[{{name='far', kind='server', retries=0, patience=0, url='http://{address}/', weight=0}}]"
        );
        let more = ["rollout.batch=1", "validate_every=1", "validation={count=4}", shard, &judge];
        let ended = Ended::after(&mut shared(&run, 2, &more));
        assert_eq!(ended.status.code(), Some(1), "{shard}: {}", ended.stderr);
        let last = ended.stderr.lines().find(|line| line.starts_with("error: "));
        let last = last.unwrap_or_default();
        assert!(last.contains("validation after iteration 0: rank "), "{shard}: {last}");
        assert!(last.contains("reward \"far\" failed"), "{shard}: {last}");
        answering.join().unwrap();
    }
}

#[test]
fn a_run_says_first_who_computes_where() {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let host = host.trim();
    for (n, expected) in [
        (1, format!("1 rank on {host}: cpu in f32")),
        (
            2,
            format!("2 ranks on 1 machine, started by --processes; {host}: 2 x cpu in f32 by gloo"),
        ),
    ] {
        let run = Run::new();
        let ended = Ended::after(&mut shared(&run, n, &["iterations=1", "algorithm=dance-grpo"]));
        let lines: Vec<&str> = ended.stderr.lines().collect();
        assert!(lines[0].starts_with(&expected), "{}", ended.stderr);
        assert!(lines[1].contains("brings its authors' settings"), "{}", ended.stderr);
        ended.succeeded();
    }
}

/// Details, which rank 0 says to people, and the error that a rank ends with.
#[test]
fn a_rank_has_a_log_of_its_own() {
    let run = Run::new();
    let mut command = shared(&run, 2, &["iterations=2"]);
    let ended = Ended::after(command.arg("-v"));
    let log = || fs::read_to_string(run.folder().join("logs/rank-001.log")).unwrap();
    for expected in ["the decoding of iteration 2", "the update of iteration 2", "align 2/2"] {
        assert!(log().contains(expected), "`{expected}` is not in: {}", log());
        assert_eq!(ended.stderr.matches(expected).count(), 1, "{}", ended.stderr);
    }
    ended.succeeded();
    let ended = Ended::after(&mut shared(&run, 2, &["iterations=2"]));
    let error = "holds a run already";
    assert!(ended.stderr.contains(error), "{}", ended.stderr);
    let last = log().lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("error: ") && last.contains(error), "{last}");
}

/// What the file that torchrun names says of an end.
#[test]
fn torchrun_is_told_the_first_reason() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("error.json");
    let told = |command: &mut Command| {
        let ended = Ended::after(command.env("TORCHELASTIC_ERROR_FILE", &file));
        let text = fs::read_to_string(&file).unwrap_or_default();
        let told: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let message = &told["message"];
        assert_eq!(message["extraInfo"]["py_callstack"], message["message"], "{text}");
        assert!(message["extraInfo"]["timestamp"].as_str().unwrap().parse::<u64>().is_ok());
        (ended.status.code().unwrap(), message["message"].as_str().unwrap().to_owned())
    };
    let run = Run::new();
    let (code, said) = told(&mut run.command(&["keep=0"]));
    assert!(code == 2 && said.contains("keep"), "{code}: {said}");
    let (code, said) = told(&mut Program::Train.command(["align", "--cnofig", "a"]));
    assert!(code == 2 && said.starts_with("unexpected argument '--cnofig'"), "{code}: {said}");
    let (code, said) = told(&mut shared(&run, 2, &["prompts_per_iteration=3"]));
    assert!(code == 1 && said.contains("2 ranks cannot share them evenly"), "{code}: {said}");
    // One that fails alone is what the file tells of, not what the launcher or the other makes of it.
    Ended::after(&mut run.command(&["iterations=1"])).succeeded();
    let (code, said) = told(&mut shared(&run, 2, &["iterations=1"]));
    assert!(code == 1 && said.contains("holds a run already"), "{code}: {said}");
}
