//! A prompt file of each kind.
#![no_main]

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for name in ["p.txt", "p.json", "p.jsonl"] {
        let file = File::of(name, data);
        let _ = flow::prompts::read(file.path());
    }
});
