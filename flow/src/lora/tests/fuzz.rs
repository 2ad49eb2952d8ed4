//! Files that nobody wrote on purpose: no panic, whatever they hold.

use proptest::prelude::*;

use super::*;

const PATHS: [&str; 12] = [
    "transformer.transformer_blocks.0.attn.to_q",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_1_linear1",
    "diffusion_model.final_layer.adaLN_modulation.1",
    "double_blocks.1.processor.qkv_lora2",
    "base_model.model.single_blocks.0.linear1.3",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm",
    "lora_lora_unet_unet_transformer_transformer_transformer",
    "img_in",
    "",
    "ё.0",
];
const ENDS: [&str; 24] = [
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_down.weight",
    "lora_up.weight",
    "lora_down.1.weight",
    "lora_A.x.weight",
    "down.weight",
    "up.weight",
    "alpha",
    "dora_scale",
    "magnitude",
    "lora_magnitude_vector.default",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "diff",
    "diff_b",
    "weight",
];
const DTYPES: [Dtype; 5] = [Dtype::F32, Dtype::BF16, Dtype::F8_E4M3, Dtype::I64, Dtype::BOOL];
/// Sizes that fit something here, and some that do not.
const SIZES: [usize; 12] = [0, 1, 2, 3, 4, 12, 16, D, 64, 2 * D, 3 * D, 7 * D];

/// Opens the file at `path` and, where that works, applies it to every parameter.
fn use_up(path: &Path) {
    let Ok(lora) = Lora::open(path, 0.7, &Layers::of(&PIPELINE)) else { return };
    let _ = lora.lines();
    let loras = [lora];
    for component in [TRANSFORMER, Component::TextEncoder, Component::TextEncoder2] {
        let weights = weights(component);
        for (name, shape) in PIPELINE.manifest(component).entries() {
            let values = merged(&loras, component, &weights, name).unwrap();
            let n: usize = shape.iter().product();
            assert!(values.is_none_or(|values| values.len() == n), "{name}");
            if let Some(layer) = name.strip_suffix(".weight") {
                let _ = loras[0].factors(layer).unwrap();
            }
        }
    }
}

fn tensor() -> impl Strategy<Value = (String, Vec<usize>, Dtype)> {
    let shape = prop::collection::vec(prop::sample::select(&SIZES[..]), 0..4);
    let name = (prop::sample::select(&PATHS[..]), prop::sample::select(&ENDS[..]));
    let name = name.prop_map(|(path, end)| format!("{path}.{end}"));
    (name, shape, prop::sample::select(&DTYPES[..]))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tensors_of_any_name_shape_and_type(
        tensors in prop::collection::vec(tensor(), 1..6),
        settings in prop::option::of("[\\[{\"a-z.:,0-9}\\]]{0,40}"),
    ) {
        let mut file = File::new(40);
        let mut names = std::collections::BTreeSet::new();
        for (name, shape, dtype) in tensors {
            let n_bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            if n_bytes < 1 << 20 && names.insert(name.clone()) {
                file.entries.push(Entry::raw(name, &shape, dtype, vec![0x3c; n_bytes]));
            }
        }
        file.metadata.extend(settings.map(|text| ("lora_adapter_metadata", text)));
        file.write();
        use_up(&file.path());
    }

    #[test]
    fn a_file_with_bytes_changed(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut file = File::new(41);
        file.kohya("lora_unet_double_blocks_0_img_attn_qkv", [3 * D, D], 2, 1.0);
        file.tensor("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", &[1, D]);
        file.lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", [128, 32], 2, 1.0);
        file.write();
        let mut bytes = std::fs::read(file.path()).unwrap();
        // The header is the first thousand bytes.
        for (index, byte) in changes {
            let at = index.index(1000);
            bytes[at] = byte;
        }
        std::fs::write(file.path(), bytes).unwrap();
        use_up(&file.path());
    }
}
