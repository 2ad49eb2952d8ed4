//! Solving the flow from noise, keeping what training needs.

use anyhow::{Context, Result, bail, ensure};
use flow::latents::{LatentSize, check_pixels};
use flow::models::transformer::GUIDANCE;
use flow::noise::Noise;
use flow::path;
use flow::pipeline::Pipeline;
use flow::schedule::{Grid, Schedule, SchedulerConfig, Shift};
use flow::solver::{self, DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS, Solver, Step, Term};
use flow::usage::Usage;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Largest guidance scale, far above what any model was trained on.
pub(crate) const MAX_GUIDANCE: f64 = 1000.0;
/// Most steps that are no slip of the hand.
const MAX_STEPS: usize = 10_000;

/// How trajectories are solved.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// How a step is taken.
    #[serde(default = "default_solver")]
    #[schemars(schema_with = "solvers")]
    pub solver: String,
    /// Steps T.
    #[serde(default = "steps")]
    pub steps: usize,
    /// Constant shift of the time grid; without it, the checkpoint's scheduler decides.
    #[serde(default)]
    pub shift: Option<f64>,
    /// Guidance scale, for a model that embeds one; without it, 3.5.
    #[serde(default)]
    pub guidance: Option<f64>,
    /// Width and height in pixels; without it, the model's own.
    #[serde(default)]
    pub size: Option<[usize; 2]>,
    /// Images a network call takes at most.
    #[serde(default = "rollout_batch")]
    pub batch: usize,
}

fn solvers(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": SOLVERS.map(|(name, _)| name) })
}
fn default_solver() -> String {
    DEFAULT_SOLVER.name().to_owned()
}
fn steps() -> usize {
    DEFAULT_STEPS
}
fn rollout_batch() -> usize {
    64
}

impl RolloutConfig {
    /// Refuses values without sense.
    pub(crate) fn validate(&self) -> Result<()> {
        let steps = self.steps;
        ensure!((2..=MAX_STEPS).contains(&steps), "rollout.steps = {steps}: from 2 to {MAX_STEPS}");
        let guidance = self.guidance.unwrap_or(0.0);
        let fits = (0.0..=MAX_GUIDANCE).contains(&guidance);
        ensure!(fits, "rollout.guidance = {guidance}: from 0 to {MAX_GUIDANCE}");
        let shift = self.shift.unwrap_or(1.0);
        ensure!(shift > 0.0 && shift <= 1e6, "rollout.shift = {shift}: above 0, at most 1e6");
        if let Some(size) = self.size {
            check_pixels(size[0], size[1]).with_context(|| format!("rollout.size = {size:?}"))?;
        }
        ensure!(self.batch > 0, "rollout.batch must be at least 1");
        Ok(())
    }

    /// Size of the latents of images of `pipeline`.
    ///
    /// # Errors
    /// [`Usage`] when `size` does not fit it.
    pub(crate) fn latent_size(&self, pipeline: &Pipeline) -> Result<LatentSize> {
        let [width, height] = self.size.unwrap_or([pipeline.default_size(); 2]);
        let size = pipeline.latent_size(width, height);
        Ok(size.map_err(|error| Usage(format!("rollout.size = [{width}, {height}]: {error}")))?)
    }

    /// Guidance scale for `pipeline`.
    ///
    /// # Errors
    /// [`Usage`] where one is set and the model embeds none.
    pub(crate) fn guidance(&self, pipeline: &Pipeline) -> Result<f64> {
        match self.guidance {
            Some(scale) if !pipeline.transformer.guidance_embeds => {
                let model = pipeline.dir.display();
                bail!(Usage(format!("guidance {scale}: {model} embeds no guidance; leave it out")))
            }
            scale => Ok(scale.unwrap_or(GUIDANCE)),
        }
    }

    /// The time grid for images of `size` under `scheduler`.
    pub(crate) fn grid(&self, scheduler: &SchedulerConfig, size: &LatentSize) -> Grid {
        let own = |factor| Shift::Factor(factor).into();
        self.shift.map_or_else(|| scheduler.grid(size.tokens()), own)
    }

    /// The solver's table of steps, on `grid`.
    pub(crate) fn steps(&self, grid: Grid) -> Result<Vec<Step>> {
        let Some(solver) = Solver::by_name(&self.solver) else {
            let known: Vec<&str> = SOLVERS.iter().map(|(name, _)| *name).collect();
            let what = format!("rollout.solver = {:?}: one of {}", self.solver, known.join(", "));
            bail!(Usage(what));
        };
        Ok(solver::plan(solver, &Schedule::new(self.steps, grid)?))
    }

    /// The table of steps for images of `size` under `scheduler`.
    pub(crate) fn plan(&self, scheduler: &SchedulerConfig, size: &LatentSize) -> Result<Vec<Step>> {
        self.steps(self.grid(scheduler, size))
    }
}

/// How the trajectories of a group start and go on.
pub(crate) struct Rollout {
    pub(crate) start: Start,
    /// One network call each.
    pub(crate) steps: Vec<Step>,
    /// Indices of the noisy steps that turn each trajectory into two; with any, a group starts as one
    /// and ends as G.
    pub(crate) splits: Vec<usize>,
    /// Factor on the noise of those steps.
    pub(crate) split_noise: f64,
    /// Whether the network is told times cut to thousandths.
    pub(crate) truncate: bool,
    /// Of each group, what the first update learns from, where it does not hang on rewards: member and network call.
    pub(crate) foreseen: Vec<Vec<(usize, usize)>>,
}

/// Initial noises of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Start {
    /// Around a shared one, with strength σ (paper Eq. 7).
    Neighbourhood(f64),
    /// The same for all.
    Shared,
    /// One each.
    Independent,
}

impl Rollout {
    /// Trajectories that all solve their own ODE or SDE.
    pub(crate) fn apart(start: Start, steps: Vec<Step>) -> Self {
        let (splits, foreseen) = (Vec::new(), Vec::new());
        Self { start, steps, splits, split_noise: 1.0, truncate: false, foreseen }
    }

    /// Trajectories of a group before each step.
    pub(crate) fn widths(&self, group_size: usize) -> Vec<usize> {
        let mut width = group_size >> self.splits.len();
        let widths = (0..self.steps.len()).map(|index| {
            let before = width;
            if self.splits.contains(&index) {
                width *= 2;
            }
            before
        });
        widths.collect()
    }

    /// Network calls an image.
    pub(crate) fn nfe(&self, group_size: usize) -> f64 {
        self.widths(group_size).iter().sum::<usize>() as f64 / group_size as f64
    }

    /// What the network is told at time `t`.
    pub(crate) fn time(&self, t: f64) -> f64 {
        if self.truncate { (1000.0 * t).trunc() / 1000.0 } else { t }
    }
}

/// States and velocities along one solve, in f32.
pub(crate) struct Trajectory {
    /// Where each network call happened: time, time after the update, state, velocity.
    pub(crate) calls: Vec<Call>,
    /// The state at t = 0, `[B, S, C]`.
    pub(crate) x0: Tensor,
}

/// One network call.
pub(crate) struct Call {
    pub(crate) step: Step,
    /// State before, `[B, S, C]`; fewer rows where a split is still to come.
    pub(crate) x_t: Tensor,
    /// Velocity there, of the same shape.
    pub(crate) v: Tensor,
}

impl Trajectory {
    /// That of the rows of all `parts`, in order.
    ///
    /// # Panics
    /// When there are none.
    pub(crate) fn joined(mut parts: Vec<Self>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        let rows = |pick: &dyn Fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(pick).collect::<Vec<&Tensor>>(), 0)
        };
        let call = |index: usize| Call {
            step: parts[0].calls[index].step,
            x_t: rows(&|part| &part.calls[index].x_t),
            v: rows(&|part| &part.calls[index].v),
        };
        Self { calls: (0..parts[0].calls.len()).map(call).collect(), x0: rows(&|part| &part.x0) }
    }

    /// Indices of the calls that begin a transition, in order.
    pub(crate) fn transitions(&self) -> Vec<usize> {
        transitions(self.calls.iter().map(|call| &call.step))
    }

    /// The state where the transition that `call` begins ended.
    pub(crate) fn arrived(&self, call: usize) -> &Tensor {
        self.calls[call + 1..]
            .iter()
            .find(|next| next.step.t_next < next.step.t)
            .map_or(&self.x0, |next| &next.x_t)
    }
}

/// Indices of the steps that begin a transition (a corrector does not), in order.
pub(crate) fn transitions<'a>(steps: impl IntoIterator<Item = &'a Step>) -> Vec<usize> {
    let numbered = steps.into_iter().enumerate();
    numbered.filter(|(_, step)| step.t_next < step.t).map(|(index, _)| index).collect()
}

/// Applies `steps` from `eps` `[B, S, C]`. `velocity(x_t, t)` is the network; `disturb(index, x)` may add
/// noise to the state after step `index`, or rows.
///
/// # Errors
/// The first of `velocity`.
pub(crate) fn solve(
    steps: &[Step],
    eps: Tensor,
    mut velocity: impl FnMut(&Tensor, f64) -> Result<Tensor>,
    mut disturb: impl FnMut(usize, Tensor) -> Tensor,
) -> Result<Trajectory> {
    let (mut x_t, mut past): (Tensor, Option<Past>) = (eps, None);
    let mut calls = Vec::with_capacity(steps.len());
    for (index, step) in steps.iter().enumerate() {
        let v = velocity(&x_t, step.t)?;
        let next = advance(step, &x_t, &v, past.as_ref());
        let [of_x, of_v] = path::x0_from_v(step.t);
        let x0 = &x_t * of_x + &v * of_v;
        past = Some(Past { v: v.shallow_clone(), x0, x0_prev: past.map(|past| past.x0) });
        calls.push(Call { step: *step, x_t, v });
        x_t = disturb(index, next);
    }
    Ok(Trajectory { calls, x0: x_t })
}

/// What the calls before left.
struct Past {
    /// Velocity of the call before.
    v: Tensor,
    /// Its data prediction.
    x0: Tensor,
    /// The data prediction of the call before that.
    x0_prev: Option<Tensor>,
}

/// The same sum in the same order as [`flow::solver::Walk`], so that both round alike.
fn advance(step: &Step, x_t: &Tensor, v: &Tensor, past: Option<&Past>) -> Tensor {
    let terms = step.terms().map(|(term, coefficient)| {
        let source = match term {
            Term::X => Some(x_t),
            Term::V => Some(v),
            Term::VPrev => past.map(|past| &past.v),
            Term::X0Prev => past.map(|past| &past.x0),
            Term::X0Prev2 => past.and_then(|past| past.x0_prev.as_ref()),
        };
        let source = source.unwrap_or_else(|| panic!("the step from t = {} needs more", step.t));
        source * coefficient
    });
    terms.reduce(|sum, term| sum + term).expect("a step has a term")
}

impl Start {
    /// The initial noises of `group`, which numbers the groups of a run: `width` of them, each an
    /// unpacked `[Z·h·w]`.
    pub(crate) fn noises(
        self,
        noise: Noise,
        group: u64,
        group_size: usize,
        width: usize,
        size: &LatentSize,
    ) -> Vec<Vec<f32>> {
        let stream = group * (group_size as u64 + 1);
        let member = |i: usize| noise.normal(stream + 1 + i as u64, size.len());
        match self {
            Self::Neighbourhood(sigma) => neighbourhood(noise, group, group_size, sigma, size),
            Self::Shared => vec![noise.normal(stream, size.len()); width],
            Self::Independent => (0..width).map(member).collect(),
        }
    }
}

/// The noises of one group around a shared one (paper Eq. 7): `√(1 − σ²)·eps* + σ·δ_i`, i < G, each an
/// unpacked `[Z·h·w]`. `group` numbers the groups of a run.
fn neighbourhood(
    noise: Noise,
    group: u64,
    group_size: usize,
    sigma: f64,
    size: &LatentSize,
) -> Vec<Vec<f32>> {
    let stream = group * (group_size as u64 + 1);
    let shared = noise.normal(stream, size.len());
    let (keep, spread) = ((1.0 - sigma * sigma).sqrt() as f32, sigma as f32);
    (1..=group_size as u64)
        .map(|i| {
            let delta = noise.normal(stream + i, size.len());
            shared.iter().zip(delta).map(|(e, d)| keep * e + spread * d).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use flow::schedule::{Schedule, Shift};
    use flow::solver::{SOLVERS, Walk, plan};
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn tensors_and_buffers_give_the_same_bits() {
        let eps = Noise::new(3).normal(0, 500);
        let field = |x: f32, t: f64| (x * 1.3 - t as f32) * 0.7;
        for (_, solver) in SOLVERS {
            let steps = plan(solver, &Schedule::new(7, Shift::Factor(3.0)).unwrap());
            let tensors = solve(
                &steps,
                Tensor::from_slice(&eps),
                |x, t| {
                    let x = Vec::<f32>::try_from(x).unwrap();
                    Ok(Tensor::from_slice(&x.iter().map(|&x| field(x, t)).collect::<Vec<f32>>()))
                },
                |_, x| x,
            )
            .unwrap();
            let mut walk = Walk::new(eps.clone());
            for step in &steps {
                let v: Vec<f32> = walk.x().iter().map(|&x| field(x, step.t)).collect();
                walk.advance(step, &v);
            }
            assert_eq!(Vec::<f32>::try_from(&tensors.x0).unwrap(), walk.into_x(), "{solver:?}");
        }
    }

    #[test]
    fn transitions_skip_correctors() {
        let schedule = Schedule::new(3, Shift::Factor(1.0)).unwrap();
        let steps = plan(flow::solver::Solver::Heun, &schedule);
        let trajectory = solve(
            &steps,
            Tensor::ones([1], (Kind::Float, Device::Cpu)),
            |x, _| Ok(x * 0.5),
            |_, x| x,
        )
        .unwrap();
        let transitions = trajectory.transitions();
        assert_eq!(transitions, [0, 2, 4]);
        assert_eq!(trajectory.arrived(0), &trajectory.calls[2].x_t);
        assert_eq!(trajectory.arrived(4), &trajectory.x0);
    }

    #[test]
    fn a_group_that_splits_shares_its_beginning() {
        let schedule = Schedule::new(6, Shift::Factor(3.0)).unwrap();
        let steps = plan(flow::solver::Solver::Euler, &schedule);
        let whole = Rollout::apart(Start::Shared, steps);
        assert_eq!((whole.widths(8), whole.nfe(8)), (vec![8; 6], 6.0));
        let tree = Rollout { splits: vec![0, 2, 3], ..whole };
        assert_eq!(tree.widths(8), [1, 2, 2, 4, 8, 8]);
        assert_eq!(tree.nfe(8), 25.0 / 8.0);
    }

    #[test]
    fn starts_are_shared_or_apart() {
        let size = LatentSize { channels: 4, height: 4, width: 4 };
        let noises = |start: Start| start.noises(Noise::new(9), 4, 3, 3, &size);
        let [shared, apart] = [Start::Shared, Start::Independent].map(noises);
        assert!(shared[0] == shared[1] && shared[1] == shared[2]);
        assert!(apart[0] != apart[1] && apart[1] != apart[2] && !shared.contains(&apart[0]));
        assert_eq!(noises(Start::Neighbourhood(1.0)), apart);
    }

    #[test]
    fn neighbours_are_normal_and_correlated() {
        let size = LatentSize { channels: 16, height: 40, width: 40 };
        let members = neighbourhood(Noise::new(9), 4, 3, 0.3, &size);
        let dot = |a: &[f32], b: &[f32]| {
            a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>() / a.len() as f64
        };
        for i in 0..3 {
            assert!((dot(&members[i], &members[i]) - 1.0).abs() < 0.03);
            for j in 0..i {
                assert!((dot(&members[i], &members[j]) - 0.91).abs() < 0.03);
            }
        }
        assert_ne!(members, neighbourhood(Noise::new(9), 5, 3, 0.3, &size));
    }
}
