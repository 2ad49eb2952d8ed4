//! One run: its configuration, the loop, and what it leaves on disk.

pub(crate) mod agreement;
pub mod align;
pub mod config;
pub mod interrupt;
pub(crate) mod layers;
pub(crate) mod lock;
pub mod metrics;
pub(crate) mod progress;
#[cfg(test)]
mod reads;
pub(crate) mod ready;
pub(crate) mod record;
pub(crate) mod report;
pub(crate) mod resume;
pub(crate) mod schema;
pub mod settings;
mod starvation;
mod state;
pub(crate) mod update;
pub(crate) mod validation;
mod watching;
