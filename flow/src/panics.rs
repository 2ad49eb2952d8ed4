//! Panics as errors of one line: a library's fault at a strange file, or memory that is not there, is
//! something to tell a user, not a trace to print.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether whatever panics anywhere in the process is told by [`reported`] alone.
static SILENT: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Calls of [`caught`] that this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Does `work`; a panic in it, on this thread, is an error of one line and nothing is printed.
///
/// # Errors
/// The first line of what the panic said.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    listen();
    DEPTH.set(DEPTH.get() + 1);
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    done.map_err(|panic| first_line(&*panic))
}

/// As [`caught`], for a whole program: also nothing that other threads panic with is printed.
///
/// # Errors
/// The first line of what the panic said.
pub fn reported<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    SILENT.store(true, Ordering::Relaxed);
    caught(work)
}

/// Whether `message` says that memory was not there.
fn is_out_of_memory(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    [
        "out of memory",
        "can't allocate",
        "failed to allocate",
        "cannot allocate",
        "bad_alloc",
        "memory allocation of",
    ]
    .iter()
    .any(|words| message.contains(words))
}

/// Whether `message`, of a panic, says that nobody reads the results any more: a pipe's reader has what it wanted.
pub fn is_unread(message: &str) -> bool {
    message.starts_with("failed printing to stdout: Broken pipe")
}

/// `message` without the frames that C++ libraries append, on one line.
pub fn without_frames(message: &str) -> String {
    let frames = ["\nException raised from", "\\nException raised from", "\nframe #", "\\nframe #"];
    let end = frames.iter().filter_map(|mark| message.find(mark)).min().unwrap_or(message.len());
    message[..end].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The line that a program ends with; where memory is gone `advice` says what to lower.
pub fn last_line(said: &str, advice: &str) -> String {
    let said = without_frames(said);
    if is_out_of_memory(&said) {
        return format!("error: out of memory: {advice} ({said})");
    }
    format!("error: {said}")
}

fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if DEPTH.get() == 0 && !SILENT.load(Ordering::Relaxed) {
                before(panic);
            }
        }));
    });
}

fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    without_frames(text.unwrap_or("a panic without a message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_one_line() {
        assert_eq!(caught(|| 3), Ok(3));
        let said = caught(|| -> () { panic!("no {}\nframe #0: here\nframe #1: there", "memory") });
        assert_eq!(said, Err("no memory".to_owned()));
        let said = caught(|| std::thread::scope(|scope| scope.spawn(|| 4).join().unwrap()));
        assert_eq!(said, Ok(4));
    }

    #[test]
    fn libtorch_says_that_memory_is_gone() {
        let said = "called `Result::unwrap()` on an `Err` value: Torch(\"[enforce fail at \
                    alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried \
                    to allocate 4096 bytes.\\nframe #0: c10::ThrowEnforceNotMet\")";
        assert!(is_out_of_memory(said));
        assert!(without_frames(said).ends_with("4096 bytes."), "{}", without_frames(said));
        assert!(is_out_of_memory("CUDA out of memory. Tried to allocate 2.00 GiB"));
        assert!(!is_out_of_memory("index out of bounds"));
        assert_eq!(
            last_line("std::bad_alloc", "buy"),
            "error: out of memory: buy (std::bad_alloc)"
        );
        assert_eq!(last_line("no\nfile", "buy"), "error: no file");
    }
}
