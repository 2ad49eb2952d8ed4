//! One seed, several independent families of noise.

use flow::noise::Noise;

/// What randomness is for; families never share a stream.
#[derive(Clone, Copy)]
pub(crate) enum Use {
    Weights = 1,
    Batches,
    Times,
    Data,
    Posterior,
    Neighbourhood,
    Anchors,
    Steps,
    Transitions,
    Forward,
    Windows,
    Branches,
}

/// The family of `seed` for `purpose`.
pub(crate) fn family(seed: u64, purpose: Use) -> Noise {
    Noise::new(seed ^ ((purpose as u64) << 56))
}
