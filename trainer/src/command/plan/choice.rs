//! How ranks hold a network where that is left to the plan.

use anyhow::Result;
use cluster::{Group, Topology};
use flow::log;
use flow::pipeline::{Component, Pipeline};
use flow::tokens::Tokenizers;
use tch::Kind;

use super::{BF16, F32, Options, Plan, UTILISATION};
use crate::group::ranks::{self, Exact};
use crate::network::lora::RANK;
use crate::network::sharding::{Shard, Sharded};
use crate::run::config::AlignConfig;
use crate::tensor::device::{Compute, memory_bytes};

/// Of a rank's memory, what a run may be foreseen to take: the rest is for rewards, other programs and what is not
/// counted.
const USABLE: f64 = 0.9;

/// Puts `states` or `all` in the place of `auto`, the same on all ranks; the first says why. All ranks call it.
///
/// # Errors
/// When a rank cannot be reached, or the model is none that can be planned.
pub(crate) fn settle(
    config: &mut AlignConfig,
    place: Option<&Topology>,
    compute: Compute,
    group: &Group,
) -> Result<()> {
    if config.ranks.shard != Shard::Auto {
        return Ok(());
    }
    config.ranks.shard = Shard::States;
    if group.world() == 1 || config.stream {
        return Ok(());
    }
    let local = place.map_or(1, |topology| topology.local_world);
    let own = memory_bytes(compute.device, local).unwrap_or(f64::INFINITY);
    let all = ranks::all(group, &Exact::from(own))?.into_iter().map(f64::from);
    let room = all.fold(f64::INFINITY, f64::min);
    let needed = ranks::of_first(group, || {
        // What is wrong with it, the run says when it begins.
        let Ok(needed) = Needed::of(config, compute, group.world()) else { return Ok(None) };
        Ok(Some([needed.states, needed.all].map(Exact::from)))
    })?;
    let Some([states, all]) = needed.map(|needed| needed.map(f64::from)) else { return Ok(()) };
    let (shard, said) = choose(&Needed { states, all }, room);
    config.ranks.shard = shard;
    if group.is_first() {
        log::note(&said);
    }
    Ok(())
}

/// Bytes of a rank, by how it holds the network.
struct Needed {
    states: f64,
    all: f64,
}

impl Needed {
    fn of(config: &AlignConfig, compute: Compute, world: usize) -> Result<Self> {
        let pipeline = &Pipeline::open(&config.model)?;
        let text_tokens = Tokenizers::open(&config.model, None)?.text_tokens();
        let lora_rank = config.lora.as_ref().map_or(RANK, |lora| lora.rank);
        let utilisation = UTILISATION;
        let plan = Plan::new(&Options { config, pipeline, text_tokens, lora_rank, utilisation })?;
        let bytes = if compute.kind == Kind::Float { F32 } else { BF16 };
        let is_encoding = !config.stream && config.embeddings.is_none();
        let beside: f64 = plan
            .components
            .iter()
            .map(|&(component, n)| match component {
                Component::Transformer => 0.0,
                Component::Vae => F32 * n,
                _ => {
                    if is_encoding {
                        bytes * n
                    } else {
                        0.0
                    }
                }
            })
            .sum();
        let of = |shard| {
            let is_adapted = config.lora.is_some();
            let sharded = plan.sharded(config, is_adapted, shard, world);
            let held = Sharded { bytes, ..sharded }.held(world);
            let working: f64 = plan.working(config, shard, world, bytes).iter().sum();
            beside + held.weights + held.gradients + held.states + working
        };
        Ok(Self { states: of(Shard::States), all: of(Shard::All) })
    }
}

/// How a rank with `room` bytes holds it, and what to say of that.
fn choose(needed: &Needed, room: f64) -> (Shard, String) {
    let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let fits = |bytes: f64| bytes <= USABLE * room;
    let has = if room.is_finite() { gb(room) } else { "unknown memory".to_owned() };
    let Needed { states, all } = *needed;
    let (shard, foreseen) = if fits(states) { (Shard::States, states) } else { (Shard::All, all) };
    let instead = match shard {
        Shard::All => format!("; \"states\" would take {}", gb(states)),
        _ => String::new(),
    };
    let warning = if fits(foreseen) {
        ""
    } else {
        "; that may not fit: take more ranks, a lora, or a smaller rollout.batch"
    };
    let said = format!(
        "ranks.shard = \"auto\" is \"{shard}\": a rank takes about {}, and has {has}{instead}{warning}",
        gb(foreseen)
    );
    (shard, said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_divided_where_they_fit_and_weights_where_they_do_not() {
        let needed = Needed { states: 60e9, all: 30e9 };
        let (shard, said) = choose(&needed, 80e9);
        assert_eq!(shard, Shard::States);
        assert!(said.ends_with("is \"states\": a rank takes about 60.0 GB, and has 80.0 GB"));
        let (shard, said) = choose(&needed, 40e9);
        assert_eq!(shard, Shard::All);
        assert!(said.ends_with("and has 40.0 GB; \"states\" would take 60.0 GB"), "{said}");
        let (shard, said) = choose(&needed, 24e9);
        assert!(shard == Shard::All && said.contains("may not fit"), "{said}");
        let (shard, said) = choose(&needed, f64::INFINITY);
        assert!(shard == Shard::States && said.contains("unknown memory"), "{said}");
    }
}
