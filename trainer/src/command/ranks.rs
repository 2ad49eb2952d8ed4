//! Several processes that share one run: starting them, or being one.

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use cluster::{Ended, Group, Launch, Node, Ranks, Timeouts, Topology};
use flow::log;
use flow::usage::Usage;

use super::reason;
use crate::group::division::Division;
use crate::group::ranks::give_way;
use crate::run::agreement;
use crate::run::align::Stopped;
use crate::run::config::{AlignConfig, RanksConfig};
use crate::run::interrupt::{self, Answers, INTERRUPTED};
use crate::tensor::device::{self, Compute, n_gpus};

mod who;

/// The flag that asks for processes on this machine; ranks that it has started say so.
pub(super) const FLAG: &str = "--processes";

/// Code of a rank that SIGTERM has ended before it listened.
const TERMINATED: u8 = 128 + 15;

/// What this process is.
pub(super) enum Place {
    /// It has started the ranks, and they have ended well.
    Started,
    /// It is a rank, or alone.
    Here(Option<Topology>),
}

/// A rank that did not end well; what went wrong, it has said itself.
#[derive(Debug)]
pub struct Failed(Ended);

impl Failed {
    /// The code the program ends with.
    pub fn code(&self) -> u8 {
        self.0.code()
    }
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Failed {}

/// Does what the environment and `--processes` ask for.
///
/// # Errors
/// When they contradict each other, or a rank that was started fails; [`Stopped`] when the ranks were asked to stop.
pub(super) fn place(processes: Option<usize>) -> Result<Place> {
    let (node, n) = match (Launch::from_environment()?, processes) {
        (Launch::Rank(topology), None) => return Ok(Place::Here(Some(topology))),
        (Launch::Rank(topology), Some(_)) => bail!(Usage(format!(
            "{FLAG}: {} has started this process as rank {} of {} already: leave it out",
            topology.launcher, topology.rank, topology.world
        ))),
        (Launch::Alone, None | Some(1)) => return Ok(Place::Here(None)),
        (Launch::Alone, Some(n)) => (alone(), n),
        (Launch::Node(node), processes) => {
            let n = processes.or(node.processes);
            let n = n.unwrap_or_else(|| n_gpus().unwrap_or(0).max(1));
            (node, n)
        }
    };
    // Where the first rank is, it answers.
    interrupt::listen(true, if node.index == 0 { Answers::Kept } else { Answers::Said })?;
    reason::forget();
    let ranks = Ranks::start(&node, n, &arguments())?;
    match ranks.wait(interrupt::asked) {
        None => Ok(Place::Started),
        Some(ended) if ended.code() == INTERRUPTED => bail!(Stopped),
        Some(ended) if interrupt::asked() && ended.code() == TERMINATED => {
            log::note("stopped before the ranks had begun");
            bail!(Stopped)
        }
        Some(ended) => bail!(Failed(ended)),
    }
}

/// Which of the ranks' answers to signals are heard.
pub(super) fn answers(place: Option<&Topology>) -> Answers {
    match place {
        Some(topology) if topology.rank > 0 => Answers::Kept,
        Some(topology) if topology.launcher == FLAG => Answers::SaidOnce,
        _ => Answers::Said,
    }
}

fn alone() -> Node {
    Node { index: 0, count: 1, processes: None, host: "127.0.0.1".to_owned(), port: 0 }
}

/// This program's arguments without [`FLAG`].
fn arguments() -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut arguments = env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == FLAG {
            arguments.next();
        } else if !argument.to_string_lossy().starts_with(&format!("{FLAG}=")) {
            kept.push(argument);
        }
    }
    kept
}

/// The device of a rank, where `name` leaves the choice.
pub(super) fn device(name: &str, place: Option<&Topology>) -> String {
    match place {
        Some(topology) if topology.local_world > 1 => device::of_process(name, topology.local_rank),
        _ => name.to_owned(),
    }
}

/// Meets the other ranks, which compute the same; the first one says who they are, and the others leave speaking to
/// people to it, with files of their own below `output`.
///
/// # Errors
/// On all ranks when not all of them come or one cannot take part.
pub(super) fn join(
    place: Option<&Topology>,
    config: &AlignConfig,
    compute: Compute,
    output: Option<&Path>,
) -> Result<Group> {
    let Some(topology) = place.filter(|topology| topology.world > 1) else {
        log::heading(&who::alone(compute));
        return Ok(Group::alone());
    };
    let group = meet(place, config, compute)?;
    let division = Division::new(&group, &config.group, config.group.prompts_per_iteration)?;
    let begin = || {
        give_way(&group, output)?;
        group.open_device(compute.device)?;
        let who = who::all(&group, topology, config.ranks.shard, &division, compute)?;
        if group.is_first() {
            log::note(&who);
        }
        Ok(())
    };
    begin().inspect_err(|error: &anyhow::Error| group.abort(&format!("{error:#}")))?;
    Ok(group)
}

/// Meets the other ranks, which compute the same, for what they tell each other from the processor.
///
/// # Errors
/// On all ranks when not all of them come, or one computes something else.
pub(super) fn meet(
    place: Option<&Topology>,
    config: &AlignConfig,
    compute: Compute,
) -> Result<Group> {
    let Some(topology) = place else { return Ok(Group::alone()) };
    let RanksConfig { join_seconds, step_seconds, .. } = config.ranks;
    let [join, step] = [join_seconds, step_seconds].map(Duration::from_secs_f64);
    let group = Group::join(topology, Timeouts { join, step })?;
    agreement::of_settings(&group, config, compute)?;
    Ok(group)
}
