//! Names of parameters outside the transformer in the files of others.

/// Parts of names of the autoencoder, of diffusers and of BFL. Source: diffusers'
/// `convert_ldm_vae_checkpoint`.
const VAE: [(&str, &str); 10] = [
    ("conv_norm_out", "norm_out"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("conv_shortcut", "nin_shortcut"),
    (".downsamplers.0.conv", ".downsample.conv"),
    (".upsamplers.0.conv", ".upsample.conv"),
    (".resnets.", ".block."),
];

/// What BFL's `ae.safetensors` calls the parameter `name` of an autoencoder of `n_levels`, whose levels of
/// the decoder it counts from the finest.
pub(super) fn vae(name: &str, n_levels: usize) -> String {
    let name = VAE.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
    let name = name.replace("down_blocks.", "down.");
    let Some((before, rest)) = name.split_once("up_blocks.") else { return name };
    let (level, after) = rest.split_once('.').unwrap_or((rest, ""));
    let level = level.parse::<usize>().map_or(0, |level| (n_levels - 1).saturating_sub(level));
    format!("{before}up.{level}.{after}")
}

/// Parts of names of T5's encoder, of GGUF files and of transformers. Source: `gguf.constants` of the
/// package gguf 0.19, `MODEL_ARCH.T5ENCODER`.
const T5: [(&str, &str); 10] = [
    ("attn_q", "layer.0.SelfAttention.q"),
    ("attn_k", "layer.0.SelfAttention.k"),
    ("attn_v", "layer.0.SelfAttention.v"),
    ("attn_o", "layer.0.SelfAttention.o"),
    ("attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"),
    ("attn_norm", "layer.0.layer_norm"),
    ("ffn_norm", "layer.1.layer_norm"),
    ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn_up", "layer.1.DenseReluDense.wi_1"),
    ("ffn_down", "layer.1.DenseReluDense.wo"),
];

/// The name in transformers of a parameter of T5 that a GGUF file calls `name`.
pub(super) fn t5(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("shared.weight".into()),
        "enc.output_norm.weight" => return Some("encoder.final_layer_norm.weight".into()),
        _ => {}
    }
    let (index, rest) = name.strip_prefix("enc.blk.")?.split_once('.')?;
    let part = rest.strip_suffix(".weight")?;
    let (_, layer) = T5.iter().find(|(known, _)| *known == part)?;
    Some(format!("encoder.block.{index}.{layer}.weight"))
}
