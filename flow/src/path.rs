//! The straight path from data to noise and its conversions, element by element (paper Eq. 1).

/// Weights of (x0, eps) in `x_t = (1 − t)·x0 + t·eps`.
pub fn weights(t: f64) -> [f64; 2] {
    [1.0 - t, t]
}

/// Weights of (x_t, v) in the data prediction `x0 = x_t − t·v`.
pub fn x0_from_v(t: f64) -> [f64; 2] {
    [1.0, -t]
}

/// Weights of (x_t, v) in the noise prediction `eps = x_t + (1 − t)·v`.
pub fn eps_from_v(t: f64) -> [f64; 2] {
    [1.0, 1.0 - t]
}

/// Half the logarithmic signal-to-noise ratio, `log((1 − t)/t)`: −∞ at noise, +∞ at data.
pub fn log_snr(t: f64) -> f64 {
    ((1.0 - t) / t).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_invert_the_path() {
        let (x0, eps) = (0.3, -1.7);
        for t in [0.0, 0.2, 0.9, 1.0] {
            let [a, b] = weights(t);
            let (x_t, v) = (a * x0 + b * eps, eps - x0);
            let apply = |[x, y]: [f64; 2]| x * x_t + y * v;
            assert!((apply(x0_from_v(t)) - x0).abs() < 1e-12);
            assert!((apply(eps_from_v(t)) - eps).abs() < 1e-12);
        }
    }

    #[test]
    fn log_snr_falls_with_noise() {
        assert!(log_snr(0.1) > 0.0 && log_snr(0.9) < 0.0);
        assert_eq!(log_snr(1.0), f64::NEG_INFINITY);
        assert_eq!(log_snr(0.0), f64::INFINITY);
    }
}
