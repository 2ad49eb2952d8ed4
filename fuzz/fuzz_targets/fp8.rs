//! Weights of eight bits with scales of any shape and type.
#![no_main]

use flow::checkpoint::{Dtype, Entry, Weights, write_tensors};
use fuzz::Folder;
use libfuzzer_sys::fuzz_target;

const DTYPES: [Dtype; 6] =
    [Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::U8];
const NAMES: [&str; 8] = [
    "a.weight",
    "a.scale_weight",
    "a.weight_scale",
    "a.scale_input",
    "scaled_fp8",
    "a.weight_scale_inv",
    "a.bias",
    "b.weight",
];

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    let path = folder.path().join("w.safetensors");
    let (mut entries, mut names, mut rest) = (Vec::new(), std::collections::BTreeSet::new(), data);
    while let [name, dtype, rows, columns, after @ ..] = rest {
        let (name, dtype) = (NAMES[*name as usize % NAMES.len()], DTYPES[*dtype as usize % DTYPES.len()]);
        let shape = match columns % 3 {
            0 => vec![],
            1 => vec![*rows as usize % 9],
            _ => vec![*rows as usize % 9, *columns as usize / 3 % 9],
        };
        let n_bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let (own, after) = after.split_at(n_bytes.min(after.len()));
        let mut bytes = own.to_vec();
        bytes.resize(n_bytes, 0x3c);
        if names.insert(name) {
            entries.push(Entry::raw(name.to_owned(), &shape, dtype, bytes));
        }
        rest = after;
    }
    if write_tensors(&path, &entries, &[]).is_err() {
        return;
    }
    if let Ok(weights) = Weights::open_file(&path) {
        for name in weights.names().map(str::to_owned).collect::<Vec<_>>() {
            let n: usize = weights.shape(&name).map_or(0, |shape| shape.iter().product());
            assert!(weights.f32(&name).map_or(true, |values| values.len() == n), "{name}");
        }
    }
});
