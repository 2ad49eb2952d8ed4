//! How long each stage takes, in a new process and in one that is warm.

use std::{
    env, fs,
    io::Write,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flow::usage::Usage;
use serde::Serialize;

use crate::{
    args::Bench,
    device,
    engine::{Engine, Finished, Memory, Options, Watch},
    export::{self, Export},
    format::Format,
    report::{Stages, timed},
    request::{Job, Request},
    run,
};

/// Prompt of every image; what it says changes no time.
const PROMPT: &str = "a red fox in the snow";
/// Images that are not counted: kernels and memory are set up in them.
const WARM_UP: usize = 1;

/// What was measured; seconds.
#[derive(Debug, Serialize)]
struct Measured {
    model: String,
    provider: String,
    device: String,
    precision: String,
    threads: usize,
    width: usize,
    height: usize,
    solver: &'static str,
    steps: usize,
    /// From the start of a process to its end, with a picture written.
    cold: Spread,
    load: f64,
    text: Spread,
    step: Spread,
    sample: Spread,
    decode: Spread,
    png: Spread,
    /// All stages of one image.
    image: Spread,
    /// Share of an image's time that no network takes, in percent.
    outside_networks: f64,
    /// Largest resident memory of this process, in bytes, where the system tells.
    peak_memory: Option<u64>,
}

/// Median, smallest and largest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(seconds: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = seconds.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (n, at) = (sorted.len(), |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN));
        let median = f64::midpoint(at(n.saturating_sub(1) / 2), at(n / 2));
        Self { median, min: at(0), max: at(n.saturating_sub(1)) }
    }
}

/// Runs the benchmark and prints a table, or one JSON object.
///
/// # Errors
/// As a run of `generate`.
pub fn run(args: &Bench, mut lines: impl Write) -> Result<()> {
    let (folder, options) = run::engine_options(&args.engine)?;
    let options = Options { memory: Memory::Keep, ..options };
    let export = Arc::new(Export::open(&folder, options.text_tokens)?);
    let jobs = jobs(args, &export)?;
    let nothing_skipped = args.image.skip && !jobs[0].skip;
    let unused = nothing_skipped.then(|| export::nothing_skipped(jobs[0].plan.len()));
    for notice in args.engine.runtime.notices(&options).into_iter().chain(unused) {
        flow::log::note(&format!("note: {notice}"));
    }
    let cold = Spread::of((0..args.starts).map(|_| cold_start()).collect::<Result<Vec<_>>>()?);
    let mut engine = Engine::closed(export, &options);
    engine.open_all()?;
    let mut made = Made { images: Vec::new() };
    engine.generate(&jobs, &mut made);
    let images = made.images.into_iter().collect::<Result<Vec<_>>>()?;
    let counted = &images[WARM_UP..];
    let of = |stage: fn(&Stages) -> Duration| {
        Spread::of(counted.iter().map(|(stages, _)| stage(stages).as_secs_f64()))
    };
    let n_calls = jobs[0].plan.len() as f64;
    let whole: f64 = counted.iter().map(|(stages, _)| stages.image().as_secs_f64()).sum();
    let networks: f64 = counted.iter().map(|(stages, _)| stages.networks.as_secs_f64()).sum();
    let sample = of(|stages| stages.sample);
    let measured = Measured {
        model: engine.export().name.clone(),
        provider: options.provider.to_string(),
        device: device::name(options.provider, options.device),
        precision: engine.precision(),
        threads: options.threads,
        width: jobs[0].width,
        height: jobs[0].height,
        solver: jobs[0].solver.name(),
        steps: jobs[0].steps,
        cold,
        load: engine.load().as_secs_f64(),
        text: of(|stages| stages.text),
        step: Spread {
            median: sample.median / n_calls,
            min: sample.min / n_calls,
            max: sample.max / n_calls,
        },
        sample,
        decode: of(|stages| stages.decode),
        png: of(|stages| stages.png),
        image: of(Stages::image),
        outside_networks: 100.0 * (whole - networks) / whole,
        peak_memory: peak_memory(),
    };
    if args.json {
        return Ok(writeln!(lines, "{}", serde_json::to_string(&measured)?)?);
    }
    print(&measured, &mut lines)
}

/// The images that are measured in this process, those that warm it up first.
fn jobs(args: &Bench, export: &Export) -> Result<Vec<Job>> {
    let base = run::request(&args.image)?;
    let job = |i: usize| {
        let (prompt, seed) = (format!("{PROMPT} {i}"), Some(i as u64));
        Ok(export.job(Request { prompt, seed, ..base.clone() }).map_err(Usage::from)?)
    };
    let n = args.images as usize + WARM_UP;
    (0..n).map(job).collect()
}

fn print(measured: &Measured, lines: &mut impl Write) -> Result<()> {
    let Measured { model, provider, device, precision, threads, width, height, .. } = measured;
    writeln!(
        lines,
        "{model}, {precision}, on {provider} ({device}, {threads} threads): {width}x{height}, {} \
         steps of {}",
        measured.steps, measured.solver
    )?;
    let rows = [
        ("start to file", measured.cold),
        ("text", measured.text),
        ("step", measured.step),
        ("all steps", measured.sample),
        ("decoder", measured.decode),
        ("PNG", measured.png),
        ("image", measured.image),
    ];
    writeln!(lines, "{:14} {:>10} {:>10} {:>10}", "seconds", "median", "least", "most")?;
    for (name, Spread { median, min, max }) in rows {
        writeln!(lines, "{name:14} {median:>10.4} {min:>10.4} {max:>10.4}")?;
    }
    writeln!(lines, "{:14} {:>10.4}", "load", measured.load)?;
    writeln!(lines, "outside of networks: {:.2} %", measured.outside_networks)?;
    if let Some(bytes) = measured.peak_memory {
        writeln!(lines, "largest memory: {:.0} MB", bytes as f64 / 1e6)?;
    }
    Ok(())
}

/// Keeps what each image took; encoding counts, writing does not.
struct Made {
    images: Vec<Result<(Stages, usize)>>,
}

impl Watch for Made {
    fn done(&mut self, _: usize, image: Result<Finished>) {
        self.images.push(image.and_then(|Finished { picture, mut stages, .. }| {
            let file = timed(&mut stages.png, || Format::Png.encode(&picture, None))?;
            Ok((stages, file.len()))
        }));
    }
}

/// Seconds of a process that makes one image.
fn cold_start() -> Result<f64> {
    let folder = tempfile::tempdir().context("cannot make a folder for an image")?;
    let program = env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg("generate").args(forwarded()).args(["--prompt", PROMPT, "-o"]);
    command.arg(folder.path().join("cold.png")).stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let ended = command.output().context("cannot start this program again")?;
    let seconds = start.elapsed().as_secs_f64();
    let said = String::from_utf8_lossy(&ended.stderr);
    let why = said.split_once("error: ").map_or(&*said, |(_, why)| why);
    ensure!(ended.status.success(), "{}", why.trim());
    Ok(seconds)
}

/// What was typed after `bench`, without the arguments that are bench's own.
fn forwarded() -> Vec<std::ffi::OsString> {
    let mut words = env::args_os().skip_while(|word| word != "bench").skip(1);
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--json") => {}
            Some("--images" | "--starts") => {
                words.next();
            }
            Some(text) if text.starts_with("--images=") || text.starts_with("--starts=") => {}
            _ => kept.push(word),
        }
    }
    kept
}

/// `VmHWM` of this process.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kilobytes| 1024 * kilobytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_of_an_even_number() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]);
        assert_eq!(spread, Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of([7.0]).median, 7.0);
    }

    #[test]
    fn this_process_has_used_memory() {
        assert!(peak_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
