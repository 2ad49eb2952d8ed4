//! The denoising loop.

use anyhow::{Context, Result, ensure};
use flow::solver::{Step, Walk};

/// What answers with a velocity: an exported transformer with prompts, or a formula in a test.
pub trait Denoiser {
    /// Writes the velocity v = eps − x0 at time `t` for the state `x_t` into `v_t`, equally long.
    fn velocity(&mut self, x_t: &[f32], t: f64, v_t: &mut [f32]) -> Result<()>;
}

/// Carries `x`, the state at the first time of a plan of [`flow::solver`], through all its steps and
/// returns the state at t = 0. The state stays in f32. Where `skipped` says so the network is not
/// called, and its velocity is the straight line through the last two (see [`skipped`]).
/// `after_step` is called once a step with its index and the [`Walk`].
///
/// # Errors
/// The denoiser's own or those of `after_step`, or a velocity with a value that is not finite; each
/// names the step.
pub fn denoise(
    denoiser: &mut dyn Denoiser,
    steps: &[Step],
    skipped: &[bool],
    x: Vec<f32>,
    mut after_step: impl FnMut(usize, &Walk) -> Result<()>,
) -> Result<Vec<f32>> {
    let mut v_t = vec![0.0; x.len()];
    let mut called = Called::default();
    let mut walk = Walk::new(x);
    for (index, step) in steps.iter().enumerate() {
        let place =
            || format!("network call {} of {} at t = {:.4}", index + 1, steps.len(), step.t);
        if skipped.get(index).copied().unwrap_or(false) {
            called.extrapolate(step.t, &mut v_t);
        } else {
            denoiser.velocity(walk.x(), step.t, &mut v_t).with_context(place)?;
            ensure!(v_t.iter().all(|v| v.is_finite()), "{}: the velocity is not finite", place());
            if !skipped.is_empty() {
                called.keep(step.t, &v_t);
            }
        }
        walk.advance(step, &v_t);
        after_step(index, &walk)?;
    }
    Ok(walk.into_x())
}

/// Which of `n` network calls a forecast replaces: every other one from the fourth on, never the
/// last. Their velocities follow the straight line in t through the last two that were computed.
pub fn skipped(n: usize) -> Vec<bool> {
    (0..n).map(|index| index >= 3 && index % 2 == 1 && index + 1 < n).collect()
}

/// The last two velocities that the network gave, with their times.
#[derive(Default)]
struct Called {
    last: (f64, Vec<f32>),
    before: (f64, Vec<f32>),
}

impl Called {
    fn keep(&mut self, t: f64, v: &[f32]) {
        std::mem::swap(&mut self.last, &mut self.before);
        self.last.0 = t;
        self.last.1.clear();
        self.last.1.extend_from_slice(v);
    }

    fn extrapolate(&self, t: f64, v: &mut [f32]) {
        let ((t1, v1), (t0, v0)) = (&self.last, &self.before);
        let of_last = ((t - t0) / (t1 - t0)) as f32;
        let pairs = v1.iter().zip(v0);
        v.iter_mut().zip(pairs).for_each(|(v, (v1, v0))| *v = v0 + of_last * (v1 - v0));
    }
}

#[cfg(test)]
mod tests {
    use flow::{
        noise::Noise,
        schedule::{Schedule, Shift},
        solver::{SOLVERS, Solver, plan},
    };

    use super::*;

    /// Exact velocity for independent data N(mean, std²).
    struct Gaussian {
        mean: f64,
        std: f64,
        times: Vec<f64>,
    }

    impl Gaussian {
        fn new(mean: f64, std: f64) -> Self {
            Self { mean, std, times: Vec::new() }
        }
    }

    impl Denoiser for Gaussian {
        fn velocity(&mut self, x_t: &[f32], t: f64, v_t: &mut [f32]) -> Result<()> {
            self.times.push(t);
            let s2 = self.std * self.std;
            let gain = (t - (1.0 - t) * s2) / ((1.0 - t).powi(2) * s2 + t * t);
            let v = |x: f32| (gain * (f64::from(x) - (1.0 - t) * self.mean) - self.mean) as f32;
            v_t.iter_mut().zip(x_t).for_each(|(v_t, &x)| *v_t = v(x));
            Ok(())
        }
    }

    fn steps(solver: Solver, n: usize) -> Vec<Step> {
        plan(solver, &Schedule::new(n, Shift::Mu(1.15)).unwrap())
    }

    fn end(denoiser: &mut Gaussian, steps: &[Step], x: Vec<f32>) -> Vec<f32> {
        denoise(denoiser, steps, &[], x, |_, _| Ok(())).unwrap()
    }

    /// The figures that `flow::solver` is tested against.
    #[test]
    fn numbers_of_the_scalar_oracle() {
        for (solver, n, expected) in [
            (Solver::Euler, 4, 0.536_999),
            (Solver::Dpmpp2m, 4, 0.537_096),
            (Solver::Euler, 8, 0.578_543),
            (Solver::Dpmpp2m, 8, 0.579_862),
        ] {
            let end = end(&mut Gaussian::new(0.5, 0.2), &steps(solver, n), vec![1.0])[0];
            assert!((end - expected).abs() < 2e-6, "{solver:?} {n}: {end}");
        }
    }

    /// The exact flow maps eps to mean + std·eps, and every method gets there.
    #[test]
    fn many_steps_reach_the_exact_map() {
        let noise = Noise::new(3).normal(0, 64);
        for (_, solver) in SOLVERS {
            let mut denoiser = Gaussian::new(-0.3, 0.5);
            let end = end(&mut denoiser, &steps(solver, 400), noise.clone());
            for (eps, x0) in noise.iter().zip(end) {
                let exact = -0.3 + 0.5 * eps;
                assert!((x0 - exact).abs() < 0.02, "{solver:?}: {x0} for {exact}");
            }
        }
    }

    #[test]
    fn every_network_call_is_counted_and_falls_in_time() -> Result<()> {
        for (solver, n_calls) in [(Solver::Euler, 5), (Solver::UniPc, 5), (Solver::Heun, 9)] {
            let (mut denoiser, mut n) = (Gaussian::new(0.0, 1.0), 0);
            denoise(&mut denoiser, &steps(solver, 5), &[], vec![0.5; 3], |index, _| {
                assert_eq!(index, n);
                n += 1;
                Ok(())
            })?;
            assert_eq!((n, denoiser.times.len()), (n_calls, n_calls), "{solver:?}");
            assert!((denoiser.times[0] - 1.0).abs() < 1e-12);
            assert!(denoiser.times.iter().all(|&t| t > 0.0));
        }
        Ok(())
    }

    #[test]
    fn every_other_call_can_be_forecast() -> Result<()> {
        let n_called = |n: usize| skipped(n).iter().filter(|skipped| !**skipped).count();
        assert_eq!([1, 4, 8, 12, 28].map(n_called), [1, 4, 6, 8, 16]);
        let (steps, mut denoiser) = (steps(Solver::Dpmpp2m, 28), Gaussian::new(0.5, 0.2));
        let forecast = denoise(&mut denoiser, &steps, &skipped(28), vec![1.0], |_, _| Ok(()))?;
        assert_eq!(denoiser.times.len(), 16);
        let whole = end(&mut Gaussian::new(0.5, 0.2), &steps, vec![1.0]);
        let fewer = end(&mut Gaussian::new(0.5, 0.2), &self::steps(Solver::Dpmpp2m, 16), vec![1.0]);
        let error = |x: &[f32]| (x[0] - 0.7).abs();
        assert!(error(&forecast) < error(&fewer), "{forecast:?} {fewer:?} {whole:?}");
        Ok(())
    }

    #[test]
    fn a_broken_network_is_caught_at_its_step() {
        struct Broken;
        impl Denoiser for Broken {
            fn velocity(&mut self, _: &[f32], _: f64, v_t: &mut [f32]) -> Result<()> {
                v_t[1] = f32::NAN;
                Ok(())
            }
        }
        let steps = steps(Solver::Euler, 4);
        let error = denoise(&mut Broken, &steps, &[], vec![0.0; 2], |_, _| Ok(())).unwrap_err();
        let expected = "network call 1 of 4 at t = 1.0000: the velocity is not finite";
        assert!(error.to_string().contains(expected), "{error}");
    }
}
