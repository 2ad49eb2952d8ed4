//! A prompt file of parquet.
#![no_main]

#[path = "../../trainer/src/data/prompts.rs"]
#[allow(dead_code, reason = "the program uses all of it")]
mod prompts;

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = File::of("p.parquet", data);
    let _ = prompts::read(file.path());
});
