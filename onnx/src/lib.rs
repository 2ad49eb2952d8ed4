//! ONNX models run by ONNX Runtime, whose shared library is opened at run time.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use onnx::{Model, Options, Tensor};
//!
//! let mut model = Model::open("vae_decoder/model.onnx", &Options { threads: 2, ..Options::default() })?;
//! let latents = Tensor::f32(vec![1, 16, 4, 4], vec![0.0; 256])?;
//! let images = model.run(&[("latent_sample", &latents)], &["sample"])?;
//! println!("{:?}", images[0].shape);
//! # Ok(())
//! # }
//! ```
//!
//! - [`Tensor`]: a shape and its numbers, `f32` or `i64`.
//! - [`Model`]: one graph, its inputs, outputs and metadata; [`Model::run`], and for a loop
//!   [`Binding`] and [`Model::run_bound`].
//! - [`Cancel`]: stops a run from another thread.
//! - [`Options`], [`Provider`]: threads, device, memory.
//! - [`library`]: which ONNX Runtime will be opened.
//!
//! Invariants: `ort` is named by this crate only; nothing of ONNX Runtime is touched before its
//! library has been found and its version checked, so a missing or wrong library is an error and
//! never a panic; a process has one ONNX Runtime environment, without telemetry.

mod binding;
mod cancel;
mod elements;
mod library;
mod model;
mod options;
mod placement;
mod port;
mod provider;
mod tensor;

pub use binding::Binding;
pub use cancel::{Cancel, Cancelled};
pub use library::library;
pub use model::Model;
pub use options::{Options, PROVIDERS, Profile, Provider};
pub use port::{ElementType, Port};
pub use provider::tensorrt_version;
pub use tensor::{Data, Tensor};
