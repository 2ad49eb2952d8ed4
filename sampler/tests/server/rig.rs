//! A server on an export of the embedded model, and what tests ask of it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Request, StatusCode},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use clap::Parser;
use http_body_util::BodyExt;
use indicatif::ProgressBar;
use sampler::{
    engine::{Engine, Finished, Options, Watch},
    export::Export,
    request,
    server::{
        app::app,
        ask::{Card, Limits},
        guard::Guard,
        job::{Job, State},
        log::Log,
        service::{Patience, Service, Settings},
        store::Keep,
        worker,
    },
};
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt;

pub(crate) const PROMPT: &str = "red \"HAT\"";
/// Steps that take a while.
pub(crate) const LONG: usize = 200;

/// The embedded model's export, made once.
static EXPORT: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| export(&[]));

/// The embedded model as `ng-export` with `options` writes it.
pub(crate) fn export(options: &[&str]) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("signs");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/signs");
    let typed = [Path::new("ng-export"), &model, Path::new("--out"), &folder];
    let typed = typed.into_iter().chain(options.iter().map(Path::new)).map(Path::as_os_str);
    let request = exporter::args::Args::parse_from(typed).request();
    exporter::export::export(&request, &ProgressBar::hidden(), &|| false).unwrap();
    (home, folder)
}

pub(crate) struct Rig {
    pub service: Arc<Service>,
    pub router: Router,
}

/// What a request got.
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

fn options() -> Options {
    Options { threads: 1, ..Options::default() }
}

pub(crate) fn settings() -> Settings {
    settings_of(&EXPORT.1)
}

pub(crate) fn settings_of(folder: &Path) -> Settings {
    let export = Arc::new(Export::open(folder, None).unwrap());
    Settings {
        cards: vec![Card { name: "signs".to_owned(), created: 1, export }],
        loras: None,
        provider: "cpu".to_owned(),
        precision: "f32".to_owned(),
        queue: 64,
        keep: Keep { time: Duration::from_mins(10), bytes: 1 << 24 },
        limits: Limits { steps: LONG, images: 10, pixels: 256 * 256 },
        patience: Patience::default(),
        guard: Guard { loopback: true, ..Guard::default() },
        log: Log { silent: true, ..Log::default() },
    }
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(settings())
    }

    pub(crate) fn with(settings: Settings) -> Self {
        let rig = Self::without_worker(settings);
        let options = Options { batch: 4, ..options() };
        let engine = Engine::closed(rig.service.cards[0].export.clone(), &options);
        worker::start(rig.service.clone(), vec![engine]).unwrap();
        rig
    }

    /// Nothing is ever drawn.
    pub(crate) fn without_worker(settings: Settings) -> Self {
        let service = Service::new(settings);
        Self { router: app(service.clone()), service }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).header("host", "localhost").body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body.to_string())).await
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Answer { status: parts.status, headers: parts.headers, body }
    }

    /// The only job under way, once it is there and `holds` of it.
    pub(crate) async fn job_when(&self, holds: impl Fn(&Job) -> bool) -> Arc<Job> {
        self.until(|| self.service.store.under_way().into_iter().find(|job| holds(job))).await
    }

    /// Waits for something to be there.
    pub(crate) async fn until<T>(&self, mut there: impl FnMut() -> Option<T>) -> T {
        for _ in 0..6000 {
            if let Some(found) = there() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not come");
    }
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    let request = Request::post(path).header("host", "localhost:8080");
    request.header("content-type", "application/json").body(body.into()).unwrap()
}

pub(crate) fn is_running(job: &Job) -> bool {
    job.see(|board| board.state == State::Running && board.step > 0)
}

impl Answer {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Server-sent events, each its name and data.
    pub(crate) fn events(&self) -> Vec<(String, String)> {
        let text = String::from_utf8(self.body.clone()).unwrap();
        let of = |block: &str, name: &str| {
            let lines = block.lines().filter_map(|line| line.strip_prefix(name));
            lines.collect::<Vec<_>>().join("\n")
        };
        text.split("\n\n")
            .filter(|block| block.contains("data: "))
            .map(|block| (of(block, "event: "), of(block, "data: ")))
            .collect()
    }
}

/// Pixels of a PNG.
pub(crate) fn pixels(file: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}

pub(crate) fn decoded(text: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(text.as_str().expect("base64 is a string")).unwrap()
}

/// Pixels that an engine alone gives [`PROMPT`], one image a seed.
pub(crate) fn drawn_alone(seeds: impl IntoIterator<Item = u64>, steps: usize) -> Vec<Vec<u8>> {
    struct Pictures(Vec<Vec<u8>>);
    impl Watch for Pictures {
        fn done(&mut self, _: usize, image: anyhow::Result<Finished>) {
            self.0.push(image.unwrap().picture.rgb);
        }
    }
    let mut engine = Engine::open(&EXPORT.1, &options()).unwrap();
    let mut pictures = Pictures(Vec::new());
    for seed in seeds {
        let request = request::Request {
            prompt: PROMPT.to_owned(),
            seed: Some(seed),
            steps: Some(steps),
            ..request::Request::default()
        };
        let job = engine.export().job(request).unwrap();
        engine.generate(&[job], &mut pictures);
    }
    pictures.0
}
