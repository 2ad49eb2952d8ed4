//! `ng-engine`: engines of TensorRT for RTX, built of exported graphs on any machine, without a GPU.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match rtx::build(&rtx::Args::parse()) {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
