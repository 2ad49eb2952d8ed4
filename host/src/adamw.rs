//! A step of AdamW (Loshchilov and Hutter 2019) in one pass over memory.

use multiversion::multiversion;

use crate::kernels::sum;

/// Numbers whose squares are added in f32.
const EXACT: usize = 4096;

/// The scalars of a step, the same for every number: with g the gradient times `clip`,
///
/// ```text
/// m ← m + of_m·(g − m)    v ← v + of_v·(g² − v)    w ← keep·w + m / (factor·√v + offset)
/// ```
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Factor on gradients.
    pub clip: f32,
    /// 1 − β₁.
    pub of_m: f32,
    /// 1 − β₂.
    pub of_v: f32,
    /// What weight decay leaves.
    pub keep: f32,
    /// Negative, so that weights descend.
    pub factor: f32,
    /// Negative.
    pub offset: f32,
}

impl AdamW {
    /// Moves `w` and its moments `m` and `v` by the gradient `g`, all of one length.
    pub fn step(&self, [w, m, v]: [&mut [f32]; 3], g: &[f32]) {
        step(self, w, m, v, g);
    }
}

#[multiversion(targets = "simd")]
fn step(scalars: &AdamW, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    let AdamW { clip, of_m, of_v, keep, factor, offset } = *scalars;
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        let g = clip * g;
        *m += of_m * (g - *m);
        *v += of_v * (g * g - *v);
        *w = keep * *w + *m / (factor * v.sqrt() + offset);
    }
}

/// Σ g².
#[multiversion(targets = "simd")]
pub fn sum_of_squares(g: &[f32]) -> f64 {
    g.chunks(EXACT).map(|part| f64::from(sum(part, |x| x * x))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_add_up() {
        let g: Vec<f32> = (0..10_001).map(|i| i as f32 / 7.0 - 300.0).collect();
        let expected: f64 = g.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((sum_of_squares(&g) - expected).abs() < 1e-6 * expected);
        assert_eq!(sum_of_squares(&[]), 0.0);
    }
}
