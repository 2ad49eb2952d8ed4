//! Stopping a run from another thread.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
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
}

/// The error of a run whose [`Cancel`] was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancelled;

impl Cancel {
    /// Stops the runs of this handle; those to come fail at once.
    pub fn cancel(&self) {
        let options = self.0.options.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.cancelled.store(true, Ordering::SeqCst);
        if let Some(options) = options.as_ref() {
            // A run that cannot be told goes on to its end and is then reported as cancelled.
            let _ = options.terminate();
        }
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// What to start a run with.
    pub(crate) fn options(&self) -> Result<Arc<RunOptions<NoSelectedOutputs>>> {
        let mut slot = self.0.options.lock().unwrap_or_else(PoisonError::into_inner);
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
