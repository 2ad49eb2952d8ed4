//! `ng-train`: alignment of flow-matching text-to-image models with human preference, through libtorch.
//!
//! Rooms from the ground up, each of which knows those before it and none after it: [`picture`], [`data`],
//! [`tensor`], [`network`], [`reward`], [`group`], [`algorithm`], [`run`], [`command`].

pub mod algorithm;
pub mod command;
pub mod data;
pub mod group;
pub mod network;
pub mod picture;
pub mod reward;
pub mod run;
pub mod tensor;
