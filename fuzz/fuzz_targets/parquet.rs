//! A prompt file that is a table.
#![no_main]

#[path = "../../trainer/src/data/prompts.rs"]
#[allow(dead_code, reason = "the program uses all of it")]
mod prompts;

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for name in ["p.parquet", "p.csv"] {
        let file = File::of(name, data);
        let _ = prompts::read(file.path());
    }
});
