//! One call of a collective operation, as ranks compare it and as errors name it.

use std::fmt;

use tch::{Kind, Tensor};

/// How values of several ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    Sum,
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    AllGather,
    ReduceScatter(Reduce),
    AllReduce(Reduce),
    /// From this rank.
    Broadcast(usize),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    numel: usize,
    kind: Kind,
}

impl Call {
    pub(crate) fn new(operation: Operation, tensor: &Tensor) -> Self {
        Self { operation, numel: tensor.numel(), kind: tensor.kind() }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.operation {
            Operation::AllGather => "all_gather",
            Operation::ReduceScatter(_) => "reduce_scatter",
            Operation::AllReduce(_) => "all_reduce",
            Operation::Broadcast(_) => "broadcast",
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} {:?}", self.name(), self.numel, self.kind)?;
        match self.operation {
            Operation::AllGather => Ok(()),
            Operation::ReduceScatter(how) | Operation::AllReduce(how) => write!(f, " to {how:?}"),
            Operation::Broadcast(from) => write!(f, " from rank {from}"),
        }
    }
}
