//! Ranks that are started one by one, each in a folder of its own: what differs between them is named before
//! anything is learnt.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tests::fixture::{copy_folder, root};
use tests::program::Ended;

use crate::align::{MODEL, Run};
use crate::ranks::CHEAP;

const PROMPTS: &str = "assets/prompts";

/// Where a rank runs, with models and prompts of its own.
fn place(run: &Run, rank: usize) -> PathBuf {
    let place = run.home().join(format!("place-{rank}"));
    for folder in [MODEL, PROMPTS] {
        copy_folder(&root().join(folder), &place.join(folder));
    }
    place
}

/// A rank of two in its place; the output folder lies there unless `settings` say otherwise.
fn rank(run: &Run, rank: usize, port: u16, settings: &[&str]) -> Command {
    let mut command = run.command(&[&CHEAP[..], settings].concat());
    let (rank, place) = (rank.to_string(), run.home().join(format!("place-{rank}")));
    command.current_dir(place).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
    command.env("RANK", &rank).env("LOCAL_RANK", &rank);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// How two ranks end, of which the second has more arguments.
fn both(run: &Run, settings: &[&str], arguments: [&[&str]; 2]) -> [Ended; 2] {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start =
        |number: usize| rank(run, number, free, settings).args(arguments[number]).spawn().unwrap();
    [0, 1].map(start).map(Ended::of)
}

/// Puts a prompt before the others.
fn add(file: &Path) {
    let text = fs::read_to_string(file).unwrap();
    fs::write(file, format!("green \"FOX\"\n{text}")).unwrap();
}

/// Changes the lowest bit of a value of a file.
fn turn(file: &Path, from_end: usize) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.len() - from_end;
    bytes[at] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn what_differs_between_ranks_is_named() {
    const VAE: &str = "assets/signs/vae/diffusion_pytorch_model.safetensors";
    const TEXT: &str = "assets/signs/text_encoder_2/model.safetensors";
    const TRANSFORMER: &str = "assets/signs/transformer/diffusion_pytorch_model.safetensors";
    type Change = fn(&Path);
    let none: Change = |_| {};
    let cases: [(&str, &[&str], &[&str], Change); 8] = [
        ("configuration", &[], &["--set", "sigma=0.25"], none),
        ("precision", &[], &["--precision", "bf16"], none),
        ("prompts", &[], &[], |place| add(&place.join(PROMPTS).join("signs-train.txt"))),
        ("validation.prompts", &["validate_every=1"], &[], |place| {
            add(&place.join(PROMPTS).join("signs-held-out.txt"));
        }),
        ("model", &["lora.rank=4"], &[], |place| turn(&place.join(TRANSFORMER), 8)),
        ("model", &["lora.rank=4"], &[], |place| turn(&place.join(TEXT), 8)),
        ("model", &[], &[], |place| turn(&place.join(VAE), 8)),
        ("weights", &[], &[], |place| turn(&place.join(TRANSFORMER), 1 << 20)),
    ];
    for (what, settings, arguments, change) in cases {
        let run = Run::new();
        let places = [0, 1].map(|rank| place(&run, rank));
        change(&places[1]);
        let ended = both(&run, settings, [&[], arguments]);
        let expected = format!("error: rank 1 has another {what} than rank 0");
        for (rank, Ended { status, stderr, .. }) in ended.iter().enumerate() {
            let last = stderr.lines().last().unwrap_or_default();
            assert!(last.starts_with(&expected), "{what} on rank {rank}: {stderr}");
            assert_eq!(status.code(), Some(1), "{what} on rank {rank}: {stderr}");
        }
        assert!(!run.folder().join("metrics.jsonl").exists(), "{what}: it has trained");
    }
}

/// An output folder that ranks do not share would be another position.
#[test]
fn ranks_go_on_from_the_same_checkpoint() {
    let run = Run::new();
    let places = [0, 1].map(|rank| place(&run, rank));
    let own = ["--resume", "--set", "output=own"];
    let mut alone = run.command(&[&CHEAP[..], &["iterations=2"]].concat());
    Ended::after(alone.current_dir(&places[0]).args(own)).succeeded();
    for ended in both(&run, &["iterations=4"], [&own, &own]) {
        assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("error: rank 1: ") && last.contains("iteration-000002"), "{last}");
        assert!(last.contains("no checkpoint is whole"), "{last}");
    }
}
