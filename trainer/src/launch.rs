//! `ng-train`: makes sure that libtorch is there, which the system's loader would only say in its own
//! words, and becomes `ng-train-libtorch`, the program proper.

use std::convert::Infallible;
use std::env;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// Beside this program.
const PROGRAM: &str = "ng-train-libtorch";
/// Settings of glibc's heap: what tensors of up to 32 MB leave, its largest bound, is used again, instead of going
/// back to the system and being cleared anew; larger ones go back at once.
const HEAP: [(&str, &str); 3] = [
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "536870912"),
    ("MALLOC_TOP_PAD_", "67108864"),
];
/// How long libtorch's threads spin for their next work, in libgomp's turns: some ten microseconds. Its default of a
/// millisecond takes processors from what computes without libtorch between its operations.
const SPIN: (&str, &str) = ("GOMP_SPINCOUNT", "10000");
/// NVIDIA's libraries: with 0, what is called f32 is not rounded to TF32, as libtorch has convolutions do.
const NO_TF32: (&str, &str) = ("NVIDIA_TF32_OVERRIDE", "0");
/// Where it is set, it says how threads wait.
const WAIT: &str = "OMP_WAIT_POLICY";

fn main() -> ExitCode {
    let Err(message) = start();
    eprintln!("error: {message}");
    ExitCode::FAILURE
}

fn start() -> Result<Infallible, String> {
    let own = env::current_exe().map_err(|error| format!("who am I? {error}"))?;
    let program = own.with_file_name(PROGRAM);
    let failed = |error| format!("cannot start {}: {error}", program.display());
    let missing = missing_libraries(&program).map_err(failed)??;
    if !missing.is_empty() {
        return Err(format!(
            "{} not found: run `make runtime`, put libtorch's libraries beside {}, or name their folder \
             in LD_LIBRARY_PATH",
            missing.join(", "),
            program.display()
        ));
    }
    let spin = env::var_os(WAIT).is_none().then_some(SPIN);
    let no_tf32 = asks_for_f32().then_some(NO_TF32);
    let unset =
        HEAP.into_iter().chain(spin).chain(no_tf32).filter(|(name, _)| env::var_os(name).is_none());
    Err(failed(Command::new(&program).args(env::args_os().skip(1)).envs(unset).exec()))
}

fn asks_for_f32() -> bool {
    let arguments: Vec<_> = env::args_os().collect();
    arguments.windows(2).any(|pair| pair[0] == "--precision" && pair[1] == "f32")
        || arguments.iter().any(|argument| argument == "--precision=f32")
}

/// Libraries that the loader looks for in vain, or why it cannot look; it does not start the program.
fn missing_libraries(program: &Path) -> std::io::Result<Result<Vec<String>, String>> {
    let mut look = Command::new(program);
    look.env("LD_TRACE_LOADED_OBJECTS", "1").stdin(Stdio::null());
    let looked = look.output()?;
    if !looked.status.success() {
        let said = String::from_utf8_lossy(&looked.stderr).trim().replace('\n', " ");
        return Ok(Err(format!(
            "libtorch cannot be loaded; is memory limited (ulimit -v)? {said}"
        )));
    }
    let lines = String::from_utf8_lossy(&looked.stdout).into_owned();
    let mut missing: Vec<String> = lines
        .lines()
        .filter_map(|line| Some(line.split_once(" => not found")?.0.trim().to_owned()))
        .collect();
    missing.dedup();
    Ok(Ok(missing))
}
