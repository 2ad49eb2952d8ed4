//! The same layers under the names of every trainer.

use super::*;

const QKV: [&str; 3] = [
    "transformer_blocks.1.attn.to_q.weight",
    "transformer_blocks.1.attn.to_k.weight",
    "transformer_blocks.1.attn.to_v.weight",
];
const TEXT_QKV: [&str; 3] = [
    "transformer_blocks.1.attn.add_q_proj.weight",
    "transformer_blocks.1.attn.add_k_proj.weight",
    "transformer_blocks.1.attn.add_v_proj.weight",
];
const LINEAR1: [&str; 4] = [
    "single_transformer_blocks.0.attn.to_q.weight",
    "single_transformer_blocks.0.attn.to_k.weight",
    "single_transformer_blocks.0.attn.to_v.weight",
    "single_transformer_blocks.0.proj_mlp.weight",
];

/// Matrices of BFL's that are one of diffusers', with their shapes.
const ALONE: [(&str, &str, [usize; 2]); 15] = [
    ("double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0", [D, D]),
    ("double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out", [D, D]),
    ("double_blocks.0.img_mlp.0", "transformer_blocks.0.ff.net.0.proj", [4 * D, D]),
    ("double_blocks.1.img_mlp.2", "transformer_blocks.1.ff.net.2", [D, 4 * D]),
    ("double_blocks.1.txt_mlp.0", "transformer_blocks.1.ff_context.net.0.proj", [4 * D, D]),
    ("double_blocks.0.txt_mlp.2", "transformer_blocks.0.ff_context.net.2", [D, 4 * D]),
    ("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear", [6 * D, D]),
    ("double_blocks.0.txt_mod.lin", "transformer_blocks.0.norm1_context.linear", [6 * D, D]),
    ("single_blocks.1.linear2", "single_transformer_blocks.1.proj_out", [D, 5 * D]),
    ("single_blocks.1.modulation.lin", "single_transformer_blocks.1.norm.linear", [3 * D, D]),
    ("img_in", "x_embedder", [D, 64]),
    ("txt_in", "context_embedder", [D, 32]),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1", [D, 256]),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2", [D, D]),
    ("final_layer.linear", "proj_out", [64, D]),
];

/// A file of BFL's matrices, each with another rank and factor; `spell` makes a path of a name.
fn of_bfl(spell: impl Fn(&str) -> String, with_alpha: bool) -> File {
    let mut file = File::new(3);
    let put = |file: &mut File, layer: &str, shape: [usize; 2]| {
        let r = 2 + file.entries.len() % 5;
        let alpha = 1.5 + file.entries.len() as f64;
        if with_alpha {
            file.kohya(&spell(layer), shape, r, alpha)
        } else {
            file.lora(&spell(layer), shape, r, 1.0)
        }
    };
    let delta = put(&mut file, "double_blocks.1.img_attn.qkv", [3 * D, D]);
    file.adds_to_all(&QKV, &[D; 3], &delta);
    let delta = put(&mut file, "double_blocks.1.txt_attn.qkv", [3 * D, D]);
    file.adds_to_all(&TEXT_QKV, &[D; 3], &delta);
    let delta = put(&mut file, "single_blocks.0.linear1", [7 * D, D]);
    file.adds_to_all(&LINEAR1, &[D, D, D, 4 * D], &delta);
    for (bfl, diffusers, shape) in ALONE {
        let delta = put(&mut file, bfl, shape);
        file.adds(&format!("{diffusers}.weight"), &delta);
    }
    // Shift above scale in BFL's, scale above shift in diffusers'.
    let mut delta = put(&mut file, "final_layer.adaLN_modulation.1", [2 * D, D]);
    delta.rotate_left(D * D);
    file.adds("norm_out.linear.weight", &delta);
    file
}

#[test]
fn kohya_s_names() {
    let file = of_bfl(|layer| format!("lora_unet_{}", layer.replace('.', "_")), true);
    file.check();
    let line = file.open().lines().join("\n");
    for part in ["LoRA in kohya names, 26 layers of transformer, rank 2 to 6, alpha/r", "scale 1"] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn bfl_s_names_with_every_prefix() {
    for prefix in
        ["", "diffusion_model.", "base_model.model.", "model.diffusion_model.", "transformer."]
    {
        of_bfl(|layer| format!("{prefix}{layer}"), false).check();
        of_bfl(|layer| format!("{prefix}{layer}"), true).check();
    }
}

#[test]
fn diffusers_names_in_every_spelling() {
    let layer = "transformer_blocks.0.attn.to_q";
    let flat = layer.replace('.', "_");
    for [a, b] in [
        [format!("transformer.{layer}.lora_A.weight"), format!("transformer.{layer}.lora_B.weight")],
        [format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight")],
        [format!("{layer}.lora_A.default.weight"), format!("{layer}.lora_B.default.weight")],
        [format!("base_model.model.{layer}.lora_A.weight"), format!("base_model.model.{layer}.lora_B.weight")],
        [
            format!("base_model.model.transformer.{layer}.lora_A.old.weight"),
            format!("base_model.model.transformer.{layer}.lora_B.old.weight"),
        ],
        [format!("unet.{layer}.lora.down.weight"), format!("unet.{layer}.lora.up.weight")],
        [
            format!("transformer.{layer}.lora_linear_layer.down.weight"),
            format!("transformer.{layer}.lora_linear_layer.up.weight"),
        ],
        [format!("diffusion_model.{layer}.lora_down.weight"), format!("diffusion_model.{layer}.lora_up.weight")],
        [format!("lora_transformer_{flat}.lora_down.weight"), format!("lora_transformer_{flat}.lora_up.weight")],
        [format!("lycoris_{flat}.lora_down.weight"), format!("lycoris_{flat}.lora_up.weight")],
        [
            "transformer._orig_mod.transformer_blocks.0._fsdp_wrapped_module.attn.to_q.lora_A.weight".into(),
            "transformer._orig_mod.transformer_blocks.0._fsdp_wrapped_module.attn.to_q.lora_B.weight".into(),
        ],
    ] {
        let mut file = File::new(5);
        let delta = file.pair([&a, &b], [D, D], 3, 1.0);
        file.adds(&format!("{layer}.weight"), &delta);
        file.check();
    }
}

#[test]
fn underscores_end_where_layers_do() {
    let mut file = File::new(6);
    for (layer, shape) in [
        ("transformer_blocks.0.attn.to_out.0", [D, D]),
        ("transformer_blocks.1.ff.net.0.proj", [4 * D, D]),
        ("time_text_embed.timestep_embedder.linear_1", [D, 256]),
        ("single_transformer_blocks.1.proj_out", [D, 5 * D]),
    ] {
        let path = format!("lora_transformer_{}", layer.replace('.', "_"));
        let delta = file.kohya(&path, shape, 4, 3.0);
        file.adds(&format!("{layer}.weight"), &delta);
    }
    file.check();
    assert!(file.open().to_string().contains("OneTrainer"));
}

#[test]
fn onetrainer_s_parts_of_a_fused_matrix() {
    let mut file = File::new(7);
    for (k, parameter) in QKV.iter().enumerate() {
        let path = format!("transformer.double_blocks.1.img_attn.qkv.{k}");
        let delta = file.kohya(&path, [D, D], 2 + k, 5.0);
        file.adds(parameter, &delta);
    }
    for (k, parameter) in LINEAR1.iter().enumerate() {
        let rows = if k == 3 { 4 * D } else { D };
        let path = format!("transformer.single_blocks.0.linear1.{k}");
        let delta = file.kohya(&path, [rows, D], 3, 1.0 + k as f64);
        file.adds(parameter, &delta);
    }
    file.check();
}

#[test]
fn sd_scripts_split_qkv_saved_whole_and_apart() {
    // A: three r × n_in, one below the other; B: blocks on a diagonal; the alpha stays.
    let (r, path) = (2, "lora_unet_double_blocks_1_img_attn_qkv");
    let mut file = File::new(8);
    let a = file.tensor(&format!("{path}.lora_down.weight"), &[3 * r, D]);
    let mut b = vec![0.0f32; 3 * D * 3 * r];
    for row in 0..3 * D {
        for k in 0..r {
            b[row * 3 * r + row / D * r + k] = 0.01 * (row + k) as f32;
        }
    }
    file.entries.push(Entry::f32(format!("{path}.lora_up.weight"), &[3 * D, 3 * r], &b));
    file.number(&format!("{path}.alpha"), 3.0);
    let b: Vec<f64> = b.into_iter().map(f64::from).collect();
    let delta = scaled(&product(&b, &a, 3 * r), 0.5);
    file.adds_to_all(&QKV, &[D; 3], &delta);
    file.check();

    let mut file = File::new(9);
    for (k, parameter) in QKV.iter().enumerate() {
        let names = ["lora_down", "lora_up"].map(|ending| format!("{path}.{ending}.{k}.weight"));
        let delta = file.pair([&names[0], &names[1]], [D, D], 3, 1.0);
        file.adds(parameter, &delta);
    }
    file.check();
}

#[test]
fn xlabs_names() {
    let mut file = File::new(10);
    let put = |file: &mut File, path: &str, shape| {
        let names = ["down", "up"].map(|ending| format!("{path}.{ending}.weight"));
        let r = 2 + file.entries.len();
        file.pair([&names[0], &names[1]], shape, r, 1.0)
    };
    let delta = put(&mut file, "double_blocks.1.processor.qkv_lora1", [3 * D, D]);
    file.adds_to_all(&QKV, &[D; 3], &delta);
    let delta = put(&mut file, "double_blocks.1.processor.qkv_lora2", [3 * D, D]);
    file.adds_to_all(&TEXT_QKV, &[D; 3], &delta);
    let delta = put(&mut file, "diffusion_model.double_blocks.0.processor.proj_lora1", [D, D]);
    file.adds("transformer_blocks.0.attn.to_out.0.weight", &delta);
    let delta = put(&mut file, "double_blocks.0.processor.proj_lora2", [D, D]);
    file.adds("transformer_blocks.0.attn.to_add_out.weight", &delta);
    // A single block's projection of queries, keys and values alone.
    let delta = put(&mut file, "single_blocks.0.processor.qkv_lora", [3 * D, D]);
    file.adds_to_all(&LINEAR1[..3], &[D; 3], &delta);
    let delta = put(&mut file, "single_blocks.1.processor.proj_lora", [D, 5 * D]);
    file.adds("single_transformer_blocks.1.proj_out.weight", &delta);
    file.check();
}

#[test]
fn text_encoders_by_every_name() {
    let clip = "text_model.encoder.layers.0.self_attn.q_proj";
    let t5 = "encoder.block.1.layer.1.DenseReluDense.wo";
    let shape = |component: Component, layer: &str| {
        let weights = weights(component);
        let shape = weights.get(&format!("{layer}.weight")).unwrap().shape.to_vec();
        [shape[0], shape[1]]
    };
    let (clip_flat, t5_flat) = (clip.replace('.', "_"), t5.replace('.', "_"));
    for (of_clip, of_t5) in [
        (format!("lora_te1_{clip_flat}"), format!("lora_te3_{t5_flat}")),
        (format!("lora_te_{clip_flat}"), format!("lora_te2_{t5_flat}")),
        (format!("text_encoder.{clip}"), format!("text_encoder_2.{t5}")),
        (
            format!("text_encoders.clip_l.transformer.{clip}"),
            format!("text_encoders.t5xxl.transformer.{t5}"),
        ),
        (format!("clip_l.{clip}"), format!("t5.{t5}")),
        (format!("text_encoder.{}", &clip["text_model.".len()..]), format!("t5xxl.{t5}")),
    ] {
        let mut file = File::new(11);
        for (component, layer, path) in
            [(Component::TextEncoder, clip, of_clip), (Component::TextEncoder2, t5, of_t5)]
        {
            let delta = file.kohya(&path, shape(component, layer), 3, 2.0);
            file.deltas.insert((component, format!("{layer}.weight")), delta);
        }
        file.check();
        let lora = file.open();
        assert!(lora.changes(Component::TextEncoder) && !lora.changes(TRANSFORMER));
        assert!(!lora.is_low_rank());
    }
}

#[test]
fn a_lora_written_twice_counts_once() {
    let layer = "transformer_blocks.0.attn.to_q";
    let mut file = File::new(12);
    let delta = file.lora(&format!("transformer.{layer}"), [D, D], 3, 1.0);
    file.adds(&format!("{layer}.weight"), &delta);
    file.kohya("lora_unet_double_blocks_0_img_attn_qkv", [3 * D, D], 3, 1.0);
    file.check();
    let said = file.open().lines().join("\n");
    assert!(
        said.contains("lora_unet_double_blocks_0_img_attn_qkv") && said.contains("passed over")
    );
}
