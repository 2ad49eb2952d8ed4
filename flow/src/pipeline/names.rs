//! Weights of components by the names that networks use, whatever wrapper, alias or tool named them.

use std::collections::BTreeMap;

use super::{Component, Result, foreign};
use crate::checkpoint::Weights;
use crate::ops::shapes::Manifest;

/// Names that tell the networks apart, wherever they stand in a name.
const BFL: [&str; 2] = ["img_in.weight", "final_layer.linear.weight"];
const DIFFUSERS: &str = "x_embedder.weight";
const T5: &str = "encoder.block.0.layer.0.SelfAttention.q.weight";
const CLIP: &str = "embeddings.token_embedding.weight";
const VAE: &str = "decoder.conv_norm_out.weight";
/// How the name of what each level of the autoencoder has begins and ends.
const LEVEL: [&str; 2] = ["encoder.down_blocks.", ".resnets.0.conv1.weight"];
/// T5's token table in a GGUF file.
const T5_OF_GGUF: &str = "token_embd.weight";

/// CLIP's own prefix, which transformers 5 drops.
const TEXT_MODEL: &str = "text_model.";
/// T5's token table: the network's name for it, and a second one that files have beside it or alone.
const TOKENS: &str = "shared.weight";
const TIED: &str = "encoder.embed_tokens.weight";
/// Parts of a whole CLIP and of a whole T5 that are no text encoder.
const REST_OF_CLIP: [&str; 5] =
    ["vision_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias"];
const REST_OF_T5: [&str; 2] = ["decoder.", "lm_head."];
/// A buffer that old files have.
const POSITION_IDS: &str = "embeddings.position_ids";

/// `weights` of `component`, by the names that its network has.
///
/// # Errors
/// When rows of fused layers are not those of `manifest`.
pub(super) fn usual(
    weights: Weights,
    component: Component,
    manifest: &Manifest,
) -> Result<Weights> {
    match component {
        Component::Transformer => transformer(weights, manifest),
        Component::TextEncoder => Ok(clip(weights)),
        Component::TextEncoder2 => Ok(t5(weights)),
        Component::Vae => Ok(vae(weights, manifest)),
    }
}

/// How names begin that are no part of a transformer, in a file whose transformer's names begin with nothing.
const OTHER_NETWORKS: [&str; 5] =
    ["vae.", "text_encoders.", "first_stage_model.", "cond_stage_model.", "conditioner."];

/// Whether a file holds the network of `component`, under any name that is read.
pub(super) fn holds(file: &Weights, component: Component) -> bool {
    let any = |tails: &[&str]| tails.iter().any(|tail| file.before(tail).is_some());
    match component {
        Component::Transformer => bfl_prefix(file).is_some() || any(&[DIFFUSERS]),
        Component::TextEncoder => any(&[CLIP]),
        Component::TextEncoder2 => any(&[T5, T5_OF_GGUF]),
        Component::Vae => any(&[VAE, &foreign::vae(VAE, 1)]),
    }
}

/// What a file says of a transformer's depth.
pub(super) struct Blocks {
    pub(super) double: usize,
    pub(super) single: usize,
    pub(super) guidance: bool,
}

/// Blocks of the transformer in a file, if there is one.
pub(super) fn blocks(file: &Weights) -> Option<Blocks> {
    let (prefix, kinds) = match bfl_prefix(file) {
        Some(prefix) => (prefix, ["double_blocks", "single_blocks"]),
        None => (file.before(DIFFUSERS)?, ["transformer_blocks", "single_transformer_blocks"]),
    };
    let [double, single] = kinds.map(|kind| file.n_blocks(&format!("{prefix}{kind}")));
    let is_guidance =
        |name: &str| name.contains("guidance_in.") || name.contains("guidance_embedder.");
    Some(Blocks { double, single, guidance: file.names().any(is_guidance) })
}

/// What stands before BFL's names in a file that has them.
pub(super) fn bfl_prefix(weights: &Weights) -> Option<&str> {
    let prefix = weights.before(BFL[0])?;
    let last = format!("{prefix}{}", BFL[1]);
    weights.shape(&last).map(|_| prefix)
}

fn transformer(weights: Weights, manifest: &Manifest) -> Result<Weights> {
    if let Some(prefix) = bfl_prefix(&weights).map(str::to_owned) {
        return within(weights, &prefix).from_bfl(&prefix, manifest);
    }
    let prefix = weights.before(DIFFUSERS).unwrap_or_default().to_owned();
    Ok(stripped(within(weights, &prefix), &prefix))
}

fn clip(weights: Weights) -> Weights {
    let prefix = weights.before(CLIP).unwrap_or_default().to_owned();
    let outer = prefix.strip_suffix(TEXT_MODEL).unwrap_or(&prefix).to_owned();
    let weights = stripped(within(weights, &outer), &outer);
    weights
        .without("the other half of a CLIP", |name| {
            REST_OF_CLIP.iter().any(|part| name.starts_with(part))
        })
        .renamed(|name| {
            let rest = name.strip_prefix(TEXT_MODEL).unwrap_or(name);
            (rest != POSITION_IDS).then(|| format!("{TEXT_MODEL}{rest}"))
        })
}

fn t5(weights: Weights) -> Weights {
    if weights.shape(T5_OF_GGUF).is_some() {
        return weights.renamed(|name| Some(foreign::t5(name).unwrap_or_else(|| name.to_owned())));
    }
    let prefix = weights.before(T5).unwrap_or_default().to_owned();
    let weights = stripped(within(weights, &prefix), &prefix)
        .without("a decoder and its head", |name| {
            REST_OF_T5.iter().any(|part| name.starts_with(part))
        });
    let has_tokens = weights.shape(TOKENS).is_some();
    weights.renamed(|name| match name {
        TIED if has_tokens => None,
        TIED => Some(TOKENS.to_owned()),
        _ => Some(name.to_owned()),
    })
}

/// The autoencoder; of one in BFL's names attention layers are convolutions of one pixel.
fn vae(weights: Weights, manifest: &Manifest) -> Weights {
    let known: BTreeMap<&str, &[usize]> = manifest.entries().collect();
    let is_level = |name: &str| name.starts_with(LEVEL[0]) && name.ends_with(LEVEL[1]);
    let n_levels = known.keys().filter(|name| is_level(name)).count();
    let Some(prefix) = weights.before(&foreign::vae(VAE, n_levels)).map(str::to_owned) else {
        let prefix = weights.before(VAE).unwrap_or_default().to_owned();
        return stripped(within(weights, &prefix), &prefix);
    };
    let names: BTreeMap<String, &str> = known
        .keys()
        .map(|name| (format!("{prefix}{}", foreign::vae(name, n_levels)), *name))
        .collect();
    within(weights, &prefix)
        .renamed(|name| Some(names.get(name).map_or(name, |name| *name).to_owned()))
        .as_matrices(|name| known.get(name).is_some_and(|shape| shape.len() == 2))
}

/// Those under `prefix`; where it is empty, those that are not under another network's.
fn within(weights: Weights, prefix: &str) -> Weights {
    let is_other = |name: &str| OTHER_NETWORKS.iter().any(|other| name.starts_with(other));
    weights.without("other networks", |name| {
        if prefix.is_empty() { is_other(name) } else { !name.starts_with(prefix) }
    })
}

fn stripped(weights: Weights, prefix: &str) -> Weights {
    weights.renamed(|name| Some(name.strip_prefix(prefix).unwrap_or(name).to_owned()))
}

#[cfg(test)]
mod tests;
