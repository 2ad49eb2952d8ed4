//! `ng-export`: a FLUX checkpoint as ONNX.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Parser;
use exporter::args::Args;
use exporter::export::{Table, export};
use flow::panics;
use indicatif::{ProgressBar, ProgressStyle};

fn main() -> ExitCode {
    let args = Args::parse();
    let said = match panics::reported(|| run(args)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => format!("{error:#}"),
        Err(panic) => panic,
    };
    eprintln!("error: {}", panics::without_frames(&said));
    ExitCode::FAILURE
}

fn run(args: Args) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&stop);
    ctrlc::set_handler(move || asked.store(true, Ordering::Relaxed))
        .context("cannot listen for interrupts")?;
    let template = "{msg:<24} {wide_bar} {human_pos}/{human_len} weights {eta}";
    let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(template)?);
    let summaries = export(&args.request(), &bar, &stop);
    bar.finish_and_clear();
    match write!(io::stdout(), "{}", Table(&summaries?)) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}
