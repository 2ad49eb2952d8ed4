//! What the benchmarks share: the programs they run, medians, tables. Each benchmark is a program that
//! runs the built ones as a user would and prints one table.

pub mod align;
pub mod program;
pub mod table;
pub mod variant;

/// The middle of `values`, the mean of the middle two for an even number of them.
///
/// # Panics
/// When there are none, or one is not a number.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    assert!(!sorted.is_empty() && sorted.iter().all(|x| !x.is_nan()), "no median of {values:?}");
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle() {
        for values in [&[5.0, 1.0, 3.0][..], &[4.0, 1.0, 2.0, 9.0]] {
            assert!((median(values) - 3.0).abs() < 1e-12, "{values:?}");
        }
    }
}
