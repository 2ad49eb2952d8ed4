//! `ng-sample`: images from an exported FLUX pipeline.

use std::{
    io::{Write, stdout},
    process::ExitCode,
};

use anyhow::Result;
use clap::Parser;
use flow::{panics, usage::Usage};
use sampler::{
    args::{Cli, Command},
    generate, inspect,
    run::Run,
    server::args::serve,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let (code, said) = match panics::reported(|| run(cli)) {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => (if error.is::<Usage>() { 2 } else { 1 }, format!("{error:#}")),
        Err(panic) => (1, panic),
    };
    // There is nowhere left to tell that stderr is closed.
    let _ = writeln!(std::io::stderr(), "error: {}", panics::without_frames(&said));
    ExitCode::from(code)
}

fn run(cli: Cli) -> Result<()> {
    match (cli.inspect, cli.command) {
        (Some(path), _) => inspect::run(&path, stdout()),
        (None, Some(Command::Inspect(args))) => inspect::run(&args.path, stdout()),
        (None, Some(Command::Serve(args))) => serve(&args),
        (None, Some(Command::Generate(args))) => generate::run(&Run::new(&args)?, stdout()),
        (None, None) => generate::run(&Run::new(&cli.generate)?, stdout()),
    }
}
