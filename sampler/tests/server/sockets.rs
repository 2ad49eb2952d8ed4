//! Connections as clients open, keep and break them.

use std::{sync::Arc, time::Duration};

use sampler::server::{job::Job, listen, service::Patience};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::{JoinHandle, spawn},
};

use crate::rig::{LONG, PROMPT, Rig, is_running, settings};

/// A server on a port of its own.
struct Open {
    rig: Rig,
    port: u16,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<anyhow::Result<()>>,
}

impl Open {
    async fn new(rig: Rig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel();
        let closing = async { _ = stopped.await };
        let grace = Duration::from_mins(1);
        let served = spawn(listen::serve(listener, rig.service.clone(), closing, grace));
        Self { rig, port, stop: Some(stop), served }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.unwrap()
    }

    /// Status and everything that comes back for `bytes`, after which nothing is sent.
    async fn talk(&self, bytes: &[u8]) -> (u16, String) {
        let mut stream = self.connect().await;
        // What is refused early may not be read to its end.
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
        answer(stream).await
    }

    async fn health(&self) -> u16 {
        self.talk(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await.0
    }
}

async fn answer(mut stream: TcpStream) -> (u16, String) {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text).await;
    let text = String::from_utf8_lossy(&text).into_owned();
    let status = text.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_default();
    (status, text)
}

const HEAD: &str = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n\
                    Content-Type: application/json\r\n";

fn framed(body: &serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    format!("{HEAD}Connection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[tokio::test]
async fn broken_requests_get_a_4xx_and_health_stays() {
    let open = Open::new(Rig::without_worker(settings())).await;
    let chunked = format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n");
    let large = "a".repeat(100_000);
    for (what, request) in [
        ("half a head", HEAD.to_owned()),
        ("half a body", format!("{HEAD}Content-Length: 99\r\n\r\n{{")),
        (
            "no host",
            format!("{}Content-Length: 2\r\n\r\n{{}}", HEAD.replace("Host: localhost\r\n", "")),
        ),
        ("two lengths", format!("{HEAD}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}")),
        ("a negative length", format!("{HEAD}Content-Length: -1\r\n\r\n{{}}")),
        ("a huge length", format!("{HEAD}Content-Length: 999999999999\r\n\r\n{{}}")),
        ("a chunk of no size", format!("{chunked}zz\r\n{{}}\r\n0\r\n\r\n")),
        ("65,537 chunks", format!("{chunked}{}0\r\n\r\n", "1\r\n \r\n".repeat(65_537))),
        ("a large head", format!("{HEAD}X: {large}\r\n\r\n")),
        ("a large body", format!("{HEAD}Content-Length: 200000\r\n\r\n{large}{large}")),
        ("no HTTP", "\u{16}\u{3}\u{1} hello there\r\n\r\n".to_owned()),
    ] {
        let (status, text) = open.talk(request.as_bytes()).await;
        assert!((400..500).contains(&status), "{what}: {text}");
        assert_eq!(open.health().await, 200, "after {what}");
    }
}

#[tokio::test]
async fn slow_requests_are_given_up_and_others_are_not_held_up() {
    let mut settings = settings();
    let patience = Duration::from_millis(300);
    settings.patience = Patience { head: patience, body: patience };
    let open = Open::new(Rig::without_worker(settings)).await;
    let mut slow = Vec::new();
    for start in
        [HEAD.to_owned(), format!("{HEAD}Content-Length: 99\r\n\r\n{{")].iter().cycle().take(40)
    {
        let mut stream = open.connect().await;
        stream.write_all(start.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    assert_eq!(open.health().await, 200);
    for stream in slow {
        let (status, text) = answer(stream).await;
        assert_eq!(status, 408, "{text}");
    }
}

#[tokio::test]
async fn closed_connections_free_their_slots() {
    let open = Open::new(Rig::new()).await;
    let wish = framed(&json!({"prompt": PROMPT, "num_inference_steps": LONG}));
    let mut streams = Vec::new();
    for _ in 0..30 {
        let mut stream = open.connect().await;
        stream.write_all(&wish).await.unwrap();
        streams.push(stream);
    }
    let under_way = |n| (open.rig.service.store.under_way().len() == n).then_some(());
    open.rig.until(|| under_way(30)).await;
    let running: Arc<Job> = open.rig.job_when(is_running).await;
    drop(streams);
    open.rig.until(|| under_way(0)).await;
    assert_eq!(open.rig.service.queue.waiting(), 0);
    assert!(running.see(|board| board.step < board.of));
    assert_eq!(open.health().await, 200);
}

#[tokio::test]
async fn what_was_accepted_is_answered_before_the_end() {
    let mut open = Open::new(Rig::new()).await;
    let wish = framed(&json!({"prompt": PROMPT, "num_inference_steps": 20}));
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = open.connect().await;
        stream.write_all(&wish).await.unwrap();
        streams.push(stream);
    }
    let job = json!({"prompt": PROMPT, "steps": 20});
    let id = open.rig.post("/api/jobs", &job).await.json()["id"].as_str().unwrap().to_owned();
    open.rig.until(|| (open.rig.service.store.under_way().len() == 9).then_some(())).await;
    open.stop.take().unwrap().send(()).unwrap();
    open.rig.until(|| open.rig.service.is_closing().then_some(())).await;
    let (status, text) = open.talk(&wish).await;
    assert_eq!(status, 503, "{text}");
    for stream in streams {
        let (status, text) = answer(stream).await;
        assert!(status == 200 && text.contains("b64_json"), "{text}");
    }
    // A job of the jobs API is answered when its image has been fetched.
    open.rig.until(|| open.rig.service.store.under_way().is_empty().then_some(())).await;
    let get = format!(
        "GET /api/jobs/{id}/images/0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    );
    assert_eq!(open.talk(get.as_bytes()).await.0, 200);
    open.served.await.unwrap().unwrap();
    assert!(TcpStream::connect(("127.0.0.1", open.port)).await.is_err(), "the port is closed");
}
