//! A drawing on its way: what state it is in, and who may watch or stop it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use axum::body::Bytes;
use tokio::sync::watch;

use super::drawing::Drawing;

/// A drawing, from the queue to its images.
#[derive(Debug)]
pub struct Job {
    pub id: String,
    pub drawing: Drawing,
    /// Id of the request that brought it.
    pub request_id: String,
    pub source: Source,
    pub created: SystemTime,
    pub queued: Instant,
    /// Images that were sent to a client that asked for it later.
    fetched: Mutex<HashSet<usize>>,
    board: watch::Sender<Board>,
}

/// Which API a job came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    OpenAi,
    Jobs,
    Sdapi,
}

/// What can be seen of a job.
#[derive(Clone, Debug)]
pub struct Board {
    pub state: State,
    /// Network calls done, over all images.
    pub step: usize,
    /// Network calls in all.
    pub of: usize,
    pub started: Option<Instant>,
    pub finished: Option<Instant>,
    pub previews: Vec<Preview>,
    /// In the order of their seeds; `None` until drawn.
    pub images: Vec<Option<Bytes>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Queued,
    Running,
    Done,
    Cancelled,
    /// Why.
    Failed(String),
}

/// What an image is going to be.
#[derive(Clone, Debug)]
pub struct Preview {
    /// Index of the image.
    pub image: usize,
    /// Its network calls done.
    pub step: usize,
    /// A file of the drawing's format.
    pub file: Bytes,
}

impl Job {
    pub fn new(id: String, drawing: Drawing, source: Source, request_id: &str) -> Arc<Self> {
        let board = Board {
            state: State::Queued,
            step: 0,
            of: drawing.calls(),
            started: None,
            finished: None,
            previews: Vec::new(),
            images: vec![None; drawing.count],
        };
        Arc::new(Self {
            id,
            drawing,
            request_id: request_id.to_owned(),
            source,
            created: SystemTime::now(),
            queued: Instant::now(),
            fetched: Mutex::default(),
            board: watch::Sender::new(board),
        })
    }

    /// What can be seen now.
    pub fn board(&self) -> Board {
        self.board.borrow().clone()
    }

    /// Looks without a copy.
    pub fn see<T>(&self, look: impl FnOnce(&Board) -> T) -> T {
        look(&self.board.borrow())
    }

    /// Wakes at every change.
    pub fn watch(&self) -> watch::Receiver<Board> {
        self.board.subscribe()
    }

    /// Waits for the end and returns the board.
    pub async fn ended(&self) -> Board {
        let mut watch = self.watch();
        let ended = watch.wait_for(|board| board.state.is_end()).await;
        ended.map_or_else(|_| self.board(), |board| board.clone())
    }

    /// An image of it is begun. Returns whether it is the first.
    pub fn begin(&self) -> bool {
        self.board.send_if_modified(|board| {
            let first = board.state == State::Queued;
            if first {
                board.state = State::Running;
                board.started = Some(Instant::now());
            }
            first
        })
    }

    /// A network call is done; `preview` if one was due.
    pub fn step(&self, preview: Option<Preview>) {
        self.board.send_modify(|board| {
            // Images that are drawn again after their company failed take their steps twice.
            board.step = (board.step + 1).min(board.of);
            board.previews.extend(preview);
        });
    }

    /// Image `index` is there. Returns whether it was the last.
    pub fn image(&self, index: usize, file: Bytes) -> bool {
        self.board.send_modify(|board| board.images[index] = Some(file));
        self.see(|board| board.images.iter().all(Option::is_some)) && self.end(State::Done)
    }

    /// Image `index` was sent.
    pub fn fetched(&self, index: usize) {
        self.fetched.lock().unwrap_or_else(PoisonError::into_inner).insert(index);
    }

    /// Whether its client has, or will get with its response, all that there is.
    pub fn is_delivered(&self) -> bool {
        let n_sent = self.fetched.lock().unwrap_or_else(PoisonError::into_inner).len();
        let all_sent = |board: &Board| n_sent == board.images.len();
        self.source != Source::Jobs || self.see(|b| b.state != State::Done || all_sent(b))
    }

    /// Ends it, unless it has ended. Returns whether it had not.
    pub fn end(&self, state: State) -> bool {
        self.board.send_if_modified(|board| {
            let first = !board.state.is_end();
            if first {
                board.state = state;
                board.finished = Some(Instant::now());
            }
            first
        })
    }
}

impl State {
    pub fn is_end(&self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed(_) => "failed",
        }
    }
}

impl Board {
    /// Seconds that the steps to come take at the pace of those done.
    pub fn seconds_left(&self) -> Option<f64> {
        let elapsed = self.started?.elapsed();
        (self.step > 0 && !self.state.is_end())
            .then(|| elapsed.as_secs_f64() / self.step as f64 * (self.of - self.step) as f64)
    }

    /// Bytes of its files.
    pub fn size(&self) -> usize {
        let images = self.images.iter().flatten().map(Bytes::len);
        images.chain(self.previews.iter().map(|preview| preview.file.len())).sum()
    }

    /// Time from the first step to the end or to now.
    pub fn run_time(&self) -> Duration {
        let Some(started) = self.started else { return Duration::ZERO };
        self.finished.unwrap_or_else(Instant::now).duration_since(started)
    }
}
