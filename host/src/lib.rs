//! The processor's interpreter of [`flow::ops::Ops`]: plain Rust on f32 tensors of a few samples, which
//! stay in the cache from one operator to the next.
//!
//! libtorch takes a whole batch through each operator; in a small network every activation then goes out
//! to memory and back, and an operator's call costs as much as its arithmetic. Here a few samples go
//! through all operators, and weights are laid out once as products read them. Integers are held as f32,
//! exact below 2²⁴. [`Interpreter`] keeps nothing; [`Trace`] keeps what slopes need, and leaves
//! a [`Passage`] that gives them.
//!
//! Beside it, what an optimiser does to flat f32 parameters, for the same reason: each number is read once.

mod adamw;
mod attention;
mod interpreter;
mod kernels;
mod learned;
mod parameters;
mod passage;
mod product;
mod slopes;
mod tensor;
mod trace;

pub use adamw::{AdamW, sum_of_squares};
pub use interpreter::Interpreter;
pub use learned::Learned;
pub use parameters::Parameters;
pub use passage::{Passage, Weights};
pub use tensor::Tensor;
pub use trace::{Trace, Traced};

/// Whether this processor has the fused multiply-add that the products are made of; where it has not, each
/// costs a call. `ATEN_CPU_CAPABILITY=default`, which keeps libtorch from it, keeps this interpreter out too.
///
/// The width of vectors does not matter: every kernel adds in one order and rounds once a step, so that its
/// bits are the same on each of them.
pub fn is_fast() -> bool {
    if std::env::var_os("ATEN_CPU_CAPABILITY").is_some_and(|limit| limit == "default") {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

/// Numbers in [−1, 1) that do not repeat.
#[cfg(test)]
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
