//! The table of ranks: memory, bytes that cross, seconds, and what limits them.

use std::fmt;

use super::cost::{Link, Machine, Seconds};
use super::{BF16, GPUS_A_NODE, Options, Plan};
use crate::group::division::enough;
use crate::network::sharding::{Held, Shard};

/// Dense bf16 operations a second of one H800, and its memory (NVIDIA's data sheet).
const H800_FLOPS: f64 = 989e12;
const H800_BYTES: f64 = 80e9;
/// Ranks that are tabulated.
const WORLD_SIZES: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// What a GPU sends a second: an H800's NVLink, and one adapter a GPU of the usual networks, of which this
/// share is reached; seconds to the next rank.
const REACHED: f64 = 0.8;
const LINKS: [Link; 3] = [
    Link { name: "NVLink", bytes: REACHED * 200e9, latency: 5e-6, is_shared: false },
    Link { name: "400 Gb/s", bytes: REACHED * 50e9, latency: 10e-6, is_shared: false },
    Link { name: "100 Gb/s", bytes: REACHED * 12.5e9, latency: 20e-6, is_shared: false },
];
/// What an iteration waits for, as a share of what it computes, at which the network counts as its limit.
const MUCH: f64 = 0.1;

/// How ranks may hold a network.
const HOW: [(&str, Shard); 3] = [
    ("masters and moments divided", Shard::States),
    ("weights too, every node having all, its own joined by NVLink", Shard::Node),
    ("weights too", Shard::All),
];

/// A run on 1 to 512 H800s.
pub(super) struct Ranks<'a> {
    pub(super) plan: &'a Plan,
    pub(super) options: &'a Options<'a>,
}

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = self.options.config;
        writeln!(
            f,
            "\non H800s that reach {:.0} % of their peak, {GPUS_A_NODE} a node, all joined by one kind of link, of which {:.0} % are \
             reached: GB a rank; GB\nthat a rank sends in an optimiser step and in an iteration; seconds of \
             an iteration without decoding and rewards;\nwhat limits them at 400 Gb/s. Where ranks cannot \
             share the images evenly, an iteration has the next number of prompts that they can",
            100.0 * self.options.utilisation,
            100.0 * REACHED,
        )?;
        // A run trains all weights or adapters; one that names neither is told both.
        let whole = config.lora.is_none().then_some(("all weights", false));
        for (what, lora) in whole.into_iter().chain([("LoRA", true)]) {
            for (how, shard) in HOW {
                writeln!(f, "\n{what}, {how} (ranks.shard = \"{shard}\")")?;
                self.table(f, lora, shard)?;
            }
            let fewest = HOW.map(|(_, shard)| {
                let fits = |&world: &usize| self.bytes(world, lora, shard).1 <= H800_BYTES;
                let fewest = WORLD_SIZES.into_iter().find(fits);
                let from = fewest.map_or("never".to_owned(), |n| format!("from {n} on"));
                format!("\"{shard}\" {from}")
            });
            writeln!(
                f,
                "\nranks whose memory holds {what}, by ranks.shard: {}",
                fewest.join(", ")
            )?;
        }
        Ok(())
    }
}

impl Ranks<'_> {
    fn table(&self, f: &mut fmt::Formatter<'_>, lora: bool, shard: Shard) -> fmt::Result {
        let [nvlink, infiniband, ethernet] = LINKS.map(|link| link.name);
        writeln!(
            f,
            "ranks prompts weights gradients states working  total   a step  iteration  computing \
             {nvlink:>8}{infiniband:>10}{ethernet:>10}  limit"
        )?;
        for world in WORLD_SIZES {
            self.row(f, world, lora, shard)?;
        }
        Ok(())
    }

    /// What a rank holds, and that with what it works with.
    fn bytes(&self, world: usize, lora: bool, shard: Shard) -> (Held, f64) {
        let config = self.options.config;
        let held = self.plan.sharded(config, lora, shard, GPUS_A_NODE).held(world);
        let working: f64 = self.plan.working(config, shard, world, BF16).iter().sum();
        (held, held.weights + held.gradients + held.states + working)
    }

    fn row(
        &self,
        f: &mut fmt::Formatter<'_>,
        world: usize,
        lora: bool,
        shard: Shard,
    ) -> fmt::Result {
        let Options { config, utilisation, .. } = *self.options;
        let sharded = self.plan.sharded(config, lora, shard, GPUS_A_NODE);
        let n_prompts = config.group.prompts_per_iteration;
        let prompts = enough(n_prompts, config.group.group_size, world);
        let iteration =
            self.plan.iteration(self.options, sharded, prompts, world).map_err(|_| fmt::Error)?;
        let (Held { weights, gradients, states }, total) = self.bytes(world, lora, shard);
        let working = total - weights - gradients - states;
        let seconds = LINKS.map(|link| {
            let flops = utilisation * H800_FLOPS;
            let machine = Machine { flops, processors: usize::MAX, link, inside: LINKS[0] };
            iteration.seconds(&machine, world)
        });
        let [weights, gradients, states, working, gb] =
            [weights, gradients, states, working, total].map(|bytes| bytes / 1e9);
        let [step, sent] = iteration.sent(world).map(|bytes| bytes / 1e9);
        let [nvlink, infiniband, ethernet] = seconds.map(Seconds::total);
        writeln!(
            f,
            "{world:>5}{prompts:>8}{weights:>8.1}{gradients:>10.1}{states:>7.1}{working:>8.1}{gb:>7.1}\
             {step:>9.2}{sent:>11.1}{:>11.1}{nvlink:>9.1}{infiniband:>10.1}{ethernet:>10.1}  {}",
            seconds[0].computing,
            limit(total, seconds[1]),
        )
    }
}

/// What keeps a rank that has `bytes` from being faster.
fn limit(bytes: f64, seconds: Seconds) -> &'static str {
    if bytes > H800_BYTES {
        "memory: above 80 GB"
    } else if seconds.waiting > MUCH * seconds.computing {
        "the network"
    } else {
        "computing"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named() {
        let seconds = |computing, waiting| Seconds { computing, waiting };
        assert_eq!(limit(81e9, seconds(1.0, 9.0)), "memory: above 80 GB");
        assert_eq!(limit(79e9, seconds(10.0, 0.9)), "computing");
        assert_eq!(limit(79e9, seconds(10.0, 1.1)), "the network");
    }
}
