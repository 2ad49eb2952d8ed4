//! The programs that are measured.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

/// Root of the repository, from which every program runs.
pub fn root() -> &'static Path {
    const MANIFEST: &str = env!("CARGO_MANIFEST_DIR");
    Path::new(MANIFEST).parent().unwrap_or(Path::new(MANIFEST))
}

/// The model to measure: the first argument of the benchmark, or the embedded one.
pub fn model() -> String {
    // Cargo passes flags of its own.
    env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or("assets/signs".into())
}

/// One of our programs as `cargo build --release` left it, `target/release/NAME`.
///
/// # Errors
/// When it is not there.
pub fn built(name: &str) -> Result<PathBuf> {
    // A benchmark runs as target/release/deps/NAME-HASH.
    let this = env::current_exe().context("cannot find this program")?;
    let folder = this.ancestors().nth(2).context("this program has no target folder")?;
    let path = folder.join(name);
    ensure!(path.is_file(), "{} is missing: run `make build`", path.display());
    Ok(path)
}

/// The Python that has the peers' packages.
///
/// # Errors
/// When it is not installed.
pub fn python() -> Result<PathBuf> {
    let stamp = root().join(".runtime/parity.stamp");
    ensure!(stamp.is_file(), "the Python peers are missing: run `make parity-runtime`");
    Ok(root().join(".runtime/venv/bin/python"))
}

/// A program that ended well.
pub struct Run {
    /// What it printed on standard output.
    pub stdout: String,
    /// From its start to its end.
    pub seconds: f64,
}

/// After what a command prints, its seconds, those of processors and its largest resident memory in bytes.
const COST: &str = "import resource, subprocess, sys, time\n\
                    start = time.monotonic()\n\
                    subprocess.run(sys.argv[1:], check=True)\n\
                    used = resource.getrusage(resource.RUSAGE_CHILDREN)\n\
                    print(time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss << 10)";

/// What a program took.
#[derive(Clone, Debug)]
pub struct Cost {
    /// What it printed.
    pub stdout: String,
    /// From its start to its end.
    pub seconds: f64,
    /// Of all processors.
    pub processor_seconds: f64,
    /// Largest resident memory in bytes.
    pub peak: f64,
}

/// Runs `command` in [`root`] to its end, and measures it.
///
/// # Errors
/// As [`run`].
pub fn cost(command: &Command) -> Result<Cost> {
    let mut measured = Command::new(python()?);
    measured.args(["-c", COST]).arg(command.get_program()).args(command.get_args());
    measured.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let told = run(&mut measured)?.stdout;
    let (stdout, last) = told.trim_end().rsplit_once('\n').unwrap_or(("", told.trim_end()));
    let numbers = last.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
    let &[seconds, processor_seconds, peak] = numbers.as_slice() else {
        bail!("not three numbers: {last}");
    };
    Ok(Cost { stdout: stdout.to_owned(), seconds, processor_seconds, peak })
}

/// Runs `command` in [`root`] to its end.
///
/// # Errors
/// When it cannot be started or fails; the message holds what it said.
pub fn run(command: &mut Command) -> Result<Run> {
    let start = Instant::now();
    let ended = command
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let seconds = start.elapsed().as_secs_f64();
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        bail!("{} failed, {}: {said}", command.get_program().display(), ended.status);
    }
    Ok(Run { stdout: String::from_utf8(ended.stdout)?, seconds })
}
