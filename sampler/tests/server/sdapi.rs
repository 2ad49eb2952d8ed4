//! The A1111 subset.

use serde_json::{Value, json};

use crate::rig::{LONG, PROMPT, Rig, decoded, drawn_alone, is_running, pixels, settings};

#[tokio::test]
async fn text_to_image_as_clients_ask() {
    let rig = Rig::new();
    // What the web UI's own documentation and its clients send.
    let wish = json!({
        "prompt": PROMPT, "negative_prompt": "blur", "styles": [], "seed": 3, "subseed": -1,
        "subseed_strength": 0, "sampler_name": "DPM++ 2M", "scheduler": "Automatic", "batch_size": 1,
        "n_iter": 2, "steps": 8, "cfg_scale": 7.0, "width": 32, "height": 32,
        "restore_faces": false, "tiling": false, "enable_hr": false, "script_args": [],
        "script_name": null, "send_images": true, "save_images": false, "alwayson_scripts": {},
        "override_settings": {"sd_model_checkpoint": "signs"}, "sampler_index": "Euler",
    });
    let body = rig.post("/sdapi/v1/txt2img", &wish).await.ok();
    let images: Vec<_> =
        body["images"].as_array().unwrap().iter().map(|image| pixels(&decoded(image))).collect();
    assert!(images == drawn_alone([3, 4], 8));
    let info: Value = serde_json::from_str(body["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["all_seeds"], json!([3, 4]));
    assert_eq!(
        info["ignored"],
        json!(["cfg_scale", "negative_prompt", "subseed", "sampler_index"])
    );
    assert_eq!(body["parameters"]["sampler_name"], "DPM++ 2M");
    for (field, value) in [
        ("enable_hr", json!(true)),
        ("styles", json!(["x"])),
        ("scheduler", json!("Karras")),
        ("sampler_name", json!("DDIM")),
        ("alwayson_scripts", json!({"ControlNet": {}})),
        ("width", json!(33)),
        ("unknown", json!(1)),
    ] {
        let mut wish = wish.clone();
        wish[field] = value;
        let answer = rig.post("/sdapi/v1/txt2img", &wish).await;
        assert_eq!(answer.status, 400, "{field}");
        assert!(answer.json()["detail"].as_str().unwrap().contains(field), "{}", answer.json());
    }
}

#[tokio::test]
async fn progress_shows_and_interrupt_stops() {
    let rig = Rig::new();
    assert_eq!(rig.get("/sdapi/v1/progress").await.ok()["progress"], 0.0);
    let wish = json!({"prompt": PROMPT, "steps": LONG});
    let watched = async {
        let previewed = |job: &sampler::server::job::Job| {
            is_running(job) && job.see(|board| !board.previews.is_empty())
        };
        rig.job_when(previewed).await;
        let progress = rig.get("/sdapi/v1/progress?skip_current_image=false").await.ok();
        let share = progress["progress"].as_f64().unwrap();
        assert!(0.0 < share && share < 1.0, "{progress}");
        assert!(progress["eta_relative"].as_f64().unwrap() > 0.0);
        assert_eq!(progress["state"]["sampling_steps"], LONG);
        assert_eq!(pixels(&decoded(&progress["current_image"])).len(), 32 * 32 * 3);
        let without = rig.get("/sdapi/v1/progress?skip_current_image=true").await.ok();
        assert_eq!(without["current_image"], Value::Null);
        rig.post("/sdapi/v1/interrupt", &json!({})).await.ok();
    };
    let (answer, ()) = tokio::join!(rig.post("/sdapi/v1/txt2img", &wish), watched);
    assert_eq!(answer.ok()["images"], json!([]));
}

#[tokio::test]
async fn what_clients_list_first() {
    let rig = Rig::without_worker(settings());
    let names = |list: &Value, key: &str| -> Vec<Value> {
        list.as_array().unwrap().iter().map(|item| item[key].clone()).collect()
    };
    let samplers = rig.get("/sdapi/v1/samplers").await.ok();
    assert!(names(&samplers, "name").contains(&json!("DPM++ 2M")), "{samplers}");
    assert_eq!(names(&rig.get("/sdapi/v1/schedulers").await.ok(), "label"), ["Automatic"]);
    assert_eq!(names(&rig.get("/sdapi/v1/sd-models").await.ok(), "title"), ["signs"]);
    assert_eq!(rig.get("/sdapi/v1/options").await.ok()["sd_model_checkpoint"], "signs");
    let set = |name: &str| json!({"sd_model_checkpoint": name});
    rig.post("/sdapi/v1/options", &set("signs")).await.ok();
    assert_eq!(rig.post("/sdapi/v1/options", &set("other")).await.status, 404);
    assert_eq!(rig.post("/sdapi/v1/options", &json!({"eta": 1})).await.status, 400);
}
