//! A run that is ended in each of its stages goes on, and ends as one that was left alone.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tests::program::Ended;

use crate::align::{Run, same_tensors};
use crate::validation::validations;

/// What a run with `-v` says when a stage begins, and what ends it there.
const ENDS: [(&str, Signal); 7] = [
    ("the rollout of", Signal::INT),
    ("the decoding of", Signal::KILL),
    ("the rewards of", Signal::USR1),
    ("the update of", Signal::KILL),
    ("the validation after", Signal::TERM),
    ("the sheet after", Signal::INT),
    ("saving iteration", Signal::KILL),
];
/// Each start makes two at most before it is ended.
const ITERATIONS: usize = 2 * ENDS.len() + 1;

/// Starts `run`, which may go on, and sends `signal` when `stage` begins in a second iteration, whatever parts it has
/// in one.
fn end(run: &Run, more: &[&str], stage: &str, signal: Signal) {
    let mut command = run.command(more);
    command.args(["-v", "--resume"]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let (mut all, mut begun) = (String::new(), BTreeSet::new());
    while begun.len() < 2 {
        let mut line = String::new();
        assert!(said.read_line(&mut line).unwrap() > 0, "it ended before {stage} twice: {all}");
        all += &line;
        if line.starts_with(stage) {
            begun.insert(line);
        }
    }
    kill_process(Pid::from_child(&child), signal).unwrap();
    said.read_to_string(&mut all).unwrap();
    let status = child.wait().unwrap();
    if signal == Signal::KILL {
        assert_eq!(status.signal(), Some(9), "{all}");
    } else {
        assert_eq!(status.code(), Some(130), "{stage}: {all}");
        assert!(all.contains(": stopping: waits for "), "{stage}: {all}");
        let last = all.lines().last().unwrap_or_default();
        assert!(last.starts_with("stopped after iteration"), "{stage}: {all}");
    }
}

#[test]
fn a_run_ended_in_each_of_its_stages_goes_on_to_the_same_end() {
    let (whole, ended) = (Run::new(), Run::new());
    let iterations = format!("iterations={ITERATIONS}");
    let more = [
        &iterations,
        "save_every=1",
        "validate_every=1",
        "validation={count=2, best='ocr'}",
        "judges=[]",
    ];
    Ended::after(&mut whole.command(&more)).succeeded();
    for (stage, signal) in ENDS {
        end(&ended, &more, stage, signal);
    }
    Ended::after(ended.command(&more).arg("--resume")).succeeded();
    let [a, b] = [&whole, &ended].map(|run| run.folder().join("aligned/SHA256SUMS"));
    assert_eq!(fs::read_to_string(a).unwrap(), fs::read_to_string(b).unwrap());
    let state = |run: &Run| run.checkpoint(ITERATIONS).join("training_state.safetensors");
    assert!(same_tensors(&state(&whole), &state(&ended)), "optimiser or full weights differ");
    assert_eq!(whole.metrics(), ended.metrics());
    let held_out = |run: &Run| {
        let mut records = validations(run);
        for record in &mut records {
            record.retain(|name, _| name != "wall" && !name.starts_with("seconds/"));
        }
        records
    };
    assert_eq!(held_out(&whole), held_out(&ended));
    let best = |run: &Run| fs::read_link(run.folder().join("best")).ok();
    assert_eq!(best(&whole), best(&ended));
}
