//! The ranks of a run as one value, and what they do together.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::call::{Call, Operation, Reduce};
use crate::error::Error;
use crate::member::{Member, Pending, Timeouts};
use crate::nccl;
use crate::topology::Topology;
use crate::watch::{Alarm, Circle};

/// All ranks of a run, or this process alone. Operations are called by all ranks in the same order.
///
/// An error other than [`Error::Refused`] and [`Error::Disagree`] ends the group: every later operation
/// fails with it at once, and so do those of all other ranks.
#[derive(Clone)]
pub struct Group(Option<Rc<Member>>);

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

    /// The ranks of this rank's node, and those that have its place on each node, as groups of their own; called by
    /// all ranks.
    ///
    /// # Errors
    /// [`Error::Environment`] if nodes have different numbers of ranks, or their ranks do not follow each other.
    pub fn by_node(&self) -> Result<[Self; 2], Error> {
        let Some(member) = &self.0 else { return Ok([Self::alone(), Self::alone()]) };
        let Topology { rank, world, local_rank, local_world, .. } = *member.topology();
        if world % local_world != 0 || rank % local_world != local_rank {
            return Err(Error::Environment {
                variable: "LOCAL_WORLD_SIZE".to_owned(),
                what: format!(
                    "rank {rank} of {world} is number {local_rank} of {local_world} of its node: every node needs as \
                     many ranks, in order"
                ),
            });
        }
        let part = |number: usize, name: &str, ranks: Vec<usize>| match ranks.len() {
            1 => Ok(Self::alone()),
            n if n == world => Ok(self.clone()),
            _ => Ok(Self(Some(Rc::new(member.part(Circle { number, ranks }, name)?)))),
        };
        let first = rank - local_rank;
        let within = part(
            1,
            &format!("node {}", rank / local_world),
            (first..first + local_world).collect(),
        )?;
        let alike = (local_rank..world).step_by(local_world).collect();
        Ok([within, part(2, &format!("place {local_rank}"), alike)?])
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
        self.start_reduce_scatter(whole, how)?.wait()
    }

    /// Starts [`Group::reduce_scatter`] and returns while it is under way.
    ///
    /// # Errors
    /// See [`Group::reduce_scatter`].
    pub fn start_reduce_scatter(&self, whole: &Tensor, how: Reduce) -> Result<Pending, Error> {
        let call = Call::new(Operation::ReduceScatter(how), whole);
        let Some(member) = &self.0 else { return Ok(Pending::ended(call, whole.detach().copy())) };
        let size = whole.size();
        let world = self.world() as i64;
        if size.first().is_none_or(|n| n % world != 0) {
            return Err(
                member.refuse(&call, format!("a tensor of {size:?} has no {world} equal parts"))
            );
        }
        // Gloo sends every rank its parts, which are reduced there.
        let is_apart = whole.device() == Device::Cpu;
        let n = if is_apart { size[0] } else { size[0] / world };
        let output = Tensor::empty([&[n], &size[1..]].concat(), (whole.kind(), whole.device()));
        let mut pending = member.start(call, output, &whole.detach())?;
        pending.reduces = is_apart.then_some(how);
        Ok(pending)
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
        let room = lengths.iter().max().map_or(1, |&longest| longest.max(1));
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
        member.abort(why);
    }

    /// Whether the group still stands, without asking anybody.
    ///
    /// # Errors
    /// What has ended it.
    pub fn check(&self) -> Result<(), Error> {
        self.0.as_ref().map_or(Ok(()), |member| member.standing("check"))
    }

    /// What tells other threads that the group has ended.
    pub fn alarm(&self) -> Alarm {
        self.0.as_ref().map_or_else(Alarm::default, |member| member.alarm())
    }
}
