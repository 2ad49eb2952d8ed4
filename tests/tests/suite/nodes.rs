//! `ng-train align` on two nodes of two ranks: each node has all weights, divided among its own, and together they learn
//! what one process learns; and how ranks hold a network where they are not told.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;

use flow::checkpoint::Weights;
use tests::program::Ended;

use crate::align::{Run, WEIGHTS, same_tensors};

/// A reward that costs nothing, and a rate at which one update can be seen.
const SETTINGS: [&str; 4] = [
    "rewards=[{name = 'jpeg', kind = 'jpeg', prefer = 'small', weight = 1.0}]",
    "judges=[]",
    "optimizer.learning_rate=1e-4",
    "ranks.shard=node",
];
const WORLD: usize = 4;
const A_NODE: usize = 2;

/// Four ranks as two machines would start them, to their end.
fn on_nodes(run: &Run, more: &[&str], flags: &[&str]) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |rank: usize| {
        let mut command = run.command(&[&SETTINGS[..], more].concat());
        command.args(flags);
        let numbers = [
            ("RANK", rank),
            ("LOCAL_RANK", rank % A_NODE),
            ("WORLD_SIZE", WORLD),
            ("LOCAL_WORLD_SIZE", A_NODE),
            ("MASTER_PORT", usize::from(port)),
        ];
        command.envs(numbers.map(|(name, number)| (name, number.to_string())));
        command.env("MASTER_ADDR", "127.0.0.1");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let ranks: Vec<_> = (0..WORLD).map(start).collect();
    for rank in ranks {
        Ended::of(rank).succeeded();
    }
}

/// Files of the state in the checkpoint of `iteration`: a part of each rank of one node, or of the process alone.
fn states(run: &Run, iteration: usize) -> Vec<PathBuf> {
    let files = fs::read_dir(run.checkpoint(iteration)).unwrap().map(|entry| entry.unwrap().path());
    let is_state = |path: &PathBuf| path.to_string_lossy().contains("training_state");
    let mut files: Vec<PathBuf> = files.filter(is_state).collect();
    files.sort();
    files
}

/// AdamW's first moments after the first update, which are its gradient but for a factor.
fn gradient(run: &Run) -> Vec<Vec<f32>> {
    let files: Vec<Weights> =
        states(run, 1).iter().map(|path| Weights::open_file(path).unwrap()).collect();
    let segments = (0..).map(|index| format!("m.{index}"));
    let segments = segments.take_while(|name| files[0].get(name).is_some());
    segments.map(|name| files.iter().flat_map(|file| file.f32(&name).unwrap()).collect()).collect()
}

/// ‖a − b‖/‖a‖; b may be longer by what makes it even.
fn away(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = |share: f64| -> f64 {
        let pairs = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
        pairs.map(|(a, b)| (f64::from(*a) - share * f64::from(*b)).powi(2)).sum()
    };
    (squares(1.0) / squares(0.0)).sqrt()
}

/// With a LoRA, which is divided among all ranks, to the bit what four ranks of one machine learn: those may be farther
/// from one process than all weights are.
#[test]
fn nodes_learn_what_one_process_and_what_one_machine_learns() {
    let whole: (&[&str], &[&str], f64) = (&["algorithm=neighbor"], &[], 1e-6);
    let lora: (&[&str], &[&str], f64) =
        (&["algorithm=diffusion-nft", "lora.rank=4"], &["--processes", "4"], 0.0);
    for (case, flags, bound) in [whole, lora] {
        let of_seed = |seed: &String| {
            let settings = [&["iterations=1", "updates=1", seed][..], case].concat();
            let (one, nodes) = (Run::new(), Run::new());
            // On one machine, node is all.
            let mut command = one.command(&[&SETTINGS[..], &settings[..]].concat());
            Ended::after(command.args(flags)).succeeded();
            on_nodes(&nodes, &settings, &[]);
            // A pixel that a rounding has moved is another reward: there is nothing to compare.
            let [a, b] = [&one, &nodes].map(|run| run.metrics()[0]["reward_std/jpeg"]);
            (a == b).then(|| away(&gradient(&one), &gradient(&nodes)))
        };
        let seeds: Vec<String> = (0..5).map(|seed| format!("seed={seed}")).collect();
        let off = seeds.iter().find_map(of_seed).expect("rewards alike");
        assert!(off <= bound, "{case:?}: {off:e}");
    }
}

#[test]
fn nodes_save_a_part_of_each_rank_of_one_and_go_on_to_the_bit() {
    let (whole, parts) = (Run::new(), Run::new());
    let more = ["optimizer.ema=0.5", "keep=1"];
    let until = |run: &Run, iterations: &str, flags: &[&str]| {
        on_nodes(run, &[&more[..], &[iterations]].concat(), flags);
    };
    until(&whole, "iterations=4", &[]);
    until(&parts, "iterations=2", &[]);
    fs::remove_dir_all(parts.folder().join("aligned")).unwrap();
    until(&parts, "iterations=4", &["--resume"]);
    let [one, two] = [&whole, &parts].map(|run| states(run, 4));
    assert_eq!(one.len(), A_NODE);
    for (one, two) in one.iter().zip(&two) {
        assert!(same_tensors(one, two), "{} differs", one.display());
    }
    let [one, two] = [&whole, &parts].map(|run| run.folder().join("aligned").join(WEIGHTS));
    assert!(same_tensors(&one, &two), "nodes went on elsewhere");
}

#[test]
fn the_plan_chooses_how_weights_are_held_and_a_run_keeps_to_it() {
    let run = Run::new();
    let said = |shard: &str, iterations: &str, flags: &[&str]| {
        let own = [&SETTINGS[..3], &[shard, iterations]].concat();
        let mut command = run.command(&own);
        let ended = Ended::after(command.args(["--processes", "2"]).args(flags));
        let said = ended.stderr.clone();
        ended.succeeded();
        said
    };
    let chosen = said("ranks.shard=auto", "iterations=1", &[]);
    assert!(chosen.contains("ranks.shard = \"auto\" is \"states\": a rank takes"), "{chosen}");
    let named = said("ranks.shard=states", "iterations=2", &["--resume"]);
    assert!(!named.contains("ranks.shard"), "{named}");
    let other = said("ranks.shard=all", "iterations=3", &["--resume"]);
    assert!(other.contains("ranks.shard was \"states\" and is \"all\""), "{other}");
}
