//! A checkpoint in one file: lines of names, each of a small tensor, read as a FLUX pipeline.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use flow::checkpoint::{Dtype, Entry, write_tensors};
use flow::pipeline::Pipeline;
use fuzz::Folder;
use libfuzzer_sys::fuzz_target;

static LIKE: OnceLock<Pipeline> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let like = LIKE.get_or_init(|| {
        let fixture = "../tests/fixtures/tiny-flux/pipeline";
        Pipeline::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).expect("it is a pipeline")
    });
    let (mut entries, mut names) = (Vec::new(), std::collections::BTreeSet::new());
    for line in data.split(|byte| *byte == b'\n').take(200) {
        let [rows, columns, name @ ..] = line else { continue };
        let Ok(name) = std::str::from_utf8(name) else { continue };
        let shape = [*rows as usize % 200, *columns as usize % 200];
        let bytes = vec![0; 2 * shape[0] * shape[1]];
        if names.insert(name) {
            entries.push(Entry::raw(name.to_owned(), &shape, Dtype::F16, bytes));
        }
    }
    let folder = Folder::new();
    let path = folder.path().join("flux.safetensors");
    if write_tensors(&path, &entries, &[]).is_ok() {
        let _ = like.in_file(&path);
    }
});
