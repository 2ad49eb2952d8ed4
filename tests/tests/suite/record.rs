//! `--record-update`, recomputed from the equations in double precision.

use std::path::Path;

use flow::checkpoint::Weights;
use tests::program::{Ended, Program, typed};

use crate::align::{MODEL, SHORT};

/// ε of the clip and p of the quasi-norm, as the run is told.
const CLIP: f64 = 1e-3;
const QUASI_NORM: f64 = 0.8;
/// Of the preset's two rewards.
const WEIGHTS: [f64; 2] = [1.0, 0.5];
const STD_FLOOR: f64 = 1e-6;

/// A recorded update: M transitions, groups of G, latents of N numbers.
struct Record {
    tensors: Weights,
    m: usize,
    g: usize,
    n: usize,
}

/// What the equations give for one transition.
struct Recomputed {
    log_rho: Vec<f64>,
    objective: f64,
    /// dJ/dv of this transition alone.
    gradient: Vec<f64>,
    /// Members that the clip silences.
    n_clipped: usize,
}

impl Record {
    fn open(path: &Path) -> Self {
        let tensors = Weights::open_file(path).unwrap();
        let shape = tensors.get("candidates").unwrap().shape.to_vec();
        let [m, g, rows, columns] = shape[..] else { panic!("candidates of shape {shape:?}") };
        Self { tensors, m, g, n: rows * columns }
    }

    fn all(&self, name: &str) -> Vec<f64> {
        self.tensors.f32(name).unwrap().into_iter().map(f64::from).collect()
    }

    /// Row `index` of the M rows of `name`.
    fn row(&self, name: &str, index: usize) -> Vec<f64> {
        let values = self.all(name);
        let length = values.len() / self.m;
        values[index * length..(index + 1) * length].to_vec()
    }

    /// METHOD section 1 for transition `index`, with the mean distance and τ = 1 (`τ_eff` = N).
    fn recompute(&self, index: usize) -> Recomputed {
        let row = |name: &str| self.row(name, index);
        let (x_in, v_old, v_theta) = (row("x_in"), row("v_old"), row("v_theta"));
        let (candidates, advantages) = (row("candidates"), row("advantages"));
        let dt = row("t_next")[0] - row("t_in")[0];
        let tau = self.n as f64;
        let away: Vec<Vec<f64>> = candidates
            .chunks(self.n)
            .map(|c| (0..self.n).map(|k| c[k] - (x_in[k] + dt * v_old[k])).collect())
            .collect();
        let moved: Vec<f64> = (0..self.n).map(|k| dt * (v_theta[k] - v_old[k])).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let tilt: Vec<f64> = away.iter().map(|c| 2.0 / tau * dot(&moved, c)).collect();
        let distances: Vec<f64> = away.iter().map(|c| -dot(c, c) / tau).collect();
        let total = log_sum_exp(&distances);
        let tilted: Vec<f64> =
            distances.iter().zip(&tilt).map(|(distance, l)| distance - total + l).collect();
        let normaliser = log_sum_exp(&tilted);
        let log_rho: Vec<f64> = tilt.iter().map(|l| l - normaliser).collect();

        // The new policy's mean of c − x_old.
        let mean: Vec<f64> = (0..self.n)
            .map(|k| tilted.iter().zip(&away).map(|(p, c)| (p - normaliser).exp() * c[k]).sum())
            .collect();
        let (mut objective, mut n_clipped) = (0.0, 0);
        let mut gradient = vec![0.0; self.n];
        for ((&log_rho, &a), c) in log_rho.iter().zip(&advantages).zip(&away) {
            let rho = log_rho.exp();
            objective += (a * rho).min(a * rho.clamp(1.0 - CLIP, 1.0 + CLIP));
            if (a > 0.0 && rho > 1.0 + CLIP) || (a < 0.0 && rho < 1.0 - CLIP) {
                n_clipped += 1;
                continue;
            }
            for k in 0..self.n {
                gradient[k] += a * rho * 2.0 / tau * (c[k] - mean[k]) * dt / self.g as f64;
            }
        }
        objective /= self.g as f64;
        Recomputed { log_rho, objective, gradient, n_clipped }
    }

    /// Eq. 3 with the unbiased deviation, a weighted sum over the rewards, then Eq. 11 times √G.
    fn advantages(&self, index: usize) -> Vec<f64> {
        let (all, g) = (self.row("rewards", index), self.g as f64);
        let mut sum = vec![0.0; self.g];
        for (rewards, weight) in all.chunks(self.g).zip(WEIGHTS) {
            let mean = rewards.iter().sum::<f64>() / g;
            let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (g - 1.0);
            if variance.sqrt() >= STD_FLOOR {
                let scores = rewards.iter().map(|r| (r - mean) / variance.sqrt());
                sum.iter_mut().zip(scores).for_each(|(a, score)| *a += weight * score);
            }
        }
        let powers = sum.iter().map(|a| a.abs().powf(QUASI_NORM)).sum::<f64>();
        sum.iter().map(|a| a * g.sqrt() / powers.powf(1.0 / QUASI_NORM)).collect()
    }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + x.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

struct Differences {
    /// The largest.
    absolute: f64,
    /// That as a share of the largest expected magnitude.
    relative: f64,
}

fn differences(found: &[f64], expected: &[f64]) -> Differences {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let pairs = found.iter().zip(expected);
    let absolute = pairs.fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    Differences { absolute, relative: absolute / largest }
}

#[test]
fn a_recorded_update_follows_from_the_equations() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("update.safetensors");
    let output = typed(&scratch.path().join("run"));
    let mut command = Program::Train.command(["align", "--preset", "signs"]);
    command.arg("--record-update").arg(&file);
    let own = [
        format!("model={MODEL}"),
        format!("output={output}"),
        "iterations=1".into(),
        "group_size=6".into(),
        "rollout.steps=5".into(),
        "optimizer.learning_rate=1e-4".into(),
        format!("neighbor.clip={CLIP}"),
        format!("advantage.quasi_norm={QUASI_NORM}"),
        format!("rewards.0.weight={}", WEIGHTS[0]),
        format!("rewards.1.weight={}", WEIGHTS[1]),
        format!("rewards.1.std_floor={STD_FLOOR}"),
    ];
    for setting in SHORT.iter().map(|&s| s.to_owned()).chain(own) {
        command.args(["--set", &setting]);
    }
    Ended::after(&mut command).succeeded();

    let record = Record::open(&file);
    assert_eq!((record.m, record.g), (4, 6));
    assert!(record.tensors.metadata("config").is_some_and(|config| config.contains("group_size")));
    let found: Vec<Recomputed> = (0..record.m).map(|index| record.recompute(index)).collect();
    let objectives: Vec<f64> = found.iter().map(|one| one.objective).collect();
    // The program stores the gradient of the mean over transitions.
    let gradients: Vec<f64> =
        found.iter().flat_map(|one| &one.gradient).map(|x| x / record.m as f64).collect();
    let log_rhos: Vec<f64> = found.iter().flat_map(|one| one.log_rho.clone()).collect();
    let advantages: Vec<f64> = (0..record.m).flat_map(|index| record.advantages(index)).collect();
    let rho = differences(&record.all("log_rho"), &log_rhos);
    let objective = differences(&record.all("objective"), &objectives);
    let gradient = differences(&record.all("gradient"), &gradients);
    let advantage = differences(&record.all("advantages"), &advantages);
    let moved = log_rhos.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let (n_clipped, n): (usize, usize) =
        (found.iter().map(|one| one.n_clipped).sum(), log_rhos.len());
    println!(
        "recomputed: log rho {:.1e} ({:.1e} of the largest, {moved:.1e}), objective {:.1e}, gradient \
         {:.1e} and advantages {:.1e} of the largest; the clip silences {n_clipped} of {n}",
        rho.absolute, rho.relative, objective.absolute, gradient.relative, advantage.relative
    );
    assert!(rho.absolute < 2e-7, "log rho differs by {:.1e}", rho.absolute);
    assert!(objective.absolute < 2e-7, "the objective differs by {:.1e}", objective.absolute);
    assert!(gradient.relative < 1e-5, "the gradient differs by {:.1e}", gradient.relative);
    assert!(advantage.relative < 1e-5, "advantages differ by {:.1e}", advantage.relative);
    assert!(moved > 1e-5, "the policy has not moved: {moved:.1e}");
    assert!(n_clipped > 0 && n_clipped < n, "the clip silences {n_clipped} of {n}");
}
