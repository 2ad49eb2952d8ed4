//! The pipeline that trains: its networks on one device, adapters, optimiser, and how they are written.

pub(crate) mod condition;
pub(crate) mod embeddings;
pub(crate) mod engine;
mod inference;
pub(crate) mod init;
mod learning;
pub mod lora;
pub(crate) mod model;
pub(crate) mod optimizer;
pub(crate) mod reference;
pub(crate) mod save;
pub(crate) mod sharding;
pub(crate) mod shards;
