//! Why a process failed, in the file that torchrun names for it: torchrun tells the first of them.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use cluster::Launch;

use super::ranks;

const VARIABLE: &str = "TORCHELASTIC_ERROR_FILE";

/// Writes down why this process failed. Ranks that `--processes` started share a file, where the first reason stays.
pub fn tell(said: &str) {
    let launch = Launch::from_environment();
    let is_shared = matches!(launch, Ok(Launch::Rank(rank)) if rank.launcher == ranks::FLAG);
    write(said, OpenOptions::new().write(true).create(true).create_new(is_shared).truncate(true));
}

/// Writes down that a rank failed, for one that had no time to.
pub fn tell_of_rank(said: &str) {
    write(said, OpenOptions::new().write(true).create_new(true));
}

/// Removes what an earlier run left, before ranks share the file.
pub(super) fn forget() {
    if let Some(path) = env::var_os(VARIABLE) {
        _ = fs::remove_file(path);
    }
}

fn write(said: &str, options: &OpenOptions) {
    let Some(path) = env::var_os(VARIABLE) else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let extra = serde_json::json!({ "py_callstack": said, "timestamp": now.to_string() });
    let text = serde_json::json!({ "message": { "message": said, "extraInfo": extra } });
    // Nothing is lost where it cannot be written: the same stands in the program's own output.
    _ = options.open(path).and_then(|mut file| file.write_all(text.to_string().as_bytes()));
}
