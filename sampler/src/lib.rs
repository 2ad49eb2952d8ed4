//! Images from an exported FLUX pipeline: tokenise, encode, sample, decode, PNG.
//!
//! - [`args`] → [`request`]: what was typed, what it means.
//! - [`generate`]: the run; [`engine`] holds the networks, [`sample`] the denoising loop.
//! - [`outputs`], [`picture`], [`sheet`], [`report`]: what goes in and comes out.
//!
//! Invariants: nothing here knows libtorch or the trainer; no file but [`engine`] and [`generate`]
//! knows ONNX Runtime; solvers, schedules, noise and tokenizers are `flow`'s, as in training; an
//! image's bits depend on the model, prompt, seed, size and plan, not on threads or on other images.

pub mod args;
pub mod engine;
pub mod generate;
pub mod outputs;
pub mod picture;
pub mod report;
pub mod request;
pub mod sample;
pub mod sheet;
