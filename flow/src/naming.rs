//! FLUX's layers by the names of Black Forest Labs, which ComfyUI, kohya and most trainers write, and
//! by those of diffusers, which everything here uses.
//!
//! BFL computes queries, keys and values (and a single block's MLP) by one matrix, whose rows are those
//! of diffusers' layers one below the other. Source: diffusers' `scripts/convert_flux_to_diffusers.py`.

/// A layer of BFL's and what it is in diffusers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// BFL's path, such as `double_blocks.0.img_attn.qkv`.
    pub bfl: String,
    /// diffusers' paths; the rows (outputs) of BFL's tensors are theirs in this order.
    pub diffusers: Vec<String>,
    /// Whether the upper and the lower half of the rows change places: BFL has shift above scale,
    /// diffusers scale above shift.
    pub halves_swapped: bool,
}

/// Leaves of a linear layer: BFL's and diffusers'.
const OF_LINEAR: &[[&str; 2]] = &[["weight", "weight"], ["bias", "bias"]];
/// Leaves of a normalisation.
const OF_NORM: &[[&str; 2]] = &[["scale", "weight"]];

impl Layer {
    fn new(bfl: String, diffusers: Vec<String>) -> Self {
        let halves_swapped = bfl == SWAPPED;
        Self { bfl, diffusers, halves_swapped }
    }

    /// Last parts of its parameters' names: BFL's and diffusers'.
    pub fn leaves(&self) -> &'static [[&'static str; 2]] {
        if self.bfl.ends_with("_norm") { OF_NORM } else { OF_LINEAR }
    }

    /// Gives the rows of one tensor, row-major `[n_rows, …]`, the order of the other naming.
    pub fn reorder<T>(&self, rows: &mut [T]) {
        if self.halves_swapped {
            rows.rotate_left(rows.len() / 2);
        }
    }
}

/// The layer with the halves of its rows swapped.
const SWAPPED: &str = "final_layer.adaLN_modulation.1";

/// Layers outside the blocks.
const OUTSIDE: [(&str, &str); 10] = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    (SWAPPED, "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
];

/// Blocks of one kind: their names, and the layers in each.
struct Blocks {
    bfl: &'static str,
    diffusers: &'static str,
    layers: &'static [(&'static str, &'static [&'static str])],
}

const DOUBLE: Blocks = Blocks {
    bfl: "double_blocks",
    diffusers: "transformer_blocks",
    layers: &[
        ("img_mod.lin", &["norm1.linear"]),
        ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
        ("img_attn.norm.query_norm", &["attn.norm_q"]),
        ("img_attn.norm.key_norm", &["attn.norm_k"]),
        ("img_attn.proj", &["attn.to_out.0"]),
        ("img_mlp.0", &["ff.net.0.proj"]),
        ("img_mlp.2", &["ff.net.2"]),
        ("txt_mod.lin", &["norm1_context.linear"]),
        ("txt_attn.qkv", &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        ("txt_attn.norm.query_norm", &["attn.norm_added_q"]),
        ("txt_attn.norm.key_norm", &["attn.norm_added_k"]),
        ("txt_attn.proj", &["attn.to_add_out"]),
        ("txt_mlp.0", &["ff_context.net.0.proj"]),
        ("txt_mlp.2", &["ff_context.net.2"]),
    ],
};

const SINGLE: Blocks = Blocks {
    bfl: "single_blocks",
    diffusers: "single_transformer_blocks",
    layers: &[
        ("modulation.lin", &["norm.linear"]),
        ("linear1", &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
        ("norm.query_norm", &["attn.norm_q"]),
        ("norm.key_norm", &["attn.norm_k"]),
        ("linear2", &["proj_out"]),
    ],
};

impl Blocks {
    fn layers(&self, index: usize) -> impl Iterator<Item = Layer> {
        self.layers.iter().map(move |(bfl, diffusers)| {
            let name = |layer: &&str| format!("{}.{index}.{layer}", self.diffusers);
            Layer::new(format!("{}.{index}.{bfl}", self.bfl), diffusers.iter().map(name).collect())
        })
    }
}

/// Every layer of a FLUX transformer with that many blocks, those of the embedded guidance included.
pub fn layers(n_double: usize, n_single: usize) -> Vec<Layer> {
    let outside = OUTSIDE
        .iter()
        .map(|(bfl, diffusers)| Layer::new((*bfl).to_owned(), vec![(*diffusers).to_owned()]));
    outside
        .chain((0..n_double).flat_map(|index| DOUBLE.layers(index)))
        .chain((0..n_single).flat_map(|index| SINGLE.layers(index)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::pipeline::{Component, Pipeline};

    #[test]
    fn every_parameter_of_flux_has_one_name_of_bfl() {
        let pipeline = Pipeline::known("flux.1-dev").unwrap();
        let layers = layers(19, 38);
        let named: Vec<String> = layers
            .iter()
            .flat_map(|layer| {
                let leaves = layer.leaves().iter();
                leaves.flat_map(|[_, leaf]| {
                    layer.diffusers.iter().map(move |l| format!("{l}.{leaf}"))
                })
            })
            .collect();
        let distinct: BTreeSet<&str> = named.iter().map(String::as_str).collect();
        assert_eq!(distinct.len(), named.len());
        let manifest = pipeline.manifest(Component::Transformer);
        let wanted: BTreeSet<&str> = manifest.entries().map(|(name, _)| name).collect();
        assert_eq!(distinct, wanted);
        // Tensors of flux1-dev.safetensors.
        assert_eq!(layers.iter().map(|layer| layer.leaves().len()).sum::<usize>(), 780);
    }

    #[test]
    fn shift_and_scale_change_places_in_the_last_modulation_alone() {
        let layers = layers(1, 1);
        let swapped: Vec<&str> =
            layers.iter().filter(|l| l.halves_swapped).map(|l| &*l.diffusers[0]).collect();
        assert_eq!(swapped, ["norm_out.linear"]);
        let layer = layers.iter().find(|layer| layer.halves_swapped).unwrap();
        let mut rows = [1, 2, 3, 4];
        layer.reorder(&mut rows);
        assert_eq!(rows, [3, 4, 1, 2]);
    }
}
