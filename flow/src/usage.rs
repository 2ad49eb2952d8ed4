//! A mistake in what was typed, as opposed to one in a file: the program ends with code 2.

/// The mistake, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);
