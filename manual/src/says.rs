//! How much a program says, by the same flags in all of them.

use std::path::PathBuf;

use clap::Args;
use flow::log::{self, Level};

/// The flags.
#[derive(Args, Clone, Debug, Default)]
pub struct Says {
    /// Say nothing but warnings and errors; results are printed all the same
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say every step, and what is under way in it
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Append everything that is said to a file
    #[arg(long, global = true, value_name = "FILE")]
    pub log: Option<PathBuf>,
}

impl Says {
    /// From here on so much is said.
    ///
    /// # Errors
    /// In one line, when the file cannot be opened.
    pub fn open(&self) -> Result<(), String> {
        let level = match (self.quiet, self.verbose) {
            (true, _) => Level::Quiet,
            (_, true) => Level::Verbose,
            _ => Level::Usual,
        };
        let file = self.log.as_deref();
        let name = || file.map(|path| path.display().to_string()).unwrap_or_default();
        log::open(level, file).map_err(|error| format!("--log {}: {error}", name()))
    }
}
