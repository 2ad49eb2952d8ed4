//! Gradients of small networks on the processor, by the interpreter in plain Rust.

use anyhow::Result;
use flow::models::transformer::TransformerConfig;
use host::{Learned, Trace, Traced};
use rayon::prelude::*;
use tch::Tensor;

use super::condition::Condition;
use super::inference::{Batch, copied, inputs, joined};
use crate::tensor::parameters::Parameters;

/// Runs the network forward, asks `gradient` for dJ/dv and adds its product with dv/dθ to what `parameters` have
/// learnt, on all threads. Its velocities have the bits of [`super::inference::Inference`], and its gradients the
/// same bits on any number of threads.
///
/// # Errors
/// Those of `gradient`.
pub(super) fn forward_backward(
    config: &TransformerConfig,
    parameters: &Parameters,
    [x_t, t]: [&Tensor; 2],
    condition: &Condition,
    gradient: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let batch = Batch::cut(x_t, t, condition);
    let learned = parameters.lend(|weights| {
        let forward = |sample| {
            let trace = Trace::new(weights);
            let constants = batch.values(sample).each_ref().map(Traced::from);
            let v = config.forward(&trace, &inputs(&constants));
            (trace, v)
        };
        let traces: Vec<(Trace<'_>, Traced)> = batch.samples.par_iter().map(forward).collect();
        let parts: Vec<host::Tensor> = traces.iter().map(|(_, v)| v.value().clone()).collect();
        let of_v = copied(&gradient(&joined(&parts, x_t))?);
        let mut from = 0;
        let upstream: Vec<&[f32]> = parts
            .iter()
            .map(|part| {
                let n = part.values().len();
                from += n;
                &of_v.values()[from - n..from]
            })
            .collect();
        let back = |((trace, v), dv): ((Trace<'_>, Traced), &[f32])| trace.back(&v, dv.to_vec());
        anyhow::Ok(traces.into_par_iter().zip(upstream).map(back).collect::<Vec<Learned>>())
    })?;
    parameters.learn(&learned);
    Ok(())
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
