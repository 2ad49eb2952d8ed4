//! `ng-sample`: images from an exported FLUX pipeline.

use std::{
    io::{Write, stdout},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Parser;
use flow::usage::Usage;
use sampler::{args::Args, generate, picture::read_parameters, request::Request};

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = format!("{error:#}").replace('\n', " ");
            // There is nowhere left to tell that stderr is closed.
            let _ = writeln!(std::io::stderr(), "error: {line}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(png) = &args.inspect {
        let text = read_parameters(png)?
            .with_context(|| format!("{} holds no parameters", png.display()))?;
        return Ok(writeln!(stdout(), "{text}")?);
    }
    generate::run(&Request::new(args)?, stdout())
}
