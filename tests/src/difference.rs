//! How far two computations are apart.

/// Largest absolute difference.
///
/// # Panics
/// When the lengths differ, nothing is compared, or a number is not finite.
#[track_caller]
pub fn absolute(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths differ");
    assert!(!found.is_empty(), "nothing to compare");
    found.iter().zip(expected).fold(0.0, |largest, (&a, &b)| {
        assert!(a.is_finite() && b.is_finite(), "{a} against {b}");
        f64::max(largest, (f64::from(a) - f64::from(b)).abs())
    })
}

/// Largest absolute difference as a share of the largest expected magnitude.
///
/// # Panics
/// As [`absolute`], and when everything expected is 0.
#[track_caller]
pub fn relative(found: &[f32], expected: &[f32]) -> f64 {
    let largest = expected.iter().fold(0.0, |largest, &b| f64::max(largest, f64::from(b).abs()));
    assert!(largest > 0.0, "everything expected is 0");
    absolute(found, expected) / largest
}
