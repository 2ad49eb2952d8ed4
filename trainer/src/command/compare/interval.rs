//! What a few seeds say of a mean.

/// Student's t that 2.5 % exceed, by degrees of freedom from 1; beyond them the normal quantile.
const QUANTILES: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];
const NORMAL: f64 = 1.960;
/// Normal quantile of a power of 80 %.
const POWER: f64 = 0.842;

/// Half the width of the 95 % interval of a mean of `n` values whose standard deviation is `std`; no number for
/// one value.
pub(super) fn half_width(std: f64, n: usize) -> f64 {
    let quantile = match n {
        0 | 1 => f64::NAN,
        n => QUANTILES.get(n - 2).copied().unwrap_or(NORMAL),
    };
    quantile * std / (n as f64).sqrt()
}

/// Seeds of which four in five studies would find a difference of `size` apart from 0 at 95 %, where differences by
/// seed have a standard deviation of `std`.
pub(super) fn seeds(std: f64, size: f64) -> usize {
    let quantile = |n: usize| QUANTILES.get(n - 2).copied().unwrap_or(NORMAL);
    let needed = |n: usize| ((quantile(n) + POWER) * std / size).powi(2);
    let few = (2..=QUANTILES.len() + 1).find(|&n| n as f64 >= needed(n));
    few.unwrap_or_else(|| needed(QUANTILES.len() + 2).ceil() as usize)
}

/// Fewest seeds that can set a run apart.
const FEWEST: usize = 3;

/// Whether the mean of `differences` is so far off 0 that no more of them are needed.
pub(super) fn is_apart(differences: &[f64]) -> bool {
    let n = differences.len();
    n >= FEWEST && mean(differences).abs() > 2.0 * half_width(std(differences), n)
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation; of one value it is no number.
pub(super) fn std(values: &[f64]) -> f64 {
    let (mean, n) = (mean(values), values.len() as f64);
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_seeds_that_agree_are_apart_and_three_that_do_not_are_not() {
        assert!(is_apart(&[0.10, 0.11, 0.12]));
        assert!(is_apart(&[-0.10, -0.11, -0.12]));
        assert!(!is_apart(&[0.10, 0.11]));
        // 0.10 ± 0.07: its interval is off 0, not twice it.
        assert!(!is_apart(&[0.07, 0.10, 0.13]));
    }

    #[test]
    fn an_interval_narrows_with_seeds() {
        assert!((half_width(0.1, 5) - 2.776 * 0.1 / 5f64.sqrt()).abs() < 1e-12);
        assert!((half_width(0.1, 400) - 0.0098).abs() < 1e-12);
        assert!(half_width(0.1, 1).is_nan());
    }

    #[test]
    fn small_differences_need_many_seeds() {
        assert_eq!(seeds(0.01, 0.05), 3);
        assert_eq!(seeds(0.05, 0.05), 10);
        assert_eq!(seeds(0.2, 0.05), 126);
    }
}
