//! UniPC of order 2 as a linear multistep method.
//!
//! UniPC corrects the state at t with the data prediction found there, then predicts the next. The
//! prediction it corrects was itself a sum of the state before and of past data predictions, so that
//! the correction is a sum of the predicted state and of the last three data predictions, and a
//! whole step needs no second state.
//!
//! Source: `UniPCMultistepScheduler` (bh2, order 2, flow sigmas) of diffusers 0.36 to 0.42.

use crate::path;

/// λ is taken no nearer to noise than here, as the source moves a first time of 1.
const FIRST: f64 = 1.0 - 1e-6;

/// Weights of the predicted state at `t` and of the data predictions there, before it, and before
/// that, in the predicted state at `t_next`, after steps from the times `[t_prev2, t_prev]`; of first
/// order where there are none, and to t = 0.
pub(super) fn weights([t_prev2, t_prev]: [Option<f64>; 2], t: f64, t_next: f64) -> [f64; 4] {
    let predicted = Weights::predictor(t_prev, t, t_next);
    let mut m = [predicted.m0, predicted.m1, 0.0];
    if let Some(t_prev) = t_prev {
        let before = Weights::predictor(t_prev2, t_prev, t);
        let after = Weights::corrector(t_prev2, t_prev, t);
        let carried = predicted.x;
        m[0] += carried * after.m_next;
        m[1] += carried * (after.m0 - before.m0);
        m[2] += carried * (after.m1 - before.m1);
    }
    [predicted.x, m[0], m[1], m[2]]
}

/// `x_next = x·x + m0·m0 + m1·m1 + m_next·m_next`: m0 is the data prediction at t, m1 the one before,
/// m_next the one at t_next.
struct Weights {
    x: f64,
    m0: f64,
    m1: f64,
    m_next: f64,
}

impl Weights {
    /// B(h) = e^h − 1 makes it DPM-Solver++ 2M.
    fn predictor(t_prev: Option<f64>, t: f64, t_next: f64) -> Self {
        let r = t_next / t;
        let c = match t_prev {
            Some(t_prev) if t_next > 0.0 => step_of(t, t_next) / (2.0 * step_of(t_prev, t)),
            _ => 0.0,
        };
        Self { x: r, m0: (1.0 - r) * (1.0 + c), m1: -(1.0 - r) * c, m_next: 0.0 }
    }

    fn corrector(t_prev: Option<f64>, t: f64, t_next: f64) -> Self {
        let (r, h) = (t_next / t, step_of(t, t_next));
        // The right-hand sides of the source's two order conditions.
        let e = (-h).exp_m1();
        let first = e / -h - 1.0;
        let second = first / -h - 0.5;
        let (b1, b2) = (first / e, 2.0 * second / e);
        let (of_d1, of_next) = match t_prev {
            None => (0.0, 0.5),
            Some(t_prev) => {
                let rk = -step_of(t_prev, t) / h;
                let rho = (b2 - b1) / (rk - 1.0);
                (rho / rk, b1 - rho)
            }
        };
        let by = 1.0 - r;
        Self { x: r, m0: by * (1.0 - of_d1 - of_next), m1: by * of_d1, m_next: by * of_next }
    }
}

/// Difference of λ from `t` to `t_next`.
fn step_of(t: f64, t_next: f64) -> f64 {
    path::log_snr(t_next.min(FIRST)) - path::log_snr(t.min(FIRST))
}
