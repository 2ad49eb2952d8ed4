//! What the suites in `tests/suite` share: the built programs, the fixtures, and measures of
//! difference.
//!
//! Invariant: nothing here links libtorch or ONNX Runtime; the suites run the programs that a person
//! runs and read the files that these write.

pub mod difference;
pub mod fixture;
pub mod program;
