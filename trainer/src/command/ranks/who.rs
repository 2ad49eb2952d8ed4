//! What ranks are and where: a run's first line.

use std::collections::BTreeSet;
use std::env;
use std::fs;

use anyhow::Result;
use cluster::{Group, Topology};
use serde::{Deserialize, Serialize};

use crate::group::division::Division;
use crate::group::ranks;
use crate::network::sharding::Shard;
use crate::tensor::device::{Compute, device_name, precision_name};

/// Where a rank computes.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Place {
    host: String,
    device: String,
}

impl Place {
    fn own(compute: Compute) -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = if host.trim().is_empty() { "this machine" } else { host.trim() };
        Self { host: host.to_owned(), device: device_name(compute.device) }
    }
}

/// Of a process that is alone.
pub(super) fn alone(compute: Compute) -> String {
    let machines = machines(&[Place::own(compute)]);
    format!("1 rank on {machines} in {}", precision_name(compute.kind))
}

/// Of all ranks, which all call it.
///
/// # Errors
/// When a rank cannot be reached.
pub(super) fn all(
    group: &Group,
    topology: &Topology,
    shard: Shard,
    division: &Division,
    compute: Compute,
) -> Result<String> {
    let places = machines(&ranks::all(group, &Place::own(compute))?);
    let Topology { world, local_world, launcher, .. } = topology;
    let count = match topology.n_nodes() {
        1 => "1 machine".to_owned(),
        n => format!("{n} machines of {local_world}"),
    };
    let mut variables: Vec<String> = env::vars()
        .filter(|(name, _)| name.starts_with("NCCL_") || name.starts_with("GLOO_"))
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    variables.sort();
    let variables = if variables.is_empty() { "none".to_owned() } else { variables.join(" ") };
    Ok(format!(
        "{world} ranks on {count}, started by {launcher}; {places} in {} by {}; shard = {shard}; {division}; NCCL \
         and Gloo variables: {variables}",
        precision_name(compute.kind),
        group.carrier(),
    ))
}

/// Each machine's devices; machines with equal ones stand together.
fn machines(ranks: &[Place]) -> String {
    let mut machines: Vec<(&str, Vec<&str>)> = Vec::new();
    for Place { host, device } in ranks {
        match machines.iter_mut().find(|(known, _)| known == host) {
            Some((_, devices)) => devices.push(device),
            None => machines.push((host, vec![device])),
        }
    }
    let mut kinds: Vec<(String, Vec<&str>)> = Vec::new();
    for (host, devices) in machines {
        let devices = counted(&devices);
        match kinds.iter_mut().find(|(known, _)| *known == devices) {
            Some((_, hosts)) => hosts.push(host),
            None => kinds.push((devices, vec![host])),
        }
    }
    let lines = kinds.iter().map(|(devices, hosts)| format!("{}: {devices}", hosts.join(", ")));
    lines.collect::<Vec<_>>().join("; ")
}

/// "cuda:0 to cuda:7", "2 x cpu".
fn counted(devices: &[&str]) -> String {
    let distinct: BTreeSet<&str> = devices.iter().copied().collect();
    let number = |device: &str| device.strip_prefix("cuda:")?.parse::<usize>().ok();
    let in_a_row = |pair: &[&str]| number(pair[0]).map(|n| n + 1) == number(pair[1]);
    match devices {
        [one] => (*one).to_owned(),
        [one, ..] if distinct.len() == 1 => format!("{} x {one}", devices.len()),
        [first, .., last] if number(first).is_some() && devices.windows(2).all(in_a_row) => {
            format!("{first} to {last}")
        }
        _ => devices.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_a_machine_and_equal_ones_once() {
        let told = |ranks: &[(&str, &str)]| {
            let place = |&(host, device): &(&str, &str)| Place {
                host: host.to_owned(),
                device: device.to_owned(),
            };
            machines(&ranks.iter().map(place).collect::<Vec<_>>())
        };
        assert_eq!(told(&[("a", "cpu")]), "a: cpu");
        assert_eq!(told(&[("a", "cpu"), ("a", "cpu")]), "a: 2 x cpu");
        let of = |host: &'static str, n: usize| -> Vec<(&str, &str)> {
            ["cuda:0", "cuda:1", "cuda:2"][..n].iter().map(|&device| (host, device)).collect()
        };
        assert_eq!(told(&[of("a", 3), of("b", 3)].concat()), "a, b: cuda:0 to cuda:2");
        assert_eq!(
            told(&[of("a", 3), of("b", 1), vec![("c", "cuda:2"), ("c", "cuda:0")]].concat()),
            "a: cuda:0 to cuda:2; b: cuda:0; c: cuda:2, cuda:0"
        );
    }
}
