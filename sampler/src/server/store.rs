//! Jobs by their id: those under way, and for a while those that have ended.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::job::{Job, Source};

/// Ids remembered after their jobs are gone.
const GONE: usize = 10_000;

/// How long ended jobs are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    pub time: Duration,
    /// Bytes of images; the job that ended first goes first.
    pub bytes: usize,
}

pub struct Store {
    keep: Keep,
    shelf: Mutex<Shelf>,
}

#[derive(Default)]
struct Shelf {
    jobs: HashMap<String, Arc<Job>>,
    /// Oldest first.
    gone: VecDeque<String>,
    gone_ids: HashSet<String>,
}

/// What an id leads to.
pub enum Found {
    Job(Arc<Job>),
    /// There was one, and its time is over.
    Gone,
    Never,
}

impl Store {
    pub fn new(keep: Keep) -> Self {
        Self { keep, shelf: Mutex::default() }
    }

    pub fn insert(&self, job: Arc<Job>) {
        self.tidy();
        self.lock().jobs.insert(job.id.clone(), job);
    }

    /// Forgets a job that nobody can ask for again.
    pub fn remove(&self, id: &str) {
        self.lock().jobs.remove(id);
    }

    /// A job of the jobs API.
    pub fn find(&self, id: &str) -> Found {
        self.tidy();
        let shelf = self.lock();
        match shelf.jobs.get(id).filter(|job| job.source == Source::Jobs) {
            Some(job) => Found::Job(job.clone()),
            None if shelf.gone_ids.contains(id) => Found::Gone,
            None => Found::Never,
        }
    }

    /// Jobs of `source`, those queued first first.
    pub fn of(&self, source: Source) -> Vec<Arc<Job>> {
        self.tidy();
        let shelf = self.lock();
        let mut jobs: Vec<_> =
            shelf.jobs.values().filter(|job| job.source == source).cloned().collect();
        jobs.sort_by_key(|job| job.queued);
        jobs
    }

    /// Jobs that have not ended.
    pub fn under_way(&self) -> Vec<Arc<Job>> {
        let shelf = self.lock();
        shelf.jobs.values().filter(|job| job.see(|b| !b.state.is_end())).cloned().collect()
    }

    /// Lets go of what was kept long enough.
    pub fn tidy(&self) {
        let mut shelf = self.lock();
        let mut ended: Vec<_> = shelf
            .jobs
            .values()
            .filter_map(|job| job.see(|b| Some((b.finished?, b.size(), job.id.clone()))))
            .collect();
        ended.sort_by_key(|&(finished, ..)| std::cmp::Reverse(finished));
        let mut bytes = 0;
        for (finished, size, id) in ended {
            bytes += size;
            if finished.elapsed() > self.keep.time || bytes > self.keep.bytes {
                shelf.drop_job(id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    fn drop_job(&mut self, id: String) {
        self.jobs.remove(&id);
        self.gone_ids.insert(id.clone());
        self.gone.push_back(id);
        if self.gone.len() > GONE
            && let Some(oldest) = self.gone.pop_front()
        {
            self.gone_ids.remove(&oldest);
        }
    }
}
