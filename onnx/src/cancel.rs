//! Stopping a run from another thread.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use anyhow::{Result, anyhow};
use ort::session::{NoSelectedOutputs, RunOptions};

/// A handle that stops every run it was given to, also one that is under way: ONNX Runtime ends it
/// before its next operator. Clones are the same handle.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Shared>);

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    /// What the runs under this handle are started with, made by the first of them.
    options: Mutex<Option<Arc<RunOptions<NoSelectedOutputs>>>>,
    /// Handles of [`Cancel::of_all`] that this one has a part in.
    joined: Mutex<Vec<Weak<Shared>>>,
    /// Of a handle of [`Cancel::of_all`]: its parts that were not used.
    unused: AtomicUsize,
}

/// The error of a run whose [`Cancel`] was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

impl Cancel {
    /// A handle that is used when all of `parts` are: for a run that several jobs share.
    pub fn of_all(parts: &[Self]) -> Self {
        if let [part] = parts {
            return part.clone();
        }
        let whole = Self::default();
        whole.0.unused.store(parts.len(), Ordering::SeqCst);
        for part in parts {
            let mut joined = lock(&part.0.joined);
            if part.is_cancelled() {
                whole.lose();
            } else {
                joined.retain(|whole| whole.strong_count() > 0);
                joined.push(Arc::downgrade(&whole.0));
            }
        }
        whole
    }

    /// Stops the runs of this handle; those to come fail at once.
    pub fn cancel(&self) {
        let mut joined = lock(&self.0.joined);
        let options = lock(&self.0.options);
        self.0.cancelled.store(true, Ordering::SeqCst);
        if let Some(options) = options.as_ref() {
            // A run that cannot be told goes on to its end and is then reported as cancelled.
            let _ = options.terminate();
        }
        for whole in joined.drain(..).filter_map(|whole| whole.upgrade()) {
            Self(whole).lose();
        }
    }

    /// One of its parts was used.
    fn lose(&self) {
        if self.0.unused.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.cancel();
        }
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// What to start a run with.
    pub(crate) fn options(&self) -> Result<Arc<RunOptions<NoSelectedOutputs>>> {
        let mut slot = lock(&self.0.options);
        if self.is_cancelled() {
            return Err(Cancelled.into());
        }
        if let Some(options) = slot.as_ref() {
            return Ok(options.clone());
        }
        Ok(slot.insert(Arc::new(RunOptions::new()?)).clone())
    }

    /// The result of a run under this handle: what it returned, or [`Cancelled`].
    pub(crate) fn outcome<T>(&self, result: ort::Result<T>) -> Result<T> {
        match result {
            _ if self.is_cancelled() => Err(Cancelled.into()),
            Ok(value) => Ok(value),
            Err(error) => Err(one_line(error.message())),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish()
    }
}

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cancelled")
    }
}

impl std::error::Error for Cancelled {}

/// ONNX Runtime's messages may run over several lines; ours are one.
pub(crate) fn one_line(message: &str) -> anyhow::Error {
    anyhow!(message.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::Cancel;

    #[test]
    fn a_shared_run_is_stopped_by_the_last() {
        let parts = [Cancel::default(), Cancel::default(), Cancel::default()];
        parts[1].cancel();
        let whole = Cancel::of_all(&parts);
        parts[0].cancel();
        parts[0].cancel();
        assert!(!whole.is_cancelled());
        parts[2].cancel();
        assert!(whole.is_cancelled());
        let alone = Cancel::of_all(&[Cancel::default()]);
        assert!(!alone.is_cancelled());
    }
}
