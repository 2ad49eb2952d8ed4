//! A rank in a group: how it joins, how operations are started and end, and what ends the group.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Tensor};

use crate::c10d::{self, Failure, Gloo, Store};
use crate::call::{Call, Operation, Reduce};
use crate::error::{Error, ranks};
use crate::nccl::{Communicator, Id, Nccl, Started};
use crate::store::Place;
use crate::topology::Topology;
use crate::watch::{Alarm, Circle, Fault, Watch};

/// How long a rank waits between two looks at whether another one has stopped.
const SLICE: Duration = Duration::from_millis(20);

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until all have joined.
    pub join: Duration,
    /// Until an operation that one has called has ended.
    pub step: Duration,
}

/// One of a group's ranks.
pub(crate) struct Member {
    /// Among the group's ranks.
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Where it stands in the run, as messages name it.
    topology: Topology,
    /// Of the run's store.
    place: Place,
    timeouts: Timeouts,
    circle: Circle,
    /// Of this group.
    calls: Cell<u64>,
    /// Calls on GPUs that all ranks have compared.
    compared: RefCell<HashSet<Call>>,
    failed: RefCell<Option<Error>>,
    /// Of a group that is not that of all.
    store: Option<Store>,
    gloo: Gloo,
    /// What tensors of a GPU go through.
    pub(crate) nccl: OnceCell<Communicator>,
    watch: Rc<Watch>,
}

/// An operation under way; its tensors are kept until it has ended.
#[must_use = "the operation has ended only after `wait`"]
pub struct Pending {
    member: Option<Rc<Member>>,
    call: Call,
    output: Tensor,
    _input: Option<Tensor>,
    work: Option<Work>,
    /// How the ranks' parts, one after the other in `output`, become one.
    pub(crate) reduces: Option<Reduce>,
}

enum Work {
    Gloo(c10d::Work),
    Nccl(Started),
}

impl Member {
    pub(crate) fn join(topology: &Topology, timeouts: Timeouts) -> Result<Self, Error> {
        let place = Place::of(topology);
        let (rank, world, address) = (topology.rank, topology.world, place.address());
        let wrong = |what: String| Error::Join { rank, world, store: address.clone(), what };
        let place = place.of_round(topology, timeouts.join).map_err(wrong)?;
        let store = place.open(topology, timeouts.join).map_err(wrong)?;
        let watch = Watch::start(topology, &place, store, timeouts.join).map_err(wrong)?;
        come_together(topology, &watch, timeouts.join).map_err(|what| {
            watch.report(Fault { reporter: rank, peers: Vec::new(), what: what.clone() });
            wrong(what)
        })?;
        let through = place.through().map_err(|error| wrong(error.to_string()))?;
        let gloo =
            Gloo::open(watch.store(), rank, world, &through, timeouts.step).map_err(wrong)?;
        watch.pass();
        let topology = topology.clone();
        let circle = Circle { number: 0, ranks: (0..world).collect() };
        Ok(Self::new(circle, (topology, place), timeouts, None, gloo, Rc::new(watch)))
    }

    fn new(
        circle: Circle,
        (topology, place): (Topology, Place),
        timeouts: Timeouts,
        store: Option<Store>,
        gloo: Gloo,
        watch: Rc<Watch>,
    ) -> Self {
        let rank = circle.ranks.iter().position(|&rank| rank == topology.rank);
        Self {
            rank: rank.expect("a rank is in its groups"),
            world: circle.ranks.len(),
            topology,
            place,
            timeouts,
            circle,
            calls: Cell::new(0),
            compared: RefCell::default(),
            failed: RefCell::default(),
            store,
            gloo,
            nccl: OnceCell::new(),
            watch,
        }
    }

    /// A group of some of the run's ranks, this one among them, which `name` tells from others of its number; all of
    /// them call it.
    pub(crate) fn part(&self, circle: Circle, name: &str) -> Result<Self, Error> {
        let operation = format!("meeting {name}");
        self.standing(&operation)?;
        let meet = || {
            let place = self.place.clone().within(name);
            let store = place.again(self.timeouts.join)?;
            let through = place.through().map_err(|error| error.to_string())?;
            let place = circle.ranks.iter().position(|&rank| rank == self.topology.rank);
            let (rank, world) = (place.unwrap_or_default(), circle.ranks.len());
            let gloo = Gloo::open(&store, rank, world, &through, self.timeouts.step)?;
            Ok((store, gloo))
        };
        let (store, gloo) = meet().map_err(|failure: Failure| self.fail(&operation, &failure))?;
        let run = (self.topology.clone(), self.place.clone());
        Ok(Self::new(circle, run, self.timeouts, Some(store), gloo, Rc::clone(&self.watch)))
    }

    /// Where this process stands in the run.
    pub(crate) fn topology(&self) -> &Topology {
        &self.topology
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap_or_else(|| self.watch.store())
    }

    /// Counts a call.
    fn enter(&self, call: &str) -> u64 {
        self.calls.set(self.calls.get() + 1);
        self.watch.enter(self.circle.number, call);
        self.calls.get()
    }

    pub(crate) fn open_nccl(&self, device: usize) -> Result<(), Error> {
        const OPERATION: &str = "opening nccl";
        self.standing(OPERATION)?;
        self.enter(OPERATION);
        let opened = self.meet_by_nccl(device).map_err(|failure| self.fail(OPERATION, &failure))?;
        self.watch.pass();
        _ = self.nccl.set(opened);
        Ok(())
    }

    fn meet_by_nccl(&self, device: usize) -> Result<Communicator, Failure> {
        const KEY: &str = "nccl";
        let store = self.store();
        let nccl = Nccl::open()?;
        if self.rank == 0 {
            store.set(KEY, &nccl.unique_id()?.to_text())?;
        }
        if !wait_for(self.timeouts.join, &self.watch, || store.has(KEY))? {
            return Err("timed out".to_owned());
        }
        let id = Id::from_text(&store.get(KEY)?).ok_or("the store holds another program's id")?;
        let look = || self.watch.fault().map_or(Ok(()), |fault| Err(fault.what));
        Communicator::open(id, self.rank, self.world, device, self.timeouts.step, &look)
    }

    /// Starts an operation that writes `output`, once all ranks are known to call the same.
    pub(crate) fn start(
        self: &Rc<Self>,
        call: Call,
        output: Tensor,
        input: &Tensor,
    ) -> Result<Pending, Error> {
        self.standing(call.name())?;
        if !input.is_contiguous() {
            let what = format!("a tensor of {:?} is not contiguous", input.size());
            return Err(self.refuse(&call, what));
        }
        if input.numel() == 0 {
            return Ok(Pending::ended(call, output));
        }
        let number = self.enter(&call.to_string());
        let is_through_gloo = input.device() == Device::Cpu;
        let is_alike = if is_through_gloo {
            self.is_alike(&call)?
        } else {
            self.compared.borrow().contains(&call)
        };
        if !is_alike {
            self.compare(&call, number)?;
            self.compared.borrow_mut().insert(call.clone());
        }
        let mut input = input.detach();
        let work = if is_through_gloo {
            let (operation, argument) = match call.operation {
                // Two to three times as fast as Gloo's own, which puts the whole together twice.
                Operation::AllGather => {
                    input = input.reshape([-1]).repeat([self.world as i64]);
                    (c10d::Operation::AllToAll, 0)
                }
                Operation::ReduceScatter(_) => (c10d::Operation::AllToAll, 0),
                Operation::AllReduce(how) => (c10d::Operation::AllReduce, how.code()),
                Operation::Broadcast(from) => (c10d::Operation::Broadcast, from as i32),
            };
            self.gloo.start(operation, argument, &output, &input).map(Work::Gloo)
        } else {
            let nccl = self.nccl.get().ok_or("open_device comes first".to_owned());
            nccl.and_then(|nccl| nccl.start(call.operation, &output, &input)).map(Work::Nccl)
        };
        let work = work.map_err(|failure| self.fail(call.name(), &failure))?;
        let (member, input) = (Some(Rc::clone(self)), Some(input));
        Ok(Pending { member, call, output, _input: input, work: Some(work), reduces: None })
    }

    /// Whether all ranks make this call now, which they tell each other through Gloo, whose process a size that
    /// differs would end. A GPU's calls do not wait for that: each is compared when it is first seen.
    fn is_alike(&self, call: &Call) -> Result<bool, Error> {
        let mut hasher = DefaultHasher::new();
        call.hash(&mut hasher);
        let own = vec![hasher.finish() as i64; self.world];
        let input = Tensor::from_slice(&own);
        let output = input.zeros_like();
        let work = self.gloo.start(c10d::Operation::AllToAll, 0, &output, &input);
        let work = work.map_err(|failure| self.fail(call.name(), &failure))?;
        self.end_of(call, &Work::Gloo(work))?;
        Ok(output.equal(&input))
    }

    /// Compares the call with the other ranks', through the store.
    fn compare(&self, call: &Call, number: u64) -> Result<(), Error> {
        let store = self.store();
        let verdict = self.ask(store, &format!("call/{number}"), call);
        let verdict = verdict.map_err(|failure| self.fail(call.name(), &failure))?;
        if verdict.is_empty() {
            return Ok(());
        }
        self.watch.pass();
        let (operation, rank) = (call.name().to_owned(), self.topology.rank);
        Err(Error::Disagree { operation, rank, calls: verdict })
    }

    /// Empty if all ranks make the same call.
    fn ask(&self, store: &Store, key: &str, call: &Call) -> Result<String, String> {
        let own = format!("rank {}: {call}", self.topology.rank);
        let first = store.set_first(key, &own)?;
        let of = |text: &str| text.split_once(": ").map(|(_, call)| call.to_owned());
        let (odd, all, verdict) =
            (format!("{key}/odd"), format!("{key}/n"), format!("{key}/verdict"));
        if of(&first) != of(&own) {
            store.append(&odd, &format!("; {own}"))?;
        }
        if store.add(&all, 1)? == self.world as i64 {
            let odd = if store.has(&odd)? { store.get(&odd)? } else { String::new() };
            store.set(&verdict, &if odd.is_empty() { odd } else { format!("{first}{odd}") })?;
        }
        let came = wait_for(self.timeouts.step, &self.watch, || store.has(&verdict))?;
        if came { store.get(&verdict) } else { Err("timed out".to_owned()) }
    }

    fn finish(&self, call: &Call, work: &Work) -> Result<(), Error> {
        self.end_of(call, work)?;
        self.watch.pass();
        Ok(())
    }

    /// Waits for it.
    fn end_of(&self, call: &Call, work: &Work) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            let waited = match (work, self.nccl.get()) {
                (Work::Nccl(started), Some(nccl)) => nccl.wait(started, SLICE),
                (Work::Gloo(work), _) => work.wait(SLICE),
                (Work::Nccl(_), None) => unreachable!("started by what is there"),
            };
            match waited {
                Ok(true) => return Ok(()),
                Ok(false) if self.watch.fault().is_none() => {
                    self.watch.look_ahead(start.elapsed(), self.timeouts.step);
                }
                Ok(false) => self.standing(call.name())?,
                Err(failure) => return Err(self.fail(call.name(), &failure)),
            }
        }
    }

    pub(crate) fn alarm(&self) -> Alarm {
        self.watch.alarm()
    }

    /// Fails where the group has ended.
    pub(crate) fn standing(&self, operation: &str) -> Result<(), Error> {
        if let Some(error) = &*self.failed.borrow() {
            return Err(error.clone());
        }
        match self.watch.fault() {
            Some(fault) => Err(self.end(fault.error(operation, self.topology.rank), fault)),
            None => Ok(()),
        }
    }

    pub(crate) fn refuse(&self, call: &Call, what: String) -> Error {
        Error::Refused { operation: call.name().to_owned(), rank: self.topology.rank, what }
    }

    /// Ends the group after an operation's failure; the error that stands.
    fn fail(&self, operation: &str, failure: &str) -> Error {
        let error = match self.watch.fault() {
            Some(fault) => fault.error(operation, self.topology.rank),
            None => self.watch.blame(&self.circle, operation, failure, self.timeouts.step),
        };
        let what = match &error {
            Error::Lost { what, .. } => what.clone(),
            other => other.to_string(),
        };
        let own = self.topology.rank;
        let fault = Fault { reporter: own, peers: error.peers(), what };
        let standing = self.watch.report(fault.clone());
        let error = if standing == fault { error } else { standing.error(operation, own) };
        self.end(error, standing)
    }

    /// Ends the group for `why`.
    pub(crate) fn abort(&self, why: &str) {
        let rank = self.topology.rank;
        let fault = Fault { reporter: rank, peers: Vec::new(), what: why.to_owned() };
        self.end(fault.error("abort", rank), fault);
    }

    /// Ends the group; the error that every later operation fails with.
    fn end(&self, error: Error, fault: Fault) -> Error {
        self.watch.report(fault);
        // Nothing can be done about a connection that does not close: the error is on its way.
        _ = self.gloo.abort();
        if let Some(nccl) = self.nccl.get() {
            nccl.abort();
        }
        self.failed.borrow_mut().get_or_insert(error).clone()
    }
}

impl Pending {
    pub(crate) fn ended(call: Call, output: Tensor) -> Self {
        Self { member: None, call, output, _input: None, work: None, reduces: None }
    }

    /// What the operation has made.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn wait(self) -> Result<Tensor, Error> {
        if let (Some(member), Some(work)) = (&self.member, &self.work) {
            member.finish(&self.call, work)?;
        }
        let (Some(how), Some(member)) = (self.reduces, &self.member) else {
            return Ok(self.output);
        };
        let parts = self.output.unflatten(0, [member.world as i64, -1]);
        let by_rank: &[i64] = &[0];
        Ok(match how {
            Reduce::Sum => parts.sum_dim_intlist(by_rank, false, parts.kind()),
            Reduce::Min => parts.amin(by_rank, false),
            Reduce::Max => parts.amax(by_rank, false),
        })
    }
}

/// Waits until every rank has said that it is there and believes in the same world.
fn come_together(topology: &Topology, watch: &Watch, patience: Duration) -> Result<(), String> {
    let (store, rank, world) = (watch.store(), topology.rank, topology.world);
    let first = store.set_first("world", &format!("rank {rank} was told of {world} ranks"))?;
    if !first.ends_with(&format!("told of {world} ranks")) {
        return Err(format!("{first}, rank {rank} of {world}: give all the same world"));
    }
    if store.add(&format!("here/{rank}"), 1)? != 1 {
        return Err(format!("two processes say that they are rank {rank}: give each its own"));
    }
    let absent = || -> Result<Vec<usize>, String> {
        let mut absent = Vec::new();
        for other in 0..world {
            if !store.has(&format!("here/{other}"))? {
                absent.push(other);
            }
        }
        Ok(absent)
    };
    if store.add("here", 1)? == world as i64 {
        store.set("all here", "yes")?;
    }
    if !wait_for(patience, watch, || store.has("all here"))? {
        let seconds = patience.as_secs();
        return Err(format!("{} did not come within {seconds} s", ranks(&absent()?)));
    }
    Ok(())
}

/// Asks until it is so, the time is over (`false`), or another rank has reported a fault.
fn wait_for(
    patience: Duration,
    watch: &Watch,
    so: impl Fn() -> Result<bool, String>,
) -> Result<bool, String> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(100);
    loop {
        if so()? {
            return Ok(true);
        }
        if let Some(fault) = watch.fault() {
            return Err(fault.what);
        }
        let waited = start.elapsed();
        if waited > patience {
            return Ok(false);
        }
        watch.look_ahead(waited, patience);
        thread::sleep(pause);
        pause = (pause * 2).min(SLICE);
    }
}
