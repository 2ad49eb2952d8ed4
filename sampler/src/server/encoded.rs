//! Image files as clients want them.

pub use crate::format::Format as Encoding;
