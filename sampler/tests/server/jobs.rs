//! The jobs API.

use serde_json::{Value, json};

use crate::rig::{LONG, PROMPT, Rig, drawn_alone, is_running, pixels, settings};

async fn create(rig: &Rig, wish: &Value) -> String {
    let answer = rig.post("/api/jobs", wish).await;
    assert_eq!(answer.status, 202, "{}", String::from_utf8_lossy(&answer.body));
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(answer.header("location"), Some(format!("/api/jobs/{id}").as_str()));
    id
}

#[tokio::test]
async fn a_job_is_taken_in_watched_and_fetched() {
    let rig = Rig::new();
    let wish = json!({"prompt": PROMPT, "seed": 3, "count": 2, "steps": 6, "previews": 2});
    let id = create(&rig, &wish).await;
    let events = rig.get(&format!("/api/jobs/{id}/events")).await.events();
    let count = |name: &str| events.iter().filter(|event| event.0 == name).count();
    assert_eq!((count("preview"), count("done")), (4, 1));
    // At most one for the beginning, for each step and for each image.
    assert!((1..=1 + 1 + 12 + 2).contains(&count("progress")), "{} events", events.len());
    assert_eq!(events.last().unwrap().0, "done");
    let data = |(_, data): &(String, String)| serde_json::from_str::<Value>(data).unwrap();
    let previews: Vec<_> = events.iter().filter(|(name, _)| name == "preview").map(data).collect();
    let places: Vec<_> =
        previews.iter().map(|p| (p["image"].as_u64(), p["step"].as_u64())).collect();
    assert_eq!(
        places,
        [(Some(0), Some(2)), (Some(1), Some(2)), (Some(0), Some(4)), (Some(1), Some(4))]
    );
    assert!(previews[0]["url"].as_str().unwrap().starts_with("data:image/png;base64,"));
    let status = rig.get(&format!("/api/jobs/{id}")).await.ok();
    assert_eq!(
        (&status["state"], &status["step"], &status["of"]),
        (&json!("done"), &json!(12), &json!(12))
    );
    for (index, alone) in drawn_alone([3, 4], 6).iter().enumerate() {
        assert_eq!(status["images"][index]["seed"], 3 + index);
        let image = rig.get(status["images"][index]["url"].as_str().unwrap()).await;
        assert_eq!(image.header("content-type"), Some("image/png"));
        assert!(pixels(&image.body) == *alone, "image {index}");
    }
    assert_eq!(rig.get("/api/jobs").await.ok()["jobs"], json!([status]));
    assert_eq!(rig.get(&format!("/api/jobs/{id}/images/2")).await.status, 404);
}

#[tokio::test]
async fn cancelling_answers_by_the_state_of_the_job() {
    let rig = Rig::new();
    let wish = |steps: usize| json!({"prompt": PROMPT, "steps": steps});
    let (first, second) = (create(&rig, &wish(LONG)).await, create(&rig, &wish(3)).await);
    let running = rig.job_when(is_running).await;
    assert_eq!(running.id, first);
    let status = rig.get(&format!("/api/jobs/{second}")).await.ok();
    assert_eq!((&status["state"], &status["seconds_left"]), (&json!("queued"), &Value::Null));
    assert!(rig.get(&format!("/api/jobs/{first}")).await.ok()["seconds_left"].is_f64());
    for id in [&second, &first] {
        let path = format!("/api/jobs/{id}/cancel");
        assert_eq!(rig.post(&path, &json!({})).await.ok()["state"], "cancelled");
        let again = rig.post(&path, &json!({})).await;
        assert_eq!(
            (again.status.as_u16(), &again.json()["error"]["code"]),
            (409, &json!("job_ended"))
        );
    }
    assert!(running.see(|board| board.step < board.of), "it was stopped on its way");
    assert_eq!(rig.post("/api/jobs/job-1/cancel", &json!({})).await.status, 404);
    let events = rig.get(&format!("/api/jobs/{first}/events")).await.events();
    assert_eq!(events.last().unwrap().0, "cancelled");
    // The networks are as good as before.
    let id = create(&rig, &json!({"prompt": PROMPT, "seed": 3, "steps": 2})).await;
    rig.get(&format!("/api/jobs/{id}/events")).await;
    let image = rig.get(&format!("/api/jobs/{id}/images/0")).await;
    assert!(pixels(&image.body) == drawn_alone([3], 2)[0]);
}

#[tokio::test]
async fn ended_jobs_are_kept_within_bounds() {
    let mut settings = settings();
    settings.keep.bytes = 0;
    let rig = Rig::with(settings);
    let id = create(&rig, &json!({"prompt": PROMPT, "steps": 1})).await;
    rig.until(|| rig.service.store.under_way().is_empty().then_some(())).await;
    for answer in [
        rig.get(&format!("/api/jobs/{id}")).await,
        rig.get(&format!("/api/jobs/{id}/images/0")).await,
        rig.post(&format!("/api/jobs/{id}/cancel"), &json!({})).await,
    ] {
        assert_eq!(
            (answer.status.as_u16(), &answer.json()["error"]["code"]),
            (410, &json!("job_gone"))
        );
    }
}

#[tokio::test]
async fn a_request_without_a_number_of_steps_gets_no_more_than_the_server_allows() {
    for (most, gets) in [(LONG, 8), (3, 3)] {
        let mut settings = settings();
        settings.limits.steps = most;
        let rig = Rig::with(settings);
        let id = create(&rig, &json!({"prompt": PROMPT})).await;
        rig.get(&format!("/api/jobs/{id}/events")).await.events();
        let job = rig.get(&format!("/api/jobs/{id}")).await.ok();
        assert_eq!((&job["steps"], &job["of"]), (&json!(gets), &json!(gets)));
    }
}
