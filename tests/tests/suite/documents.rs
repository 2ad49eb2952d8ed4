//! The documents: every link leads somewhere, and every command does what it says.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use tests::fixture::{Fixture, copy_folder, root};
use tests::program::{Ended, Program};

/// What commands mean in a test.
const MEANING: &str = include_str!("documents.sh");

/// All pages, by name, in the order in which a reader meets them.
fn pages() -> Vec<(String, PathBuf)> {
    let mut pages = vec![root().join("README.md"), root().join("CONTRIBUTING.md")];
    let mut docs: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    docs.sort();
    pages.append(&mut docs);
    let name = |path: &Path| path.strip_prefix(root()).unwrap().display().to_string();
    pages.into_iter().map(|path| (name(&path), path)).collect()
}

#[test]
fn every_link_leads_somewhere() {
    for (name, path) in pages() {
        let text = fs::read_to_string(&path).unwrap();
        for (before, rest) in text.split("](").zip(text.split("](").skip(1)) {
            let link = rest.split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{name} links {link}, which does not exist");
            if let Some(line) = place.strip_prefix('L') {
                let shown = before.rsplit('[').next().unwrap().trim_matches('`');
                let (text, line) =
                    (fs::read_to_string(&target).unwrap(), line.parse::<usize>().unwrap());
                let found = text.lines().nth(line - 1).unwrap_or_default();
                let is = text.lines().position(|line| line.contains(&format!("fn {shown}(")));
                assert!(
                    found.contains(&format!("fn {shown}(")),
                    "{name}: line {line} of {file} is not {shown}, which is at {:?}",
                    is.map(|line| line + 1)
                );
            }
        }
    }
}

#[test]
fn every_page_can_be_found() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for (name, _) in pages().iter().skip(1) {
        assert!(readme.contains(&format!("({name})")), "README.md does not link {name}");
    }
}

/// The lines of all blocks of shell commands.
fn commands(page: &str) -> String {
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.collect::<Vec<&str>>().concat()
}

/// A folder in which the documents' files are where they say.
fn scratch() -> TempDir {
    let home = tempfile::tempdir().unwrap();
    for name in ["assets", ".runtime", "tests"] {
        symlink(root().join(name), home.path().join(name)).unwrap();
    }
    copy_folder(&Fixture::open("tiny-flux").pipeline, &home.path().join("FLUX.1-dev"));
    fs::write(home.path().join("prompts.txt"), "a fox in the snow\na red \"CAT\"\n").unwrap();
    home
}

/// Runs the commands of the page `name` in `folder`.
fn run(name: &str, folder: &Path) {
    let commands = commands(&fs::read_to_string(root().join(name)).unwrap());
    assert!(!commands.is_empty(), "{name} has no commands");
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(format!("{MEANING}\n{commands}")).current_dir(folder);
    bash.env("BIN", Program::Train.path().parent().unwrap()).env("ROOT", root());
    bash.env_remove("ORT_DYLIB_PATH").env_remove("NG_SAMPLE_TOKEN").stdin(Stdio::null());
    let ended = Ended::after(&mut bash);
    assert!(ended.status.success(), "{name}: {}\n{}\n{}", ended.status, ended.stdout, ended.stderr);
}

#[test]
fn commands_of_the_first_pages_run() {
    let home = scratch();
    for name in ["README.md", "CONTRIBUTING.md"] {
        run(name, home.path());
    }
}

#[test]
fn commands_about_the_embedded_model_run() {
    let home = scratch();
    for name in ["docs/getting-started.md", "docs/evaluation.md", "docs/rewards.md"] {
        run(name, home.path());
    }
}

#[test]
fn commands_about_flux_run() {
    let home = scratch();
    run("docs/flux.md", home.path());
    let adapters = home.path().join("out/flux-aligned/aligned/pytorch_lora_weights.safetensors");
    fs::create_dir(home.path().join("styles")).unwrap();
    for style in ["style.safetensors", "styles/ink.safetensors"] {
        fs::copy(&adapters, home.path().join(style)).unwrap();
    }
    symlink("FLUX.1-dev", home.path().join("CHECKPOINT")).unwrap();
    for name in
        ["docs/inputs.md", "docs/export.md", "docs/sample.md", "docs/serve.md", "docs/results.md"]
    {
        run(name, home.path());
    }
}

#[test]
fn no_page_has_commands_that_nothing_runs() {
    let source = fs::read_to_string(root().join("tests/tests/suite/documents.rs")).unwrap();
    for (name, path) in pages() {
        let has = !commands(&fs::read_to_string(path).unwrap()).is_empty();
        assert!(
            !has || source.contains(&format!("\"{name}\"")),
            "{name}: its commands run nowhere"
        );
    }
}
