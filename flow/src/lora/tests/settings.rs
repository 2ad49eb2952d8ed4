//! α and r that stand beside the tensors.

use serde_json::{Value, json};

use super::*;

const Q: &str = "transformer_blocks.0.attn.to_q";

/// A file in diffusers' names, of `(layer, r, factor)`.
fn file(layers: &[(&str, usize, f64)]) -> File {
    let mut file = File::new(20);
    for (layer, r, factor) in layers {
        let delta = file.lora(&format!("transformer.{layer}"), [D, D], *r, *factor);
        file.adds(&format!("{layer}.weight"), &delta);
    }
    file
}

/// The settings as diffusers puts them into the file.
fn within(mut file: File, settings: &Value) -> File {
    let object = settings.as_object().unwrap().iter();
    let named: serde_json::Map<String, Value> =
        object.map(|(key, value)| (format!("transformer.{key}"), value.clone())).collect();
    file.metadata.push(("lora_adapter_metadata", Value::Object(named).to_string()));
    file
}

fn beside(file: &File, name: &str, settings: &Value) {
    std::fs::write(file.folder.path().join(name), settings.to_string()).unwrap();
}

#[test]
fn alpha_rslora_and_patterns_as_peft_matches_them() {
    let (k, add_q, other) = (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.1.attn.to_q",
    );
    let anchored = "^transformer_blocks.0.attn.to_k";
    for (layers, settings) in [
        (vec![(Q, 4, 2.0)], json!({"r": 4, "lora_alpha": 8})),
        (vec![(Q, 4, 2.0), (k, 4, 2.0)], json!({"r": 4, "lora_alpha": 4, "use_rslora": true})),
        (
            vec![(Q, 4, 1.0), (k, 2, 4.0)],
            json!({"r": 4, "lora_alpha": 4, "rank_pattern": {anchored: 2}, "alpha_pattern": {anchored: 8}}),
        ),
        (
            vec![(Q, 4, 1.0), (add_q, 4, 1.0)],
            json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"q_proj": 8}}),
        ),
        (
            vec![(Q, 4, 3.0), (add_q, 4, 2.0)],
            json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"add_q_proj": 8, "to_q": 12}}),
        ),
        (
            vec![(Q, 4, 4.0), (other, 4, 1.0)],
            json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {r"transformer_blocks\.0\..*to_q": 16}}),
        ),
        (
            vec![(Q, 4, 4.0), (k, 4, 1.0), (other, 4, 4.0)],
            json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_(?!k).": 16}}),
        ),
        (
            vec![(Q, 9, 2.0)],
            json!({"r": 4, "lora_alpha": 4, "use_rslora": true, "rank_pattern": {"to_q": 9},
                   "alpha_pattern": {"to_q": 6}}),
        ),
    ] {
        within(file(&layers), &settings).check();
        // The same in a file of its own.
        let apart = file(&layers);
        beside(&apart, "adapter_config.json", &settings);
        apart.check();
    }
}

#[test]
fn a_folder_of_peft_and_one_of_dancegrpo() {
    let mut peft = file(&[(Q, 3, 2.5)]);
    peft.name = "adapter_model.safetensors".into();
    beside(&peft, "adapter_config.json", &json!({"peft_type": "LORA", "r": 3, "lora_alpha": 7.5}));
    peft.check();
    peft.write();
    let layers = Layers::of(&PIPELINE);
    assert!(Lora::open(peft.folder.path(), 1.0, &layers).unwrap().lines().len() == 1);
    std::fs::remove_file(peft.folder.path().join("adapter_config.json")).unwrap();
    let said = peft.open().lines().join("\n");
    assert!(said.contains("adapter_config.json") && said.contains("taken as 1"), "{said}");

    let mut dance = file(&[(Q, 4, 2.0)]);
    dance.name = FILE.into();
    let settings = json!({"step": 100, "lora_params": {"lora_rank": 4, "lora_alpha": 8}});
    beside(&dance, "lora_config.json", &settings);
    dance.check();
}

#[test]
fn settings_beside_several_files_are_nobody_s() {
    let file = file(&[(Q, 4, 1.0)]);
    beside(&file, "adapter_config.json", &json!({"r": 8, "lora_alpha": 64}));
    std::fs::write(file.folder.path().join("other.safetensors"), "").unwrap();
    file.check();
}

#[test]
fn a_tensor_s_alpha_comes_before_settings() {
    let mut file = within(file(&[(Q, 4, 1.5)]), &json!({"r": 4, "lora_alpha": 8}));
    file.number(&format!("transformer.{Q}.alpha"), 6.0);
    file.check();
}

#[test]
fn lokr_of_peft_is_scaled_by_its_settings() {
    let mut file = File::new(21);
    let (w1, w2) = (
        file.tensor(&format!("base_model.model.{Q}.lokr_w1"), &[1, 1]),
        file.tensor(&format!("base_model.model.{Q}.lokr_w2"), &[D, D]),
    );
    file.adds(&format!("{Q}.weight"), &scaled(&w2, 2.0 * w1[0]));
    beside(&file, "adapter_config.json", &json!({"peft_type": "LOKR", "r": 8, "alpha": 16}));
    file.check();
}

#[test]
fn odd_metadata() {
    for text in ["null", "[]", "{}"] {
        let mut file = file(&[(Q, 4, 1.0)]);
        file.metadata.push(("lora_adapter_metadata", text.into()));
        file.check();
    }
    for text in
        ["{r: 4", "[1]", "7", "\"x\"", r#"{"transformer.r": "four"}"#, r#"{"transformer.r": 0}"#]
    {
        let mut file = file(&[(Q, 4, 1.0)]);
        file.metadata.push(("lora_adapter_metadata", text.into()));
        let message = file.refused();
        assert!(message.contains("lora_adapter_metadata"), "{message}");
    }
    let mut notes = file(&[(Q, 4, 1.0)]);
    notes.metadata.push(("ss_tag_frequency", "x".repeat(2_000_000)));
    notes.check();
}

#[test]
fn settings_that_cannot_be_followed_are_refused() {
    for (settings, parts) in [
        (json!({"r": 4, "lora_alpha": 4, "use_dora": true}), &["DoRA", "magnitudes"][..]),
        (json!({"r": 8, "lora_alpha": 8}), &["r = 8", "4 rows"]),
        (json!({"peft_type": "OFT"}), &["kind OFT"]),
        (json!({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}), &["pissa"]),
        (json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_(": 8}}), &["to_(", "regular"]),
        (json!({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": "8"}}), &["to_q", "number"]),
        (json!({"r": 4, "lora_alpha": 4, "rank_pattern": [1]}), &["rank_pattern"]),
    ] {
        let message = within(file(&[(Q, 4, 1.0)]), &settings).refused();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
}
