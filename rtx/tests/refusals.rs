//! What the program refuses, with one line, before it loads anything.

#[cfg(not(feature = "enterprise"))]
use std::fs;
use std::path::Path;
use std::process::Command;

#[cfg(not(feature = "enterprise"))]
const LIBRARY: &str = "libtensorrt_rtx.so.1";
#[cfg(feature = "enterprise")]
const LIBRARY: &str = "libnvinfer.so.11";

/// The one line that is said about `graph`, `architecture` and `library`.
#[track_caller]
fn said(graph: &str, architecture: &str, library: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ng-engine"));
    let arguments = command.args([graph, "--architecture", architecture, "--library"]).arg(library);
    let ended = arguments.output().unwrap();
    let text = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    text
}

#[test]
fn what_cannot_be_is_said() {
    let nowhere = Path::new("/nowhere");
    for (graph, architecture, says) in [
        #[cfg(not(feature = "enterprise"))]
        ("Cargo.toml", "90", "H100".to_owned()),
        ("Cargo.toml", "42", "unknown".to_owned()),
        ("nothing.onnx", "89", "no such file".to_owned()),
        ("Cargo.toml", "89", format!("holds no {LIBRARY}: install")),
    ] {
        let text = said(graph, architecture, nowhere);
        assert!(text.contains(&says), "{text}");
    }
}

#[cfg(not(feature = "enterprise"))]
#[test]
fn what_is_no_library_is_said() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for name in [LIBRARY, "libtensorrt_onnxparser_rtx.so.1"] {
        fs::write(folder.join(name), "no library").unwrap();
    }
    let text = said("Cargo.toml", "89", folder);
    assert!(text.contains("cannot load") && text.contains(LIBRARY), "{text}");
}
