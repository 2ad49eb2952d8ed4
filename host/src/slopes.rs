//! What reaches the inputs of [`crate::kernels`] from what reached their results.

use multiversion::multiversion;

use crate::kernels::{CUBIC, TWICE, dot, exp, standard, sum};

/// Of x·sigmoid(x).
#[multiversion(targets = "simd")]
pub(crate) fn silu(dy: &mut [f32], x: &[f32]) {
    for (dy, &x) in dy.iter_mut().zip(x) {
        let s = 1.0 / (1.0 + exp(-x));
        *dy *= s * (1.0 + x * (1.0 - s));
    }
}

/// Of the tanh form: x·sigmoid(u) with u = 2·√(2/π)·(x + 0.044715·x³).
#[multiversion(targets = "simd")]
pub(crate) fn gelu_tanh(dy: &mut [f32], x: &[f32]) {
    for (dy, &x) in dy.iter_mut().zip(x) {
        let s = 1.0 / (1.0 + exp(-TWICE * (x + CUBIC * x * x * x)));
        *dy *= s * (1.0 + x * (1.0 - s) * TWICE * (1.0 + 3.0 * CUBIC * x * x));
    }
}

/// Of rows of `width` brought to mean 0 and variance 1.
#[multiversion(targets = "simd")]
pub(crate) fn standardise(dy: &mut [f32], x: &[f32], width: usize, eps: f32) {
    let mut y = vec![0.0; width];
    for (dy, x) in dy.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let (mean, scale) = standard(x, eps);
        y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - mean) * scale);
        let mean = sum(dy, |dy| dy) / width as f32;
        let along = dot(dy, &y) / width as f32;
        for (dy, y) in dy.iter_mut().zip(&y) {
            *dy = (*dy - mean - along * y) * scale;
        }
    }
}

/// Of rows of the width of `weight` divided by their root mean square, times `weight`; adds what reaches the
/// weight to `of_weight`.
#[multiversion(targets = "simd")]
pub(crate) fn rms_norm(dy: &mut [f32], of_weight: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    let mut y = vec![0.0; width];
    for (dy, x) in dy.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
        let scale = 1.0 / (sum(x, |x| x * x) / width as f32 + eps).sqrt();
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale);
        for (((of, dy), y), w) in of_weight.iter_mut().zip(dy.iter_mut()).zip(&y).zip(weight) {
            *of += *dy * y;
            *dy *= w;
        }
        let along = dot(dy, &y) / width as f32;
        for (dy, y) in dy.iter_mut().zip(&y) {
            *dy = (*dy - along * y) * scale;
        }
    }
}

/// Of a bias that is added to rows as wide as it; added to `of_bias`.
#[multiversion(targets = "simd")]
pub(crate) fn bias(of_bias: &mut [f32], dy: &[f32]) {
    for dy in dy.chunks_exact(of_bias.len()) {
        of_bias.iter_mut().zip(dy).for_each(|(of, dy)| *of += dy);
    }
}
