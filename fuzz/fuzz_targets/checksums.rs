//! A list of SHA-256.
#![no_main]

use fuzz::Folder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    folder.write("SHA256SUMS", data);
    if let Ok(Some(list)) = flow::checksums::Checksums::open(folder.path()) {
        let _ = list.check_all();
    }
});
