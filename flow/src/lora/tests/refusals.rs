//! What cannot be applied is named, in one line; and how files are found by what is typed.

use super::*;

const Q: &str = "transformer.transformer_blocks.0.attn.to_q";

fn lora() -> File {
    let mut file = File::new(30);
    file.lora(Q, [D, D], 3, 1.0);
    file
}

#[test]
fn other_kinds_are_named() {
    for (tensor, part) in [
        ("lycoris_transformer_blocks_0_attn_to_q.oft_blocks", "OFT"),
        ("transformer_blocks.0.attn.to_q.oft_R.weight", "OFT"),
        ("transformer_blocks.0.attn.to_k.boft_R", "BOFT"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_mid.weight", "LoCon"),
        ("lycoris_x.lokr_t2", "LoKr"),
        ("diffusion_model.x.a1.weight", "GLoRA"),
        ("base_model.model.x.lora_E", "AdaLoRA"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "IP-Adapter"),
        ("double_blocks.0.img_attn.qkv.weight", "no part of a LoRA"),
    ] {
        let mut file = lora();
        file.tensor(tensor, &[2, 2]);
        let message = file.refused();
        assert!(message.contains(part) && message.contains(tensor), "{message}");
    }
    let mut checkpoint = File::new(31);
    checkpoint.tensor("double_blocks.0.img_attn.qkv.weight", &[3 * D, D]);
    assert!(checkpoint.refused().contains("checkpoint"));
    assert!(File::new(32).refused().contains("no adapters"));
}

#[test]
fn a_control_lora_is_named() {
    let mut file = File::new(33);
    file.lora("img_in", [D, 128], 4, 1.0);
    file.tensor("img_in.lora_B.bias", &[D]);
    file.tensor("double_blocks.0.img_attn.norm.query_norm.scale", &[16]);
    let message = file.refused();
    assert!(message.contains("control LoRA") && message.contains("128"), "{message}");
    let mut file = File::new(34);
    file.lora("transformer.x_embedder", [D, 128], 4, 1.0);
    assert!(file.refused().contains("control LoRA"));
}

#[test]
fn layers_of_other_models_are_named() {
    for path in [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "diffusion_model.blocks.0.self_attn.q",
        "lora_unet_double_blocks_7_img_attn_qkv",
        "transformer.transformer_blocks.0.attn2.to_q",
        "controlnet.transformer_blocks.0.attn.to_q",
    ] {
        let mut file = File::new(35);
        file.kohya("lora_unet_double_blocks_0_img_attn_proj", [D, D], 3, 1.0);
        file.kohya(path, [D, D], 3, 1.0);
        let message = file.refused();
        assert!(message.contains(path) && message.contains("another model"), "{message}");
    }
    let mut file = lora();
    file.lora("diffusion_model.double_blocks.0.img_attn.qkv.2", [D, D + 1], 3, 1.0);
    let message = file.refused();
    assert!(message.contains("to_v") && message.contains("[48, 49]"), "{message}");
}

#[test]
fn guidance_on_a_model_without() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let schnell = Pipeline::open(&folder.join("../tests/fixtures/tiny-schnell/pipeline")).unwrap();
    for path in [
        "transformer.time_text_embed.guidance_embedder.linear_1",
        "lora_unet_guidance_in_in_layer",
        "diffusion_model.guidance_in.in_layer",
    ] {
        let mut file = File::new(35);
        file.lora("double_blocks.0.img_attn.proj", [24, 24], 3, 1.0);
        file.lora(path, [24, 256], 2, 1.0);
        file.write();
        let error = Lora::open(&file.path(), 1.0, &Layers::of(&schnell)).err().unwrap().to_string();
        assert!(error.contains("guidance") && error.contains(path), "{error}");
    }
}

#[test]
fn what_is_not_whole_is_named() {
    let without = |remove: &str| {
        let mut file = lora();
        file.entries.retain(|entry| !entry.name.ends_with(remove));
        file.refused()
    };
    assert!(without(A).contains("A and B is missing"));
    assert!(without(B).contains("A and B is missing"));
    for (name, shape, part) in [
        ("alpha", &[2][..], "2 numbers"),
        ("lokr_w1", &[2, 2], "lokr_w2"),
        ("hada_w1_a", &[D, 2], "missing"),
        ("diff", &[D, D], "beside"),
        ("lora_B.bias", &[D + 1], "49"),
        ("lora_magnitude_vector", &[7], "DoRA"),
    ] {
        let mut file = lora();
        file.tensor(&format!("{Q}.{name}"), shape);
        let message = file.refused();
        assert!(message.contains(part) && message.contains("to_q"), "{message}");
    }
    let mut file = File::new(36);
    file.tensor(&format!("{Q}.lora_magnitude_vector"), &[D]);
    assert!(file.refused().contains("not whole"));
    let mut file = File::new(37);
    file.tensor(&format!("{Q}.{A}"), &[3, D]);
    file.tensor(&format!("{Q}.{B}"), &[D, 2]);
    assert!(file.refused().contains("2 columns"));
    let mut file = File::new(38);
    file.number(&format!("{Q}.alpha"), 1.0);
    assert!(file.refused().contains("alpha without"));
}

#[test]
fn numbers_that_are_none_are_named() {
    for (name, bad) in [(A, f32::NAN), (B, f32::INFINITY)] {
        let mut file = lora();
        let entry = file.entries.iter_mut().find(|entry| entry.name.ends_with(name)).unwrap();
        let mut values = vec![0.5; 3 * D];
        values[7] = bad;
        *entry = Entry::f32(entry.name.clone(), &entry.shape.clone(), &values);
        assert!(file.refused().contains("not finite"));
    }
    let mut file = lora();
    file.number(&format!("{Q}.alpha"), f32::NAN);
    assert!(file.refused().contains("not finite"));
    let mut file = lora();
    let entry = &mut file.entries[0];
    *entry = Entry::i64(entry.name.clone(), &[3, D], &[1; 3 * D]);
    assert!(file.refused().contains("I64"));
}

#[test]
fn two_adapters_and_two_paths_of_one_layer_are_refused() {
    let mut file = File::new(39);
    for name in ["default", "old"] {
        let names = ["lora_A", "lora_B"].map(|ending| format!("{Q}.{ending}.{name}.weight"));
        file.tensor(&names[0], &[3, D]);
        file.tensor(&names[1], &[D, 3]);
    }
    let message = file.refused();
    assert!(message.contains("same tensor") || message.contains("default, old"), "{message}");
    let mut file = lora();
    file.lora("diffusion_model.double_blocks.0.img_attn.qkv", [3 * D, D], 3, 1.0);
    assert!(file.refused().contains("change the same layer"));
}

#[test]
fn a_layer_of_clip_without_use_is_passed_over_with_a_notice() {
    let mut file = File::new(42);
    file.tensor("text_encoders.clip_l.transformer.text_projection.diff", &[32, 32]);
    assert!(file.refused().contains("FLUX uses"));
    let delta = file.lora(Q, [D, D], 3, 1.0);
    file.adds("transformer_blocks.0.attn.to_q.weight", &delta);
    file.check();
    assert!(file.open().lines()[1].contains("text_projection passed over"));
}

#[test]
fn embeddings_of_words_are_passed_over_with_a_notice() {
    let mut file = lora();
    file.tensor("bundle_emb.token.clip_l", &[2, 32]);
    let said = file.open().lines().join("\n");
    assert!(said.contains("note: ") && said.contains("bundle_emb.token.clip_l"), "{said}");
}

#[test]
fn a_scale_follows_a_file_that_exists() {
    let home = tempfile::tempdir().unwrap();
    let place = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
    for name in ["v1:final.safetensors", "style.safetensors", "стиль-猫 (1).safetensors", "0.5:2"]
    {
        std::fs::write(place(name), "").unwrap();
        assert_eq!(scaled_path(&place(name)), Ok((place(name).into(), 1.0)));
        for (scale, value) in [("0.5", 0.5), ("-0.5", -0.5), ("2", 2.0), (".25", 0.25)] {
            let typed = format!("{}:{scale}", place(name));
            assert_eq!(scaled_path(&typed), Ok((place(name).into(), value)), "{typed}");
        }
        for scale in ["1,0", "", "nan", "inf", "x", "1e999"] {
            let typed = format!("{}:{scale}", place(name));
            let refused = scaled_path(&typed).unwrap_err();
            assert!(refused.contains("scale") && refused.contains(scale), "{refused}");
        }
    }
    assert_eq!(scaled_path("absent:0.5"), Ok(("absent".into(), 0.5)));
    assert_eq!(scaled_path("absent:x"), Ok(("absent:x".into(), 1.0)));
    assert_eq!(scaled_path(&format!("{}/:0.25", place("."))).unwrap().1, 0.25);
}

#[test]
fn the_file_of_a_folder_is_the_usual_or_the_only_one() {
    let home = tempfile::tempdir().unwrap();
    let put = |name: &str| std::fs::write(home.path().join(name), "").unwrap();
    let found = || file(home.path()).map(|path| path.file_name().unwrap().to_owned());
    let refused = || found().unwrap_err().to_string();
    assert!(refused().contains("no .safetensors"));
    put("pytorch_lora_weights.bin");
    assert!(refused().contains("ng-train convert"), "{}", refused());
    put("._late.safetensors");
    put("early.safetensors");
    assert_eq!(found().unwrap(), "early.safetensors");
    put("late.safetensors");
    assert!(refused().contains("early.safetensors, late.safetensors"), "{}", refused());
    put("adapter_model.safetensors");
    assert_eq!(found().unwrap(), "adapter_model.safetensors");
    put(FILE);
    assert_eq!(found().unwrap(), FILE);
    let above = tempfile::tempdir().unwrap();
    std::fs::create_dir(above.path().join("lora")).unwrap();
    std::fs::write(above.path().join("lora/adapter_model.safetensors"), "").unwrap();
    let message = file(above.path()).unwrap_err().to_string();
    assert!(message.contains("lora meant"), "{message}");
    std::fs::write(above.path().join("model_index.json"), "{}").unwrap();
    assert!(file(above.path()).unwrap_err().to_string().contains("pipeline"));
}
