//! Seconds of an iteration on several ranks: what they compute, and what they wait for each other.

use crate::network::sharding::{Shard, Sharded, others};

/// How ranks are joined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) name: &'static str,
    /// Bytes a second that a rank sends while it receives as many.
    pub(super) bytes: f64,
    /// Seconds from one rank to the next.
    pub(super) latency: f64,
    /// Whether all ranks have these bytes together, as on one machine's memory.
    pub(super) is_shared: bool,
}

impl Link {
    /// Bytes a second that each of `n` ranks sends.
    fn rate(&self, n: f64) -> f64 {
        if self.is_shared { self.bytes / n } else { self.bytes }
    }
}

/// What ranks compute with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// Operations a second that a rank reaches.
    pub(super) flops: f64,
    /// Ranks that have these at a time.
    pub(super) processors: usize,
    pub(super) link: Link,
    /// Of the ranks of a node, where each node has all weights.
    pub(super) inside: Link,
}

/// An iteration.
#[derive(Clone, Copy, Debug)]
pub(super) struct Iteration {
    pub(super) sharded: Sharded,
    /// Segments of the network, each of which is sent by itself.
    pub(super) segments: f64,
    /// Operations of all ranks.
    pub(super) flops: f64,
    /// Passes of a batch, of all ranks: forward alone, forward and backward.
    pub(super) passes: [f64; 2],
    /// Optimiser steps.
    pub(super) steps: f64,
    /// Velocities that ranks which share groups tell each other: how often, and bytes of all.
    pub(super) gathers: f64,
    pub(super) gathered: f64,
}

/// Seconds of a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seconds {
    pub(super) computing: f64,
    /// Waiting for others while nothing computes.
    pub(super) waiting: f64,
}

impl Seconds {
    pub(super) fn total(self) -> f64 {
        self.computing + self.waiting
    }
}

impl Iteration {
    /// Bytes that one of `world` ranks sends: in an optimiser step with all that leads to it, in the
    /// iteration.
    pub(super) fn sent(&self, world: usize) -> [f64; 2] {
        let of_step: f64 = self.sharded.step(world).iter().sum();
        let [forward, training] = self.passes.map(|passes| passes / world as f64);
        let training = training * self.sharded.pass(world, true);
        let step = of_step + training / self.steps;
        let rollout = forward * self.sharded.pass(world, false) + self.gathered * others(world);
        [step, self.steps * step + rollout]
    }

    /// On `world` ranks of `machine`. Where weights are divided, a segment is gathered while the one before it
    /// computes, so that a pass takes the longer of both, and the first segment; but over a machine's memory, where
    /// who sends does not compute. Gradients and weights of a step are sent while nothing computes.
    pub(super) fn seconds(&self, machine: &Machine, world: usize) -> Seconds {
        let n = world as f64;
        let crowded = (n / machine.processors as f64).max(1.0);
        let computing = self.flops / n * crowded / machine.flops;
        let link = machine.link;
        let rate = link.rate(n);
        let hops = (n - 1.0) * link.latency;
        let steps: f64 = self.sharded.step(world).iter().map(|bytes| bytes / rate).sum();
        let mut waiting = self.steps * (steps + 2.0 * self.segments * hops);
        waiting += self.gathered * others(world) / rate + self.gathers * hops;
        if self.sharded.shard == Shard::States {
            return Seconds { computing, waiting };
        }
        let link = if self.sharded.shard == Shard::Node { machine.inside } else { link };
        let n_among = self.sharded.among(world) as f64;
        let (rate, hops) = (link.rate(n_among), (n_among - 1.0) * link.latency);
        // Operations go with passes: 1 forward, and what a training pass costs more.
        let passes = self.passes.map(|passes| passes / n);
        let all: f64 = self.sharded.pass(world, false) * passes[0] / rate
            + self.sharded.pass(world, true) * passes[1] / rate
            + (passes[0] + 3.0 * passes[1]) * self.segments * hops;
        waiting +=
            if link.is_shared { all } else { (all - computing).max(0.0) + all / self.segments };
        Seconds { computing, waiting }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARDED: Sharded = Sharded {
        shard: Shard::States,
        node: 8,
        weights: 10e9,
        trained: 10e9,
        largest_segment: 0.3e9,
        is_adapted: false,
        bytes: 2.0,
        has_average: false,
        n_copies: 0.0,
    };
    const ITERATION: Iteration = Iteration {
        sharded: SHARDED,
        segments: 50.0,
        flops: 64e15,
        passes: [128.0, 64.0],
        steps: 4.0,
        gathers: 0.0,
        gathered: 0.0,
    };
    const LINK: Link = Link { name: "", bytes: 50e9, latency: 1e-5, is_shared: false };
    const MACHINE: Machine =
        Machine { flops: 400e12, processors: usize::MAX, link: LINK, inside: LINK };

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9 * expected.abs().max(1.0), "{found} {expected}");
    }

    #[test]
    fn alone_nothing_is_waited_for() {
        let Seconds { computing, waiting } = ITERATION.seconds(&MACHINE, 1);
        assert_near(computing, 160.0);
        assert_near(waiting, 0.0);
        assert_eq!(ITERATION.sent(1), [0.0, 0.0]);
    }

    #[test]
    fn divided_states_by_hand() {
        let Seconds { computing, waiting } = ITERATION.seconds(&MACHINE, 8);
        assert_near(computing, 20.0);
        // 7/8 of 40 and of 20 GB a step at 50 GB/s, and 2·50 messages of 7 hops of 10 µs; four times.
        assert_near(waiting, 4.0 * (35.0 / 50.0 + 17.5 / 50.0 + 0.007));
        let [step, iteration] = ITERATION.sent(8);
        assert_near(step, 52.5e9);
        assert_near(iteration, 210e9);
    }

    #[test]
    fn members_of_a_group_on_several_ranks_by_hand() {
        let spread = Iteration { gathers: 8.0, gathered: 4e9, ..ITERATION };
        // 7/8 of 4 GB at 50 GB/s, and 8 messages of 7 hops of 10 µs.
        let more = spread.seconds(&MACHINE, 8).waiting - ITERATION.seconds(&MACHINE, 8).waiting;
        assert_near(more, 0.07 + 8.0 * 7e-5);
        assert_near(spread.sent(8)[1] - ITERATION.sent(8)[1], 3.5e9);
    }

    #[test]
    fn divided_weights_hide_behind_what_computes_by_hand() {
        let all = Iteration { sharded: Sharded { shard: Shard::All, ..SHARDED }, ..ITERATION };
        // 16 passes forward of 17.5 GB, 8 back of 35 + 35 GB: 840 GB at 50 GB/s; (16 + 24)·50 messages of 7 hops.
        let transfer = 16.8 + 0.14;
        let Seconds { computing, waiting } = all.seconds(&MACHINE, 8);
        assert_near(computing, 20.0);
        // No gradient waits for the step, but for its messages, and of the passes the first of 50 segments.
        assert_near(waiting, 4.0 * 0.007 + transfer / 50.0);
        let slow = Machine { link: Link { bytes: 12.5e9, ..LINK }, ..MACHINE };
        let transfer = 67.2 + 0.14;
        let waits = all.seconds(&slow, 8).waiting;
        assert_near(waits, 4.0 * 0.007 + transfer - 20.0 + transfer / 50.0);
        assert_near(all.sent(8)[1], 840e9);
    }

    #[test]
    fn nodes_gather_by_their_own_link_by_hand() {
        let node = Iteration { sharded: Sharded { shard: Shard::Node, ..SHARDED }, ..ITERATION };
        let slow = Machine { link: Link { bytes: 10e9, ..LINK }, ..MACHINE };
        // On 16 ranks half as many passes of 8; between 2 nodes 5 GB a step at 10 GB/s.
        let transfer = 8.4 + 0.07;
        let waits = 4.0 * (0.5 + 100.0 * 15.0 * 1e-5) + transfer / 50.0;
        assert_near(node.seconds(&slow, 16).waiting, waits);
    }

    /// Seconds of rollout and update of docs/cluster.md, by ranks of one thread on two processors over Gloo, which
    /// exchanges 1.5 GB a second each way between two of them, and a number in 0.12 ms. With weights divided, from
    /// what one rank takes with them divided.
    #[test]
    fn measured_ranks_are_explained() {
        const GLOO: Link = Link { name: "", bytes: 3e9, latency: 1.2e-4, is_shared: true };
        let embedded = [0.480, 0.279, 0.321];
        let larger = [5.35, 3.15, 3.37];
        let all = |states: [f64; 3], times: [f64; 3]| times.map(|times| times * states[0]);
        for (weights, shard, measured) in [
            (2.31e6, Shard::States, embedded),
            (36.0e6, Shard::States, larger),
            (2.31e6, Shard::All, all(embedded, [1.64, 1.10, 1.44])),
            (36.0e6, Shard::All, all(larger, [1.85, 1.13, 1.04])),
        ] {
            let sharded = Sharded { shard, weights, trained: weights, bytes: 4.0, ..SHARDED };
            let passes = [32.0, 4.0];
            let iteration =
                Iteration { sharded, segments: 8.0, steps: 1.0, flops: 1.0, passes, ..ITERATION };
            let flops = 1.0 / measured[0];
            let machine = Machine { flops, processors: 2, link: GLOO, inside: GLOO };
            for (world, measured) in [(2, measured[1]), (4, measured[2])] {
                let foreseen = iteration.seconds(&machine, world).total();
                let away = foreseen / measured - 1.0;
                println!(
                    "{world} ranks, {weights}, {shard}: {foreseen:.3}, {away:+.3} of {measured:.3}"
                );
                let bound = if shard == Shard::States { 0.2 } else { 0.25 };
                assert!(away.abs() < bound, "{world} ranks, {weights}, {shard}: {away}");
            }
        }
    }

    #[test]
    fn ranks_that_share_processors_are_no_faster() {
        let two = Machine { processors: 2, link: Link { is_shared: true, ..LINK }, ..MACHINE };
        let [of_2, of_4] = [2, 4].map(|world| ITERATION.seconds(&two, world));
        assert_near(of_2.computing, 80.0);
        assert_near(of_4.computing, 80.0);
        // Each of the four sends 3/4 at a quarter of the rate, where two sent 1/2 at a half.
        let hops = 4.0 * 100.0 * 1e-5;
        assert_near(of_4.waiting - 3.0 * hops, 3.0 * (of_2.waiting - hops));
    }
}
