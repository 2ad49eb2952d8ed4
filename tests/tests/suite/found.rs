//! Folders and files as people have them: links, other names, edits by hand, one file for everything.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use flow::checkpoint::{Entry, Weights, write_tensors};
use tempfile::TempDir;
use tests::fixture::{copy_folder, root};
use tests::program::{Ended, Program, typed};

use crate::align::{MODEL, Run, WEIGHTS};

/// Data of the transformer's graph, as `ng-export` names it.
const DATA: &str = "model.onnx_data";
const SUMS: &str = "SHA256SUMS";

/// An export of the tiny pipeline.
struct Exported {
    home: TempDir,
}

impl Exported {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let out = typed(&home.path().join("export"));
        Program::Export.run(["tests/fixtures/tiny-schnell/pipeline", "--out", &out]).succeeded();
        Self { home }
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("export")
    }

    /// A copy without sums, whose transformer's graph and data `change` may move about.
    fn changed(&self, name: &str, change: impl FnOnce(&Path)) -> PathBuf {
        let folder = self.home.path().join(name);
        copy_folder(&self.folder(), &folder);
        fs::remove_file(folder.join(SUMS)).unwrap();
        change(&folder.join("transformer"));
        folder
    }

    /// How a short run on `folder` ends, and its latents.
    fn sampled(&self, folder: &Path) -> (Ended, Option<Vec<f32>>) {
        let latents = self.home.path().join("latents.safetensors");
        let picture = self.home.path().join("a.png");
        for file in [&latents, &picture] {
            let _ = fs::remove_file(file);
        }
        let picture = typed(&picture);
        let ended = Program::Sample.run([
            "--model",
            &typed(folder),
            "-p",
            "a fox",
            "--steps",
            "2",
            "-W",
            "32",
            "-H",
            "32",
            "--seed",
            "3",
            "-o",
            &picture,
            "--latents-out",
            &typed(&latents),
        ]);
        let found = Weights::open_file(&latents).ok();
        (ended, found.map(|found| found.f32("latents").unwrap()))
    }
}

/// Replaces the name of the data by others of the same length, the first half of the tensors by `first`.
fn rename_data(graph: &Path, first: &str, second: &str) {
    let mut bytes = fs::read(graph).unwrap();
    let places: Vec<usize> = (0..bytes.len() - DATA.len())
        .filter(|&at| &bytes[at..at + DATA.len()] == DATA.as_bytes())
        .collect();
    assert!(places.len() > 4, "the graph has tensors outside");
    for (i, &at) in places.iter().enumerate() {
        let name = if 2 * i < places.len() { first } else { second };
        bytes[at..at + DATA.len()].copy_from_slice(name.as_bytes());
    }
    fs::write(graph, bytes).unwrap();
}

#[test]
fn graphs_find_their_data_under_any_name_and_behind_the_links_of_a_hub() {
    let exported = Exported::new();
    let (_, usual) = exported.sampled(&exported.folder());
    let usual = usual.unwrap();
    let in_two = |part: &Path| {
        rename_data(&part.join("model.onnx"), "model_data.part", "weights_2.onnx_");
        fs::copy(part.join(DATA), part.join("weights_2.onnx_")).unwrap();
        fs::rename(part.join(DATA), part.join("model_data.part")).unwrap();
    };
    // blobs/1, blobs/2, … and links to them, as huggingface_hub keeps a snapshot.
    let linked = |part: &Path| {
        in_two(part);
        let blobs = part.parent().unwrap().join("blobs");
        fs::create_dir(&blobs).unwrap();
        let files: Vec<PathBuf> =
            fs::read_dir(part).unwrap().map(|entry| entry.unwrap().path()).collect();
        for (i, file) in files.iter().enumerate() {
            fs::rename(file, blobs.join(i.to_string())).unwrap();
            symlink(format!("../blobs/{i}"), file).unwrap();
        }
    };
    for folder in [exported.changed("two files", in_two), exported.changed("hub", linked)] {
        let (ended, found) = exported.sampled(&folder);
        ended.succeeded();
        assert_eq!(found.unwrap(), usual, "{}", folder.display());
    }
    let elsewhere = exported.home.path().join("elsewhere");
    let away = exported.changed("away", |part| {
        fs::rename(part.join(DATA), &elsewhere).unwrap();
        symlink(&elsewhere, part.join(DATA)).unwrap();
    });
    let (ended, _) = exported.sampled(&away);
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        ended.stderr.contains("behind a link") && ended.stderr.contains("cp -rL"),
        "{}",
        ended.stderr
    );
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}

#[test]
fn an_edited_config_is_said_and_an_edited_graph_is_refused() {
    let exported = Exported::new();
    let config = exported.folder().join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&config).unwrap();
    let mut entries: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (_, usual) = exported.sampled(&exported.folder());
    entries["shift"] = 5.0.into();
    fs::write(&config, entries.to_string()).unwrap();
    let (ended, found) = exported.sampled(&exported.folder());
    let said =
        ended.stderr.lines().filter(|line| line.contains("scheduler_config.json: edited since"));
    assert_eq!(said.count(), 1, "{}", ended.stderr);
    ended.succeeded();
    assert_ne!(found, usual, "the new shift counts");
    let graph = exported.folder().join("transformer/model.onnx");
    let mut bytes = fs::read(&graph).unwrap();
    bytes.extend([0x2a, 0]);
    fs::write(&graph, bytes).unwrap();
    let (ended, _) = exported.sampled(&exported.folder());
    assert_eq!(ended.status.code(), Some(1));
    assert!(ended.stderr.contains("transformer/model.onnx: damaged"), "{}", ended.stderr);
}

/// A checkpoint of ComfyUI's, trained on and exported.
#[test]
fn a_file_of_comfyui_is_aligned_and_exported() {
    let home = tempfile::tempdir().unwrap();
    let place = |name: &str| home.path().join(name);
    let (model, plain, back) =
        (place("model"), place("plain.safetensors"), place("back.safetensors"));
    Program::Train.run(["convert", MODEL, &typed(&plain)]).succeeded();
    copy_folder(&root().join(MODEL), &model);
    fs::remove_file(model.join(WEIGHTS)).unwrap();
    let file = Weights::open_file(&plain).unwrap();
    let comfy: Vec<Entry<'_>> = file
        .entries()
        .into_iter()
        .map(|mut entry| {
            entry.name = format!("model.diffusion_model.{}", entry.name);
            entry
        })
        .collect();
    write_tensors(&model.join("transformer/flux1-dev.safetensors"), &comfy, &[]).unwrap();
    let run = Run::new();
    let settings = ["iterations=2", "save_every=2"];
    let mut command = run.command(&settings);
    command.args(["--set", &format!("model={}", typed(&model))]);
    Ended::after(&mut command).succeeded();
    let aligned = run.folder().join("aligned");
    Program::Export.run([&typed(&aligned), "--out", &typed(&place("onnx"))]).succeeded();
    // What was aligned goes back to ComfyUI, under the names that it came with.
    Program::Train.run(["convert", &typed(&aligned), &typed(&back)]).succeeded();
    let back = Weights::open_file(&back).unwrap();
    assert_eq!(back.names().collect::<Vec<_>>(), file.names().collect::<Vec<_>>());
    let differs = |name: &str| back.f32(name).unwrap() != file.f32(name).unwrap();
    assert!(file.names().any(differs), "it was trained");
}
