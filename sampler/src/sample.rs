//! The denoising loop.

use anyhow::{Context, Result, ensure};
use flow::solver::Step;

/// What answers with a velocity: an exported transformer with a prompt, or a formula in a test.
pub trait Denoiser {
    /// Velocity v = eps − x0 at time `t` for the state `x_t`, equally long.
    fn velocity(&mut self, x_t: &[f32], t: f64) -> Result<Vec<f32>>;
}

/// Carries `noise`, the state at t = 1, through every step of a plan of [`flow::solver`] and returns
/// the state at t = 0. The state stays in f32. `after_step` is called once a network call.
///
/// # Errors
/// The denoiser's own, or a velocity of another length or with a value that is not finite; each
/// names the step.
pub fn denoise(
    denoiser: &mut dyn Denoiser,
    steps: &[Step],
    noise: Vec<f32>,
    mut after_step: impl FnMut(),
) -> Result<Vec<f32>> {
    let (mut x_t, mut history) = (noise, None);
    for (index, step) in steps.iter().enumerate() {
        let place =
            || format!("network call {} of {} at t = {:.4}", index + 1, steps.len(), step.t);
        let v_t = denoiser.velocity(&x_t, step.t).with_context(place)?;
        ensure!(
            v_t.len() == x_t.len(),
            "{}: the velocity has {} values, not {}",
            place(),
            v_t.len(),
            x_t.len()
        );
        ensure!(v_t.iter().all(|v| v.is_finite()), "{}: the velocity is not finite", place());
        let (next, left) = step.apply(&x_t, v_t, history.as_ref());
        (x_t, history) = (next, Some(left));
        after_step();
    }
    Ok(x_t)
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
        fn velocity(&mut self, x_t: &[f32], t: f64) -> Result<Vec<f32>> {
            self.times.push(t);
            let s2 = self.std * self.std;
            let gain = (t - (1.0 - t) * s2) / ((1.0 - t).powi(2) * s2 + t * t);
            let v = |&x: &f32| (gain * (f64::from(x) - (1.0 - t) * self.mean) - self.mean) as f32;
            Ok(x_t.iter().map(v).collect())
        }
    }

    fn steps(solver: Solver, n: usize) -> Vec<Step> {
        plan(solver, &Schedule::new(n, Shift::Mu(1.15)).unwrap())
    }

    /// The figures that `flow::solver` is tested against.
    #[test]
    fn numbers_of_the_scalar_oracle() -> Result<()> {
        for (solver, n, expected) in [
            (Solver::Euler, 4, 0.536_999),
            (Solver::Dpmpp2m, 4, 0.537_096),
            (Solver::Euler, 8, 0.578_543),
            (Solver::Dpmpp2m, 8, 0.579_862),
        ] {
            let end =
                denoise(&mut Gaussian::new(0.5, 0.2), &steps(solver, n), vec![1.0], || ())?[0];
            assert!((end - expected).abs() < 2e-6, "{solver:?} {n}: {end}");
        }
        Ok(())
    }

    /// The exact flow maps eps to mean + std·eps, and every method gets there.
    #[test]
    fn many_steps_reach_the_exact_map() -> Result<()> {
        let noise = Noise::new(3).normal(0, 64);
        for (_, solver) in SOLVERS {
            let mut denoiser = Gaussian::new(-0.3, 0.5);
            let end = denoise(&mut denoiser, &steps(solver, 400), noise.clone(), || ())?;
            for (eps, x0) in noise.iter().zip(end) {
                let exact = -0.3 + 0.5 * eps;
                assert!((x0 - exact).abs() < 0.02, "{solver:?}: {x0} for {exact}");
            }
        }
        Ok(())
    }

    #[test]
    fn every_network_call_is_counted_and_falls_in_time() -> Result<()> {
        for (solver, n_calls) in [(Solver::Euler, 5), (Solver::Dpmpp2m, 5), (Solver::Heun, 9)] {
            let (mut denoiser, mut n) = (Gaussian::new(0.0, 1.0), 0);
            denoise(&mut denoiser, &steps(solver, 5), vec![0.5; 3], || n += 1)?;
            assert_eq!((n, denoiser.times.len()), (n_calls, n_calls), "{solver:?}");
            assert!((denoiser.times[0] - 1.0).abs() < 1e-12);
            assert!(denoiser.times.iter().all(|&t| t > 0.0));
        }
        Ok(())
    }

    #[test]
    fn a_broken_network_is_caught_at_its_step() {
        struct Broken(Vec<f32>);
        impl Denoiser for Broken {
            fn velocity(&mut self, _: &[f32], _: f64) -> Result<Vec<f32>> {
                Ok(self.0.clone())
            }
        }
        for (answer, expected) in [
            (vec![0.0, f32::NAN], "network call 1 of 4 at t = 1.0000: the velocity is not finite"),
            (vec![0.0], "has 1 values, not 2"),
        ] {
            let steps = steps(Solver::Euler, 4);
            let error = denoise(&mut Broken(answer), &steps, vec![0.0; 2], || ()).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
