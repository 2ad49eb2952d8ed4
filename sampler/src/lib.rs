//! Images from an exported FLUX pipeline: tokenise, encode, sample, decode, write.
//!
//! - [`request`], [`export`]: what one image should be; what a model's folder makes of it.
//! - [`engine`], [`progress`]: the networks, loaded once, for many requests: previews, cancelling.
//! - [`networks`], [`sample`], [`texts`], [`adapters`], [`tensorrt`]: what the engine runs.
//! - [`args`], [`runtime`] → [`run`] → [`generate`]: a run of the program.
//! - [`server`]: requests over HTTP.
//! - [`outputs`], [`picture`], [`format`], [`exif`], [`parameters`], [`settings`], [`sheet`], [`label`],
//!   [`device`], [`report`]: what goes in and comes out.
//! - [`bench`], [`compare`]: stages measured; models side by side.
//! - [`inspect`], [`infotext`]: what pictures and models say of themselves.
//!
//! Invariants: nothing here knows libtorch or the trainer; no file but [`engine`] and [`networks`]
//! runs a graph; solvers, schedules, noise and tokenizers are `flow`'s, as in training; an image's
//! bits depend on the model, provider, prompt, seed, size and plan, not on threads or on other images.

pub mod adapters;
pub mod args;
pub mod bench;
pub mod compare;
pub mod device;
pub mod engine;
pub mod exif;
pub mod export;
pub mod format;
pub mod generate;
pub mod infotext;
pub mod inspect;
pub mod label;
pub mod networks;
pub mod outputs;
pub mod parameters;
pub mod picture;
pub mod progress;
pub mod report;
pub mod request;
pub mod run;
pub mod runtime;
pub mod sample;
pub mod server;
pub mod settings;
pub mod sheet;
pub mod tensorrt;
pub mod texts;
