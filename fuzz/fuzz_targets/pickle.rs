//! A file of PyTorch, converted without being run.
#![no_main]

#[path = "../../trainer/src/data"]
#[allow(dead_code, unreachable_pub, reason = "the program uses all of it")]
mod data {
    pub mod pickle;
}

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = File::of("w.pt", bytes);
    let to = file.path().with_extension("safetensors");
    if data::pickle::convert(file.path(), &to).is_ok() {
        let written = std::fs::metadata(&to).expect("it was written").len();
        // Tied weights may be named twice; the rest is the header.
        assert!(written <= 3 * bytes.len() as u64 + 4096, "{written} of {}", bytes.len());
    }
});
