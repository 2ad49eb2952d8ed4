//! The OpenAI images API.

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::rig::{PROMPT, Rig, decoded, drawn_alone, is_running, pixels, settings};

const PATH: &str = "/v1/images/generations";

#[tokio::test]
async fn an_image_has_the_bits_of_its_seed_whatever_else_is_drawn() {
    let rig = Rig::new();
    let alone = drawn_alone(3..10, 8);
    let ask = |seed: u64, n: u64| json!({"prompt": PROMPT, "seed": seed, "n": n});
    let together = rig.post(PATH, &ask(3, 7)).await.ok();
    for (index, image) in together["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!(image["seed"], 3 + index);
        assert!(pixels(&decoded(&image["b64_json"])) == alone[index], "image {index} of seven");
    }
    let wishes: Vec<Value> = (0..24).map(|i| ask(3 + i % 7, 1)).collect();
    let others: Vec<Value> =
        (0..4).map(|i| json!({"prompt": "blue \"CUP\"", "num_inference_steps": 3 + i})).collect();
    let all = wishes.iter().chain(&others).map(|wish| rig.post(PATH, wish));
    for (index, answer) in join_all(all).await.iter().enumerate() {
        let image = decoded(&answer.ok()["data"][0]["b64_json"]);
        if let Some(alone) = (index < wishes.len()).then(|| &alone[index % 7]) {
            assert!(pixels(&image) == *alone, "image {index} under load");
        }
    }
}

#[tokio::test]
async fn every_field_has_its_place() {
    let rig = Rig::new();
    let wish = json!({
        "prompt": PROMPT, "model": "signs", "n": 1, "size": "32x48", "quality": "hd",
        "background": "auto", "moderation": "low", "output_format": "png",
        "output_compression": 100, "response_format": "b64_json", "style": "natural", "user": "u",
        "stream": false, "partial_images": 0, "num_inference_steps": 2, "seed": 5,
        "negative_prompt": "", "true_cfg_scale": 1, "generator_device": "cuda",
        "vae_use_tiling": true, "solver": "euler", "shift": 2.5, "lora": null,
    });
    let body = rig.post(PATH, &wish).await.ok();
    assert_eq!(body["size"], "32x48");
    assert_eq!(body["output_format"], "png");
    assert_eq!(body["background"], "opaque");
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(body["usage"]["input_tokens_details"]["text_tokens"], 0);
    assert_eq!(body.get("quality"), None);
    let file = decoded(&body["data"][0]["b64_json"]);
    let text = String::from_utf8_lossy(&file);
    assert!(text.contains("Steps: 2, Sampler: Euler, Schedule shift: 2.5"), "{text}");
    assert_eq!(pixels(&file).len(), 32 * 48 * 3);
    let low = rig.post(PATH, &json!({"prompt": "a", "quality": "low", "size": "auto"})).await.ok();
    assert_eq!((&low["quality"], &low["size"]), (&json!("low"), &json!("32x32")));
    let prompt = "word ".repeat(500);
    let cut = rig.post(PATH, &json!({"prompt": prompt})).await.ok();
    assert!(cut["notices"][0].as_str().unwrap().contains("are cut"), "{cut}");
}

#[tokio::test]
async fn models_are_listed() {
    let rig = Rig::without_worker(settings());
    let list = rig.get("/v1/models").await.ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0], rig.get("/v1/models/signs").await.ok());
    assert_eq!(list["data"][0]["object"], "model");
    let answer = rig.get("/v1/models/other").await;
    assert_eq!((answer.status.as_u16(), &answer.json()["error"]["param"]), (404, &json!("model")));
}

#[tokio::test]
async fn a_stream_has_partial_images_and_then_the_image() {
    let rig = Rig::new();
    let wish = json!({"prompt": PROMPT, "seed": 3, "stream": true, "partial_images": 3});
    let answer = rig.post(PATH, &wish).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events = answer.events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let partial = "image_generation.partial_image";
    assert_eq!(names, [partial, partial, partial, "image_generation.completed", ""]);
    assert_eq!(events[4].1, "[DONE]");
    for (index, (name, data)) in events[..4].iter().enumerate() {
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name.as_str());
        assert_eq!((&data["size"], &data["quality"]), (&json!("32x32"), &json!("auto")));
        assert_eq!(
            (&data["background"], &data["output_format"]),
            (&json!("opaque"), &json!("png"))
        );
        assert!(data["created_at"].is_u64());
        let last = index == 3;
        assert_eq!(data.get("partial_image_index"), (!last).then_some(&json!(index)));
        assert_eq!(data.get("usage").is_some(), last);
        let image = pixels(&decoded(&data["b64_json"]));
        assert_eq!(image == drawn_alone([3], 8)[0], last, "image {index}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_slot() {
    let rig = Rig::new();
    let wish = json!({"prompt": PROMPT, "num_inference_steps": crate::rig::LONG});
    for stream in [false, true] {
        let mut wish = wish.clone();
        wish["stream"] = stream.into();
        let mut other = wish.clone();
        other["num_inference_steps"] = 3.into();
        let (running, queued) = (rig.post(PATH, &wish), rig.post(PATH, &other));
        let job = tokio::select! {
            _ = async { tokio::join!(running, queued) } => panic!("nobody waited for these"),
            job = rig.job_when(|job| is_running(job) && rig.service.queue.waiting() == 1) => job,
        };
        // Both futures are dropped here, as a server drops those of a closed connection.
        assert_eq!(rig.service.queue.waiting(), 0, "stream: {stream}");
        assert!(job.see(|board| board.state.is_end() && board.step < board.of));
        assert!(rig.service.store.under_way().is_empty());
    }
    rig.post(PATH, &json!({"prompt": PROMPT, "num_inference_steps": 1})).await.ok();
    let metrics = String::from_utf8(rig.get("/metrics").await.body).unwrap();
    let line = "ng_sample_requests_failed_total{reason=\"disconnected\"} 4";
    assert!(metrics.contains(line), "{metrics}");
}
