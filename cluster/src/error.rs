//! What goes wrong between ranks, each with the operation, the rank that says so and the peer where it is
//! known.

/// Every message is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The environment describes no cluster.
    #[error("{variable}: {what}")]
    Environment { variable: String, what: String },
    /// The group did not come together.
    #[error("rank {rank} of {world} cannot join the others at {store}: {what}")]
    Join { rank: usize, world: usize, store: String, what: String },
    /// Ranks that have ended, hang, cannot be reached or did not come along in time.
    #[error("{operation} on rank {rank}: {} {what}", ranks(peers))]
    Lost { operation: String, rank: usize, peers: Vec<usize>, what: String },
    /// Ranks call different operations, or the same one with different sizes or types.
    #[error("{operation} on rank {rank}: ranks differ: {calls}")]
    Disagree { operation: String, rank: usize, calls: String },
    /// A tensor that the operation does not take; nothing was sent.
    #[error("{operation} on rank {rank}: {what}")]
    Refused { operation: String, rank: usize, what: String },
    /// Another rank has ended the group.
    #[error("{operation} on rank {rank}: rank {peer} has stopped: {what}")]
    Stopped { operation: String, rank: usize, peer: usize, what: String },
    /// What every rank ends with at the same place, so that all can still do something together.
    #[error("{what}")]
    Shared { what: String },
    /// The library failed in a way that blames nobody.
    #[error("{operation} on rank {rank}: {what}")]
    Failed { operation: String, rank: usize, what: String },
}

impl Error {
    /// Ranks to blame, in order; none where it is not known.
    pub fn peers(&self) -> Vec<usize> {
        match self {
            Self::Lost { peers, .. } => peers.clone(),
            Self::Stopped { peer, .. } => vec![*peer],
            _ => Vec::new(),
        }
    }
}

/// "rank 2", "ranks 2, 5".
pub(crate) fn ranks(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(ToString::to_string).collect();
    match list.as_slice() {
        [] => "no rank".to_owned(),
        [one] => format!("rank {one}"),
        list => format!("ranks {}", list.join(", ")),
    }
}
