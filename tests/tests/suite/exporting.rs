//! Exports that end early: one line, the right code, and nothing left.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tests::fixture::{Fixture, entries_below, root};
use tests::program::{Ended, Program, typed};

#[track_caller]
fn assert_nothing_below(home: &Path) {
    assert_eq!(entries_below(home), Vec::<std::path::PathBuf>::new());
}

/// Files may grow to so many blocks of 512 bytes; a full disk takes the same way.
#[test]
fn an_export_that_cannot_write_leaves_nothing() {
    let model = typed(&Fixture::open("tiny-flux").pipeline);
    let home = tempfile::tempdir().unwrap();
    let out = typed(&home.path().join("export"));
    for (blocks, file, more) in [
        ("1", "config.json", &[][..]),
        ("40", "text_encoder/model.onnx_data", &[]),
        ("300", "transformer/model.onnx_data", &["--copy-weights"]),
        ("300", "transformer/model.onnx_data", &["--precision", "int8", "--resume"]),
    ] {
        let limited = "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$0\" \"$@\"";
        let program = Program::Export.path();
        let arguments = [&["--out", &out, "--threads", "1"], more].concat();
        let mut command = Command::new("sh");
        command.args(["-c", limited]).arg(program).args([blocks, &model]).args(arguments);
        let ended = Ended::after(command.current_dir(root()));
        assert_eq!(ended.status.code(), Some(1), "{blocks}: {}", ended.stderr);
        let says = [home.path().to_str().unwrap(), file, "File too large"];
        let is_one_line = ended.stderr.starts_with("error: ") && ended.stderr.lines().count() == 1;
        let is_said = says.iter().all(|part| ended.stderr.contains(part));
        assert!(is_one_line && is_said, "{blocks}: {}", ended.stderr);
        assert_nothing_below(home.path());
    }
}

/// In the middle of a verification, which takes much longer than a signal.
#[test]
fn an_export_ended_by_a_signal_says_so_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let out = typed(&home.path().join("export"));
    for (signal, more) in
        [(Signal::INT, None), (Signal::TERM, None), (Signal::INT, Some("--resume"))]
    {
        let arguments = ["assets/signs", "--out", &out, "--precision", "f16", "--verify", "-v"];
        let mut command = Program::Export.command(arguments.into_iter().chain(more));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut said, mut all) = (BufReader::new(child.stderr.take().unwrap()), String::new());
        while !all.contains("verifying text_encoder") {
            assert!(said.read_line(&mut all).unwrap() > 0, "{all}");
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        said.read_to_string(&mut all).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{all}");
        let last = all.lines().last().unwrap_or_default();
        if more.is_none() {
            let is_said = last.ends_with("interrupted: nothing was exported");
            assert!(last.starts_with("error: ") && is_said, "{all}");
            assert_nothing_below(home.path());
        } else {
            assert_eq!(last, "error: interrupted: the same command goes on from here", "{all}");
            assert!(!Path::new(&out).exists());
            assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
        }
    }
}
