//! The networks over [`Ops`](crate::ops::Ops), one architecture a file: those of a FLUX pipeline, and
//! those that rewards are made of.
//!
//! Each config deserialises from the component's `config.json` as diffusers and transformers write it,
//! refuses what it does not support, and bounds every size before anything is allocated.

use std::ops::RangeInclusive;

use serde::Deserialize;

pub mod aesthetic;
pub mod blip;
pub mod clip;
pub mod image_reward;
pub mod t5;
pub mod transformer;
pub mod vae;

/// A `config.json` that this project cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value outside what the architecture allows.
    #[error("invalid {field} = {value}: {expected}")]
    Invalid {
        /// Name of the entry.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A legal value that this project does not implement.
    #[error("unsupported {field} = {value}: only {supported} is read")]
    Unsupported {
        /// Name of the entry.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What is implemented.
        supported: &'static str,
    },
}

/// Largest width, vocabulary or channel count a config may name.
const MAX_SIZE: usize = 1 << 20;
/// Largest number of layers or heads a config may name.
const MAX_COUNT: usize = 4096;

/// `quantization_config` of a config.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Quantization {
    quant_method: String,
    bnb_4bit_quant_type: String,
}

impl Quantization {
    /// Refuses weights that another library quantised, by that library's name.
    fn refuse(quantization: Option<&Self>) -> Result<(), ConfigError> {
        quantization.map_or(Ok(()), |Self { quant_method, bnb_4bit_quant_type }| {
            Err(ConfigError::Unsupported {
                field: "quantization_config.quant_method",
                value: [&**quant_method, bnb_4bit_quant_type].join(" ").trim().to_owned(),
                supported: "weights in bf16, f16, f32, fp8 or GGUF",
            })
        })
    }
}

fn size(field: &'static str, value: usize) -> Result<(), ConfigError> {
    within(field, value, 1..=MAX_SIZE, "a size from 1 to 1048576")
}

fn count(field: &'static str, value: usize) -> Result<(), ConfigError> {
    within(field, value, 1..=MAX_COUNT, "a count from 1 to 4096")
}

fn heads(width: usize, heads: usize) -> Result<(), ConfigError> {
    size("hidden_size", width)?;
    count("num_attention_heads", heads)?;
    if width.is_multiple_of(heads) {
        return Ok(());
    }
    Err(ConfigError::Invalid {
        field: "num_attention_heads",
        value: heads.to_string(),
        expected: "a divisor of hidden_size",
    })
}

fn within(
    field: &'static str,
    value: usize,
    range: RangeInclusive<usize>,
    expected: &'static str,
) -> Result<(), ConfigError> {
    if range.contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::Invalid { field, value: value.to_string(), expected })
    }
}

fn only(
    field: &'static str,
    value: &str,
    allowed: &[&str],
    supported: &'static str,
) -> Result<(), ConfigError> {
    if allowed.contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::Unsupported { field, value: value.to_owned(), supported })
    }
}
