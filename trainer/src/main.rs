//! `ng-train` once libtorch is found.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{CommandFactory, Parser};
use flow::usage::Usage;
use flow::{aborts, log, panics};
use trainer::command::args::Cli;

/// What helps where memory is gone.
const ADVICE: &str = "lower rollout.batch, rollout.size or prompts_per_iteration (or --batch, --width and \
                      --height), set recompute = true, or train [lora] with stream = true";

fn main() -> ExitCode {
    if let Some(end) = manual::written(Cli::command()) {
        return end;
    }
    let cli = Cli::parse();
    if let Err(error) = aborts::tell(ADVICE) {
        eprintln!("warning: what a library's abort means will not be told: {error}");
    }
    let said = match panics::reported(|| trainer::command::run(&cli)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) if error.is::<trainer::run::align::Stopped>() => return ExitCode::from(130),
        Ok(Err(error)) if error.is::<trainer::command::Failed>() => {
            log::say(&format!("error: {error}"));
            let code = error.downcast_ref().map_or(1, trainer::command::Failed::code);
            return ExitCode::from(code);
        }
        Ok(Err(error)) if error.is::<Usage>() => {
            log::say(&format!("error: {error:#}"));
            return ExitCode::from(2);
        }
        Ok(Err(error)) => panics::without_frames(&format!("{error:#}")),
        Err(panic) if panics::is_unread(&panic) => return ExitCode::SUCCESS,
        Err(panic) => panic,
    };
    tell_launcher(&said);
    log::say(&panics::last_line(&said, ADVICE));
    ExitCode::FAILURE
}

/// Writes down for torchrun, which names the rank that failed first, why it did.
fn tell_launcher(said: &str) {
    let Some(path) = std::env::var_os("TORCHELASTIC_ERROR_FILE") else { return };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let extra = serde_json::json!({ "py_callstack": said, "timestamp": now.to_string() });
    let text = serde_json::json!({ "message": { "message": said, "extraInfo": extra } });
    // Nothing is lost where it cannot be written: the same stands in the program's own output.
    _ = std::fs::write(path, text.to_string());
}
