//! What is refused, and how.

use axum::{body::Body, http::Request};
use serde_json::{Value, json};

use crate::rig::{Answer, Rig, post, settings};

const PATH: &str = "/v1/images/generations";

#[track_caller]
fn check(answer: &Answer, status: u16, code: &str) {
    let body = answer.json();
    let error = body["error"].as_object().unwrap();
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["code", "message", "param", "type"]);
    assert_eq!((answer.status.as_u16(), &error["code"]), (status, &json!(code)), "{body}");
    let retry = answer.header("retry-after");
    assert_eq!(
        answer.header("x-should-retry"),
        Some(if retry.is_some() { "true" } else { "false" })
    );
    assert!(answer.header("x-request-id").unwrap().starts_with("req-"));
    assert_eq!(answer.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn every_wrong_field_is_named() {
    let rig = Rig::without_worker(settings());
    for (field, value) in [
        ("prompt", json!(1)),
        ("prompt", json!("a\u{0}b")),
        ("prompt", json!("a".repeat(9000))),
        ("model", json!(["signs"])),
        ("n", json!(0)),
        ("n", json!(11)),
        ("n", json!(1.5)),
        ("n", json!("2")),
        ("size", json!("33x32")),
        ("size", json!("0x32")),
        ("size", json!("-32x32")),
        ("size", json!("1000000000x16")),
        ("size", json!("512x512")),
        ("size", json!("32X32")),
        ("size", json!("99999999999999999999x32")),
        ("quality", json!("best")),
        ("background", json!("transparent")),
        ("moderation", json!("high")),
        ("output_format", json!("bmp")),
        ("output_compression", json!(50)),
        ("response_format", json!("url")),
        ("style", json!("plain")),
        ("stream", json!("yes")),
        ("partial_images", json!(2)),
        ("negative_prompt", json!("blur")),
        ("num_inference_steps", json!(0)),
        ("num_inference_steps", json!(1_000_000_000)),
        ("guidance_scale", json!(3.5)),
        ("guidance_scale", json!(-1)),
        ("true_cfg_scale", json!(4)),
        ("seed", json!(-2)),
        ("seed", json!(1e30)),
        ("solver", json!("magic")),
        ("shift", json!(0)),
        ("colour", json!("red")),
    ] {
        let mut wish = json!({"prompt": "a"});
        wish[field] = value;
        let answer = rig.post(PATH, &wish).await;
        let error = answer.json()["error"].clone();
        check(&answer, 400, error["code"].as_str().unwrap());
        assert_eq!(error["param"], field, "{error}");
        assert!(error["message"].as_str().unwrap().contains(field), "{error}");
    }
    let nearest = rig.post(PATH, &json!({"prompt": "a", "size": "42x30"})).await.json();
    let message = nearest["error"]["message"].as_str().unwrap();
    assert!(message.contains("multiples of 8; the nearest is 40x32"), "{message}");
    check(&rig.post(PATH, &json!({})).await, 400, "missing_required_parameter");
    check(
        &rig.post(PATH, &json!({"prompt": "a", "model": "dall-e-3"})).await,
        404,
        "model_not_found",
    );
    let path = rig.post(PATH, &json!({"prompt": "a", "lora": {"path": "/etc/passwd"}})).await;
    assert_eq!(path.json()["error"]["param"], "lora.path");
    let lora = rig.post(PATH, &json!({"prompt": "a", "lora": {"name": "style"}})).await;
    assert_eq!(lora.json()["error"]["param"], "lora");
    assert_eq!(rig.service.queue.waiting(), 0);
}

#[tokio::test]
async fn the_limits_are_the_servers_own() {
    let mut settings = settings();
    (settings.limits.steps, settings.limits.images) = (300, 20);
    let rig = Rig::without_worker(settings);
    let paths = [
        (PATH, "num_inference_steps", "n"),
        ("/api/jobs", "steps", "count"),
        ("/sdapi/v1/txt2img", "steps", "n_iter"),
    ];
    for (path, steps, count) in paths {
        for (field, value, most) in
            [(steps, 0, 300), (steps, 301, 300), (count, 0, 20), (count, 21, 20)]
        {
            let mut wish = json!({"prompt": "a"});
            wish[field] = value.into();
            let answer = rig.post(path, &wish).await.json().to_string();
            let expected = format!("{field}: {value} is not from 1 to {most}");
            assert!(answer.contains(&expected), "{path}: {answer}");
        }
    }
    // Only the unknown field is wrong.
    let wish = json!({"prompt": "a", "num_inference_steps": 300, "n": 20, "colour": "red"});
    check(&rig.post(PATH, &wish).await, 400, "unknown_parameter");
}

#[tokio::test]
async fn bodies_that_are_no_requests() {
    let rig = Rig::without_worker(settings());
    check(&rig.send(post(PATH, "[]")).await, 400, "invalid_json");
    check(
        &rig.send(post(PATH, "{\"prompt\": \"a\", \"prompt\": \"b\"}")).await,
        400,
        "invalid_json",
    );
    check(&rig.send(post(PATH, b"{\"prompt\": \"\xff\"}".to_vec())).await, 400, "invalid_json");
    let large = json!({"prompt": "a".repeat(10_000_000)}).to_string();
    check(&rig.send(post(PATH, large.clone())).await, 413, "body_too_large");
    let unannounced = Body::from_stream(futures_util::stream::iter(
        large
            .into_bytes()
            .chunks(1000)
            .map(|part| Ok::<_, std::io::Error>(part.to_vec()))
            .collect::<Vec<_>>(),
    ));
    check(&rig.send(post(PATH, unannounced)).await, 413, "body_too_large");
    let form = Request::post(PATH).header("host", "localhost").header("content-type", "text/plain");
    check(&rig.send(form.body(Body::from("{}")).unwrap()).await, 415, "unsupported_media_type");
    check(&rig.get("/v1/images/edits").await, 404, "unknown_url");
    check(&rig.get(PATH).await, 405, "method_not_allowed");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_again() {
    let mut settings = settings();
    settings.queue = 3;
    let rig = Rig::without_worker(settings);
    let wish = |count: u64| json!({"prompt": "a", "count": count});
    assert_eq!(rig.post("/api/jobs", &wish(2)).await.status, 202);
    for path in ["/api/jobs", PATH] {
        let wish = if path == PATH { json!({"prompt": "a", "n": 2}) } else { wish(2) };
        let answer = rig.post(path, &wish).await;
        check(&answer, 429, "queue_full");
        assert!((1..=120).contains(&answer.header("retry-after").unwrap().parse::<u64>().unwrap()));
    }
    assert_eq!(rig.post("/api/jobs", &wish(1)).await.status, 202);
    assert_eq!(rig.service.queue.waiting(), 3);
    assert_eq!(rig.get("/ready").await.ok(), json!({"status": "ready"}));
    rig.service.close();
    check(&rig.post("/api/jobs", &wish(1)).await, 503, "shutting_down");
    assert_eq!(rig.get("/ready").await.status, 503);
    assert_eq!(rig.get("/health").await.status, 200);
}

#[tokio::test]
async fn strangers_are_kept_out() {
    let rig = Rig::without_worker(settings());
    let from = |host: &str, origin: &str| {
        let request = Request::get("/v1/models").header("host", host).header("origin", origin);
        request.body(Body::empty()).unwrap()
    };
    let own = rig.send(from("127.0.0.1:8080", "http://127.0.0.1:8080")).await;
    assert_eq!((own.status.as_u16(), own.header("access-control-allow-origin")), (200, None));
    check(
        &rig.send(from("127.0.0.1:8080", "http://evil.example")).await,
        403,
        "origin_not_allowed",
    );
    check(&rig.send(from("evil.example", "http://evil.example")).await, 403, "host_not_allowed");
    let page = rig.get("/").await;
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
    let text = String::from_utf8(page.body.clone()).unwrap();
    assert!(!text.contains("://"), "the page names another place");
}

#[tokio::test]
async fn a_request_keeps_its_own_id() {
    let rig = Rig::without_worker(settings());
    let with = |id: &str| {
        let request =
            Request::get("/health").header("host", "localhost").header("x-request-id", id);
        request.body(Body::empty()).unwrap()
    };
    assert_eq!(rig.send(with("mine-1")).await.header("x-request-id"), Some("mine-1"));
    let foreign = rig.send(with("a b")).await;
    assert!(foreign.header("x-request-id").unwrap().starts_with("req-"));
    let _: Value = foreign.ok();
}
