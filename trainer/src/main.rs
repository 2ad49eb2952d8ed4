//! `ng-train` once libtorch is found.

use std::process::ExitCode;

use clap::Parser;
use flow::usage::Usage;
use trainer::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match trainer::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<trainer::align::Stopped>() => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}
