//! The ranks of a run as one value, and what they do together.

use std::cell::{OnceCell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::c10d::{self, Failure, Gloo, Store};
use crate::call::{Call, Operation, Reduce};
use crate::error::{Error, ranks};
use crate::nccl::{self, Communicator, Id, Nccl, Started};
use crate::store::Place;
use crate::topology::Topology;
use crate::watch::{Fault, Watch};

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

/// All ranks of a run, or this process alone. Operations are called by all ranks in the same order.
///
/// An error other than [`Error::Refused`] and [`Error::Disagree`] ends the group: every later operation
/// fails with it at once, and so do those of all other ranks.
#[derive(Clone)]
pub struct Group(Option<Rc<Member>>);

struct Member {
    rank: usize,
    world: usize,
    timeouts: Timeouts,
    /// Calls that all ranks have compared.
    compared: RefCell<HashSet<Call>>,
    failed: RefCell<Option<Error>>,
    gloo: Gloo,
    /// What tensors of a GPU go through.
    nccl: OnceCell<Communicator>,
    watch: Watch,
}

/// An operation under way; its tensors are kept until it has ended.
#[must_use = "the operation has ended only after `wait`"]
pub struct Pending {
    member: Option<Rc<Member>>,
    call: Call,
    output: Tensor,
    work: Option<Work>,
}

enum Work {
    Gloo(c10d::Work),
    Nccl(Started),
}

impl Group {
    /// This process, with nobody else.
    pub fn alone() -> Self {
        Self(None)
    }

    /// Meets the other ranks; returns when all have come. A world of one is [`Group::alone`].
    ///
    /// # Errors
    /// [`Error::Join`], which names the ranks that are missing, or what else is wrong.
    pub fn join(topology: &Topology, timeouts: Timeouts) -> Result<Self, Error> {
        if topology.world == 1 {
            return Ok(Self::alone());
        }
        Self::join_as_is(topology, timeouts)
    }

    /// [`Group::join`], but a world of one goes through the libraries as well, which shows whether they work.
    ///
    /// # Errors
    /// See [`Group::join`].
    pub fn join_as_is(topology: &Topology, timeouts: Timeouts) -> Result<Self, Error> {
        Member::join(topology, timeouts).map(|member| Self(Some(Rc::new(member))))
    }

    /// Lets tensors on this rank's GPU be taken, each rank having one of its own; called by all ranks. Nothing
    /// to do for tensors of the processor.
    ///
    /// # Errors
    /// When a rank cannot open NCCL, or NCCL its GPU; the group has ended then.
    pub fn open_device(&self, device: Device) -> Result<(), Error> {
        match (&self.0, nccl::index(device)) {
            (Some(member), Some(index)) if member.nccl.get().is_none() => member.open_nccl(index),
            _ => Ok(()),
        }
    }

    /// What carries tensors: where NCCL was found and its version, or that it is Gloo.
    pub fn carrier(&self) -> String {
        let is_open = self.0.as_ref().is_some_and(|member| member.nccl.get().is_some());
        let nccl = is_open.then(nccl::about_nccl).and_then(Result::ok);
        nccl.unwrap_or_else(|| "gloo".to_owned())
    }

    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |member| member.rank)
    }

    pub fn world(&self) -> usize {
        self.0.as_ref().map_or(1, |member| member.world)
    }

    /// Whether this rank is the one that speaks for all.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Every rank's `[n, …]`, by rank: `[world · n, …]`. A scalar counts as `[1]`.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn all_gather(&self, part: &Tensor) -> Result<Tensor, Error> {
        self.start_all_gather(part)?.wait()
    }

    /// Starts [`Group::all_gather`] and returns while it is under way.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn start_all_gather(&self, part: &Tensor) -> Result<Pending, Error> {
        let part = &if part.dim() == 0 { part.view(1) } else { part.shallow_clone() };
        let mut size = part.size();
        size[0] *= self.world() as i64;
        let call = Call::new(Operation::AllGather, part);
        let Some(member) = &self.0 else {
            return Ok(Pending::ended(call, part.detach().copy()));
        };
        let output = Tensor::empty(size, (part.kind(), part.device()));
        member.start(call, output, part)
    }

    /// The reduced value of every rank's `[world · n]`, of which this rank gets its `[n]`.
    ///
    /// # Errors
    /// See [`Group`]; [`Error::Refused`] if the ranks cannot share the tensor evenly.
    pub fn reduce_scatter(&self, whole: &Tensor, how: Reduce) -> Result<Tensor, Error> {
        let call = Call::new(Operation::ReduceScatter(how), whole);
        let Some(member) = &self.0 else { return Ok(whole.detach().copy()) };
        let size = whole.size();
        let world = self.world() as i64;
        if size.first().is_none_or(|n| n % world != 0) {
            return Err(
                member.refuse(&call, format!("a tensor of {size:?} has no {world} equal parts"))
            );
        }
        let n = size[0] / world;
        if whole.device() != Device::Cpu {
            let part = [&[n], &size[1..]].concat();
            let output = Tensor::empty(part, (whole.kind(), whole.device()));
            return member.start(call, output, &whole.detach())?.wait();
        }
        // Gloo reduces the whole; c10d does the same with this operation.
        let reduced = member.start(call, whole.detach().copy(), whole)?.wait()?;
        Ok(reduced.narrow(0, member.rank as i64 * n, n).copy())
    }

    /// The reduced value of every rank's tensor, in its place.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn all_reduce(&self, tensor: &mut Tensor, how: Reduce) -> Result<(), Error> {
        let call = Call::new(Operation::AllReduce(how), tensor);
        self.in_place(call, tensor)
    }

    /// Rank `from`'s tensor, in place of every other rank's.
    ///
    /// # Errors
    /// See [`Group`]; [`Error::Refused`] if there is no such rank.
    pub fn broadcast(&self, tensor: &mut Tensor, from: usize) -> Result<(), Error> {
        let call = Call::new(Operation::Broadcast(from), tensor);
        match &self.0 {
            Some(member) if from >= member.world => {
                Err(member.refuse(&call, format!("no rank {from} in a world of {}", member.world)))
            }
            _ => self.in_place(call, tensor),
        }
    }

    fn in_place(&self, call: Call, tensor: &mut Tensor) -> Result<(), Error> {
        let Some(member) = &self.0 else { return Ok(()) };
        let shared = tensor.detach();
        member.start(call, shared.shallow_clone(), &shared)?.wait().map(drop)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn barrier(&self) -> Result<(), Error> {
        let mut sign = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
        self.all_reduce(&mut sign, Reduce::Sum)
    }

    /// Every rank's bytes, by rank; they may differ in length.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn all_gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let lengths = self.all_gather(&Tensor::from_slice(&[own.len() as i64]))?;
        let lengths: Vec<usize> =
            (0..self.world()).map(|r| lengths.int64_value(&[r as i64]) as usize).collect();
        // Few sizes, so that few are compared.
        let room = lengths.iter().max().map_or(0, |longest| longest.next_power_of_two());
        let mut padded = own.to_vec();
        padded.resize(room, 0);
        let all = self.all_gather(&Tensor::from_slice(&padded))?;
        let mut bytes = vec![0; room * self.world()];
        all.copy_data_u8(&mut bytes, room * self.world());
        let parts = bytes.chunks_exact(room).zip(lengths);
        Ok(parts.map(|(part, length)| part[..length].to_vec()).collect())
    }

    /// Ends the group with the reason: every other rank's operation fails with it.
    pub fn abort(&self, why: &str) {
        let Some(member) = &self.0 else { return };
        let fault = Fault { reporter: member.rank, peers: Vec::new(), what: why.to_owned() };
        member.end(fault.error("abort", member.rank), fault);
    }

    /// Whether the group still stands, without asking anybody.
    ///
    /// # Errors
    /// What has ended it.
    pub fn check(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |member| member.standing("check"))
    }
}

impl Member {
    fn join(topology: &Topology, timeouts: Timeouts) -> Result<Self, Error> {
        let place = Place::of(topology);
        let (rank, world) = (topology.rank, topology.world);
        let wrong = |what: String| Error::Join { rank, world, store: place.address(), what };
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
        let (compared, failed) = (RefCell::default(), RefCell::default());
        let nccl = OnceCell::new();
        Ok(Self { rank, world, timeouts, compared, failed, gloo, nccl, watch })
    }

    fn open_nccl(&self, device: usize) -> Result<(), Error> {
        const OPERATION: &str = "opening nccl";
        self.standing(OPERATION)?;
        self.watch.enter(OPERATION);
        let opened = self.meet_by_nccl(device).map_err(|failure| self.fail(OPERATION, &failure))?;
        self.watch.pass();
        _ = self.nccl.set(opened);
        Ok(())
    }

    fn meet_by_nccl(&self, device: usize) -> Result<Communicator, Failure> {
        const KEY: &str = "nccl";
        let store = self.watch.store();
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
    fn start(
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
        let number = self.watch.enter(&call.to_string());
        if !self.compared.borrow().contains(&call) {
            self.compare(&call, number)?;
            self.compared.borrow_mut().insert(call.clone());
        }
        let work = if input.device() == Device::Cpu {
            let (operation, argument) = match call.operation {
                Operation::AllGather => (c10d::Operation::AllGather, 0),
                Operation::ReduceScatter(how) | Operation::AllReduce(how) => {
                    (c10d::Operation::AllReduce, how.code())
                }
                Operation::Broadcast(from) => (c10d::Operation::Broadcast, from as i32),
            };
            self.gloo.start(operation, argument, &output, &input.detach()).map(Work::Gloo)
        } else {
            let nccl = self.nccl.get().ok_or("open_device comes first".to_owned());
            nccl.and_then(|nccl| nccl.start(call.operation, &output, input)).map(Work::Nccl)
        };
        let work = work.map_err(|failure| self.fail(call.name(), &failure))?;
        Ok(Pending { member: Some(Rc::clone(self)), call, output, work: Some(work) })
    }

    /// Compares the call with the other ranks', through the store: a size that differs would end Gloo's
    /// process. Two calls that were each compared before are not compared with each other.
    fn compare(&self, call: &Call, number: u64) -> Result<(), Error> {
        let store = self.watch.store();
        let verdict = self.ask(store, &format!("call/{number}"), call);
        let verdict = verdict.map_err(|failure| self.fail(call.name(), &failure))?;
        if verdict.is_empty() {
            return Ok(());
        }
        self.watch.pass();
        Err(Error::Disagree { operation: call.name().to_owned(), rank: self.rank, calls: verdict })
    }

    /// Empty if all ranks make the same call.
    fn ask(&self, store: &Store, key: &str, call: &Call) -> Result<String, String> {
        let own = format!("rank {}: {call}", self.rank);
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
        loop {
            let waited = match (work, self.nccl.get()) {
                (Work::Nccl(started), Some(nccl)) => nccl.wait(*started, SLICE),
                (Work::Gloo(work), _) => work.wait(SLICE),
                (Work::Nccl(_), None) => unreachable!("started by what is there"),
            };
            match waited {
                Ok(true) => break,
                Ok(false) if self.watch.fault().is_none() => {}
                Ok(false) => self.standing(call.name())?,
                Err(failure) => return Err(self.fail(call.name(), &failure)),
            }
        }
        self.watch.pass();
        Ok(())
    }

    /// Fails where the group has ended.
    fn standing(&self, operation: &str) -> Result<(), Error> {
        if let Some(error) = &*self.failed.borrow() {
            return Err(error.clone());
        }
        match self.watch.fault() {
            Some(fault) => Err(self.end(fault.error(operation, self.rank), fault)),
            None => Ok(()),
        }
    }

    fn refuse(&self, call: &Call, what: String) -> Error {
        Error::Refused { operation: call.name().to_owned(), rank: self.rank, what }
    }

    /// Ends the group after an operation's failure; the error that stands.
    fn fail(&self, operation: &str, failure: &str) -> Error {
        let error = match self.watch.fault() {
            Some(fault) => fault.error(operation, self.rank),
            None => self.watch.blame(operation, failure, self.timeouts.step),
        };
        let what = match &error {
            Error::Lost { what, .. } => what.clone(),
            other => other.to_string(),
        };
        let fault = Fault { reporter: self.rank, peers: error.peers(), what };
        let standing = self.watch.report(fault.clone());
        let error = if standing == fault { error } else { standing.error(operation, self.rank) };
        self.end(error, standing)
    }

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
    fn ended(call: Call, output: Tensor) -> Self {
        Self { member: None, call, output, work: None }
    }

    /// What the operation has made.
    ///
    /// # Errors
    /// See [`Group`].
    pub fn wait(self) -> Result<Tensor, Error> {
        if let (Some(member), Some(work)) = (&self.member, &self.work) {
            member.finish(&self.call, work)?;
        }
        Ok(self.output)
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
        if start.elapsed() > patience {
            return Ok(false);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(SLICE);
    }
}
