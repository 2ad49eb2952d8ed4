//! ONNX sessions shared by worker threads.

use std::{
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use onnx::{Model, Options};

/// Up to `n_max` single-threaded sessions of one ONNX file. The first is opened at once, so that
/// a bad file is found at start-up; the others when a worker finds none idle.
pub(super) struct Pool {
    path: PathBuf,
    n_max: usize,
    shelf: Mutex<Shelf>,
    returned: Condvar,
}

struct Shelf {
    idle: Vec<Model>,
    n_open: usize,
}

impl Pool {
    pub(super) fn open(path: &Path, n_max: usize) -> Result<Self> {
        let shelf = Shelf { idle: vec![open(path)?], n_open: 1 };
        Ok(Self {
            path: path.to_owned(),
            n_max: n_max.max(1),
            shelf: Mutex::new(shelf),
            returned: Condvar::new(),
        })
    }

    /// Lends a session to `work`, waiting for one if all are lent.
    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Model) -> Result<T>) -> Result<T> {
        let mut loan = Loan { pool: self, model: Some(self.take()?) };
        work(loan.model.as_mut().expect("lent until dropped"))
    }

    fn take(&self) -> Result<Model> {
        let mut shelf = self.lock();
        loop {
            if let Some(model) = shelf.idle.pop() {
                return Ok(model);
            }
            if shelf.n_open < self.n_max {
                shelf.n_open += 1;
                drop(shelf);
                return open(&self.path).inspect_err(|_| {
                    self.lock().n_open -= 1;
                    self.returned.notify_one();
                });
            }
            shelf = self.returned.wait(shelf).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts the session back even if the work panics: nobody may wait for it in vain.
struct Loan<'a> {
    pool: &'a Pool,
    model: Option<Model>,
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        self.pool.lock().idle.extend(self.model.take());
        self.pool.returned.notify_one();
    }
}

fn open(path: &Path) -> Result<Model> {
    Model::open(path, &Options::default())
}
