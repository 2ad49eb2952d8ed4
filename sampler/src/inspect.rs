//! What a picture says about itself.

use std::{io::Write, path::Path};

use anyhow::{Context, Result};

use crate::picture::read_parameters;

/// Prints what is known of `path`.
///
/// # Errors
/// When it cannot be read or says nothing.
pub fn run(path: &Path, mut lines: impl Write) -> Result<()> {
    let text = read_parameters(path)?
        .with_context(|| format!("{} holds no parameters", path.display()))?;
    Ok(writeln!(lines, "{text}")?)
}
