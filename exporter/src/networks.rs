//! The networks of a pipeline, recorded: inputs, outputs and seams of every graph.
//!
//! Names, order and open dimensions are those of Optimum's export configs for diffusers pipelines
//! (`optimum/exporters/onnx/model_configs.py` in optimum-onnx), so that either side's folder runs in the
//! other's sampler. Floats go in and come out as f32 whatever is inside: a sampler's state stays f32.

use flow::models::transformer::Inputs;
use flow::pipeline::Pipeline;

use crate::element::Float;
use crate::graph::{Builder, Graph, Kind, Size};
use crate::part::Part;
use crate::precision::Dialect;

const BATCH: &str = "batch_size";
const IMAGE_TOKENS: &str = "packed_height_width";
const TEXT_TOKENS: &str = "sequence_length";
const FLOAT: Kind = Kind::Float(Float::F32);

/// The network of `part` in `dialect`.
pub fn record(pipeline: &Pipeline, part: Part, dialect: Dialect) -> Graph {
    let graph = Builder::new(dialect);
    match part {
        Part::TextEncoder => text_encoder(pipeline, graph),
        Part::TextEncoder2 => text_encoder_2(pipeline, graph),
        Part::Transformer => transformer(pipeline, graph),
        Part::VaeDecoder => vae_decoder(pipeline, graph),
        Part::VaeEncoder => vae_encoder(pipeline, graph),
    }
}

/// `input_ids` `[B, L]` → `last_hidden_state` `[B, L, D]`, `pooler_output` `[B, D]`.
fn text_encoder(pipeline: &Pipeline, graph: Builder) -> Graph {
    let config = &pipeline.text_encoder;
    let ids = graph.input("input_ids", Kind::Integer, &sizes([BATCH, TEXT_TOKENS], []));
    let encoded = config.forward(&graph, &ids);
    let width = [config.hidden_size];
    graph.finish(&[
        ("last_hidden_state", encoded.last_hidden_state, sizes([BATCH, TEXT_TOKENS], width)),
        ("pooler_output", encoded.pooler_output, sizes([BATCH], width)),
    ])
}

/// `input_ids` `[B, L]` → `last_hidden_state` `[B, L, D]`.
fn text_encoder_2(pipeline: &Pipeline, graph: Builder) -> Graph {
    let config = &pipeline.text_encoder_2;
    let ids = graph.input("input_ids", Kind::Integer, &sizes([BATCH, TEXT_TOKENS], []));
    let mut state = config.prologue(&graph, &ids);
    for index in 0..config.num_layers {
        graph.seam(format!("block {index}"), &[&state.x, &state.bias]);
        state = config.block(&graph, index, &state);
    }
    graph.seam("epilogue".into(), &[&state.x]);
    let states = config.epilogue(&graph, &state);
    graph.finish(&[("last_hidden_state", states, sizes([BATCH, TEXT_TOKENS], [config.d_model]))])
}

/// Everything that conditions a velocity → `out_hidden_states` `[B, S, C]`; `timestep` is the flow
/// time in [0, 1], `guidance` exists where the model embeds it.
fn transformer(pipeline: &Pipeline, graph: Builder) -> Graph {
    let config = &pipeline.transformer;
    let input = |name, shape: Vec<Size>| graph.input(name, FLOAT, &shape);
    let hidden_states = input("hidden_states", sizes([BATCH, IMAGE_TOKENS], [config.in_channels]));
    let encoder_hidden_states =
        input("encoder_hidden_states", sizes([BATCH, TEXT_TOKENS], [config.joint_attention_dim]));
    let pooled_projections =
        input("pooled_projections", sizes([BATCH], [config.pooled_projection_dim]));
    let timestep = input("timestep", sizes([BATCH], []));
    let txt_ids = input("txt_ids", sizes([TEXT_TOKENS], [3]));
    let img_ids = input("img_ids", sizes([IMAGE_TOKENS], [3]));
    let guidance = config.guidance_embeds.then(|| input("guidance", sizes([BATCH], [])));
    let inputs = Inputs {
        hidden_states: &hidden_states,
        encoder_hidden_states: &encoder_hidden_states,
        pooled_projections: &pooled_projections,
        timestep: &timestep,
        txt_ids: &txt_ids,
        img_ids: &img_ids,
        guidance: guidance.as_ref(),
    };
    let mut state = config.prologue(&graph, &inputs);
    for index in 0..config.n_blocks() {
        let rope = [&state.rope.cos, &state.rope.sin];
        // The last block still asks how many text tokens there were.
        let tokens = [&state.x, &state.c, &state.temb];
        graph.seam(format!("block {index}"), &[&tokens[..], &rope].concat());
        state = config.block(&graph, index, &state);
        state.x = graph.limited(&state.x);
        if index < config.num_layers {
            state.c = graph.limited(&state.c);
        }
    }
    graph.seam("epilogue".into(), &[&state.x, &state.temb]);
    let velocity = config.epilogue(&graph, &state);
    let shape = sizes([BATCH, IMAGE_TOKENS], [config.in_channels]);
    graph.finish(&[("out_hidden_states", velocity, shape)])
}

/// `latent_sample` `[B, Z, h, w]`, unscaled and unshifted → `sample` `[B, 3, f·h, f·w]` in [−1, 1].
fn vae_decoder(pipeline: &Pipeline, graph: Builder) -> Graph {
    let (config, f) = (&pipeline.vae, pipeline.vae.factor());
    let shape = image(config.latent_channels, "latent_height", "latent_width");
    let z = graph.input("latent_sample", FLOAT, &shape);
    let pixels = config.decode(&graph, &z);
    let (height, width) = (format!("latent_height * {f}"), format!("latent_width * {f}"));
    graph.finish(&[("sample", pixels, image(config.out_channels, &height, &width))])
}

/// `sample` `[B, 3, f·h, f·w]` in [−1, 1] → `latent_parameters` `[B, 2Z, h, w]`.
fn vae_encoder(pipeline: &Pipeline, graph: Builder) -> Graph {
    let (config, f) = (&pipeline.vae, pipeline.vae.factor());
    let shape = image(config.in_channels, "sample_height", "sample_width");
    let pixels = graph.input("sample", FLOAT, &shape);
    let moments = config.encode(&graph, &pixels);
    let (height, width) = (format!("sample_height / {f}"), format!("sample_width / {f}"));
    let shape = image(2 * config.latent_channels, &height, &width);
    graph.finish(&[("latent_parameters", moments, shape)])
}

/// Open dimensions, then fixed ones.
fn sizes<const N: usize, const M: usize>(open: [&str; N], fixed: [usize; M]) -> Vec<Size> {
    open.into_iter().map(Size::from).chain(fixed.into_iter().map(Size::from)).collect()
}

fn image(channels: usize, height: &str, width: &str) -> Vec<Size> {
    vec![BATCH.into(), channels.into(), height.into(), width.into()]
}
