//! What the handlers share: the models' cards, the queue, the store, limits, metrics and log.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    ask::{Ask, Card, Limits, Names},
    guard::Guard,
    identity::new_id,
    job::{Job, Source, State},
    log::Log,
    metrics::{Kind, Metrics, Now, Reason},
    queue::{Queue, Refused},
    refusal::Refusal,
    store::{Keep, Store},
};

/// A server's state.
pub struct Service {
    /// At least one.
    pub cards: Vec<Card>,
    /// Folder of the LoRAs that clients may load.
    pub loras: Option<PathBuf>,
    /// What computes, and in which type; for metrics.
    pub provider: String,
    pub precision: String,
    pub queue: Queue,
    pub store: Store,
    pub limits: Limits,
    pub patience: Patience,
    pub guard: Guard,
    pub metrics: Metrics,
    pub log: Log,
    pub connections: AtomicUsize,
    /// The model of A1111 requests that name none.
    pub checkpoint: AtomicUsize,
    /// Whether the worker is there.
    pub alive: AtomicBool,
    closing: AtomicBool,
    /// Bits of the mean seconds an image takes, over the last few.
    pace: AtomicU64,
}

/// Settings of a [`Service`].
pub struct Settings {
    pub cards: Vec<Card>,
    pub loras: Option<PathBuf>,
    pub provider: String,
    pub precision: String,
    /// Images that may wait.
    pub queue: usize,
    pub keep: Keep,
    pub limits: Limits,
    pub patience: Patience,
    pub guard: Guard,
    pub log: Log,
}

/// How long a client may take over a request.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For its head, and for nothing at all between two requests.
    pub head: Duration,
    /// For its body.
    pub body: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { head: Duration::from_secs(10), body: Duration::from_secs(10) }
    }
}

/// Longest time that a client is told to wait, since the OpenAI clients wait no longer.
const MAX_WAIT: f64 = 120.0;

impl Service {
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            cards: settings.cards,
            loras: settings.loras,
            provider: settings.provider,
            precision: settings.precision,
            queue: Queue::new(settings.queue),
            store: Store::new(settings.keep),
            limits: settings.limits,
            patience: settings.patience,
            guard: settings.guard,
            metrics: Metrics::new(),
            log: settings.log,
            connections: AtomicUsize::new(0),
            checkpoint: AtomicUsize::new(0),
            alive: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            pace: AtomicU64::new(1f64.to_bits()),
        })
    }

    /// Number of the model called `name`, the first without one.
    ///
    /// # Errors
    /// 404 when there is none of that name.
    pub fn model(&self, name: Option<&str>) -> Result<usize, Refusal> {
        let Some(name) = name else { return Ok(0) };
        self.cards.iter().position(|card| card.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.cards.iter().map(|card| card.name.as_str()).collect();
            let message = format!("no model {name:?}; there are {}", names.join(", "));
            let param = Some("model".to_owned());
            let status = axum::http::StatusCode::NOT_FOUND;
            Refusal { param, ..Refusal::new(status, "model_not_found", message) }
        })
    }

    /// Takes in what `ask` means for model number `model`.
    ///
    /// # Errors
    /// A wrong field, a full queue (429) or a server that is going down (503).
    pub fn submit(
        &self,
        model: usize,
        ask: Ask,
        names: Names,
        source: Source,
        request_id: &str,
    ) -> Result<Arc<Job>, Refusal> {
        let drawing = self.cards[model].drawing(model, ask, self.limits, names)?;
        let job = Job::new(new_id("job"), drawing, source, request_id);
        self.store.insert(job.clone());
        if let Err(refused) = self.queue.push(job.clone()) {
            self.store.remove(&job.id);
            let refusal = match refused {
                Refused::Closed => Refusal::closing(),
                Refused::Full => Refusal::queue_full(self.queue.capacity(), self.wait()),
            };
            self.count_failure(refusal.code.unwrap_or_default());
            return Err(refusal);
        }
        Ok(job)
    }

    /// Stops `job`, queued or in the middle of a step. Returns whether it had not ended.
    pub fn cancel(&self, job: &Job, reason: &str) -> bool {
        self.queue.remove(job);
        job.drawing.first.cancel.cancel();
        let ended = job.end(State::Cancelled);
        if ended {
            self.count_failure(reason);
            self.log_job(job, reason);
        }
        ended
    }

    /// `job` could not be drawn.
    pub fn fail(&self, job: &Job, error: &anyhow::Error) {
        self.queue.remove(job);
        let why = format!("{error:#}").replace('\n', " ");
        if job.end(State::Failed(why)) {
            self.count_failure("failed");
            self.log_job(job, "failed");
        }
    }

    /// `job` is drawn.
    pub fn complete(&self, job: &Job) {
        let kind = self.kind(job);
        self.metrics.latency.get_or_create(&kind).observe(job.queued.elapsed().as_secs_f64());
        self.metrics.success.get_or_create(&kind).inc();
        self.metrics.steps.observe(job.drawing.first.steps as f64);
        self.log_job(job, "done");
    }

    /// An image was drawn in `time`.
    pub fn count_image(&self, job: &Job, time: Duration) {
        self.metrics.images.get_or_create(&self.kind(job)).inc();
        self.metrics.pixels.inc_by((job.drawing.first.width * job.drawing.first.height) as u64);
        let before = f64::from_bits(self.pace.load(Ordering::Relaxed));
        let pace = 0.8f64.mul_add(before, 0.2 * time.as_secs_f64());
        self.pace.store(pace.to_bits(), Ordering::Relaxed);
    }

    /// Whole seconds until a full queue has room, about.
    pub fn wait(&self) -> u64 {
        let pace = f64::from_bits(self.pace.load(Ordering::Relaxed));
        (pace * self.queue.waiting() as f64).clamp(1.0, MAX_WAIT).ceil() as u64
    }

    /// Takes no new work from now on.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.queue.close();
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst) || self.is_closing()
    }

    /// Whether work is taken and there is someone to do it.
    pub fn is_ready(&self) -> bool {
        !self.is_closing() && self.alive.load(Ordering::SeqCst)
    }

    /// The metrics' text.
    pub fn metrics_text(&self) -> String {
        let under_way = self.store.under_way();
        let count = |state: &State| {
            under_way.iter().filter(|job| job.see(|board| board.state == *state)).count()
        };
        self.metrics.text(Now {
            running: count(&State::Running),
            waiting: count(&State::Queued),
            connections: self.connections.load(Ordering::Relaxed),
        })
    }

    /// Labels of `job`.
    pub fn kind(&self, job: &Job) -> Kind {
        Kind {
            model: self.cards[job.drawing.model].name.clone(),
            provider: self.provider.clone(),
            precision: self.precision.clone(),
            size: job.drawing.size_name(),
        }
    }

    fn count_failure(&self, reason: &str) {
        self.metrics.failed.get_or_create(&Reason { reason: reason.to_owned() }).inc();
    }

    fn log_job(&self, job: &Job, state: &str) {
        let (board, drawing) = (job.board(), &job.drawing);
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let queued = board.started.unwrap_or_else(Instant::now).duration_since(job.queued);
        let mut fields = json!({
            "job": job.id,
            "request_id": job.request_id,
            "state": state,
            "model": self.cards[drawing.model].name,
            "size": drawing.size_name(),
            "steps": drawing.first.steps,
            "solver": drawing.first.solver.name(),
            "images": drawing.count,
            "queue_ms": ms(queued),
            "run_ms": ms(board.run_time()),
        });
        if let State::Failed(why) = &board.state {
            fields["error"] = why.as_str().into();
        }
        if self.log.prompts {
            fields["prompt"] = drawing.first.prompt.as_str().into();
            fields["seed"] = drawing.first.seed.into();
        }
        self.log.event("job", fields);
    }
}

/// A job and the client that waits for it: if the client goes away, so does the job.
pub struct Ticket {
    pub service: Arc<Service>,
    pub job: Arc<Job>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.service.cancel(&self.job, "disconnected");
        self.service.store.remove(&self.job.id);
    }
}
