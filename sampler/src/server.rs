//! `ng-sample serve`: an export behind HTTP.
//!
//! - [`app`]: the routes. [`openai`], [`jobs`], [`sdapi`] and [`page`] are the APIs; [`guard`] says who
//!   may ask, [`body`] and [`fields`] read what is asked, [`refusal`] says why not.
//! - [`ask`] → [`drawing`] → [`job`]: a request's wishes, what they mean, and its way through the
//!   [`queue`] to the [`worker`], the one thread that owns the networks.
//! - [`loras`]: styles that are loaded while the server runs.
//! - [`events`], [`metrics`], [`log`], [`store`]: what can be seen of it.
//! - [`listen`]: sockets, and going down.
//!
//! Invariants: a drawing is a value, and its bits depend on it and the model alone; no more work is
//! taken in than the queue holds; what was taken in is drawn, failed or cancelled, never forgotten.

pub mod app;
pub mod args;
pub mod ask;
pub mod body;
pub mod drawing;
pub mod encoded;
pub mod events;
pub mod fields;
pub mod guard;
pub mod identity;
pub mod job;
pub mod jobs;
pub mod listen;
pub mod log;
pub mod loras;
pub mod metrics;
pub mod openai;
pub mod page;
pub mod queue;
pub mod refusal;
pub mod sdapi;
pub mod service;
pub mod store;
pub mod worker;

pub use ask::{Card, Limits};
