//! Gradients of small networks on the processor, by the interpreter in plain Rust.

use std::collections::{HashMap, HashSet};

use anyhow::Result;
use flow::models::transformer::TransformerConfig;
use host::{Learned, Passage, Trace, Traced};
use rayon::prelude::*;
use tch::Tensor;

use super::condition::Condition;
use super::inference::{Batch, Inference, Part, copied, inputs, joined, rows_of};
use crate::tensor::parameters::Parameters;

/// A network that learns.
#[derive(Clone, Copy)]
pub(super) struct Learner<'a> {
    pub(super) config: &'a TransformerConfig,
    pub(super) parameters: &'a Parameters,
}

/// Ways forward that wait for their way back, through parameters as they were at a version.
#[derive(Default)]
pub(super) struct Kept {
    version: u64,
    ways: Vec<Way>,
}

/// Samples that have gone forward together.
struct Way {
    part: Part,
    passage: Passage,
}

/// A way forward, and for each of its samples the row of a batch that it is in, if any.
type Found = (Way, Vec<Option<usize>>);

impl Learner<'_> {
    /// Velocities of `rows` of `x_t` `[B, S, C]` at times `t` `[B]` by `inference`, which has the parameters as they
    /// are; their ways are kept.
    pub(super) fn velocity(
        self,
        kept: &mut Kept,
        inference: &Inference,
        x: [&Tensor; 2],
        condition: &Condition,
        rows: &[i64],
    ) -> Tensor {
        kept.renew(self.parameters);
        let ways = self.forward(|| inference.trace(), x, condition, rows);
        let velocities = joined(ways.iter().map(|way| way.passage.value()));
        kept.ways.extend(ways);
        velocities.reshape([-1, x[0].size()[1], x[0].size()[2]])
    }

    /// Runs the network forward, asks `gradient` for dJ/dv and adds its product with dv/dθ to what the parameters
    /// have learnt, on all threads; what `kept` has need not go forward again. Its velocities have the bits of
    /// [`Inference`], its gradients those of samples that go together alike.
    ///
    /// # Errors
    /// Those of `gradient`.
    pub(super) fn forward_backward(
        self,
        kept: &mut Kept,
        x: [&Tensor; 2],
        condition: &Condition,
        gradient: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let size = x[0].size();
        kept.renew(self.parameters);
        let mut found = kept.take(x, condition);
        let gone: HashSet<usize> =
            found.iter().flat_map(|(_, rows)| rows).flatten().copied().collect();
        let others: Vec<i64> =
            rows_of(x[0]).into_iter().filter(|&row| !gone.contains(&(row as usize))).collect();
        let others = self
            .parameters
            .lend(|weights| self.forward(|| Trace::new(weights), x, condition, &others));
        found.extend(others.into_iter().map(|way| {
            let rows = way.part.rows.iter().map(|&row| Some(row as usize)).collect();
            (way, rows)
        }));
        let width = (size[1] * size[2]) as usize;
        let mut v = vec![0.0; x[0].numel()];
        for (way, rows) in &found {
            for (row, values) in rows.iter().zip(way.passage.value().values().chunks_exact(width)) {
                if let Some(row) = row {
                    v[row * width..][..width].copy_from_slice(values);
                }
            }
        }
        let of_v = copied(&gradient(&Tensor::from_slice(&v).reshape(size))?);
        let with_slopes = |(way, rows): Found| {
            let mut dv = vec![0.0; rows.len() * width];
            for (row, dv) in rows.iter().zip(dv.chunks_exact_mut(width)) {
                if let Some(row) = row {
                    dv.copy_from_slice(&of_v.values()[row * width..][..width]);
                }
            }
            (way.passage, dv)
        };
        let ways: Vec<(Passage, Vec<f32>)> = found.into_iter().map(with_slopes).collect();
        let learned: Vec<Learned> = self.parameters.lend(|weights| {
            ways.into_par_iter().map(|(passage, dv)| passage.back(weights, dv)).collect()
        });
        self.parameters.learn(&learned);
        Ok(())
    }

    fn forward<'t>(
        self,
        begun: impl Fn() -> Trace<'t> + Sync,
        x: [&Tensor; 2],
        condition: &Condition,
        rows: &[i64],
    ) -> Vec<Way> {
        let Batch { parts, ids } = Batch::cut(x, condition, rows);
        let way = |part: Part| {
            let (trace, constants) = (begun(), part.values(&ids).each_ref().map(Traced::from));
            let v = self.config.forward(&trace, &inputs(&constants));
            Way { part, passage: trace.passage(&v) }
        };
        parts.into_par_iter().map(way).collect()
    }
}

impl Kept {
    /// Forgets what other values of `parameters` computed.
    fn renew(&mut self, parameters: &Parameters) {
        if self.version != parameters.version() {
            *self = Self { version: parameters.version(), ways: Vec::new() };
        }
    }

    /// The ways of which at least half of the samples are among `x`: what has nothing to learn goes back with them.
    fn take(&mut self, x: [&Tensor; 2], condition: &Condition) -> Vec<Found> {
        if self.ways.is_empty() {
            return Vec::new();
        }
        let mut at: HashMap<Vec<u32>, Vec<usize>> = HashMap::new();
        for part in Batch::cut(x, condition, &rows_of(x[0])).parts {
            for (&row, sample) in part.rows.iter().zip(part.samples()) {
                at.entry(sample).or_default().push(row as usize);
            }
        }
        let mut found = Vec::new();
        for way in std::mem::take(&mut self.ways) {
            let rows: Vec<Option<usize>> =
                way.part.samples().map(|sample| at.get_mut(&sample)?.pop()).collect();
            if 2 * rows.iter().flatten().count() >= rows.len() {
                found.push((way, rows));
            } else {
                self.ways.push(way);
            }
        }
        found
    }
}

impl Part {
    /// The bits of all that a sample is.
    fn samples(&self) -> impl Iterator<Item = Vec<u32>> {
        let n = self.rows.len();
        (0..n).map(move |i| {
            let values = self.of.iter().flat_map(move |x| {
                let width = x.values().len() / n;
                &x.values()[i * width..][..width]
            });
            values.map(|x| x.to_bits()).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use cluster::Group;
    use flow::noise::Noise;
    use tch::Kind;

    use super::*;
    use crate::network::model::{Loading, Model};
    use crate::tensor::device::Compute;
    use crate::tensor::parameters::Storage;

    fn model(dir: &str) -> Model {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(dir);
        let storage = Storage::Trainable(Group::alone());
        let loading = Loading { storage, ..Loading::to_sample(Compute::CPU, false) };
        let mut model = Model::load(&dir, loading).unwrap();
        model.engine.train();
        model
    }

    fn normal(stream: u64, shape: &[i64]) -> Tensor {
        let n = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&Noise::new(8).normal(stream, n)).reshape(shape)
    }

    /// What reaches each parameter, in order, after two passes.
    fn gradients(model: &mut Model, recompute: bool) -> Vec<Tensor> {
        let size = model.latent_size(None).unwrap();
        let condition = model.encode(&["red \"CAT\""; 37], 3.5, &size).unwrap();
        let shape = [37, size.tokens() as i64, size.token_width() as i64];
        let t = Tensor::linspace(0.02, 1.0, 37, (Kind::Float, tch::Device::Cpu));
        model.engine.recompute = recompute;
        for pass in 0..2 {
            let gradient = |v: &Tensor| Ok(v * 2.0 + normal(10 + pass, &shape));
            let x_t = normal(pass, &shape);
            model.engine.forward_backward(&x_t, &t, &condition, gradient).unwrap();
        }
        let found = model.engine.trained().take_gradients().unwrap();
        found.into_iter().flatten().map(|gradient| gradient.values).collect()
    }

    #[test]
    fn gradients_are_those_of_libtorch() {
        for dir in ["assets/signs", "tests/fixtures/tiny-flux/pipeline"] {
            let mut model = model(dir);
            let torch = gradients(&mut model, true);
            let ours = gradients(&mut model, false);
            assert_eq!(ours.len(), torch.len());
            for (index, (ours, torch)) in ours.iter().zip(&torch).enumerate() {
                let largest = torch.abs().max().double_value(&[]);
                let difference = (ours - torch).abs().max().double_value(&[]);
                assert!(
                    difference <= 1e-5 * largest && largest > 0.0,
                    "{dir}, parameter {index}: {difference:e} of {largest:e}"
                );
            }
        }
    }

    #[test]
    fn what_is_kept_goes_forward_once() {
        let model = model("assets/signs");
        let size = model.latent_size(None).unwrap();
        let condition = model.encode(&["red \"CAT\""; 12], 3.5, &size).unwrap();
        let x_t = normal(0, &[12, size.tokens() as i64, size.token_width() as i64]);
        let t = Tensor::linspace(0.02, 1.0, 12, (Kind::Float, tch::Device::Cpu));
        // Not all that trains was known to, nor does all that was known to.
        let calls = [vec![4, 1], vec![2, 0, 3], vec![10, 7, 11]];
        let trained = Tensor::from_slice(&[8, 1, 2, 4, 5, 10, 7]);
        let [x_in, t_in] = [&x_t, &t].map(|x| x.index_select(0, &trained));
        let parameters = model.engine.trained();
        let learner = Learner { config: &model.pipeline.transformer, parameters };
        let learn = |kept: &mut Kept| {
            let mut seen = Tensor::new();
            let gradient = |v: &Tensor| {
                seen = v.shallow_clone();
                Ok(v * 2.0 + normal(10, &v.size()))
            };
            learner
                .forward_backward(kept, [&x_in, &t_in], &condition.rows(&trained), gradient)
                .unwrap();
            let learned = parameters.take_gradients().unwrap().into_iter().flatten();
            (seen, learned.map(|found| found.values).collect::<Vec<Tensor>>())
        };
        let (v, learned) = learn(&mut Kept::default());
        let mut kept = Kept::default();
        let inference = Inference::new(&model.pipeline.transformer, parameters, None);
        let all = inference.velocity(&x_t, &t, &condition);
        for rows in &calls {
            let v = learner.velocity(&mut kept, &inference, [&x_t, &t], &condition, rows);
            assert!(v.equal(&all.index_select(0, &Tensor::from_slice(rows))));
        }
        let n_kept = |kept: &Kept| kept.ways.iter().map(|way| way.part.rows.len()).sum::<usize>();
        assert_eq!(n_kept(&kept), 8);
        let (v_again, learned_again) = learn(&mut kept);
        assert!(n_kept(&kept) <= 3, "most of the second call has nothing to learn");
        assert!(v_again.equal(&v));
        for (again, learned) in learned_again.iter().zip(&learned) {
            let difference = (again - learned).abs().max().double_value(&[]);
            assert!(difference <= 2e-6 * learned.abs().max().double_value(&[]));
        }
        // Other weights' ways lead nowhere.
        parameters.refresh().unwrap();
        let _ = learn(&mut kept);
        assert_eq!(n_kept(&kept), 0);
    }

    #[test]
    fn threads_change_no_bit() {
        let of = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gradients(&mut model("assets/signs"), false))
        };
        for (index, (one, three)) in of(1).iter().zip(&of(3)).enumerate() {
            assert!(one.equal(three), "parameter {index}");
        }
    }
}
