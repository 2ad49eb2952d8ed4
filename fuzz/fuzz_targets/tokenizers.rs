//! A tokenizer, and a prompt through it.
#![no_main]

use fuzz::Folder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    folder.write("tokenizer.json", data);
    if let Ok(tokenizer) = flow::tokens::Truncated::open(folder.path(), 77) {
        let _ = tokenizer.encode("a red sign, \u{e9}\u{4e2d} \"CAT\" 42");
    }
});
