//! Signs of life: each rank says in the store that it lives and where it is, so that an operation that
//! fails can say whose fault it is, and a rank that stops takes the others with it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::c10d::Store;
use crate::error::Error;
use crate::store::Place;
use crate::topology::Topology;

/// Key of the first fault that any rank reports.
const FAULT: &str = "fault";
/// Number of ranks that have left in good order.
const LEFT: &str = "left";
/// Time between two signs of life; larger worlds take longer, so that one store can serve them.
const BEAT: Duration = Duration::from_millis(100);
const BEAT_A_RANK: Duration = Duration::from_millis(1);
/// Beats without a change after which a rank is silent.
const SILENCE: u32 = 3;
/// Groups that a rank can be in: that of all, and two more.
const GROUPS: usize = 3;

/// Tells any thread whether this rank has heard that its group has ended.
#[derive(Clone, Default)]
pub struct Alarm(Arc<AtomicBool>);

impl Alarm {
    pub fn rings(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A group among those of a run.
pub(crate) struct Circle {
    /// 0 for that of all.
    pub(crate) number: usize,
    /// Its ranks, as the run counts them.
    pub(crate) ranks: Vec<usize>,
}

/// Why the group has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The rank that found it.
    pub(crate) reporter: usize,
    /// Ranks to blame; none: the reporter itself.
    pub(crate) peers: Vec<usize>,
    pub(crate) what: String,
}

impl Fault {
    /// What a launcher tells the others, through `store`, of a rank that ended without a word: who waits for
    /// its call in the store has no connection whose end would show.
    pub(crate) fn tell_of_end(store: &Store, rank: usize) {
        let what = "has ended".to_owned();
        let fault = Self { reporter: rank, peers: vec![rank], what };
        // Where the store is gone, the ranks see that themselves.
        _ = store.set_first(FAULT, &fault.to_text());
    }

    fn to_text(&self) -> String {
        let peers: Vec<String> = self.peers.iter().map(ToString::to_string).collect();
        format!("{}|{}|{}", self.reporter, peers.join(","), self.what)
    }

    fn from_text(text: &str) -> Self {
        let mut parts = text.splitn(3, '|');
        let mut part = || parts.next().unwrap_or_default();
        let reporter = part().parse().unwrap_or(0);
        let peers = part().split(',').filter_map(|peer| peer.parse().ok()).collect();
        Self { reporter, peers, what: part().to_owned() }
    }

    /// As an operation of rank `rank` reports it.
    pub(crate) fn error(&self, operation: &str, rank: usize) -> Error {
        let (operation, what) = (operation.to_owned(), self.what.clone());
        if self.peers.is_empty() && self.reporter == rank {
            return Error::Failed { operation, rank, what };
        }
        if self.peers.is_empty() {
            return Error::Stopped { operation, rank, peer: self.reporter, what };
        }
        Error::Lost { operation, rank, peers: self.peers.clone(), what }
    }
}

/// Where a rank was at its last sign of life.
struct Sign {
    beat: u64,
    /// Of each group.
    calls: [u64; GROUPS],
    at: String,
}

/// The other ranks, after a while of looking.
struct Others {
    silent: Vec<usize>,
    signs: Vec<(usize, Sign)>,
}

pub(crate) struct Watch {
    shared: Arc<Shared>,
    /// Signs of all ranks, seen since then shortly before a patience ends.
    seen: Mutex<Option<(Instant, Vec<Sign>)>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    rank: usize,
    world: usize,
    store: Store,
    beat: Duration,
    /// The rank that serves the store, if one does.
    server: Option<usize>,
    address: String,
    calls: [AtomicU64; GROUPS],
    at: Mutex<String>,
    fault: Mutex<Option<Fault>>,
    alarm: Alarm,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Watch {
    /// Over `store`; a second connection to it says the signs of life.
    pub(crate) fn start(
        topology: &Topology,
        place: &Place,
        store: Store,
        patience: Duration,
    ) -> Result<Self, String> {
        let shared = Arc::new(Shared {
            rank: topology.rank,
            world: topology.world,
            store,
            beat: BEAT.max(BEAT_A_RANK * topology.world as u32),
            server: (!topology.launcher_serves).then_some(0),
            address: place.address(),
            calls: Default::default(),
            at: Mutex::new("joining".to_owned()),
            fault: Mutex::default(),
            alarm: Alarm::default(),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let own = place.again(patience)?;
        shared.sign(&own, 0)?;
        let thread = {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("signs-of-life".to_owned()).spawn(move || shared.live(&own))
        };
        Ok(Self {
            shared,
            seen: Mutex::default(),
            thread: Some(thread.map_err(|error| error.to_string())?),
        })
    }

    pub(crate) fn store(&self) -> &Store {
        &self.shared.store
    }

    pub(crate) fn alarm(&self) -> Alarm {
        self.shared.alarm.clone()
    }

    /// Counts a call of a group.
    pub(crate) fn enter(&self, group: usize, call: &str) {
        *lock(&self.seen) = None;
        self.shared.calls[group].fetch_add(1, Ordering::Relaxed);
        *lock(&self.shared.at) = format!("in {call} (call {})", self.shared.n_calls());
    }

    pub(crate) fn pass(&self) {
        *lock(&self.shared.at) = format!("past call {}", self.shared.n_calls());
    }

    /// What ended the group, once this rank has heard of it.
    pub(crate) fn fault(&self) -> Option<Fault> {
        if !self.shared.alarm.rings() {
            return None;
        }
        lock(&self.shared.fault).clone()
    }

    /// Says that the group has ended; the fault that stands, which is the first one reported.
    pub(crate) fn report(&self, fault: Fault) -> Fault {
        let standing = match self.shared.store.set_first(FAULT, &fault.to_text()) {
            Ok(text) => Fault::from_text(&text),
            Err(_) => fault,
        };
        self.shared.keep(standing.clone());
        standing
    }

    /// Looks at the others' signs once a wait of `waited` so far nears its `patience`: whose do not change until it
    /// ends is silent.
    pub(crate) fn look_ahead(&self, waited: Duration, patience: Duration) {
        if waited + self.shared.beat * (SILENCE + 1) < patience {
            return;
        }
        let mut seen = lock(&self.seen);
        if seen.is_none() {
            *seen = self.shared.signs().map(|signs| (Instant::now(), signs));
        }
    }

    /// Who is to blame for an operation of `circle` that failed with `failure`: silent ranks, ranks behind this one,
    /// or nobody known. Looks for [`SILENCE`] beats, less what [`Watch::look_ahead`] has.
    pub(crate) fn blame(
        &self,
        circle: &Circle,
        operation: &str,
        failure: &str,
        step: Duration,
    ) -> Error {
        let rank = self.shared.rank;
        let operation = operation.to_owned();
        // The first whose patience ends closes its connections, on which the others fail.
        let is_over = lock(&self.seen).is_some();
        let timed_out = is_over
            || ["timed out", "timeout"].iter().any(|word| failure.to_lowercase().contains(word));
        let Some(Others { silent, signs }) = self.look() else {
            let fault = self.fault().unwrap_or_else(|| self.shared.store_is_gone());
            return fault.error(&operation, rank);
        };
        let seconds = step.as_secs_f64();
        if !silent.is_empty() {
            let what = if timed_out {
                format!("gave no sign of life in {seconds} s: frozen, or its machine is gone")
            } else {
                "has ended or cannot be reached".to_owned()
            };
            return Error::Lost { operation, rank, peers: silent, what };
        }
        let own = self.shared.calls[circle.number].load(Ordering::Relaxed);
        let is_behind = |(rank, sign): &(usize, Sign)| {
            circle.ranks.contains(rank) && sign.calls[circle.number] < own
        };
        match signs.into_iter().find(is_behind) {
            Some((peer, sign)) if timed_out => {
                let what = format!("did not come along in {seconds} s: it is {}", sign.at);
                Error::Lost { operation, rank, peers: vec![peer], what }
            }
            _ => Error::Failed { operation, rank, what: failure.to_owned() },
        }
    }

    /// `None` where the store does not answer.
    fn look(&self) -> Option<Others> {
        let seen = lock(&self.seen).take();
        let (since, before) = match seen {
            Some(seen) => seen,
            None => (Instant::now(), self.shared.signs()?),
        };
        thread::sleep((self.shared.beat * SILENCE).saturating_sub(since.elapsed()));
        let after = self.shared.signs()?;
        let mut silent = Vec::new();
        let mut others = Vec::new();
        for (rank, (before, after)) in before.into_iter().zip(after).enumerate() {
            if rank == self.shared.rank {
                continue;
            }
            if before.beat == after.beat {
                silent.push(rank);
            } else {
                others.push((rank, after));
            }
        }
        Some(Others { silent, signs: others })
    }

    /// Leaves in good order: whoever serves the store stays until all have left.
    fn leave(&self) {
        let shared = &self.shared;
        let Ok(mut left) = shared.store.add(LEFT, 1) else { return };
        let deadline = Instant::now() + Duration::from_secs(10);
        while shared.server == Some(shared.rank)
            && left < shared.world as i64
            && Instant::now() < deadline
            && self.fault().is_none()
        {
            thread::sleep(Duration::from_millis(5));
            let Ok(now) = shared.store.add(LEFT, 0) else { return };
            left = now;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if thread::panicking() {
            let what = "it has panicked".to_owned();
            self.report(Fault { reporter: self.shared.rank, peers: Vec::new(), what });
        }
        if self.fault().is_none() {
            self.leave();
        } else if self.shared.server == Some(self.shared.rank) {
            // The others look into the store for whom to blame.
            thread::sleep(self.shared.beat * (2 * SILENCE));
        }
        *lock(&self.shared.stop) = true;
        self.shared.stopped.notify_all();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

impl Shared {
    fn sign(&self, store: &Store, beat: u64) -> Result<(), String> {
        let calls = self.calls.each_ref().map(|calls| calls.load(Ordering::Relaxed).to_string());
        let sign = format!("{beat} {} {}", calls.join(","), lock(&self.at));
        store.set(&key(self.rank), &sign)
    }

    /// Of all groups.
    fn n_calls(&self) -> u64 {
        self.calls.iter().map(|calls| calls.load(Ordering::Relaxed)).sum()
    }

    /// The thread: signs, and hears of faults.
    fn live(&self, store: &Store) {
        let mut beat = 0;
        loop {
            beat += 1;
            let heard = self.sign(store, beat).and_then(|()| store.has(FAULT));
            match heard {
                Ok(false) => {}
                Ok(true) => {
                    if let Ok(text) = store.get(FAULT) {
                        self.keep(Fault::from_text(&text));
                    }
                }
                Err(_) => {
                    self.keep(self.store_is_gone());
                    return;
                }
            }
            let stop = lock(&self.stop);
            let waited = self.stopped.wait_timeout_while(stop, self.beat, |stop| !*stop);
            if *waited.unwrap_or_else(PoisonError::into_inner).0 {
                return;
            }
        }
    }

    fn store_is_gone(&self) -> Fault {
        let peers: Vec<usize> = self.server.into_iter().filter(|&rank| rank != self.rank).collect();
        let address = &self.address;
        let what = if peers.is_empty() {
            format!("the launcher's store at {address} is gone")
        } else {
            format!("has ended or cannot be reached: its store at {address} is gone")
        };
        Fault { reporter: self.rank, peers, what }
    }

    /// The first fault that this rank hears of stands.
    fn keep(&self, fault: Fault) {
        lock(&self.fault).get_or_insert(fault);
        self.alarm.0.store(true, Ordering::Release);
    }

    fn signs(&self) -> Option<Vec<Sign>> {
        (0..self.world)
            .map(|rank| {
                let text = self.store.get(&key(rank)).ok()?;
                let mut parts = text.splitn(3, ' ');
                let beat = parts.next()?.parse().ok()?;
                let mut of_groups = parts.next()?.split(',');
                let mut calls = [0; GROUPS];
                for calls in &mut calls {
                    *calls = of_groups.next()?.parse().ok()?;
                }
                Some(Sign { beat, calls, at: parts.next()?.to_owned() })
            })
            .collect()
    }
}

fn key(rank: usize) -> String {
    format!("sign/{rank}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
