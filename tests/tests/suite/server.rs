//! A run whose reward server is not there.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::Path;

use tests::program::{Ended, Program, typed};

use crate::align::{MODEL, SHORT};

/// Two iterations under a server at an address of this machine where nothing listens, and JPEG size.
fn run(output: &Path, is_required: bool) -> Ended {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let rewards = format!(
        "rewards=[{{name='far', kind='server', url='http://{gone}/score', weight=1, retries=1, patience=0, \
         required={is_required}}}, {{name='near', kind='jpeg', prefer='small', weight=1}}]"
    );
    let places = [format!("model={MODEL}"), format!("output={}", typed(output))];
    let settings = SHORT.iter().map(|&setting| setting.to_owned());
    let mut command = Program::Train.command(["align", "--preset", "signs"]);
    for setting in settings.chain(places).chain([rewards, "iterations=2".to_owned()]) {
        command.args(["--set", &setting]);
    }
    Ended::after(&mut command)
}

#[test]
fn a_server_that_is_not_there_ends_the_run_in_one_line() {
    let home = tempfile::tempdir().unwrap();
    let ended = run(&home.path().join("run"), true);
    assert_eq!(ended.status.code(), Some(1), "{}", ended.stderr);
    let mut lines = ended.stderr.lines().filter(|line| line.starts_with("error: "));
    let (Some(line), None) = (lines.next(), lines.next()) else { panic!("{}", ended.stderr) };
    for part in ["error: iteration 1: reward \"far\" failed, attempts: 2: http://127.", "refused"] {
        assert!(line.contains(part), "{part} is not in: {line}");
    }
}

#[test]
fn an_optional_server_that_is_not_there_is_counted_and_never_a_score() {
    let home = tempfile::tempdir().unwrap();
    let output = home.path().join("run");
    let ended = run(&output, false);
    let warned =
        ended.stderr.lines().filter(|line| line.starts_with("warning: iteration ")).count();
    assert!(warned == 2 && ended.stderr.contains("reward \"far\""), "{}", ended.stderr);
    ended.succeeded();
    let metrics = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let steps: Vec<BTreeMap<String, Option<f64>>> =
        metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(steps.len(), 2);
    for step in steps {
        assert_eq!(step["reward_failures/far"], Some(4.0), "two attempts for each of two groups");
        assert_eq!(step["reward_failures/near"], Some(0.0));
        assert!(!step.contains_key("reward/far") && step["reward/near"].unwrap() < 0.0);
    }
}
