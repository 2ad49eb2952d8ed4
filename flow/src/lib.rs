//! What training and deployment must agree on.
//!
//! # Conventions
//! Time runs as in the Neighbor GRPO paper: t = 1 is noise, t = 0 is data,
//! `x_t = (1 − t)·x0 + t·eps`, and a network predicts the velocity `v = eps − x0` (Eq. 1, 2).
//! Sigma, in schedules, is another name for t.
//!
//! Nothing here links a native library or opens a socket: networks are functions over [`ops::Ops`],
//! solvers are tables of numbers, noise is a counter.
#![warn(missing_docs)]

pub mod aborts;
pub mod checkpoint;
pub mod checksums;
pub mod contents;
mod disk;
pub mod known;
pub mod latents;
pub mod log;
pub mod lora;
pub mod models;
pub mod naming;
pub mod nn;
pub mod noise;
pub mod ops;
pub mod panics;
pub mod path;
pub mod picture;
pub mod pipeline;
pub mod prompts;
pub mod reference;
pub mod schedule;
pub mod sde;
pub mod solver;
pub mod staged;
pub mod tiles;
pub mod tokens;
pub mod usage;
