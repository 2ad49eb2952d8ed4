//! The graphs of an exported FLUX pipeline.

use flow::pipeline::Component;

/// One graph of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Part {
    /// Tokens to the pooled CLIP vector
    #[value(name = "text_encoder")]
    TextEncoder,
    /// Tokens to T5 states
    #[value(name = "text_encoder_2")]
    TextEncoder2,
    /// Noisy latents, time and text to a velocity
    #[value(name = "transformer")]
    Transformer,
    /// Latents to an image
    #[value(name = "vae_decoder")]
    VaeDecoder,
    /// An image to means and log-variances of latents
    #[value(name = "vae_encoder")]
    VaeEncoder,
}

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
}
