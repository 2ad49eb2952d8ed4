//! What `fixtures/make.py` computed from the papers.

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::Objective;
use super::dgpo::DgpoConfig;
use super::direct::DirectConfig;
use super::matching::MatchingConfig;
use super::nft::NftConfig;
use super::sde::SdeConfig;
use super::window::WindowConfig;

/// `fixtures/case.json`; tensors are `[M, S, C]`, flat.
#[derive(Deserialize)]
pub(crate) struct Cases {
    pub(crate) sde: Vec<SdeCase>,
    pub(crate) nft: Vec<NftCase>,
    pub(crate) matching: Vec<MatchingCase>,
    pub(crate) windows: Vec<WindowCase>,
    pub(crate) tree: Vec<TreeCase>,
    pub(crate) dgpo: Vec<DgpoCase>,
}

#[derive(Deserialize)]
pub(crate) struct SdeCase {
    pub(crate) settings: SdeConfig,
    pub(crate) t: Vec<f64>,
    pub(crate) t_next: Vec<f64>,
    pub(crate) t_second: f64,
    pub(crate) advantages: Vec<f64>,
    pub(crate) x_in: Vec<f64>,
    pub(crate) v_old: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) v_reference: Vec<f64>,
    pub(crate) x_next: Vec<f64>,
    pub(crate) log_ratio: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) gradient: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct NftCase {
    pub(crate) settings: NftConfig,
    pub(crate) t: Vec<f64>,
    pub(crate) x0: Vec<f64>,
    pub(crate) x_t: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) v_old: Vec<f64>,
    pub(crate) v_reference: Vec<f64>,
    pub(crate) advantages: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) gradient: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct MatchingCase {
    pub(crate) settings: MatchingConfig,
    pub(crate) t: Vec<f64>,
    pub(crate) target: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) v_old: Vec<f64>,
    pub(crate) v_lag: Vec<f64>,
    pub(crate) v_reference: Vec<f64>,
    pub(crate) advantages: Vec<f64>,
    pub(crate) log_ratio: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) gradient: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct DgpoCase {
    pub(crate) settings: DgpoConfig,
    pub(crate) group_size: usize,
    pub(crate) target: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) v_lag: Vec<f64>,
    pub(crate) v_start: Vec<f64>,
    pub(crate) advantages: Vec<f64>,
    pub(crate) weights: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) gradient: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct WindowCase {
    pub(crate) settings: WindowConfig,
    pub(crate) n_steps: usize,
    pub(crate) starts: Vec<usize>,
}

#[derive(Deserialize)]
pub(crate) struct TreeCase {
    pub(crate) weighted: bool,
    pub(crate) leaves: Vec<f64>,
    pub(crate) arrivals: Vec<usize>,
    pub(crate) log_probs: Vec<Option<Vec<f64>>>,
    pub(crate) fused: Vec<Vec<f64>>,
    pub(crate) advantages: Vec<Vec<f64>>,
}

pub(crate) fn cases() -> Cases {
    serde_json::from_str(include_str!("fixtures/case.json")).unwrap()
}

/// Values `[M, S, C]` in f32.
pub(crate) fn latents(values: &[f64]) -> Tensor {
    vector(values).reshape([-1, 2, 3])
}

/// Values `[M]` in f32.
pub(crate) fn vector(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).to_kind(Kind::Float)
}

/// The largest difference, as a share of the largest expected magnitude.
pub(crate) fn difference(found: &Tensor, expected: &[f64]) -> f64 {
    let expected = Tensor::from_slice(expected);
    let found = found.to_kind(Kind::Double).reshape([-1]);
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    largest(&(found - &expected)) / largest(&expected)
}

/// Holds value and gradient against the script's.
#[track_caller]
pub(crate) fn check(found: &Objective, value: &[f64], gradient: &[f64], what: &str) {
    let (of_value, of_gradient) =
        (difference(&found.value, value), difference(&found.gradient, gradient));
    println!("{what}: value {of_value:.1e}, gradient {of_gradient:.1e} (relative)");
    assert!(of_value < 1e-5, "{what}: the value differs by {of_value:.1e}");
    assert!(of_gradient < 1e-4, "{what}: the gradient differs by {of_gradient:.1e}");
}

/// Whether the algorithm of that name needs rewards that have gradients.
pub(crate) fn follows_rewards(name: &str) -> bool {
    DirectConfig::PUBLISHED.iter().any(|(known, _)| *known == name)
}
