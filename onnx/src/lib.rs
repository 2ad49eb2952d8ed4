//! ONNX models run by ONNX Runtime, whose shared library is opened at run time.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use onnx::{Model, Options, Tensor};
//!
//! let mut model = Model::open("vae_decoder/model.onnx", &Options { threads: 2 })?;
//! let latents = Tensor::f32(vec![1, 16, 4, 4], vec![0.0; 256])?;
//! let images = model.run(&[("latent_sample", &latents)], &["sample"])?;
//! println!("{:?}", images[0].shape);
//! # Ok(())
//! # }
//! ```
//!
//! - [`Tensor`]: a shape and its numbers, `f32` or `i64`.
//! - [`Model`]: one graph, its inputs, outputs and metadata; [`Model::run`].
//! - [`library`]: which ONNX Runtime will be opened.
//!
//! Invariants: `ort` is named by this crate only; nothing of ONNX Runtime is touched before its
//! library has been found and its version checked, so a missing or wrong library is an error and
//! never a panic; a process has one ONNX Runtime environment, without telemetry.

mod library;
mod model;
mod tensor;

pub use library::library;
pub use model::{ElementType, Model, Options, Port};
pub use tensor::{Data, Tensor};
