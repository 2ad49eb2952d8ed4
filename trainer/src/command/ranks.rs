//! Several processes that share one run: starting them, or being one.

use std::env;
use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use cluster::{Ended, Group, Launch, Node, Ranks, Timeouts, Topology};
use flow::log;
use flow::usage::Usage;

use crate::group::division::Division;
use crate::network::sharding::Shard;
use crate::run::config::{AlignConfig, RanksConfig};
use crate::run::interrupt;
use crate::tensor::device::{self, Compute, n_gpus, precision_name};

/// The flag that asks for processes on this machine.
const FLAG: &str = "--processes";

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
/// When they contradict each other, or a rank that was started fails.
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
    interrupt::listen(true)?;
    let ranks = Ranks::start(&node, n, &arguments())?;
    match ranks.wait(interrupt::asked) {
        None => Ok(Place::Started),
        Some(ended) => Err(anyhow!(Failed(ended))),
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

/// Meets the other ranks; the first one says who they are.
///
/// # Errors
/// When not all of them come.
pub(super) fn join(
    place: Option<&Topology>,
    config: &AlignConfig,
    compute: Compute,
) -> Result<Group> {
    let Some(topology) = place else { return Ok(Group::alone()) };
    let group = meet(place, &config.ranks)?;
    group.open_device(compute.device)?;
    let division = Division::new(&group, &config.group, config.group.prompts_per_iteration)?;
    if group.is_first() && group.world() > 1 {
        let shard = config.ranks.shard;
        log::note(&describe(topology, shard, &division, compute, &group.carrier()));
    }
    Ok(group)
}

/// Meets the other ranks, for what they tell each other from the processor.
///
/// # Errors
/// When not all of them come.
pub(super) fn meet(place: Option<&Topology>, config: &RanksConfig) -> Result<Group> {
    let Some(topology) = place else { return Ok(Group::alone()) };
    let [join, step] = [config.join_seconds, config.step_seconds].map(Duration::from_secs_f64);
    Ok(Group::join(topology, Timeouts { join, step })?)
}

fn describe(
    topology: &Topology,
    shard: Shard,
    division: &Division,
    compute: Compute,
    carrier: &str,
) -> String {
    let Topology { world, local_world, launcher, .. } = topology;
    let machines = match topology.n_nodes() {
        1 => "1 machine".to_owned(),
        n => format!("{n} machines of {local_world}"),
    };
    let mut variables: Vec<String> = env::vars()
        .filter(|(name, _)| name.starts_with("NCCL_") || name.starts_with("GLOO_"))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    variables.sort();
    let variables = if variables.is_empty() { "none".to_owned() } else { variables.join(" ") };
    format!(
        "{world} ranks on {machines}, started by {launcher}; {:?} in {} by {carrier}; shard = {shard}; {division}; \
         NCCL and Gloo variables: {variables}",
        compute.device,
        precision_name(compute.kind),
    )
}
