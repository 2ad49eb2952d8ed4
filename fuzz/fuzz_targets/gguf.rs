//! A GGUF file: its header, and every tensor that it names.
#![no_main]

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = File::of("w.gguf", &[b"GGUF", data].concat());
    if let Ok(weights) = flow::checkpoint::Weights::open_file(file.path()) {
        for name in weights.names().map(str::to_owned).collect::<Vec<_>>() {
            let _ = weights.f32(&name);
        }
    }
});
