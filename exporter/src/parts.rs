//! The graphs of an exported FLUX pipeline: folders, inputs and outputs.
//!
//! Names, order, element types and open dimensions are those of Optimum's export configs for
//! diffusers pipelines (`optimum/exporters/onnx/model_configs.py` in optimum-onnx), so that either
//! side's folder runs in the other's sampler.

use flow::models::transformer::Inputs;
use flow::pipeline::{Component, Pipeline};

use crate::graph::{Builder, Graph, Kind, Size};

/// One graph of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Tokens to the pooled CLIP vector.
    TextEncoder,
    /// Tokens to T5 states.
    TextEncoder2,
    /// Noisy latents, time and text to a velocity.
    Transformer,
    /// Latents to an image.
    VaeDecoder,
    /// An image to means and log-variances of latents.
    VaeEncoder,
}

const BATCH: &str = "batch_size";
const IMAGE_TOKENS: &str = "packed_height_width";
const TEXT_TOKENS: &str = "sequence_length";

impl Part {
    /// All five, in the order they run.
    pub const ALL: [Self; 5] = [
        Self::TextEncoder,
        Self::TextEncoder2,
        Self::Transformer,
        Self::VaeDecoder,
        Self::VaeEncoder,
    ];

    /// Its folder in the export, and the prefix of its reference tensors.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Transformer => "transformer",
            Self::VaeDecoder => "vae_decoder",
            Self::VaeEncoder => "vae_encoder",
        }
    }

    /// The checkpoint component it is made from.
    pub fn component(self) -> Component {
        match self {
            Self::TextEncoder => Component::TextEncoder,
            Self::TextEncoder2 => Component::TextEncoder2,
            Self::Transformer => Component::Transformer,
            Self::VaeDecoder | Self::VaeEncoder => Component::Vae,
        }
    }

    /// Its network, recorded.
    pub fn graph(self, pipeline: &Pipeline) -> Graph {
        match self {
            Self::TextEncoder => text_encoder(pipeline),
            Self::TextEncoder2 => text_encoder_2(pipeline),
            Self::Transformer => transformer(pipeline),
            Self::VaeDecoder => vae_decoder(pipeline),
            Self::VaeEncoder => vae_encoder(pipeline),
        }
    }
}

/// `input_ids` `[B, L]` → `last_hidden_state` `[B, L, D]`, `pooler_output` `[B, D]`.
fn text_encoder(pipeline: &Pipeline) -> Graph {
    let (config, graph) = (&pipeline.text_encoder, Builder::default());
    let ids = graph.input("input_ids", Kind::Integer, &sizes([BATCH, TEXT_TOKENS], []));
    let encoded = config.forward(&graph, &ids);
    let width = [config.hidden_size];
    graph.finish(&[
        ("last_hidden_state", encoded.last_hidden_state, sizes([BATCH, TEXT_TOKENS], width)),
        ("pooler_output", encoded.pooler_output, sizes([BATCH], width)),
    ])
}

/// `input_ids` `[B, L]` → `last_hidden_state` `[B, L, D]`.
fn text_encoder_2(pipeline: &Pipeline) -> Graph {
    let (config, graph) = (&pipeline.text_encoder_2, Builder::default());
    let ids = graph.input("input_ids", Kind::Integer, &sizes([BATCH, TEXT_TOKENS], []));
    let states = config.forward(&graph, &ids);
    graph.finish(&[("last_hidden_state", states, sizes([BATCH, TEXT_TOKENS], [config.d_model]))])
}

/// Everything that conditions a velocity → `out_hidden_states` `[B, S, C]`; `timestep` is the flow
/// time in [0, 1], `guidance` exists where the model embeds it.
fn transformer(pipeline: &Pipeline) -> Graph {
    let (config, graph) = (&pipeline.transformer, Builder::default());
    let input = |name, shape: Vec<Size>| graph.input(name, Kind::Float, &shape);
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
    let velocity = config.forward(&graph, &inputs);
    let shape = sizes([BATCH, IMAGE_TOKENS], [config.in_channels]);
    graph.finish(&[("out_hidden_states", velocity, shape)])
}

/// `latent_sample` `[B, Z, h, w]`, unscaled and unshifted → `sample` `[B, 3, f·h, f·w]` in [−1, 1].
fn vae_decoder(pipeline: &Pipeline) -> Graph {
    let (config, graph, f) = (&pipeline.vae, Builder::default(), pipeline.vae.factor());
    let shape = image(config.latent_channels, "latent_height", "latent_width");
    let z = graph.input("latent_sample", Kind::Float, &shape);
    let pixels = config.decode(&graph, &z);
    let (height, width) = (format!("latent_height * {f}"), format!("latent_width * {f}"));
    graph.finish(&[("sample", pixels, image(config.out_channels, &height, &width))])
}

/// `sample` `[B, 3, f·h, f·w]` in [−1, 1] → `latent_parameters` `[B, 2Z, h, w]`.
fn vae_encoder(pipeline: &Pipeline) -> Graph {
    let (config, graph, f) = (&pipeline.vae, Builder::default(), pipeline.vae.factor());
    let shape = image(config.in_channels, "sample_height", "sample_width");
    let pixels = graph.input("sample", Kind::Float, &shape);
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
