//! Every form of what is added, and every type of number.

use super::*;

const Q: &str = "transformer_blocks.0.attn.to_q";

fn kronecker(w1: &[f64], [a, b]: [usize; 2], w2: &[f64], [c, d]: [usize; 2]) -> Vec<f64> {
    let mut out = vec![0.0; a * c * b * d];
    for (i, x) in w1.iter().enumerate() {
        for (j, y) in w2.iter().enumerate() {
            let (row, column) = (i / b * c + j / d, i % b * d + j % d);
            out[row * b * d + column] = x * y;
        }
    }
    out
}

#[test]
fn lokr_whole_and_split() {
    // Whole factors: f = 1 whatever the alpha.
    let mut file = File::new(1);
    let path = "diffusion_model.double_blocks.0.img_attn.proj";
    let (w1, w2) = ([4, 6], [D / 4, D / 6]);
    let first = file.tensor(&format!("{path}.lokr_w1"), &w1);
    let second = file.tensor(&format!("{path}.lokr_w2"), &w2);
    file.number(&format!("{path}.alpha"), 9999999999.0);
    file.adds("transformer_blocks.0.attn.to_out.0.weight", &kronecker(&first, w1, &second, w2));
    // One of them split: r is its own.
    let path = format!("lycoris_{}", Q.replace('.', "_"));
    let first = file.tensor(&format!("{path}.lokr_w1"), &[6, 4]);
    let b = file.tensor(&format!("{path}.lokr_w2_a"), &[D / 6, 3]);
    let a = file.tensor(&format!("{path}.lokr_w2_b"), &[3, D / 4]);
    file.number(&format!("{path}.alpha"), 2.0);
    let delta = kronecker(&first, [6, 4], &product(&b, &a, 3), [D / 6, D / 4]);
    file.adds(&format!("{Q}.weight"), &scaled(&delta, 2.0 / 3.0));
    // Both split, on a fused matrix.
    let path = "lora_unet_single_blocks_1_linear1";
    let b = file.tensor(&format!("{path}.lokr_w1_a"), &[7, 2]);
    let a = file.tensor(&format!("{path}.lokr_w1_b"), &[2, 4]);
    let d = file.tensor(&format!("{path}.lokr_w2_a"), &[D, 2]);
    let c = file.tensor(&format!("{path}.lokr_w2_b"), &[2, D / 4]);
    file.number(&format!("{path}.alpha"), 3.0);
    let delta = kronecker(&product(&b, &a, 2), [7, 4], &product(&d, &c, 2), [D, D / 4]);
    let single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
        .map(|layer| format!("single_transformer_blocks.1.{layer}.weight"));
    let single = single.each_ref().map(String::as_str);
    file.adds_to_all(&single, &[D, D, D, 4 * D], &scaled(&delta, 1.5));
    file.check();
    assert!(file.open().to_string().contains("LoKr"), "{}", file.open());
    assert!(!file.open().is_low_rank());
}

#[test]
fn loha() {
    let mut file = File::new(2);
    let path = format!("lycoris_{}", Q.replace('.', "_"));
    let mut put = |end: &str, shape: &[usize]| file.tensor(&format!("{path}.hada_{end}"), shape);
    let (b1, a1) = (put("w1_a", &[D, 3]), put("w1_b", &[3, D]));
    let (b2, a2) = (put("w2_a", &[D, 3]), put("w2_b", &[3, D]));
    file.number(&format!("{path}.alpha"), 7.5);
    let (first, second) = (product(&b1, &a1, 3), product(&b2, &a2, 3));
    let delta: Vec<f64> = first.iter().zip(second).map(|(x, y)| 2.5 * x * y).collect();
    file.adds(&format!("{Q}.weight"), &delta);
    file.check();
    assert!(file.open().to_string().contains("LoHa"));
}

#[test]
fn differences_of_weights_biases_and_norms() {
    let mut file = File::new(3);
    let prefix = "diffusion_model.double_blocks.0";
    // Factors and a bias's difference of one layer, as ComfyUI extracts them.
    let delta = file.lora(&format!("{prefix}.img_attn.qkv"), [3 * D, D], 3, 1.0);
    let names = ["to_q", "to_k", "to_v"].map(|l| format!("transformer_blocks.0.attn.{l}"));
    let weights = names.each_ref().map(|layer| format!("{layer}.weight"));
    file.adds_to_all(&weights.each_ref().map(String::as_str), &[D; 3], &delta);
    let delta = file.tensor(&format!("{prefix}.img_attn.qkv.diff_b"), &[3 * D]);
    let biases = names.each_ref().map(|layer| format!("{layer}.bias"));
    file.adds_to_all(&biases.each_ref().map(String::as_str), &[D; 3], &delta);
    // A whole difference, a norm's, and a bias alone.
    let delta = file.tensor(&format!("{prefix}.img_mlp.0.diff"), &[4 * D, D]);
    file.adds("transformer_blocks.0.ff.net.0.proj.weight", &delta);
    let delta = file.tensor(&format!("{prefix}.txt_attn.norm.key_norm.diff"), &[16]);
    file.adds("transformer_blocks.0.attn.norm_added_k.weight", &delta);
    let mut delta = file.tensor("diffusion_model.final_layer.adaLN_modulation.1.diff_b", &[2 * D]);
    delta.rotate_left(D);
    file.adds("norm_out.linear.bias", &delta);
    // A norm of a text encoder.
    let layer = "text_model.encoder.layers.0.layer_norm1";
    let n = super::weights(Component::TextEncoder).get(&format!("{layer}.bias")).unwrap().shape[0];
    for (end, leaf) in [("diff", "weight"), ("diff_b", "bias")] {
        let delta = file.tensor(&format!("text_encoders.clip_l.transformer.{layer}.{end}"), &[n]);
        file.deltas.insert((Component::TextEncoder, format!("{layer}.{leaf}")), delta);
    }
    file.check();
    assert!(file.open().to_string().contains("LoRA and differences"), "{}", file.open());
}

#[test]
fn a_bias_of_b_has_b_s_factor() {
    let mut file = File::new(4);
    let path = format!("transformer.{Q}");
    let delta = file.lora(&path, [D, D], 4, 1.5);
    file.adds(&format!("{Q}.weight"), &delta);
    let bias = file.tensor(&format!("{path}.lora_B.bias"), &[D]);
    file.adds(&format!("{Q}.bias"), &scaled(&bias, 1.5));
    file.number(&format!("{path}.alpha"), 6.0);
    file.check();
}

/// V with rows, or columns, of the given norms, less W.
fn decomposed(
    w: &[f64],
    delta: &[f64],
    norms: &[f64],
    n_columns: usize,
    of_rows: bool,
) -> Vec<f64> {
    let v: Vec<f64> = w.iter().zip(delta).map(|(w, delta)| w + delta).collect();
    let line = |i: usize| if of_rows { i / n_columns } else { i % n_columns };
    let mut squares = vec![0.0; norms.len()];
    v.iter().enumerate().for_each(|(i, v)| squares[line(i)] += v * v);
    let changed = v.iter().enumerate().map(|(i, v)| v * norms[line(i)] / squares[line(i)].sqrt());
    changed.zip(w).map(|(changed, w)| changed - w).collect()
}

#[test]
fn dora_in_every_spelling() {
    let parameter = format!("{Q}.weight");
    let w = model_weight(&parameter);
    for (path, end, shape, of_rows) in [
        (format!("transformer.{Q}"), "lora_magnitude_vector", vec![D], true),
        (format!("transformer.{Q}"), "lora_magnitude_vector.weight", vec![D], true),
        (format!("base_model.model.{Q}"), "lora_magnitude_vector.default.weight", vec![D], true),
        (format!("transformer.{Q}"), "magnitude", vec![D], true),
        (format!("lora_transformer_{}", Q.replace('.', "_")), "dora_scale", vec![D, 1], true),
        (format!("lora_transformer_{}", Q.replace('.', "_")), "dora_scale", vec![1, D], false),
    ] {
        let mut file = File::new(5);
        let delta = file.lora(&path, [D, D], 3, 1.0);
        let norms = file.tensor(&format!("{path}.{end}"), &shape);
        file.adds(&parameter, &decomposed(&w, &delta, &norms, D, of_rows));
        file.check_at(1.0);
        assert!(file.open().to_string().contains("DoRA") && !file.open().is_low_rank());
    }
}

#[test]
fn dora_of_a_fused_matrix_takes_its_norms_over_all_of_it() {
    let layers = ["to_q", "to_k", "to_v"].map(|l| format!("transformer_blocks.1.attn.{l}.weight"));
    let w: Vec<f64> = layers.iter().flat_map(|layer| model_weight(layer)).collect();
    for (shape, of_rows) in [([3 * D, 1], true), ([1, D], false)] {
        let mut file = File::new(6);
        let path = "lora_unet_double_blocks_1_img_attn_qkv";
        let delta = file.kohya(path, [3 * D, D], 4, 2.0);
        let norms = file.tensor(&format!("{path}.dora_scale"), &shape);
        let change = decomposed(&w, &delta, &norms, D, of_rows);
        file.adds_to_all(&layers.each_ref().map(String::as_str), &[D; 3], &change);
        file.check_at(1.0);
    }
}

#[test]
fn numbers_of_every_type() {
    let of = |values: &[f32], dtype: Dtype| -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| match dtype {
                Dtype::F64 => f64::from(*value).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
                Dtype::BF16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
                // 0.5, −1.5 and 2 as bytes.
                Dtype::F8_E4M3 => vec![[0x30, 0xbc, 0x40][(*value * 2.0 % 3.0) as usize % 3]],
                Dtype::F8_E5M2 => vec![[0x38, 0xbe, 0x40][(*value * 2.0 % 3.0) as usize % 3]],
                _ => value.to_le_bytes().to_vec(),
            })
            .collect()
    };
    let path = format!("transformer.{Q}");
    for (a, b) in [
        (Dtype::F64, Dtype::F64),
        (Dtype::F16, Dtype::BF16),
        (Dtype::BF16, Dtype::F32),
        (Dtype::F8_E4M3, Dtype::F8_E5M2),
    ] {
        let mut file = File::new(7);
        let values: Vec<f32> = (0..2 * D).map(|i| 0.5 * (i % 7) as f32).collect();
        let wide = |dtype: Dtype| -> Vec<f64> {
            let eights = matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2);
            let wide = |v: &f32| {
                if eights { [0.5, -1.5, 2.0][(v * 2.0 % 3.0) as usize % 3] } else { f64::from(*v) }
            };
            values.iter().map(wide).collect()
        };
        let delta = product(&wide(b), &wide(a), 2);
        file.entries.push(Entry::raw(format!("{path}.{A}"), &[2, D], a, of(&values, a)));
        file.entries.push(Entry::raw(format!("{path}.{B}"), &[D, 2], b, of(&values, b)));
        file.adds(&format!("{Q}.weight"), &delta);
        let lora = [file.open()];
        let weights = super::weights(TRANSFORMER);
        let got = merged(&lora, TRANSFORMER, &weights, &format!("{Q}.weight")).unwrap().unwrap();
        for ((got, own), delta) in got.iter().zip(model_weight(&format!("{Q}.weight"))).zip(delta) {
            assert!((f64::from(*got) - own - delta).abs() <= 1e-5, "{a:?} {b:?}");
        }
    }
}

#[test]
fn alpha_of_every_type_and_shape() {
    let path = format!("transformer.{Q}");
    for (dtype, shape, bytes) in [
        (Dtype::F64, vec![], 6f64.to_le_bytes().to_vec()),
        (Dtype::F32, vec![1], 6f32.to_le_bytes().to_vec()),
        (Dtype::F16, vec![], half::f16::from_f32(6.0).to_le_bytes().to_vec()),
        (Dtype::BF16, vec![1, 1], half::bf16::from_f32(6.0).to_le_bytes().to_vec()),
        (Dtype::I64, vec![], 6i64.to_le_bytes().to_vec()),
        (Dtype::I32, vec![1], 6i32.to_le_bytes().to_vec()),
        (Dtype::U8, vec![], vec![6]),
        (Dtype::F8_E4M3, vec![], vec![0x4c]),
    ] {
        let mut file = File::new(8);
        let delta = file.lora(&path, [D, D], 4, 1.5);
        file.adds(&format!("{Q}.weight"), &delta);
        file.entries.push(Entry::raw(format!("{path}.alpha"), &shape, dtype, bytes));
        file.check_at(1.0);
    }
    let mut file = File::new(8);
    let delta = file.lora(&path, [D, D], 4, -0.5);
    file.adds(&format!("{Q}.weight"), &delta);
    file.entries.push(Entry::raw(
        format!("{path}.alpha"),
        &[],
        Dtype::I16,
        (-2i16).to_le_bytes().to_vec(),
    ));
    file.check_at(1.0);
}

#[test]
fn several_files_add_up_and_a_scale_of_0_is_nothing() {
    let mut files = [File::new(9), File::new(10)];
    let mut sum = vec![0.0; D * D];
    for (file, scale) in files.iter_mut().zip([0.5, 2.0]) {
        let delta = file.lora(&format!("transformer.{Q}"), [D, D], 3, scale);
        sum.iter_mut().zip(delta).for_each(|(sum, delta)| *sum += delta);
    }
    let loras = [files[0].open_at(0.5).unwrap(), files[1].open_at(2.0).unwrap()];
    check(&loras, |(_, name)| (*name == format!("{Q}.weight")).then(|| sum.clone()));
    check(&[files[0].open_at(0.0).unwrap()], |(_, name)| {
        (*name == format!("{Q}.weight")).then(|| vec![0.0; D * D])
    });
}

#[test]
fn factors_are_what_merging_adds() {
    let mut file = File::new(11);
    let path = "lora_unet_double_blocks_1_img_attn_qkv";
    let delta = file.kohya(path, [3 * D, D], 4, 2.0);
    let lora = file.open_at(0.5).unwrap();
    assert!(lora.is_low_rank());
    for (k, layer) in ["to_q", "to_k", "to_v"].iter().enumerate() {
        let factors = lora.factors(&format!("transformer_blocks.1.attn.{layer}")).unwrap().unwrap();
        assert_eq!(factors.rank, 4);
        let wide = |values: &[f32]| values.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        let got = product(&wide(&factors.b), &wide(&factors.a), 4);
        let rows = &delta[k * D * D..][..D * D];
        assert!(got.iter().zip(rows).all(|(got, delta)| (got - 0.5 * delta).abs() < 1e-6));
    }
    assert!(lora.factors("proj_out").unwrap().is_none());
}
