//! `ng-sample`: images from an exported FLUX pipeline.

use std::{
    io::{Write, stderr, stdout},
    process::ExitCode,
};

use anyhow::Result;
use clap::{CommandFactory, Parser};
use flow::{aborts, log, panics, usage::Usage};
use sampler::{
    args::{Cli, Command, Generate},
    bench, compare, generate, inspect,
    run::Run,
    server::args::serve,
};

/// What helps where memory is gone.
const ADVICE: &str = "lower --width and --height, or take --memory low";

fn main() -> ExitCode {
    if let Some(end) = manual::written(Cli::command()) {
        return end;
    }
    let cli = Cli::parse();
    if let Err(error) = aborts::tell(ADVICE) {
        let _ =
            writeln!(stderr(), "warning: what a library's abort means will not be told: {error}");
    }
    let (code, said) = match panics::reported(|| run(cli)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => (if error.is::<Usage>() { 2 } else { 1 }, format!("{error:#}")),
        Err(panic) => (1, panic),
    };
    log::say(&panics::last_line(&said, ADVICE));
    ExitCode::from(code)
}

fn make(args: &Generate) -> Result<()> {
    let run = Run::new(args)?;
    if run.is_piped() {
        return generate::run(&run, stderr());
    }
    generate::run(&run, stdout())
}

fn run(cli: Cli) -> Result<()> {
    cli.says.open().map_err(Usage)?;
    match cli.command {
        Some(Command::Bench(args)) => bench::run(&args, stdout()),
        Some(Command::Compare(args)) => compare::run(&args, stdout()),
        Some(Command::Inspect(args)) => inspect::run(&args.path, args.json, stdout()),
        Some(Command::Generate(args)) => make(&args),
        None => make(&cli.generate),
        Some(Command::Serve(args)) => serve(&args),
    }
}
