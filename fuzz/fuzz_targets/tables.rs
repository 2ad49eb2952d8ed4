//! Prompts in tables of text.
#![no_main]

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for name in ["p.csv", "p.tsv"] {
        let file = File::of(name, &[b"Prompt,text,seed\tcaption\n", data].concat());
        if let Ok(read) = flow::prompts::read(file.path()) {
            assert!(read.prompts.iter().all(|prompt| flow::prompts::check(&prompt.text).is_ok()));
        }
        let _ = flow::prompts::read(File::of(name, data).path());
    }
});
