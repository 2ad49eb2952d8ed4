//! FLUX checkpoints as ONNX, without Python and without running the model.
//!
//! A network of [`flow::models`] is interpreted once by [`graph::Builder`], which records it as a
//! graph of standard operators; [`external`] writes that graph beside the checkpoint's weights, and
//! [`export`] puts the five graphs of a pipeline into the folder layout of Hugging Face Optimum.
//!
//! - [`args`]: what was typed.
//! - [`export`]: the whole folder, all or nothing; [`description`]: what it says of itself.
//! - [`target`], [`precision`]: which operators, which types.
//! - [`part`], [`networks`]: which graphs there are, their inputs, outputs and seams.
//! - [`graph`], [`weights`], [`external`], [`proto`]: recording, encoding, writing, file format.
//! - [`verify`]: the written graphs in ONNX Runtime against the checkpoint in plain Rust.
//! - [`tensorrt`], [`inspect`]: engines; what a folder holds.
//!
//! Invariants: batch, tokens and image size stay open in every graph; a weight is read from its
//! mapped file tensor by tensor, so memory does not grow with the model; ONNX Runtime is opened by
//! [`verify`] only; a folder appears under its final name complete or not at all.
#![warn(missing_docs)]

pub mod args;
pub mod description;
pub mod element;
pub mod export;
pub mod external;
pub mod graph;
pub mod inspect;
pub mod networks;
pub mod part;
pub mod precision;
pub mod proto;
mod publish;
pub mod target;
pub mod tensorrt;
pub mod verify;
pub mod weights;
