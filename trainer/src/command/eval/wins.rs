//! How often one contestant beats another on the same prompts and noise.

use serde::Serialize;

/// A paired comparison; errors are standard errors over prompts, absent for a single one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Wins {
    /// Share of images with the higher score, 0 to 1; a tie is half a win.
    pub(super) share: f64,
    pub(super) share_error: Option<f64>,
    /// Mean difference of the scores.
    pub(super) difference: f64,
    pub(super) difference_error: Option<f64>,
}

impl Wins {
    /// Of `these` over `those`: a row a prompt, a score an image; images of one place are a pair. The
    /// images of a prompt count as one observation, their mean.
    ///
    /// # Panics
    /// When there is no prompt, or the shapes differ.
    pub(super) fn over(these: &[Vec<f32>], those: &[Vec<f32>]) -> Self {
        assert!(!these.is_empty() && these.len() == those.len(), "the same prompts");
        let per_prompt = |value: fn(f64, f64) -> f64| -> Vec<f64> {
            let mean = |(a, b): (&Vec<f32>, &Vec<f32>)| {
                assert!(!a.is_empty() && a.len() == b.len(), "the same images");
                let pairs = a.iter().zip(b).map(|(&a, &b)| value(a.into(), b.into()));
                pairs.sum::<f64>() / a.len() as f64
            };
            these.iter().zip(those).map(mean).collect()
        };
        let (share, share_error) = mean_and_error(&per_prompt(won));
        let (difference, difference_error) = mean_and_error(&per_prompt(|a, b| a - b));
        Self { share, share_error, difference, difference_error }
    }
}

fn won(a: f64, b: f64) -> f64 {
    f64::midpoint(f64::from(a >= b), f64::from(a > b))
}

/// The mean and its standard error, √(Σ(x − x̄)²/(n(n − 1))).
fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let square: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (square / (n * (n - 1.0))).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(scores: &[f32]) -> Vec<Vec<f32>> {
        scores.iter().map(|&score| vec![score]).collect()
    }

    #[track_caller]
    fn assert_close(found: Option<f64>, expected: f64) {
        assert!((found.unwrap() - expected).abs() < 1e-7, "{found:?} is not {expected}");
    }

    /// Expected: Python's `statistics.mean(x)` and `statistics.stdev(x) / sqrt(5)` of [1, 0, 0.5, 1, 1] and
    /// of [0.5, −0.25, 0, 1, 0.25].
    #[test]
    fn shares_and_differences_have_their_paired_errors() {
        let (a, b) = (rows(&[1.0, 0.25, 0.5, 2.0, 0.5]), rows(&[0.5, 0.5, 0.5, 1.0, 0.25]));
        let found = Wins::over(&a, &b);
        assert_close(Some(found.share), 0.7);
        assert_close(found.share_error, 0.2);
        assert_close(Some(found.difference), 0.3);
        assert_close(found.difference_error, 0.215_058_131_676_065_7);
        let turned = Wins::over(&b, &a);
        assert_close(Some(turned.share), 0.3);
        assert_close(Some(turned.difference), -0.3);
        assert_close(turned.share_error, 0.2);
    }

    #[test]
    fn images_of_a_prompt_are_one_observation() {
        let a = [vec![1.0, 2.0], vec![0.0, 0.0]];
        let b = [vec![0.0, 3.0], vec![0.0, -1.0]];
        let found = Wins::over(&a, &b);
        assert_close(Some(found.share), 0.625); // (1 + 0)/2 and (½ + 1)/2
        assert_close(found.share_error, 0.125);
        assert_close(Some(found.difference), 0.25);
    }

    #[test]
    fn all_ties_are_half_and_one_prompt_has_no_error() {
        let found = Wins::over(&rows(&[0.0, 3.0]), &rows(&[0.0, 3.0]));
        assert_eq!((found.share, found.share_error), (0.5, Some(0.0)));
        assert_eq!(Wins::over(&rows(&[1.0]), &rows(&[0.0])).share_error, None);
    }
}
