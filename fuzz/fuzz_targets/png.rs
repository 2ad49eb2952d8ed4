//! The text of a PNG file.
#![no_main]

use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = File::of("a.png", data);
    let _ = sampler::format::texts(file.path());
});
