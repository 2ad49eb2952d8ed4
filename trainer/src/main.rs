//! `ng-train` once libtorch is found.

use std::process::ExitCode;

use clap::Parser;
use flow::panics;
use flow::usage::Usage;
use trainer::command::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let said = match panics::reported(|| trainer::command::run(&cli)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<trainer::run::align::Stopped>() => return ExitCode::from(130),
        Ok(Err(error)) if error.is::<Usage>() => {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
        Ok(Err(error)) => panics::without_frames(&format!("{error:#}")),
        Err(panic) => panic,
    };
    if panics::is_out_of_memory(&said) {
        eprintln!(
            "error: out of memory: lower rollout.batch, rollout.size or prompts_per_iteration (or --batch, \
             --width and --height), set recompute = true, or train [lora] with stream = true ({said})"
        );
    } else {
        eprintln!("error: {said}");
    }
    ExitCode::FAILURE
}
