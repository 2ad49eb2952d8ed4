//! What ends a program without asking it: memory that a library could not have, a file that was cut short
//! while it was mapped. Each is a last line that says what to do, and exit code 1 in place of a signal's.

use std::io;

use rustix::stdio::stderr;
use signal_hook::consts::{SIGABRT, SIGBUS};
use signal_hook::low_level::{self, exit};

/// From now on an abort says that memory is gone, most likely, and gives `advice`.
///
/// # Errors
/// When the system takes no such handler.
pub fn tell(advice: &str) -> io::Result<()> {
    on(SIGABRT, format!("\nerror: ended by a library, most likely out of memory: {advice}\n"))?;
    on(
        SIGBUS,
        "\nerror: a file was cut short while it was read: let what writes it end, and start again\n".into(),
    )
}

#[expect(unsafe_code, reason = "the handler calls write and _exit alone, as a signal allows")]
fn on(signal: i32, line: String) -> io::Result<()> {
    let say = move || {
        _ = rustix::io::write(stderr(), line.as_bytes());
        exit(1);
    };
    // SAFETY: `line` was made before; nothing is allocated, locked or freed in the handler.
    unsafe { low_level::register(signal, say) }.map(drop)
}
