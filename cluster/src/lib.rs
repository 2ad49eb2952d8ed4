//! Process groups: what ranks of one run say to each other, over libtorch's own c10d.
//!
//! A [`Group`] gathers, scatters, reduces and broadcasts tensors between the processes that a
//! [`Topology`] describes; a process that is alone has one too, whose operations are identities. It knows
//! tensors, and nothing of models.
//!
//! Tensors of the processor go through c10d's Gloo, which libtorch holds whole; those of a GPU through NCCL,
//! which is looked for when a GPU is asked for. A `TCPStore` brings the ranks together, keeps a sign of life of
//! each, and is where a rank that stops says why, so that the others stop within a tenth of a second and can
//! name it. A frozen rank is seen when the operation's time is over.
//!
//! Who listens: the store at the address that the launcher names, on loopback alone if all ranks are on one
//! machine and on every interface otherwise, without authentication; Gloo at the address that leads to it.
#![expect(unsafe_code, reason = "calls of libtorch's C++ and of the system")]

mod c10d;
mod call;
mod error;
mod group;
mod member;
mod nccl;
mod ranks;
mod store;
mod topology;
mod watch;

pub use call::Reduce;
pub use error::Error;
pub use group::Group;
pub use member::{Pending, Timeouts};
pub use nccl::about_nccl;
pub use ranks::{Ended, Ranks, ask_to_stop};
pub use store::{Served, serve};
pub use topology::{Launch, Node, PORT, Topology};
pub use watch::Alarm;
