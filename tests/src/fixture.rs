//! The repository's own files: fixtures made by Python references, and the embedded model.

use std::fs;
use std::path::{Path, PathBuf};

use flow::checkpoint::{Entry, Weights, write_tensors};
use serde::Deserialize;

/// The tiny random pipelines: guided with transformers 5's tensor names, and unguided with those that
/// folders on the model hub have.
pub const PIPELINES: [&str; 2] = ["tiny-flux", "tiny-schnell"];

/// A tiny random pipeline and what diffusers computed with it; see `fixtures/tiny-flux/make.py`.
pub struct Fixture {
    /// Name of its folder.
    pub name: &'static str,
    /// The pipeline folder.
    pub pipeline: PathBuf,
    /// Tensors, among them `pipeline.{noise, latents}` `[B, 16, h, w]` and `pipeline.image`
    /// `[B, 8h, 8w, 3]` in [0, 1].
    pub case: Weights,
    /// What was asked for.
    pub settings: Settings,
}

/// `case.json`.
#[derive(Deserialize)]
pub struct Settings {
    /// One an image.
    pub prompts: Vec<String>,
    /// Pixels.
    pub height: usize,
    /// Pixels.
    pub width: usize,
    /// Euler steps.
    pub steps: usize,
    /// What the tokenizers of transformers give.
    pub tokens: Vec<Tokens>,
}

/// Padded ids of one prompt.
#[derive(Deserialize)]
pub struct Tokens {
    /// What was tokenised.
    pub prompt: String,
    /// CLIP's ids.
    pub tokenizer: Vec<i64>,
    /// T5's ids.
    pub tokenizer_2: Vec<i64>,
}

impl Fixture {
    /// The fixture `name` of [`PIPELINES`].
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn open(name: &'static str) -> Self {
        let folder = root().join("tests/fixtures").join(name);
        let settings = fs::read(folder.join("case.json")).expect("case.json is committed");
        Self {
            name,
            pipeline: folder.join("pipeline"),
            case: Weights::open_file(&folder.join("case.safetensors")).expect("a fixture is whole"),
            settings: serde_json::from_slice(&settings).expect("case.json fits Settings"),
        }
    }

    /// The size as both programs take it, after long flags.
    pub fn size(&self) -> [String; 4] {
        let (width, height) = (self.settings.width.to_string(), self.settings.height.to_string());
        ["--width".into(), width, "--height".into(), height]
    }

    /// Row `image` of the case's `tensor`.
    ///
    /// # Panics
    /// When there is no such tensor or row.
    pub fn row(&self, tensor: &str, image: usize) -> Vec<f32> {
        let values = self.case.f32(tensor).expect("a tensor of the case");
        let length = values.len() / self.settings.prompts.len();
        values[image * length..(image + 1) * length].to_vec()
    }

    /// Writes the noise of the images `rows` as `--noise` takes it.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write_noise(&self, path: &Path, rows: std::ops::Range<usize>) {
        let (height, width) = (self.settings.height / 8, self.settings.width / 8);
        let shape = [rows.len(), 16, height, width];
        let values: Vec<f32> = rows.flat_map(|image| self.row("pipeline.noise", image)).collect();
        write_tensors(path, &[Entry::f32("latents", &shape, &values)], &[])
            .expect("noise is written");
    }
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package is a folder of it")
}

/// Copies a folder with everything in it.
///
/// # Panics
/// When something cannot be read or written.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder can be made");
    for entry in fs::read_dir(from).unwrap_or_else(|error| panic!("{}: {error}", from.display())) {
        let path = entry.expect("a folder can be listed").path();
        let target = to.join(path.file_name().expect("an entry has a name"));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }
}

/// Every file below `folder`, relative to it, in order.
///
/// # Panics
/// When it cannot be listed.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut entries = entries_below(folder);
    entries.retain(|entry| !folder.join(entry).is_dir());
    entries
}

/// Every file and folder below `folder`, relative to it, in order.
///
/// # Panics
/// When it cannot be listed.
pub fn entries_below(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(at) = open.pop() {
        for entry in fs::read_dir(&at).unwrap_or_else(|error| panic!("{}: {error}", at.display())) {
            let path = entry.expect("a folder can be listed").path();
            found.push(path.strip_prefix(folder).expect("it is below").to_owned());
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    found.sort();
    found
}
