//! Velocities of small networks on the processor, without gradients, by the interpreter in plain Rust.

use flow::models::transformer::{Inputs, TransformerConfig};
use host::{Interpreter, Trace};
use rayon::prelude::*;
use tch::{Kind, Tensor};

use super::condition::Condition;
use super::lora::Adapters;
use crate::tensor::parameters::Parameters;

/// Tokens that go through the network together: as many as keep the products busy and stay in the cache.
const TOKENS_AT_ONCE: i64 = 480;
/// Bytes of a sample's widest activation up to which it is done here: what lies in a core's caches, its share
/// of the common one included. With AVX-512 the products keep ahead of libtorch's beyond that.
const WIDEST: usize = 1 << 22;

/// A network with the values its parameters had once.
pub(crate) struct Inference {
    config: TransformerConfig,
    parameters: host::Parameters,
}

impl Inference {
    /// Whether a network with `tokens` tokens a sample is done faster here than by libtorch.
    pub(crate) fn is_worthwhile(config: &TransformerConfig, tokens: usize) -> bool {
        host::is_fast() && tokens * 4 * config.width() * size_of::<f32>() <= WIDEST
    }

    /// Copies the values of `parameters`, with what `adapters` add to them: a model and the same model with
    /// adapters are computed by one path, so that where adapters do nothing, no bit differs.
    pub(crate) fn new(
        config: &TransformerConfig,
        parameters: &Parameters,
        adapters: Option<&Adapters>,
    ) -> Self {
        let adapted = parameters.values().map(|(name, shape, mut values)| {
            if let Some(added) = adapters.and_then(|adapters| adapters.added_to(name)) {
                values.iter_mut().zip(added).for_each(|(w, added)| *w += added);
            }
            (name.to_owned(), host::Tensor::new(shape, values))
        });
        Self { config: config.clone(), parameters: adapted.collect() }
    }

    /// Velocity `[B, S, C]` of `x_t` `[B, S, C]` at times `t` `[B]`, on all threads.
    pub(crate) fn velocity(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> Tensor {
        let batch = Batch::cut([x_t, t], condition, &rows_of(x_t));
        let velocity = |part: &Part| {
            let interpreter = Interpreter::new(&self.parameters);
            self.config.forward(&interpreter, &inputs(&part.values(&batch.ids)))
        };
        let velocities: Vec<host::Tensor> = batch.parts.par_iter().map(velocity).collect();
        joined(&velocities).reshape(x_t.size())
    }

    /// The network about to be run, remembering its steps.
    pub(super) fn trace(&self) -> Trace<'_> {
        Trace::over(&self.parameters)
    }
}

/// What a network takes, cut into parts.
pub(super) struct Batch {
    pub(super) parts: Vec<Part>,
    /// Position ids of image and text.
    pub(super) ids: [host::Tensor; 2],
}

/// Samples that go through a network together.
pub(super) struct Part {
    /// Which of the batch they are.
    pub(super) rows: Vec<i64>,
    /// x_t, text, pooled text, t, guidance.
    pub(super) of: [host::Tensor; 5],
}

impl Batch {
    /// The `rows` of `x_t` and `t`, for all threads.
    pub(super) fn cut([x_t, t]: [&Tensor; 2], condition: &Condition, rows: &[i64]) -> Self {
        let (tokens, n_text) = (x_t.size()[1], condition.text.size()[1]);
        let most = ((TOKENS_AT_ONCE / (tokens + n_text)) as usize).max(1);
        // As many for each thread.
        let n_parts = rows.len().div_ceil(most).next_multiple_of(rayon::current_num_threads());
        let at_once = rows.len().div_ceil(n_parts.max(1)).max(1);
        let part = |rows: &[i64]| {
            let index = Tensor::from_slice(rows);
            let of = [x_t, &condition.text, &condition.pooled, t, &condition.guidance]
                .map(|x| copied(&x.index_select(0, &index)));
            Part { rows: rows.to_vec(), of }
        };
        let txt_ids = host::Tensor::new(&[n_text as usize, 3], vec![0.0; 3 * n_text as usize]);
        Self {
            parts: rows.chunks(at_once).map(part).collect(),
            ids: [copied(&condition.img_ids), txt_ids],
        }
    }
}

impl Part {
    /// With the `ids` of its batch, as [`inputs`] takes them.
    pub(super) fn values(&self, ids: &[host::Tensor; 2]) -> [host::Tensor; 7] {
        let ([x_t, text, pooled, t, guidance], [img_ids, txt_ids]) = (self.of.clone(), ids.clone());
        [x_t, text, pooled, t, guidance, img_ids, txt_ids]
    }
}

/// Inputs of x_t, text, pooled text, t, guidance and the ids of image and text.
pub(super) fn inputs<T>(values: &[T; 7]) -> Inputs<'_, T> {
    let [x_t, text, pooled, t, guidance, img_ids, txt_ids] = values;
    Inputs {
        hidden_states: x_t,
        encoder_hidden_states: text,
        pooled_projections: pooled,
        timestep: t,
        img_ids,
        txt_ids,
        guidance: Some(guidance),
    }
}

/// Numbers of all rows of a batch.
pub(super) fn rows_of(x: &Tensor) -> Vec<i64> {
    (0..x.size()[0]).collect()
}

/// The values of all parts, flat.
pub(super) fn joined<'a>(parts: impl IntoIterator<Item = &'a host::Tensor>) -> Tensor {
    let values: Vec<f32> = parts.into_iter().flat_map(host::Tensor::values).copied().collect();
    Tensor::from_slice(&values)
}

pub(super) fn copied(x: &Tensor) -> host::Tensor {
    let shape: Vec<usize> = x.size().iter().map(|&n| n as usize).collect();
    let flat = x.to_kind(Kind::Float).reshape([-1]);
    host::Tensor::new(&shape, Vec::try_from(&flat).expect("a tensor of f32 on the processor"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::rc::Rc;

    use flow::noise::Noise;
    use tch::no_grad;

    use super::*;
    use crate::network::model::{Loading, Model};
    use crate::tensor::device::Compute;

    const MODELS: [&str; 2] = ["assets/signs", "tests/fixtures/tiny-flux/pipeline"];

    fn model(dir: &str) -> Model {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(dir);
        Model::load(&dir, Loading::to_sample(Compute::CPU, false)).unwrap()
    }

    fn values(parameters: &Parameters) -> host::Parameters {
        let named = parameters.values();
        named.map(|(name, shape, x)| (name.to_owned(), host::Tensor::new(shape, x))).collect()
    }

    fn normal(stream: u64, shape: &[i64]) -> Tensor {
        let n = shape.iter().product::<i64>() as usize;
        Tensor::from_slice(&Noise::new(8).normal(stream, n)).reshape(shape)
    }

    fn assert_near(what: &str, ours: &host::Tensor, torch: &Tensor) {
        assert_eq!(dims(ours), torch.size(), "{what}");
        let ours = Tensor::from_slice(ours.values()).reshape(torch.size());
        let difference = (&ours - torch).abs().max().double_value(&[]);
        let largest = torch.abs().max().double_value(&[]);
        assert!(
            difference <= 5e-6 * largest && largest > 0.0,
            "{what}: {difference:e} of {largest}"
        );
    }

    fn dims(x: &host::Tensor) -> Vec<i64> {
        x.shape().iter().map(|&n| n as i64).collect()
    }

    #[test]
    fn velocities_are_those_of_libtorch() {
        for dir in MODELS {
            let model = model(dir);
            let size = model.latent_size(None).unwrap();
            let condition = model.encode(&["red \"CAT\""; 37], 3.5, &size).unwrap();
            let x_t = normal(1, &[37, size.tokens() as i64, size.token_width() as i64]);
            let t = Tensor::linspace(0.02, 1.0, 37, (Kind::Float, tch::Device::Cpu));
            let torch = no_grad(|| model.engine.forward(&x_t, &t, &condition)).unwrap();
            let config = &model.pipeline.transformer;
            let ours = Inference::new(config, model.engine.trained(), None);
            let ours = ours.velocity(&x_t, &t, &condition);
            assert_near(dir, &copied(&ours), &torch);
        }
    }

    #[test]
    fn other_networks_are_those_of_libtorch() {
        for dir in MODELS {
            let model = model(dir);
            let parts = [&model.text_encoder, &model.text_encoder_2, &model.vae].map(values);
            let [clip, t5, vae] = parts.each_ref().map(Interpreter::new);
            let ids = model.tokenise(&["red \"CAT\"", "a", "green \"DOGS\" and more"]).unwrap();
            let pipeline = &model.pipeline;
            no_grad(|| {
                let [of_clip, of_t5] = ids.each_ref().map(|ids| Rc::new(ids.shallow_clone()));
                let torch = pipeline.text_encoder.forward(&model.text_encoder.ops(), &of_clip);
                let ours = pipeline.text_encoder.forward(&clip, &copied(&of_clip));
                assert_near("clip", &ours.last_hidden_state, &torch.last_hidden_state);
                assert_near("pooled", &ours.pooler_output, &torch.pooler_output);
                let torch = pipeline.text_encoder_2.forward(&model.text_encoder_2.ops(), &of_t5);
                assert_near("t5", &pipeline.text_encoder_2.forward(&t5, &copied(&of_t5)), &torch);
                let z = normal(2, &[3, pipeline.vae.latent_channels as i64, 6, 4]);
                let torch = pipeline.vae.decode(&model.vae.ops(), &Rc::new(z.shallow_clone()));
                assert_near("decoder", &pipeline.vae.decode(&vae, &copied(&z)), &torch);
                let ours = pipeline.vae.encode(&vae, &copied(&torch));
                assert_near("encoder", &ours, &model.encode_pixels(&torch));
            });
        }
    }
}
