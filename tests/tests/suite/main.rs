//! Suites that cross crates: the built programs against reference outputs, against each other, and
//! against their promises.

mod agreement;
mod algorithms;
mod align;
mod compare;
mod determinism;
mod documents;
mod emoji;
mod ends;
mod errors;
mod eval;
mod exporting;
mod found;
mod nodes;
mod parity;
mod pretrain;
mod ranks;
mod record;
mod score;
mod serve;
mod server;
mod table;
mod tidy;
mod tokens;
mod trust;
mod validation;
