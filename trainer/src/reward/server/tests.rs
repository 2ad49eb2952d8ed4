//! The protocol, and every way in which a server can fail.

use super::super::{
    RewardConfig, Rewards, Scores,
    loopback::{Loopback, Reply, images, refusing, width},
};
use super::*;
use std::{thread, time::Duration};
use tch::Device;

fn rewards(url: &str, more: &str) -> Rewards {
    let table =
        format!("kind = 'server'\nname = 'own'\nweight = 1\ntimeout = 0.3\nurl = '{url}'\n{more}");
    let mut config: RewardConfig = toml::from_str(&table).unwrap();
    if !more.contains("patience") {
        config.patience = 0.0;
    }
    let mut rewards = Rewards::open(&[config], 2, Device::Cpu).unwrap();
    rewards.first_pause = Duration::from_millis(1);
    rewards
}

fn score(rewards: &Rewards, n: u32) -> Result<Scores> {
    let prompt: Prompt = flow::prompts::from_json(&json!({"prompt": "a cat", "tag": "x"})).unwrap();
    let images = images(n);
    rewards.score(&vec![&prompt; images.len()], &images.iter().collect::<Vec<_>>())
}

/// Scores images by their width.
fn widths(body: &Value) -> Reply {
    let scores: Vec<u32> = body["images"].as_array().unwrap().iter().map(width).collect();
    Reply::Say(200, json!({ "scores": scores }).to_string())
}

#[test]
fn images_go_in_batches_and_scores_come_in_order() {
    let server = Loopback::start(|n, body| {
        thread::sleep(Duration::from_millis(if n == 0 { 60 } else { 20 }));
        widths(body)
    });
    let scores = score(&rewards(&server.url(), "batch = 3\nrequests = 2"), 8).unwrap();
    let expected: Vec<f64> = (1..=8).map(f64::from).collect();
    assert_eq!(scores.outcomes[0].scores, Some(expected));
    let seen = server.seen();
    assert_eq!((seen.len(), server.busiest()), (3, 2));
    for request in seen {
        let n = request.body["images"].as_array().unwrap().len();
        assert_eq!(request.body["prompts"], json!(vec!["a cat"; n]));
        assert_eq!(
            request.body["metadata"],
            json!(vec![json!({"prompt": "a cat", "tag": "x"}); n])
        );
        assert!(request.head.starts_with("post /score "), "{}", request.head);
        assert!(!request.head.contains("authorization"));
    }
}

fn say(status: u16, body: &str) -> Reply {
    Reply::Say(status, body.to_owned())
}

type Fault = fn() -> Reply;

/// Answers that are no scores for three images, and what is said of each.
const FAULTS: [(Fault, &str); 13] = [
    (|| Reply::Stall, "no answer in 0.3 s"),
    (|| Reply::CutShort, "Peer disconnected"),
    (|| say(200, "{\"scores\": [1, NaN, 3]}"), "not JSON"),
    (|| say(200, "{\"scores\": [1, 1e999, 3]}"), "not JSON"),
    (|| say(200, "{\"scores\": [1, null, 3]}"), "scores[1] is null"),
    (|| say(200, "{\"scores\": [1, 2]}"), "it gave 2 scores for 3 images"),
    (|| say(200, "{\"scores\": [1, 2, 3, 4]}"), "it gave 4 scores for 3 images"),
    (|| say(200, "{\"rewards\": [1, 2, 3]}"), "no list `scores`"),
    (|| say(200, "{\"error\": \"out of\\nmemory\"}"), "the server says: out of memory"),
    (|| say(200, "<html>\n<p>hello</html>"), "not JSON"),
    (|| say(200, ""), "(nothing)"),
    (|| say(200, &" ".repeat(5 << 20)), "longer than 4194304 bytes"),
    (|| say(500, "it\nbroke"), "status 500 Internal Server Error: it broke"),
];

#[test]
fn a_passing_fault_is_retried() {
    for (fault, says) in FAULTS {
        let server = Loopback::start(move |n, body| if n < 2 { fault() } else { widths(body) });
        let scores = score(&rewards(&server.url(), ""), 3).unwrap();
        let outcome = &scores.outcomes[0];
        assert_eq!(outcome.scores.as_deref(), Some(&[1.0, 2.0, 3.0][..]), "{says}");
        assert_eq!((outcome.failures, outcome.retries, server.seen().len()), (2, 2, 3), "{says}");
    }
}

#[test]
fn a_lasting_fault_leaves_the_reward_out_or_ends_the_run() {
    for (fault, says) in FAULTS {
        let server = Loopback::start(move |_, _| fault());
        let optional = score(&rewards(&server.url(), "required = false\nretries = 1"), 3).unwrap();
        let outcome = &optional.outcomes[0];
        assert_eq!((&outcome.scores, outcome.failures), (&None, 2), "{says}");
        assert!(outcome.error.as_deref().unwrap().contains(says), "{outcome:?}");
        let error = score(&rewards(&server.url(), "retries = 1"), 3).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.starts_with("reward \"own\" failed, attempts: 2: http://127.0.0.1:"),
            "{error}"
        );
        assert!(error.contains(says) && !error.contains('\n'), "{error}");
        assert_eq!(server.seen().len(), 4);
    }
}

#[test]
fn a_refused_connection_is_retried_and_named() {
    let error = format!("{:#}", score(&rewards(&refusing(), "retries = 1"), 3).unwrap_err());
    assert!(error.contains("attempts: 2") && error.contains("Connection refused"), "{error}");
}

#[test]
fn a_request_that_the_server_refuses_is_not_repeated() {
    for (status, n_attempts) in [(400, 1), (404, 1), (302, 1), (401, 1), (429, 3), (503, 3)] {
        let server = Loopback::start(move |_, _| say(status, "{\"detail\": \"no\"}"));
        let scores = score(&rewards(&server.url(), "required = false"), 2).unwrap();
        let outcome = &scores.outcomes[0];
        assert_eq!((&outcome.scores, outcome.failures), (&None, n_attempts), "{status}");
        assert_eq!(server.seen().len(), n_attempts as usize);
        let error = outcome.error.as_deref().unwrap();
        assert!(error.contains(&format!("status {status}")) && error.contains("no"), "{error}");
    }
}

#[test]
fn one_bad_image_is_asked_about_again_alone() {
    let fails_on = |body: &Value, bad: u32| {
        body["images"].as_array().unwrap().iter().any(|image| width(image) == bad)
    };
    let server = Loopback::start(move |n, body| {
        if fails_on(body, 5) && n < 8 { say(500, "image 5") } else { widths(body) }
    });
    let one_by_one = rewards(&server.url(), "batch = 1\nrequests = 2");
    let scores = score(&one_by_one, 8).unwrap();
    let expected: Vec<f64> = (1..=8).map(f64::from).collect();
    assert_eq!(scores.outcomes[0].scores.as_deref(), Some(&expected[..]));
    assert_eq!((scores.outcomes[0].failures, server.seen().len()), (1, 9));

    let server =
        Loopback::start(
            move |_, body| {
                if fails_on(body, 5) { say(500, "image 5") } else { widths(body) }
            },
        );
    let optional = rewards(&server.url(), "batch = 1\nrequests = 2\nrequired = false");
    let outcome = &score(&optional, 8).unwrap().outcomes[0];
    assert_eq!((&outcome.scores, outcome.failures, server.seen().len()), (&None, 3, 10));
    assert!(score(&optional, 4).unwrap().outcomes[0].scores.is_some(), "the next group is scored");
}

/// Away for far more attempts than `retries` allows.
#[test]
fn a_server_that_is_away_is_waited_for() {
    for away in [503, 502, 429] {
        let server =
            Loopback::start(move |n, body| if n < 9 { say(away, "later") } else { widths(body) });
        let patient = rewards(&server.url(), "retries = 0\npatience = 1");
        let outcome = &score(&patient, 3).unwrap().outcomes[0];
        assert_eq!(outcome.scores.as_deref(), Some(&[1.0, 2.0, 3.0][..]), "{away}");
        assert_eq!(outcome.failures, 9);
    }
    // A connection that is refused, until somebody listens there.
    let url = refusing();
    let patient = rewards(&url, "retries = 0\npatience = 1");
    thread::scope(|scope| {
        let scores = scope.spawn(|| score(&patient, 2));
        thread::sleep(Duration::from_millis(200));
        let _server = Loopback::start_at(&url, |_, body| widths(body));
        assert!(scores.join().unwrap().unwrap().outcomes[0].failures > 1);
    });
}

#[test]
fn patience_ends_and_a_stop_ends_it_at_once() {
    let impatient = rewards(&refusing(), "retries = 0\npatience = 0.002");
    let error = format!("{:#}", score(&impatient, 2).unwrap_err());
    assert!(error.contains("Connection refused"), "{error}");
    let mut patient = rewards(&refusing(), "retries = 0\npatience = 9");
    patient.stop_when(|| true);
    let error = format!("{:#}", score(&patient, 2).unwrap_err());
    assert!(error.contains("stopped while waiting for reward \"own\""), "{error}");
}

/// A server that asks for an hour is not asked every second, and nobody waits longer than they want to.
#[test]
fn a_server_is_left_alone_as_long_as_it_asks() {
    let server = Loopback::start(|_, _| Reply::Later(3600));
    let error = score(&rewards(&server.url(), "retries = 5\npatience = 10"), 2).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("status 429") && error.contains("asks to wait 3600 s"), "{error}");
    assert_eq!(server.seen().len(), 1);
    let server = Loopback::start(|n, body| if n == 0 { Reply::Later(1) } else { widths(body) });
    let outcome = &score(&rewards(&server.url(), "retries = 1"), 2).unwrap().outcomes[0];
    assert!(outcome.seconds >= 1.0 && outcome.failures == 1, "{outcome:?}");
}

/// The key is the value of a variable that cargo sets, `trainer`.
#[test]
fn the_key_is_in_no_message() {
    let echoes = |status: u16, body: &'static str| {
        let server = Loopback::start(move |_, _| say(status, body));
        let url = format!("{}?k={{key}}", server.url());
        let more = "api_key_env = 'CARGO_PKG_NAME'\nretries = 0";
        let of_url = format!("{:#}", score(&rewards(&url, more), 2).unwrap_err());
        let in_header = format!("{:#}", score(&rewards(&server.url(), more), 2).unwrap_err());
        let seen = server.seen();
        assert!(seen[0].head.contains("?k=trainer "), "{}", seen[0].head);
        assert!(!seen[0].head.contains("authorization"), "{}", seen[0].head);
        assert!(seen[1].head.contains("authorization: bearer trainer"), "{}", seen[1].head);
        [of_url, in_header]
    };
    for (status, body) in [
        (401, "invalid authorization: Bearer trainer"),
        (500, "trainer"),
        (200, "<p>trainer"),
        (200, "{\"error\": {\"message\": \"bad \\u0074rainer\"}}"),
        (200, "{\"scores\": [\"trainer\", 1]}"),
    ] {
        for said in echoes(status, body) {
            assert!(!said.contains("trainer") && said.contains("[key]"), "{said}");
        }
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let error = |more: &str| {
        let table = format!("kind = 'server'\nname = 'own'\nweight = 1\n{more}");
        match toml::from_str::<RewardConfig>(&table) {
            Err(error) => error.to_string(),
            Ok(config) => match Rewards::open(&[config], 1, Device::Cpu) {
                Err(error) => format!("{error:#}"),
                Ok(_) => panic!("{more} was accepted"),
            },
        }
    };
    for (more, says) in [
        ("", "url"),
        ("url = 'localhost:8000'", "not http://"),
        ("url = 'ftp://a/b'", "not http://"),
        ("url = 'http:///score'", "no address"),
        ("url = 'http://me:secret@a/b'", "`url` holds a login"),
        ("url = 'http://a/b?api_key=secret'", "api_key={key}"),
        ("url = 'http://a/b'\nca = 'absent.pem'", "absent.pem"),
        ("url = 'http://a/b'\nca = 'Cargo.toml'", "no certificate"),
        ("url = 'http://a/b'\nbatches = 3", "batches"),
        ("url = 'http://a/b'\nbatch = 0", "`batch` is 0"),
        ("url = 'http://a/b'\ntimeout = 0", "`timeout` is 0 s"),
        ("url = 'http://a/b'\nrequests = 0", "`requests` is 0"),
        ("url = 'http://a/b'\napi_key_env = 'NG_ABSENT_KEY'", "NG_ABSENT_KEY, which is not set"),
    ] {
        let error = error(more);
        assert!(error.contains(says) && !error.contains("secret"), "{more}: {error}");
    }
}
