//! AdamW on flat parameters (Loshchilov and Hutter 2019), with an optional moving average of the
//! weights. Every state tensor is ours to save, so that a run resumes to the bit.

use anyhow::{Result, ensure};
use cluster::{Group, Reduce};
use flow::checkpoint::Entry;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::shards::{self, AVERAGE, Shards};
use crate::tensor::parameters::{Gradient, Parameters, numbers_of};

/// Settings of the optimiser.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Step size.
    pub learning_rate: f64,
    /// Steps of the optimiser, of which an iteration may make several, over which the step size rises from 0.
    #[serde(default)]
    pub warmup: usize,
    /// Decay of the first moment.
    #[serde(default = "beta1")]
    pub beta1: f64,
    /// Decay of the second moment.
    #[serde(default = "beta2")]
    pub beta2: f64,
    /// Added to the root of the second moment. Gradients of Neighbor GRPO are 10 to 40 times below
    /// DanceGRPO's: the usual 1e-8 would eat the step.
    #[serde(default = "adam_eps")]
    pub eps: f64,
    /// Decoupled weight decay.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm.
    #[serde(default = "max_grad_norm")]
    pub max_grad_norm: f64,
    /// Decay of the moving average of the weights, and at most n/(n + 9) in step n, so that a short run forgets
    /// its start; 0 keeps none. What is saved is then the average.
    #[serde(default)]
    pub ema: f64,
}

fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.999
}
fn adam_eps() -> f64 {
    1e-12
}
fn weight_decay() -> f64 {
    1e-4
}
fn max_grad_norm() -> f64 {
    1.0
}

/// Numbers that a thread moves at a time on the processor.
const PART: usize = 1 << 16;
/// One gradient in so many is held against eps.
const SEEN: i64 = 64;

/// What a step reports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepReport {
    /// Global gradient norm before clipping.
    pub(crate) grad_norm: f64,
    /// Share of parameters whose gradient is non-zero but below `eps`: there the step is damped.
    pub(crate) below_eps: f64,
    /// Step size, after the warm-up's share.
    pub(crate) rate: f64,
}

/// The state of one run.
pub(crate) struct AdamW {
    config: OptimizerConfig,
    step: i64,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
    ema: Option<Vec<Tensor>>,
}

impl OptimizerConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        let Self { learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm, ema, .. } = *self;
        let within = |name: &str, value: f64, is_within: bool, range: &str| {
            ensure!(value.is_finite() && is_within, "optimizer.{name} = {value}: {range}");
            Ok(())
        };
        let is_rate = learning_rate > 0.0 && learning_rate <= 1.0;
        within("learning_rate", learning_rate, is_rate, "above 0, at most 1")?;
        for (name, decay) in [("beta1", beta1), ("beta2", beta2), ("ema", ema)] {
            within(name, decay, (0.0..1.0).contains(&decay), "from 0, below 1")?;
        }
        within("eps", eps, eps > 0.0 && eps <= 1.0, "above 0, at most 1")?;
        within("weight_decay", weight_decay, (0.0..=1.0).contains(&weight_decay), "from 0 to 1")?;
        within("max_grad_norm", max_grad_norm, max_grad_norm > 0.0, "above 0")
    }
}

impl AdamW {
    pub(crate) fn new(config: OptimizerConfig, parameters: &[&Parameters]) -> Self {
        let masters = || parameters.iter().flat_map(|p| p.masters());
        let zeros = || masters().map(Tensor::zeros_like).collect();
        let ema = (config.ema > 0.0).then(|| masters().map(Tensor::copy).collect());
        Self { config, step: 0, m: zeros(), v: zeros(), ema }
    }

    /// Takes the accumulated gradients of `parameters` and moves them by one step at
    /// `learning_rate·scale`.
    pub(crate) fn step(&mut self, parameters: &[&Parameters], scale: f64) -> Result<StepReport> {
        let mut segments: Vec<Vec<Gradient>> = Vec::new();
        for network in parameters {
            segments.extend(network.take_gradients()?);
        }
        let within = parameters.first().map_or_else(Group::alone, |p| p.mesh().within.clone());
        let [grad_norm, below_eps] = no_grad(|| self.survey(&within, segments.iter().flatten()))?;
        if !grad_norm.is_finite() {
            // The norm is that of all ranks.
            let what = format!("the gradient norm is {grad_norm}: lower the learning rate");
            return Err(cluster::Error::Shared { what }.into());
        }
        let clip = (self.config.max_grad_norm / (grad_norm + 1e-6)).min(1.0);
        self.step += 1;
        let rate = self.rate(scale);
        let scalars = self.scalars(clip, rate);
        let masters: Vec<&Tensor> = parameters.iter().flat_map(|p| p.masters()).collect();
        no_grad(|| {
            for (index, (master, gradients)) in masters.iter().zip(segments).enumerate() {
                self.move_segment(index, master, gradients, &scalars);
            }
        });
        self.average(&masters);
        for network in parameters {
            network.refresh()?;
        }
        Ok(StepReport { grad_norm, below_eps, rate })
    }

    /// Size of the present step: `learning_rate·scale`, after the warm-up's share.
    fn rate(&self, scale: f64) -> f64 {
        let warm = match self.config.warmup {
            0 => 1.0,
            warmup => (self.step as f64 / warmup as f64).min(1.0),
        };
        self.config.learning_rate * scale * warm
    }

    /// What a step of size `rate` does to each number.
    fn scalars(&self, clip: f64, rate: f64) -> host::AdamW {
        let OptimizerConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let [of_m, of_v] = [beta1, beta2].map(|beta| 1.0 - beta.powi(self.step as i32));
        // rate·(m/of_m) / (√(v/of_v) + eps) = m / (√v·of_m/(rate·√of_v) + eps·of_m/rate)
        host::AdamW {
            clip: clip as f32,
            of_m: (1.0 - beta1) as f32,
            of_v: (1.0 - beta2) as f32,
            keep: (1.0 - rate * weight_decay) as f32,
            factor: (-of_m / (rate * of_v.sqrt())) as f32,
            offset: (-of_m * eps / rate) as f32,
        }
    }

    /// The norm of all gradients, and the share below eps by every [`SEEN`]th of them; of the ranks that have them
    /// among themselves.
    fn survey<'a>(
        &self,
        group: &Group,
        gradients: impl Iterator<Item = &'a Gradient>,
    ) -> Result<[f64; 2]> {
        // Sums stay where they are until all are there: a device is waited for once.
        let (mut squares, mut small, mut n_seen) = (Vec::new(), Vec::new(), 0);
        for Gradient { values, .. } in gradients {
            let mut plain = values.to_kind(Kind::Float);
            squares.push(match plain.device() {
                Device::Cpu => Tensor::from(sum_of_squares(&mut plain)),
                _ => plain.square().sum(Kind::Double),
            });
            let seen = plain.slice(0, None, None, SEEN).abs();
            n_seen += seen.numel();
            let below = seen.lt(self.config.eps).logical_and(&seen.ne(0.0));
            small.push(below.sum(Kind::Double));
        }
        let total = |sums: &[Tensor]| match sums {
            [] => 0.0,
            sums => Tensor::stack(sums, 0).sum(Kind::Double).double_value(&[]),
        };
        let mut totals = Tensor::from_slice(&[total(&squares), total(&small), n_seen as f64]);
        group.all_reduce(&mut totals, Reduce::Sum)?;
        let [squares, small, n_seen] = [0, 1, 2].map(|index| totals.double_value(&[index]));
        Ok([squares.sqrt(), small / n_seen.max(1.0)])
    }

    fn move_segment(
        &mut self,
        index: usize,
        master: &Tensor,
        gradients: Vec<Gradient>,
        step: &host::AdamW,
    ) {
        // Each gradient is let go when its parameter has moved.
        for gradient in gradients {
            let flats = [master, &self.m[index], &self.v[index]];
            let moved = flats.map(|flat| gradient.narrow(flat));
            let g = gradient.values.to_kind(Kind::Float);
            match g.device() {
                Device::Cpu => on_processor(step, moved, g),
                _ => on_device(step, moved, &g),
            }
        }
    }

    /// Moves the average towards `masters`.
    fn average(&mut self, masters: &[&Tensor]) {
        let n = self.step as f64;
        let decay = self.config.ema.min(n / (n + 9.0));
        for (ema, master) in self.ema.iter_mut().flatten().zip(masters) {
            let _ = no_grad(|| ema.lerp_(master, 1.0 - decay));
        }
    }

    /// Steps made.
    pub(crate) fn n_steps(&self) -> i64 {
        self.step
    }

    /// The flat weights worth saving, like the masters: the moving average where one is kept.
    pub(crate) fn averaged(&self) -> Option<&[Tensor]> {
        self.ema.as_deref()
    }

    /// Everything of this rank that [`AdamW::restore`] needs, but for the step count.
    pub(crate) fn entries(&self) -> Vec<Entry<'static>> {
        self.states().flat_map(|(kind, tensors)| shards::entries(kind, tensors)).collect()
    }

    /// Takes back what [`AdamW::entries`] gave, of whatever number of ranks.
    ///
    /// # Errors
    /// When it does not fit `parameters`.
    pub(crate) fn restore(
        &mut self,
        parameters: &[&Parameters],
        state: &Shards,
        step: i64,
    ) -> Result<()> {
        self.step = step;
        for (kind, tensors) in self.states() {
            state.restore(kind, tensors, parameters)?;
        }
        Ok(())
    }

    /// The flat tensors of each kind of state, like the masters.
    pub(super) fn states(&self) -> impl Iterator<Item = (&'static str, &Vec<Tensor>)> {
        let ema = self.ema.iter().map(|ema| (AVERAGE, ema));
        [("m", &self.m), ("v", &self.v)].into_iter().chain(ema)
    }
}

/// Moves weights and moments in one pass over memory, a part a thread.
#[expect(unsafe_code, reason = "libtorch's bindings only copy")]
fn on_processor(step: &host::AdamW, mut moved: [Tensor; 3], mut g: Tensor) {
    // SAFETY: weights, moments and the gradient share no storage with each other, and nobody else computes
    // with them while the optimiser, which is borrowed, steps.
    let numbers = |flat| unsafe { numbers_of(flat) };
    let [w, m, v] = moved.each_mut().map(|flat| numbers(flat).par_chunks_mut(PART));
    let g = numbers(&mut g).par_chunks(PART);
    w.zip(m).zip(v).zip(g).for_each(|(((w, m), v), g)| step.step([w, m, v], g));
}

/// The same by libtorch.
fn on_device(step: &host::AdamW, [mut w, mut m, mut v]: [Tensor; 3], g: &Tensor) {
    let [clip, of_m, of_v, keep, factor, offset] =
        [step.clip, step.of_m, step.of_v, step.keep, step.factor, step.offset].map(f64::from);
    let g = g * clip;
    let _ = m.lerp_(&g, of_m);
    let _ = v.lerp_(&g.square(), of_v);
    let root = v.sqrt().g_mul_scalar_(factor).g_add_scalar_(offset);
    let _ = w.g_mul_scalar_(keep).addcdiv_(&m, &root);
}

#[expect(unsafe_code, reason = "libtorch's bindings only copy")]
fn sum_of_squares(values: &mut Tensor) -> f64 {
    // SAFETY: a gradient is read here and by nobody else.
    let numbers = unsafe { numbers_of(values) };
    // In order, so that threads change nothing.
    let parts: Vec<f64> = numbers.par_chunks(PART).map(host::sum_of_squares).collect();
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use flow::noise::Noise;
    use flow::ops::shapes::Shapes;
    use flow::ops::{Ops, ParamPath};

    use super::*;
    use crate::tensor::device::Compute;
    use crate::tensor::parameters::Storage;

    fn one_segment() -> Parameters {
        let shapes = Shapes::new();
        shapes.param(&ParamPath::root().at("w"), &[3]);
        let manifest = [shapes.manifest()];
        let mut parameters = Parameters::build(
            &manifest,
            Compute::CPU,
            Storage::Trainable(Group::alone()),
            |_, _| Ok(Tensor::from_slice(&[1.0f32, -2.0, 0.5])),
        )
        .unwrap();
        parameters.train();
        parameters
    }

    fn config() -> OptimizerConfig {
        toml::from_str("learning_rate = 0.1\nweight_decay = 0.01\nmax_grad_norm = 1e9\nema = 0.5")
            .unwrap()
    }

    fn push(parameters: &Parameters, gradient: &[f32]) {
        use flow::ops::Ops;
        let w = parameters.ops().param(&ParamPath::root().at("w"), &[3]);
        (&*w * Tensor::from_slice(gradient)).sum(Kind::Float).backward();
    }

    fn weights(parameters: &Parameters) -> Vec<f32> {
        Vec::<f32>::try_from(parameters.masters().next().unwrap()).unwrap()
    }

    /// Two steps against AdamW written out in f64.
    #[test]
    fn steps_are_adamw() {
        let parameters = one_segment();
        let mut optimizer = AdamW::new(config(), &[&parameters]);
        let (mut w, mut m, mut v) = ([1.0f64, -2.0, 0.5], [0.0f64; 3], [0.0f64; 3]);
        for (step, gradient) in [[0.3f32, -1.0, 2.0], [0.1, 0.5, -3.0]].iter().enumerate() {
            push(&parameters, gradient);
            optimizer.step(&[&parameters], 1.0).unwrap();
            for i in 0..3 {
                let g = f64::from(gradient[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let n = step as i32 + 1;
                let (mh, vh) = (m[i] / (1.0 - 0.9f64.powi(n)), v[i] / (1.0 - 0.999f64.powi(n)));
                w[i] -= 0.1 * 0.01 * w[i] + 0.1 * mh / (vh.sqrt() + 1e-12);
            }
        }
        for (found, expected) in weights(&parameters).iter().zip(w) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn the_processor_steps_as_other_devices_do() {
        let flat = |seed: u64| Tensor::from_slice(&Noise::new(seed).normal(0, 100_001));
        let optimizer = AdamW { step: 7, ..AdamW::new(config(), &[]) };
        let step = optimizer.scalars(0.3, optimizer.rate(1.0));
        let start = || [flat(1), flat(2), flat(3).square()];
        let (ours, torch) = (start(), start());
        on_processor(&step, ours.each_ref().map(Tensor::shallow_clone), flat(4));
        on_device(&step, torch.each_ref().map(Tensor::shallow_clone), &flat(4));
        for ((ours, torch), before) in ours.iter().zip(&torch).zip(start()) {
            let difference = (ours - torch).abs().max().double_value(&[]);
            let [largest, change] =
                [torch.shallow_clone(), torch - before].map(|x| x.abs().max().double_value(&[]));
            assert!(difference < 3e-7 * largest && change > 1e-3, "{difference:e} of {largest}");
        }
    }

    #[test]
    fn every_setting_has_a_range() {
        let fine = config();
        fine.validate().unwrap();
        for (name, bad) in [
            ("ema", OptimizerConfig { ema: 1.0, ..fine.clone() }),
            ("ema", OptimizerConfig { ema: -1.0, ..fine.clone() }),
            ("ema", OptimizerConfig { ema: f64::NAN, ..fine.clone() }),
            ("learning_rate", OptimizerConfig { learning_rate: -1.0, ..fine.clone() }),
            ("learning_rate", OptimizerConfig { learning_rate: f64::NAN, ..fine.clone() }),
            ("beta1", OptimizerConfig { beta1: 1.0, ..fine.clone() }),
            ("beta2", OptimizerConfig { beta2: 2.0, ..fine.clone() }),
            ("eps", OptimizerConfig { eps: 0.0, ..fine.clone() }),
            ("weight_decay", OptimizerConfig { weight_decay: f64::INFINITY, ..fine.clone() }),
            ("max_grad_norm", OptimizerConfig { max_grad_norm: 0.0, ..fine.clone() }),
        ] {
            let said = bad.validate().unwrap_err().to_string();
            assert!(said.contains(&format!("optimizer.{name} = ")), "{said}");
        }
    }

    #[test]
    fn gradients_are_clipped_by_their_global_norm() {
        let parameters = one_segment();
        let clipped = OptimizerConfig { max_grad_norm: 1.0, ..config() };
        let mut optimizer = AdamW::new(clipped, &[&parameters]);
        push(&parameters, &[3.0, 4.0, 0.0]);
        let report = optimizer.step(&[&parameters], 1.0).unwrap();
        assert!((report.grad_norm - 5.0).abs() < 1e-6);
        let m = Vec::<f32>::try_from(&optimizer.m[0]).unwrap();
        assert!((m[0] - 0.06).abs() < 1e-6 && (m[1] - 0.08).abs() < 1e-6, "{m:?}");
    }

    #[test]
    fn the_average_forgets_the_start_of_a_short_run() {
        let parameters = one_segment();
        let slow = OptimizerConfig { ema: 0.99, ..config() };
        let mut optimizer = AdamW::new(slow, &[&parameters]);
        let mut average = weights(&parameters);
        for n in 1..=22 {
            push(&parameters, &[0.3, -1.0, 2.0]);
            optimizer.step(&[&parameters], 1.0).unwrap();
            let decay = n as f32 / (n as f32 + 9.0);
            for (average, weight) in average.iter_mut().zip(weights(&parameters)) {
                *average = decay * *average + (1.0 - decay) * weight;
            }
        }
        let found = Vec::<f32>::try_from(&optimizer.averaged().unwrap()[0]).unwrap();
        for (found, expected) in found.iter().zip(average) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn a_restored_optimiser_goes_on_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(shards::file_name(0, 1));
        let (a, b) = (one_segment(), one_segment());
        let mut of_a = AdamW::new(config(), &[&a]);
        push(&a, &[0.3, -1.0, 2.0]);
        of_a.step(&[&a], 1.0).unwrap();
        flow::checkpoint::write_tensors(&file, &of_a.entries(), &[]).unwrap();
        let mut of_b = AdamW::new(config(), &[&b]);
        let state = Shards::open(dir.path()).unwrap();
        of_b.restore(&[&b], &state, of_a.n_steps()).unwrap();
        no_grad(|| {
            let (from, to) = (a.masters().next().unwrap(), b.masters().next().unwrap());
            to.shallow_clone().copy_(from);
        });
        for (parameters, optimizer) in [(&a, &mut of_a), (&b, &mut of_b)] {
            push(parameters, &[0.7, 0.2, -0.1]);
            optimizer.step(&[parameters], 1.0).unwrap();
        }
        assert_eq!(weights(&a), weights(&b));
        assert_eq!(of_a.averaged().unwrap()[0], of_b.averaged().unwrap()[0]);
    }

    #[test]
    fn a_gradient_that_is_not_finite_stops_the_run() {
        let parameters = one_segment();
        let mut optimizer = AdamW::new(config(), &[&parameters]);
        push(&parameters, &[f32::NAN, 0.0, 0.0]);
        assert!(optimizer.step(&[&parameters], 1.0).is_err());
        assert_eq!(weights(&parameters), [1.0, -2.0, 0.5]);
    }
}
