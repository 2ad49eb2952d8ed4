//! What Prometheus reads. Nouns are those of vLLM-Omni, seconds are seconds, counters end in `_total`.

use std::{fmt::Write, fs};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// Bounds of the latencies' buckets, in seconds.
const SECONDS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0];

/// How a request was answered.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Answer {
    pub path: String,
    pub status: u16,
}

/// What a job was.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Kind {
    pub model: String,
    pub provider: String,
    pub precision: String,
    /// `WIDTHxHEIGHT`.
    pub size: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Reason {
    pub reason: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Stage {
    pub stage: String,
    pub provider: String,
    pub precision: String,
    pub size: String,
}

type Seconds<L> = Family<L, Histogram, fn() -> Histogram>;

/// All metrics of a server.
pub struct Metrics {
    registry: Registry,
    pub requests: Family<Answer, Counter>,
    pub latency: Seconds<Kind>,
    pub queue_wait: Histogram,
    pub stage: Seconds<Stage>,
    pub steps: Histogram,
    pub success: Family<Kind, Counter>,
    pub failed: Family<Reason, Counter>,
    pub images: Family<Kind, Counter>,
    pub pixels: Counter,
    pub batch: Histogram,
    running: Gauge,
    waiting: Gauge,
    connections: Gauge,
    memory: Gauge,
    peak_memory: Gauge,
}

/// What gauges show at the moment they are asked.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub running: usize,
    pub waiting: usize,
    pub connections: usize,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("ng_sample");
        let metrics = Self {
            requests: Family::default(),
            latency: Family::new_with_constructor(seconds),
            queue_wait: seconds(),
            stage: Family::new_with_constructor(seconds),
            steps: Histogram::new([1.0, 2.0, 4.0, 8.0, 12.0, 20.0, 28.0, 50.0, 100.0, 200.0]),
            success: Family::default(),
            failed: Family::default(),
            images: Family::default(),
            pixels: Counter::default(),
            batch: Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0]),
            running: Gauge::default(),
            waiting: Gauge::default(),
            connections: Gauge::default(),
            memory: Gauge::default(),
            peak_memory: Gauge::default(),
            registry: Registry::default(),
        };
        metrics.register(&mut registry);
        Self { registry, ..metrics }
    }

    fn register(&self, registry: &mut Registry) {
        let second = || Unit::Seconds;
        registry.register("http_requests", "Requests by path and status", self.requests.clone());
        registry.register_with_unit(
            "e2e_request_latency",
            "From the request to its last image, of jobs that were done",
            second(),
            self.latency.clone(),
        );
        registry.register_with_unit(
            "request_queue_wait",
            "From the request to its first step",
            second(),
            self.queue_wait.clone(),
        );
        registry.register_with_unit(
            "stage_gen_time",
            "An image's stages: text, sample, decode, file",
            second(),
            self.stage.clone(),
        );
        registry.register("num_inference_steps", "Steps asked for", self.steps.clone());
        registry.register("requests_success", "Jobs that were done", self.success.clone());
        let help = "Jobs that were not done: failed, cancelled, disconnected, queue_full";
        registry.register("requests_failed", help, self.failed.clone());
        registry.register("image_count", "Images drawn", self.images.clone());
        registry.register("image_pixels", "Pixels drawn", self.pixels.clone());
        registry.register(
            "batch_images",
            "Images taken from the queue at a time",
            self.batch.clone(),
        );
        registry.register("num_requests_running", "Jobs being drawn", self.running.clone());
        registry.register("num_requests_waiting", "Jobs that have not begun", self.waiting.clone());
        registry.register("connections", "Open connections", self.connections.clone());
        registry.register_with_unit("memory", "Resident memory", Unit::Bytes, self.memory.clone());
        registry.register_with_unit(
            "peak_memory",
            "Most memory ever resident",
            Unit::Bytes,
            self.peak_memory.clone(),
        );
    }

    /// The text that Prometheus reads, in the OpenMetrics format.
    pub fn text(&self, now: Now) -> String {
        self.running.set(now.running as i64);
        self.waiting.set(now.waiting as i64);
        self.connections.set(now.connections as i64);
        let (resident, peak) = memory();
        self.memory.set(resident);
        self.peak_memory.set(peak);
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            text.clear();
            // Writing into a string does not fail.
            let _ = write!(text, "# {error}\n# EOF\n");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Resident bytes and their peak, 0 where the system does not tell.
fn memory() -> (i64, i64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<i64>().ok());
        number.map_or(0, |kilobytes| kilobytes << 10)
    };
    (bytes("VmRSS:"), bytes("VmHWM:"))
}
