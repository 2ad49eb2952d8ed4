//! Server-sent events about a job, until it ends or the client is gone.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::stream;
use serde_json::Value;
use tokio::sync::watch;

use super::{
    job::{Board, Job},
    service::Ticket,
};

/// Between comments that keep a quiet connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    name: Option<&'static str>,
    data: String,
}

impl Frame {
    pub fn named(name: &'static str, data: &Value) -> Self {
        Self { name: Some(name), data: data.to_string() }
    }

    /// What ends a stream of the OpenAI API.
    pub fn done() -> Self {
        Self { name: None, data: "[DONE]".into() }
    }

    fn event(self) -> Event {
        let event = Event::default().data(self.data);
        match self.name {
            Some(name) => event.event(name),
            None => event,
        }
    }
}

/// Whoever a stream is about: a client's own job, or one that is only looked at.
pub trait Subject: Send + 'static {
    fn job(&self) -> &Job;
}

impl Subject for Ticket {
    fn job(&self) -> &Job {
        &self.job
    }
}

impl Subject for std::sync::Arc<Job> {
    fn job(&self) -> &Job {
        self
    }
}

/// Streams what `frames` makes of the job's board at every change; `seen` is its memory, 0 at first. The
/// stream ends after the frames of the job's end. The subject is dropped with the stream.
pub fn stream<S, F>(subject: S, frames: F) -> Response
where
    S: Subject,
    F: FnMut(&Job, &Board, &mut usize) -> Vec<Frame> + Send + 'static,
{
    let mut watch = subject.job().watch();
    // The state that the stream begins with is news to it.
    watch.mark_changed();
    let state = Reader { subject, watch, frames, seen: 0, ready: VecDeque::new(), ended: false };
    let events = stream::unfold(state, |mut reader| async move {
        let frame = reader.next().await?;
        Some((Ok::<_, Infallible>(frame.event()), reader))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

struct Reader<S, F> {
    subject: S,
    watch: watch::Receiver<Board>,
    frames: F,
    seen: usize,
    ready: VecDeque<Frame>,
    ended: bool,
}

impl<S: Subject, F: FnMut(&Job, &Board, &mut usize) -> Vec<Frame>> Reader<S, F> {
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            self.watch.changed().await.ok()?;
            let board = self.watch.borrow_and_update().clone();
            self.ended = board.state.is_end();
            let frames = (self.frames)(self.subject.job(), &board, &mut self.seen);
            self.ready.extend(frames);
        }
    }
}
