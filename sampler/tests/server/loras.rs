//! LoRAs of a server by name.

use std::{fs, path::Path};

use axum::{body::Body, http::Request};
use flow::checkpoint::{Entry, write_tensors};
use sampler::export::Export;
use serde_json::{Value, json};

use crate::rig::{
    Answer, PROMPT, Rig, decoded, drawn_alone, export, pixels, settings, settings_of,
};

const PATH: &str = "/v1/images/generations";

/// Two LoRAs of the first layer of `model` that has a slot, and a file that is none.
fn write_loras(model: &Path, folder: &Path) {
    let slots = Export::open(model, None).unwrap().description.lora_slots.unwrap();
    let (layer, &[n_out, n_in]) = slots.layers.iter().next().unwrap();
    let values = |n: usize, scale: f32| -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.7).sin() * scale).collect()
    };
    for (name, scale) in [("ink", 0.3), ("oil", 0.4)] {
        let (a, b) = (values(2 * n_in, scale), values(2 * n_out, scale));
        let entries = [
            Entry::f32(format!("transformer.{layer}.lora_A.weight"), &[2, n_in], &a),
            Entry::f32(format!("transformer.{layer}.lora_B.weight"), &[n_out, 2], &b),
        ];
        write_tensors(&folder.join(format!("{name}.safetensors")), &entries, &[]).unwrap();
    }
    fs::write(folder.join("none.safetensors"), "not a LoRA").unwrap();
    fs::write(folder.join("notes.txt"), "").unwrap();
}

async fn delete(rig: &Rig, path: &str) -> Answer {
    let request = Request::delete(path).header("host", "localhost");
    rig.send(request.body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn styles_come_and_go_while_the_server_runs() {
    let (home, model) = export(&["--lora-slots"]);
    let folder = home.path().join("loras");
    fs::create_dir(&folder).unwrap();
    write_loras(&model, &folder);
    let mut settings = settings_of(&model);
    settings.loras = Some(folder);
    let rig = Rig::with(settings);
    let image = async |lora: Value| {
        let wish = json!({"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "lora": lora});
        pixels(&decoded(&rig.post(PATH, &wish).await.ok()["data"][0]["b64_json"]))
    };
    let plain = image(Value::Null).await;
    assert!(plain == drawn_alone([3], 2)[0], "slots change nothing while they are empty");
    assert_eq!(
        rig.get("/api/loras").await.ok(),
        json!({"loaded": [{"model": "signs", "slots": true, "loras": []}],
               "available": ["ink", "none", "oil"]})
    );
    // One that is not loaded is loaded by the request that names it.
    let ink = image(json!({"name": "ink"})).await;
    assert!(ink != plain && image(json!({"name": "ink", "scale": 0})).await == plain);
    assert_eq!(rig.post("/api/loras", &json!({"name": "oil"})).await.ok()["model"], "signs");
    assert_eq!(rig.get("/api/loras").await.ok()["loaded"][0]["loras"], json!(["ink", "oil"]));
    assert!(image(json!({"name": "oil"})).await != ink);
    // The web UI's way to say the same.
    let wish = json!({"prompt": format!("{PROMPT} <lora:ink:1>"), "seed": 3, "steps": 2});
    let answer = rig.post("/sdapi/v1/txt2img", &wish).await.ok();
    assert!(pixels(&decoded(&answer["images"][0])) == ink);
    assert_eq!(rig.get("/sdapi/v1/loras").await.ok()[2]["name"], "oil");
    // Jobs in company of others get their own.
    let wishes = [Value::Null, json!({"name": "ink"}), Value::Null, json!({"name": "ink"})];
    let all = futures_util::future::join_all(wishes.map(&image)).await;
    assert!(all == [plain.clone(), ink.clone(), plain, ink]);
    assert_eq!(delete(&rig, "/api/loras/ink").await.ok()["name"], "ink");
    assert_eq!(delete(&rig, "/api/loras/ink").await.status, 404);
    for (name, status, code) in [
        ("none", 400, "lora_not_usable"),
        ("../ink", 404, "lora_not_found"),
        ("", 404, "lora_not_found"),
    ] {
        let answer = rig.post("/api/loras", &json!({"name": name})).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (status, &json!(code))
        );
    }
    let wish = json!({"prompt": PROMPT, "lora": {"name": "gone"}});
    let error = rig.post(PATH, &wish).await.json()["error"].clone();
    assert_eq!((&error["param"], &error["code"]), (&json!("lora"), &json!("lora_not_found")));
    assert!(error["message"].as_str().unwrap().contains("there are: ink, none, oil"), "{error}");
}

#[tokio::test]
async fn a_model_without_slots_or_a_server_without_a_folder_says_so() {
    let rig = Rig::without_worker(settings());
    let wish = json!({"prompt": "a", "lora": {"name": "ink"}});
    let error = rig.post(PATH, &wish).await.json()["error"].clone();
    assert_eq!(error["param"], "lora");
    assert!(error["message"].as_str().unwrap().contains("ng-export --lora-slots"), "{error}");
    let answer = rig.post("/api/loras", &json!({"name": "ink"})).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["error"]["code"]),
        (409, &json!("no_lora_folder"))
    );
}
