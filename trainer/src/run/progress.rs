//! A line that tells how far a run is, how fast it goes and what it reaches; plain lines where no one
//! watches a terminal.

use std::cell::Cell;
use std::time::{Duration, Instant};

use flow::log::{self, Level};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::interrupt::say;

/// Without a terminal, a line this often.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Progress of one stage.
pub(crate) struct Progress {
    bar: ProgressBar,
    name: &'static str,
    started: Instant,
    first: u64,
    said: Cell<Instant>,
    is_plain: bool,
}

impl Progress {
    /// `total` steps, of which `done` were done by an earlier run.
    pub(crate) fn new(name: &'static str, total: usize, done: usize) -> Self {
        let target = match log::level() {
            _ if log::is_aside() => ProgressDrawTarget::hidden(),
            Level::Quiet => ProgressDrawTarget::hidden(),
            _ => ProgressDrawTarget::stderr_with_hz(4),
        };
        let bar = ProgressBar::with_draw_target(Some(total as u64), target);
        let style =
            ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {msg}  {elapsed} < {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name);
        bar.set_position(done as u64);
        bar.reset_eta();
        let is_plain = bar.is_hidden();
        let now = Instant::now();
        Self { bar, name, started: now, first: done as u64, said: now.into(), is_plain }
    }

    /// One step is done; `message` says what it reached.
    pub(crate) fn advance(&self, message: &str) {
        self.advance_by(1, message);
    }

    /// So many steps are done at once.
    pub(crate) fn advance_by(&self, steps: usize, message: &str) {
        self.bar.inc(steps as u64);
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rate = (done - self.first) as f64 / self.started.elapsed().as_secs_f64();
        self.bar.set_message(format!("{message}  {}", per_time(rate)));
        let left = (total - done) as f64 / rate;
        let (name, per_time) = (self.name, per_time(rate));
        let line = format!("{name} {done}/{total}  {message}  {per_time}  {left:.0} s left");
        log::keep(&line);
        let is_due = self.said.get().elapsed() >= PLAIN_EVERY || done == total;
        let is_wanted = log::level() == Level::Verbose || (is_due && log::level() == Level::Usual);
        if self.is_plain && is_wanted {
            self.said.set(Instant::now());
            self.say_line(&line);
        }
    }

    /// Says something above the line.
    pub(crate) fn say(&self, text: &str) {
        log::keep(text);
        self.say_line(text);
    }

    fn say_line(&self, text: &str) {
        match (log::is_aside(), self.is_plain) {
            (true, _) => {}
            (_, true) => say(text),
            _ => self.bar.suspend(|| say(text)),
        }
    }
}

fn per_time(rate: f64) -> String {
    if rate >= 1.0 { format!("{rate:.1}/s") } else { format!("{:.1} s each", 1.0 / rate) }
}
