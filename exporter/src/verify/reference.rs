//! What a checkpoint computes, stage by stage, in the interpreter of `host/`: plain Rust in f32, one block's
//! weights in memory at a time.

use anyhow::Result;
use flow::models::transformer::{Inputs, State, image_ids};
use flow::noise::Noise;
use flow::ops::Rope;
use flow::ops::shapes::{Manifest, Shapes};
use flow::pipeline::Pipeline;
use host::{Interpreter, Parameters, Tensor};

use crate::part::Part;
use crate::weights::Source;

/// Samples in a batch: two, so that what belongs to one must not reach the other.
const BATCH: usize = 2;
/// Text tokens.
const TEXT: usize = 5;
/// Rows and columns of image tokens, and of latent cells.
const GRID: [usize; 2] = [2, 3];

/// Receives a stage: its name, what goes in and what comes out, both in the graph's order.
pub type Visitor<'a> = &'a mut dyn FnMut(&str, &[Tensor], &[Tensor]) -> Result<()>;

/// Fixed random inputs of the network of `part`.
pub fn inputs(pipeline: &Pipeline, part: Part) -> Vec<Tensor> {
    match part {
        Part::TextEncoder => {
            let config = &pipeline.text_encoder;
            let end = config.eos_token_id.min(config.vocab_size as i64 - 1);
            vec![ids(config.vocab_size, config.max_position_embeddings, end)]
        }
        Part::TextEncoder2 => vec![ids(pipeline.text_encoder_2.vocab_size, TEXT, 1)],
        Part::Transformer => {
            let config = &pipeline.transformer;
            let tokens = GRID[0] * GRID[1];
            let mut inputs = vec![
                random(1, &[BATCH, tokens, config.in_channels]),
                random(2, &[BATCH, TEXT, config.joint_attention_dim]),
                random(3, &[BATCH, config.pooled_projection_dim]),
                Tensor::new(&[BATCH], vec![0.25, 0.875]),
                Tensor::new(&[TEXT, 3], vec![0.0; 3 * TEXT]),
                Tensor::new(&[tokens, 3], image_ids(GRID[0], GRID[1])),
            ];
            if config.guidance_embeds {
                inputs.push(Tensor::new(&[BATCH], vec![3.5, 1.0]));
            }
            inputs
        }
        Part::VaeDecoder => {
            vec![random(4, &[BATCH, pipeline.vae.latent_channels, GRID[0], GRID[1]])]
        }
        Part::VaeEncoder => {
            let (config, factor) = (&pipeline.vae, pipeline.vae.factor());
            let shape = [BATCH, config.in_channels, factor * GRID[0], factor * GRID[1]];
            vec![random(5, &shape)]
        }
    }
}

/// Runs the network of `part` on `inputs`, in the graph's order, and hands every stage to `visit`: the whole
/// where it cannot be cut, else a prologue, every block and an epilogue.
///
/// # Errors
/// When weights cannot be read or are not finite, or `visit` fails.
pub fn run(
    pipeline: &Pipeline,
    part: Part,
    source: Source<'_>,
    inputs: &[Tensor],
    visit: Visitor<'_>,
) -> Result<()> {
    match part {
        Part::TextEncoder => clip(pipeline, source, &inputs[0], visit),
        Part::TextEncoder2 => t5(pipeline, source, &inputs[0], visit),
        Part::Transformer => transformer(pipeline, source, inputs, visit),
        Part::VaeDecoder => decoder(pipeline, source, &inputs[0], visit),
        Part::VaeEncoder => encoder(pipeline, source, &inputs[0], visit),
    }
}

/// The parameters that `network` asks for.
fn parameters(source: Source<'_>, network: impl FnOnce(&Shapes)) -> Result<Parameters> {
    let shapes = Shapes::new();
    network(&shapes);
    let manifest: Manifest = shapes.manifest();
    let read = |(name, shape): (&str, &[usize])| {
        let values = source.values(name, shape)?;
        let numbers = values.f32(0..values.len())?.into_owned();
        Ok((name.to_owned(), Tensor::new(shape, numbers)))
    };
    let parameters = manifest.entries().map(read).collect::<Result<Parameters>>();
    source.weights.release();
    parameters
}

fn random(stream: u64, shape: &[usize]) -> Tensor {
    Tensor::new(shape, Noise::new(1).normal(stream, shape.iter().product()))
}

/// Token ids `[B, L]` below `n`, the last of each row `end`.
fn ids(n: usize, length: usize, end: i64) -> Tensor {
    let id = |i: usize| {
        if i % length + 1 == length { end as f32 } else { (i * 7919 % n.min(1 << 20)) as f32 }
    };
    Tensor::new(&[BATCH, length], (0..BATCH * length).map(id).collect())
}

fn clip(pipeline: &Pipeline, source: Source<'_>, input: &Tensor, visit: Visitor<'_>) -> Result<()> {
    let config = &pipeline.text_encoder;
    let known = parameters(source, |s| _ = config.forward(s, &input.shape().to_vec()))?;
    let encoded = config.forward(&Interpreter::new(&known), input);
    visit("whole", std::slice::from_ref(input), &[encoded.last_hidden_state, encoded.pooler_output])
}

fn t5(pipeline: &Pipeline, source: Source<'_>, input: &Tensor, visit: Visitor<'_>) -> Result<()> {
    let config = &pipeline.text_encoder_2;
    let dry = Shapes::new();
    let mut shape = config.prologue(&dry, &input.shape().to_vec());
    let known = parameters(source, |s| _ = config.prologue(s, &input.shape().to_vec()))?;
    let mut state = config.prologue(&Interpreter::new(&known), input);
    let edges = |state: &flow::models::t5::State<Tensor>, is_last: bool| {
        let all = vec![state.x.clone(), state.bias.clone()];
        if is_last { all[..1].to_vec() } else { all }
    };
    let n = config.num_layers;
    let mut before = edges(&state, n == 0);
    visit("prologue", std::slice::from_ref(input), &before)?;
    for index in 0..n {
        let known = parameters(source, |s| _ = config.block(s, index, &shape))?;
        shape = config.block(&dry, index, &shape);
        state = config.block(&Interpreter::new(&known), index, &state);
        let after = edges(&state, index + 1 == n);
        visit(&format!("block {index}"), &before, &after)?;
        before = after;
    }
    let known = parameters(source, |shapes| _ = config.epilogue(shapes, &shape))?;
    visit("epilogue", &before, &[config.epilogue(&Interpreter::new(&known), &state)])
}

fn transformer(
    pipeline: &Pipeline,
    source: Source<'_>,
    inputs: &[Tensor],
    visit: Visitor<'_>,
) -> Result<()> {
    let (config, batch) = (&pipeline.transformer, inputs[0].shape()[0]);
    let dry = Shapes::new();
    let sizes: Vec<Vec<usize>> = inputs.iter().map(|input| input.shape().to_vec()).collect();
    let mut shape = config.prologue(&dry, &named(&sizes));
    let known = parameters(source, |shapes| _ = config.prologue(shapes, &named(&sizes)))?;
    let mut state = config.prologue(&Interpreter::new(&known), &named(inputs));
    let n = config.n_blocks();
    let edges = |state: &State<Tensor>, index: usize| {
        if index == n {
            return vec![state.x.clone(), state.temb.clone()];
        }
        let Rope { cos, sin } = &state.rope;
        let tokens = [&state.x, &state.c, &state.temb].map(Tensor::clone);
        tokens.into_iter().chain([repeated(cos, batch), repeated(sin, batch)]).collect()
    };
    let mut before = edges(&state, 0);
    visit("prologue", inputs, &before)?;
    for index in 0..n {
        let known = parameters(source, |shapes| _ = config.block(shapes, index, &shape))?;
        shape = config.block(&dry, index, &shape);
        state = config.block(&Interpreter::new(&known), index, &state);
        let after = edges(&state, index + 1);
        visit(&format!("block {index}"), &before, &after)?;
        before = after;
    }
    let known = parameters(source, |shapes| _ = config.epilogue(shapes, &shape))?;
    visit("epilogue", &before, &[config.epilogue(&Interpreter::new(&known), &state)])
}

/// The network's inputs in the graph's order.
fn named<T>(inputs: &[T]) -> Inputs<'_, T> {
    Inputs {
        hidden_states: &inputs[0],
        encoder_hidden_states: &inputs[1],
        pooled_projections: &inputs[2],
        timestep: &inputs[3],
        txt_ids: &inputs[4],
        img_ids: &inputs[5],
        guidance: inputs.get(6),
    }
}

/// A table `[S, D]` once for each sample.
fn repeated(table: &Tensor, batch: usize) -> Tensor {
    let shape: Vec<usize> = [batch].into_iter().chain(table.shape().iter().copied()).collect();
    Tensor::new(&shape, table.values().repeat(batch))
}

fn decoder(pipeline: &Pipeline, source: Source<'_>, z: &Tensor, visit: Visitor<'_>) -> Result<()> {
    let config = &pipeline.vae;
    let known = parameters(source, |shapes| _ = config.decode(shapes, &z.shape().to_vec()))?;
    let pixels = config.decode(&Interpreter::new(&known), z);
    visit("whole", std::slice::from_ref(z), &[pixels])
}

fn encoder(
    pipeline: &Pipeline,
    source: Source<'_>,
    pixels: &Tensor,
    visit: Visitor<'_>,
) -> Result<()> {
    let config = &pipeline.vae;
    let known = parameters(source, |shapes| _ = config.encode(shapes, &pixels.shape().to_vec()))?;
    let moments = config.encode(&Interpreter::new(&known), pixels);
    visit("whole", std::slice::from_ref(pixels), &[moments])
}
