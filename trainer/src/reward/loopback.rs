//! An HTTP server on this machine that answers as a test wants it to.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use image::RgbImage;
use serde_json::Value;

/// What a request is answered with.
pub(super) enum Reply {
    /// Status and body.
    Say(u16, String),
    /// Too many requests: again after so many seconds.
    Later(u64),
    /// A body that ends before its announced length.
    CutShort,
    /// Nothing, until the server is dropped.
    Stall,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    /// Header lines in lower case.
    pub(super) head: String,
    pub(super) body: Value,
}

/// The server; dropping it ends it.
pub(super) struct Loopback {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    busiest: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
    /// Stalled connections wait for this to be dropped.
    stalling: Option<mpsc::Sender<()>>,
    acceptor: Option<JoinHandle<()>>,
}

/// Connections that a test may make.
const MAX_CONNECTIONS: usize = 1000;

impl Loopback {
    /// `answer(n, body)` answers request n, from 0.
    pub(super) fn start(answer: impl Fn(usize, &Value) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(&TcpListener::bind("127.0.0.1:0").unwrap(), answer)
    }

    /// The same at the address of `url`, as [`refusing`] gave it.
    pub(super) fn start_at(
        url: &str,
        answer: impl Fn(usize, &Value) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let address = url.trim_start_matches("http://").trim_end_matches("/score");
        Self::listen(&TcpListener::bind(address).unwrap(), answer)
    }

    fn listen(
        listener: &TcpListener,
        answer: impl Fn(usize, &Value) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = listener.try_clone().unwrap();
        let (stalling, stalled) = mpsc::channel::<()>();
        let mut server = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            busiest: Arc::default(),
            ended: Arc::default(),
            stalling: Some(stalling),
            acceptor: None,
        };
        let (seen, busiest) = (Arc::clone(&server.seen), Arc::clone(&server.busiest));
        let ended = Arc::clone(&server.ended);
        let (answer, stalled) = (Arc::new(answer), Arc::new(Mutex::new(stalled)));
        let busy = Arc::new(AtomicUsize::new(0));
        server.acceptor = Some(thread::spawn(move || {
            let mut workers = Vec::new();
            for stream in listener.incoming().take(MAX_CONNECTIONS) {
                if ended.load(Ordering::SeqCst) {
                    break;
                }
                let (answer, stalled, seen) = (answer.clone(), stalled.clone(), seen.clone());
                let (busy, busiest) = (busy.clone(), busiest.clone());
                workers.push(thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let request = receive(&stream);
                    busiest.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let n = {
                        let mut seen = seen.lock().unwrap();
                        seen.push(request.clone());
                        seen.len() - 1
                    };
                    let reply = answer(n, &request.body);
                    busy.fetch_sub(1, Ordering::SeqCst);
                    send(&mut stream, &reply, &stalled);
                }));
            }
            for worker in workers {
                worker.join().unwrap();
            }
        }));
        server
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}/score", self.address)
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Most requests that were answered at once.
    pub(super) fn busiest(&self) -> usize {
        self.busiest.load(Ordering::SeqCst)
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.stalling = None;
        self.ended.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take()
            && acceptor.join().is_err()
            && !thread::panicking()
        {
            panic!("the test server failed");
        }
    }
}

/// An address of this machine where nothing listens.
pub(super) fn refusing() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}/score", listener.local_addr().unwrap())
}

/// The width of an image sent as Base64 of a PNG file, with or without `data:` before it.
pub(super) fn width(image: &Value) -> u32 {
    let text = image.as_str().unwrap();
    let text = text.strip_prefix("data:image/png;base64,").unwrap_or(text);
    let png = BASE64_STANDARD.decode(text).unwrap();
    image::load_from_memory_with_format(&png, image::ImageFormat::Png).unwrap().width()
}

/// Images of width 1, 2, …
pub(super) fn images(n: u32) -> Vec<RgbImage> {
    (1..=n).map(|width| RgbImage::new(width, 1)).collect()
}

fn receive(stream: &TcpStream) -> Seen {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0, "the request ended in its head");
    }
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.expect("a length").parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    Seen { body: serde_json::from_slice(&body).unwrap(), head }
}

/// Clients may have gone away, so failures to write are theirs.
fn send(stream: &mut TcpStream, reply: &Reply, stalled: &Mutex<mpsc::Receiver<()>>) {
    let mut more = String::new();
    let (status, body, missing) = match reply {
        Reply::Say(status, body) => (*status, body.as_str(), 0),
        Reply::Later(seconds) => {
            more = format!("Retry-After: {seconds}\r\n");
            (429, "", 0)
        }
        Reply::CutShort => (200, "{\"scores\": [1", 8),
        Reply::Stall => {
            let _ = stalled.lock().unwrap().recv();
            return;
        }
    };
    let length = body.len() + missing;
    let head = format!("HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\n{more}");
    drop(stream.write_all(format!("{head}Connection: close\r\n\r\n{body}").as_bytes()));
}
