//! What computes, as it was typed and as it is meant.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, builder::PossibleValuesParser};
use flow::{tokens::MAX_TEXT_TOKENS, usage::Usage};
use onnx::{PROVIDERS, Provider};

use crate::engine::{Memory, Options};

/// What computes, whatever is asked for.
#[derive(Args, Clone, Debug)]
pub struct RuntimeArgs {
    /// What computes; a run never moves to another by itself.
    #[arg(long, value_name = "NAME", default_value = "cpu",
          value_parser = PossibleValuesParser::new(PROVIDERS.map(|(name, _)| name)))]
    pub provider: String,

    /// Number of the GPU [default: 0].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub device: Option<u8>,

    /// Threads for one operator; the images do not depend on it [default: every core].
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// T5 tokens a prompt is padded or cut to [default: the tokenizer's limit, at most 512].
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u16).range(2..=MAX_TEXT_TOKENS as i64))]
    pub max_sequence_length: Option<u16>,

    /// Where TensorRT keeps the engines it builds [default: a folder in the user's cache].
    #[arg(long, value_name = "DIR")]
    pub engines: Option<PathBuf>,
}

impl RuntimeArgs {
    /// What the engine is told.
    ///
    /// # Errors
    /// [`Usage`] for an unknown provider.
    pub fn options(&self, memory: Memory) -> Result<Options> {
        let provider = Provider::by_name(&self.provider)
            .with_context(|| Usage(format!("--provider {} is not known", self.provider)))?;
        let defaults = Options::default();
        Ok(Options {
            text_tokens: self.max_sequence_length.map(usize::from),
            threads: self.threads.map_or(defaults.threads, usize::from),
            provider,
            device: self.device.map_or(defaults.device, usize::from),
            memory,
            engines: self.engines.clone(),
            ..defaults
        })
    }

    /// What a person should know before networks are opened, a sentence each.
    pub fn notices(&self, options: &Options) -> Vec<String> {
        let provider = options.provider;
        let device = self.device.filter(|_| provider == Provider::Cpu).map(|device| {
            format!("--device {device} has no effect: it is a GPU's number, and --provider is cpu")
        });
        let engines = self.engines.as_ref().filter(|_| !provider.builds_engines()).map(|folder| {
            let folder = folder.display();
            format!("--engines {folder} has no effect: --provider {provider} builds no engines")
        });
        let builds = options.notice().map(str::to_owned);
        [device, engines, builds].into_iter().flatten().collect()
    }
}
