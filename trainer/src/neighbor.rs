//! Neighbor GRPO: the softmax-distance surrogate policy and its clipped objective (paper Eq. 8 to 10).
//!
//! For one anchor and one transition, with D = x_θ − x_old, N numbers a latent and candidates c_i:
//!
//! ```text
//! ℓ_i     = (2/τ_eff)·⟨D, c_i − x_old⟩
//! q_i     = log_softmax_i(−‖c_i − x_old‖²/τ_eff)
//! log ρ_i = ℓ_i − logsumexp_k(q_k + ℓ_k)
//! J       = (1/G)·Σ_i min(A_i·ρ_i, A_i·clip(ρ_i, 1 − ε, 1 + ε))
//! ```
//!
//! This is Eq. 8 to 10 exactly: with both policies taking the one-step transition from the same state,
//! their ratio is an exponential tilt in D and every ‖D‖² cancels. Differencing two log-softmaxes
//! instead loses four digits in f32 (METHOD section 1).

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// How squared distances are scaled before the softmax.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// Mean over the latent's numbers: τ_eff = τ·N.
    Mean,
    /// Sum, as Eq. 8 is printed: τ_eff = τ.
    Sum,
    /// The trust region of an SDE step: τ_eff = 2·η²·Δt·N with η = τ.
    SdeMatched,
}

/// Settings of the surrogate.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NeighborConfig {
    /// Distance of the softmax.
    #[serde(default = "mean")]
    pub distance: Distance,
    /// Its temperature (η where `distance` is `sde-matched`).
    #[serde(default = "one")]
    pub tau: f64,
    /// Half-width ε of the ratio clip.
    #[serde(default = "clip")]
    pub clip: f64,
}

fn mean() -> Distance {
    Distance::Mean
}
fn one() -> f64 {
    1.0
}
fn clip() -> f64 {
    1e-4
}

impl Default for NeighborConfig {
    fn default() -> Self {
        Self { distance: mean(), tau: one(), clip: clip() }
    }
}

/// Limit of |log ρ| before it is exponentiated; it guards against overflow and nothing else.
const MAX_LOG_RATIO: f64 = 10.0;

/// M transitions of anchors with their groups, in f32. `N` numbers a latent, `G` members a group.
pub(crate) struct Transitions {
    /// Anchor's state before, `[M, S, C]`.
    pub(crate) x_in: Tensor,
    /// Velocity the rollout computed there, `[M, S, C]`.
    pub(crate) v_old: Tensor,
    /// Times before and after, `[M]`.
    pub(crate) t_in: Tensor,
    pub(crate) t_next: Tensor,
    /// Where the group arrived, `[M, G, S, C]`.
    pub(crate) candidates: Tensor,
    /// `[M, G]`.
    pub(crate) advantages: Tensor,
}

/// The objective at one velocity.
pub(crate) struct Objective {
    /// J of each transition, `[M]`.
    pub(crate) value: Tensor,
    /// log ρ, `[M, G]`.
    pub(crate) log_ratio: Tensor,
    /// Log-probabilities q of the old policy, `[M, G]`.
    pub(crate) log_policy: Tensor,
    /// d(mean of J)/dv, `[M, S, C]`.
    pub(crate) gradient: Tensor,
}

impl NeighborConfig {
    /// τ_eff of transitions that span `dt` `[M]` over latents of `n` numbers: `[M, 1]`.
    fn temperature(&self, dt: &Tensor, n: i64) -> Tensor {
        let dt = dt.abs().unsqueeze(1);
        match self.distance {
            Distance::Mean => dt.full_like(self.tau * n as f64),
            Distance::Sum => dt.full_like(self.tau),
            Distance::SdeMatched => dt * (2.0 * self.tau * self.tau * n as f64),
        }
    }

    /// J and its gradient at the current velocity `v` `[M, S, C]`.
    pub(crate) fn objective(&self, transitions: &Transitions, v: &Tensor) -> Objective {
        let v = v.detach().set_requires_grad(true);
        let Transitions { x_in, v_old, t_in, t_next, candidates, advantages } = transitions;
        let m = v.size()[0];
        let dt = t_next - t_in;
        let wide = dt.reshape([-1, 1, 1]);
        let x_old = x_in + v_old * &wide;
        let moved = ((&v - v_old) * &wide).reshape([m, -1, 1]); // D: [M, N, 1]
        let n = moved.size()[1];
        let away = (candidates - x_old.unsqueeze(1)).reshape([m, -1, n]); // [M, G, N]
        let tau = self.temperature(&dt, n);
        let tilt = away.bmm(&moved).squeeze_dim(2) * 2.0 / &tau;
        let dims: &[i64] = &[2];
        let log_policy =
            (-away.square().sum_dim_intlist(dims, false, Kind::Float) / &tau).log_softmax(1, Kind::Float);
        let log_ratio = &tilt - (&log_policy + &tilt).logsumexp([1], true);
        let ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp();
        let clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip);
        let dims: &[i64] = &[1];
        let value =
            (advantages * &ratio).minimum(&(advantages * clipped)).mean_dim(dims, false, Kind::Float);
        value.mean(Kind::Float).backward();
        Objective {
            value: value.detach(),
            log_ratio: log_ratio.detach(),
            log_policy,
            gradient: v.grad(),
        }
    }
}
