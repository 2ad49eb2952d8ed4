//! `ng-train` once libtorch is found.

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use flow::usage::Usage;
use flow::{aborts, log, panics};
use trainer::command::args::Cli;
use trainer::command::{Failed, reason};
use trainer::run::align::Stopped;

/// What helps where memory is gone.
const ADVICE: &str = "lower rollout.batch, rollout.size or prompts_per_iteration (or --batch, --width and \
                      --height), set recompute = true, or train [lora] with stream = true";

fn main() -> ExitCode {
    if let Some(end) = manual::written(Cli::command()) {
        return end;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() {
                reason::tell(
                    panics::without_frames(&error.to_string()).trim_start_matches("error: "),
                );
            }
            error.exit()
        }
    };
    if let Err(error) = aborts::tell(ADVICE) {
        eprintln!("warning: what a library's abort means will not be told: {error}");
    }
    let said = match panics::reported(|| trainer::command::run(&cli)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<Stopped>() => return ExitCode::from(130),
        Ok(Err(error)) if error.is::<Failed>() => {
            reason::tell_of_rank(&error.to_string());
            log::say(&format!("error: {error}"));
            return ExitCode::from(error.downcast_ref().map_or(1, Failed::code));
        }
        Ok(Err(error)) if error.is::<Usage>() => {
            reason::tell(&format!("{error:#}"));
            log::say(&format!("error: {error:#}"));
            return ExitCode::from(2);
        }
        Ok(Err(error)) => panics::without_frames(&format!("{error:#}")),
        Err(panic) if panics::is_unread(&panic) => return ExitCode::SUCCESS,
        Err(panic) => panic,
    };
    reason::tell(&said);
    log::say(&panics::last_line(&said, ADVICE));
    ExitCode::FAILURE
}
