//! What is read and drawn: prompts, captioned images, pickled weights.

pub mod captioned;
pub mod pickle;
pub(crate) mod prompts;
pub mod signs;
pub mod splitmix;
