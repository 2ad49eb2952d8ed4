//! `ng-train pretrain`: a run that was stopped in either stage goes on to the same bytes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tests::fixture::files_below;
use tests::program::{Ended, Program, typed};

/// Enough steps for each stage to be stopped in.
const SHORT: [&str; 4] = [
    "autoencoder.image_passes=480",
    "autoencoder.batch=8",
    "flow.image_passes=960",
    "flow.batch=16",
];

fn command(data: &Path, output: &Path) -> Command {
    let mut command = Program::Train.command(["pretrain", "--preset", "signs"]);
    let places =
        [("data", data), ("output", output)].map(|(key, path)| format!("{key}={}", typed(path)));
    for setting in SHORT.into_iter().chain(places.iter().map(String::as_str)) {
        command.args(["--set", setting]);
    }
    command
}

/// Interrupts `command` as soon as it tells of a step of `stage`.
fn stopped_in(stage: &str, command: &mut Command) {
    // Every step is told of.
    let command = command.arg("--verbose").stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let told = lines.find(|line| line.starts_with(stage)).unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let last = lines.last().unwrap_or_default();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{told}; {last}");
    assert!(last.contains(stage) && last.contains("--resume"), "{last}");
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bytes() {
    let home = tempfile::tempdir().unwrap();
    let data = home.path().join("signs");
    Program::Train.run(["signs", &typed(&data), "-n", "60"]).succeeded();
    let [whole, stopped] = ["whole", "stopped"].map(|name| home.path().join(name));
    let unfinished = home.path().join("stopped.unfinished");
    Ended::after(&mut command(&data, &whole)).succeeded();
    stopped_in("autoencoder", &mut command(&data, &stopped));
    assert!(unfinished.exists() && !stopped.exists());

    for (arguments, expected) in
        [(&[][..], "--resume"), (&["--resume", "--set", "seed=7"], "seed was 1 and is 7")]
    {
        let refused = Ended::after(command(&data, &stopped).args(arguments));
        assert_eq!(refused.status.code(), Some(1));
        assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    }

    stopped_in("flow", command(&data, &stopped).arg("--resume"));
    Ended::after(command(&data, &stopped).arg("--resume")).succeeded();
    assert!(!unfinished.exists());
    for file in files_below(&whole) {
        let [a, b] = [&whole, &stopped].map(|model| fs::read(model.join(&file)).unwrap());
        assert!(a == b, "{} differs", file.display());
    }
}
