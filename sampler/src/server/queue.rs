//! Jobs that wait for the worker, at most so many images at a time.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::{drawing::Drawing, job::Job};

/// First in, first out; images that fit the first may come along.
pub struct Queue {
    capacity: usize,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Entry>,
    closed: bool,
}

/// A job and the first of its images that has not been taken.
struct Entry {
    job: Arc<Job>,
    next: usize,
}

/// An image to draw: a job and an index into it.
#[derive(Clone)]
pub struct Row {
    pub job: Arc<Job>,
    pub index: usize,
}

/// Why a job was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Full,
    Closed,
}

impl Queue {
    /// Of at most `capacity` images.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, waiting: Mutex::default(), changed: Condvar::new() }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Images that wait.
    pub fn waiting(&self) -> usize {
        self.lock().len()
    }

    /// Images that wait before job `id` does.
    pub fn ahead(&self, id: &str) -> Option<usize> {
        let waiting = self.lock();
        let place = waiting.jobs.iter().position(|entry| entry.job.id == id)?;
        Some(waiting.jobs.iter().take(place).map(Entry::len).sum())
    }

    /// Puts `job` at the end.
    pub fn push(&self, job: Arc<Job>) -> Result<(), Refused> {
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(Refused::Closed);
        }
        if waiting.len() + job.drawing.count > self.capacity {
            return Err(Refused::Full);
        }
        waiting.jobs.push_back(Entry { job, next: 0 });
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for work and takes images that may share a run, in order, as many as `most` has for the
    /// first drawing. Empty once the queue is closed and nothing is left.
    pub fn take(&self, most: impl Fn(&Drawing) -> usize) -> Vec<Row> {
        let mut waiting = self.lock();
        while waiting.jobs.is_empty() {
            if waiting.closed {
                return Vec::new();
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let most = waiting.jobs.front().map_or(0, |entry| most(&entry.job.drawing));
        let mut rows: Vec<Row> = Vec::new();
        for entry in &mut waiting.jobs {
            let fits = rows.first().is_none_or(|first| first.job.drawing.fits(&entry.job.drawing));
            while fits && rows.len() < most && entry.len() > 0 {
                rows.push(Row { job: entry.job.clone(), index: entry.next });
                entry.next += 1;
            }
        }
        waiting.jobs.retain(|entry| entry.len() > 0);
        rows
    }

    /// Takes `job`'s images out that have not been begun.
    pub fn remove(&self, job: &Job) {
        self.lock().jobs.retain(|entry| entry.job.id != job.id);
    }

    /// Takes nothing in any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn len(&self) -> usize {
        self.jobs.iter().map(Entry::len).sum()
    }
}

impl Entry {
    fn len(&self) -> usize {
        self.job.drawing.count - self.next
    }
}
