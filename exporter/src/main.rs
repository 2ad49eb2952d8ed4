//! `ng-export`: a FLUX checkpoint as ONNX.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use exporter::args::{Args, Inspect, Verify, Wrap, threads as threads_of};
use exporter::export::plan::plan;
use exporter::export::{Table, export};
use exporter::target::Target;
use exporter::verify::Asked;
use exporter::{inspect, tensorrt, verify};
use flow::log::{self, Level};
use flow::pipeline::Pipeline;
use flow::usage::Usage;
use flow::{aborts, panics};
use indicatif::{ProgressBar, ProgressStyle};
use manual::says::Says;

/// What helps where memory is gone.
const ADVICE: &str =
    "end other programs, raise the limit (ulimit -v, the job's memory), or leave out --verify";
/// Whether a signal asks to stop.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let others = [Verify::command(), Inspect::command(), Wrap::command()];
    let named = others.into_iter().zip(["verify", "inspect", "wrap"]);
    let all = named.fold(Args::command(), |all, (one, name)| all.subcommand(one.name(name)));
    if let Some(end) = manual::written(all) {
        return end;
    }
    if let Err(error) = aborts::tell(ADVICE) {
        eprintln!("warning: what a library's abort means will not be told: {error}");
    }
    let (code, said) = match panics::reported(|| asked(std::env::args_os().collect())) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => {
            let is_stopped = STOP.load(Ordering::Relaxed);
            let code = if is_stopped { 130 } else { 1 + u8::from(error.is::<Usage>()) };
            (code, format!("{error:#}"))
        }
        Err(panic) => (1, panic),
    };
    log::say(&panics::last_line(&said, ADVICE));
    ExitCode::from(code)
}

/// Does what `typed` asks for.
fn asked(mut typed: Vec<OsString>) -> Result<()> {
    let command = typed.get(1).and_then(|word| word.to_str()).unwrap_or_default().to_owned();
    if ["verify", "inspect", "wrap"].contains(&command.as_str()) {
        typed.remove(1);
    }
    match command.as_str() {
        "verify" => {
            let typed = Verify::parse_from(typed);
            open(&typed.says).and_then(|()| compare(&typed))
        }
        "inspect" => {
            let Inspect { folder, says } = Inspect::parse_from(typed);
            open(&says).and_then(|()| inspect::inspect(&folder)).and_then(say)
        }
        "wrap" => {
            let Wrap { plan, graph, architecture, out, says } = Wrap::parse_from(typed);
            open(&says).and_then(|()| tensorrt::wrap(&plan, &graph, architecture, &out))
        }
        _ => run(Args::parse_from(typed)),
    }
}

fn open(says: &Says) -> Result<()> {
    Ok(says.open().map_err(Usage)?)
}

fn compare(typed: &Verify) -> Result<()> {
    let Verify {
        folder, checkpoint, loras, max_error, pictures, min_psnr, max_gmsd, threads, ..
    } = typed;
    let asked = Asked {
        max_error: *max_error,
        min_psnr: *min_psnr,
        max_gmsd: *max_gmsd,
        wanted: (*pictures).into(),
    };
    let report = verify::again(folder, checkpoint, loras, &asked, threads_of(*threads))?;
    say(report.table())?;
    report.check()
}

fn say(text: impl std::fmt::Display) -> Result<()> {
    let text = text.to_string();
    log::keep(text.trim_end());
    match write!(io::stdout(), "{text}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

fn run(args: Args) -> Result<()> {
    open(&args.says)?;
    let note = args.note();
    if args.is_dry() {
        say(plan(&args.request())?)?;
        if let Some(note) = note {
            log::note(&note);
        }
        return Ok(());
    }
    ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed))
        .context("cannot listen for interrupts")?;
    let template = "{msg:<24} {wide_bar} {human_pos}/{human_len} weights {eta}";
    let bar = match log::level() {
        Level::Quiet => ProgressBar::hidden(),
        _ => ProgressBar::new(0).with_style(ProgressStyle::with_template(template)?),
    };
    let request = args.request();
    let summaries = export(&request, &bar, &|| STOP.load(Ordering::Relaxed));
    bar.finish_and_clear();
    say(Table(&summaries?))?;
    if let Some(note) = note {
        log::note(&note);
    }
    if request.choice.target == Target::TensorRt {
        let pipeline = Pipeline::open(&request.checkpoint)?;
        let side = pipeline.default_size();
        let command = tensorrt::build_command(&request.target, &pipeline, side, 1);
        say(format_args!("on the GPU that will run it: {command}\n"))?;
    }
    Ok(())
}
