//! One run: its configuration, the loop, and what it leaves on disk.

mod agreement;
pub mod align;
pub mod config;
pub mod interrupt;
pub(crate) mod lock;
pub mod metrics;
pub(crate) mod progress;
pub(crate) mod report;
pub mod settings;
mod starvation;
mod state;
mod update;
