//! What the ranks of a run hold of a network that trains, and what each sends the others for it, in bytes.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Bytes of a master, a moment, an average, and of a gradient that is added up.
const F32: f64 = 4.0;

/// How ranks hold a network.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// `states` where `ng-train plan`'s account of that fits what memory each rank has, else `all`.
    #[default]
    Auto,
    /// Weights whole on every rank, in the type it computes in; masters, moments and the average divided.
    /// Gradients stay where they are made until an optimiser step, which adds them up and gathers new weights.
    States,
    /// Weights divided, too: those of a block are gathered before each use, the next one's meanwhile;
    /// gradients are added up in each pass. Slower, for networks that a rank cannot hold.
    All,
    /// The same inside each node, every node having all of it; gradients cross between nodes once a step.
    Node,
}

impl fmt::Display for Shard {
    /// As settings name it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A network on several ranks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sharded {
    /// Not [`Shard::Auto`].
    pub(crate) shard: Shard,
    /// Ranks of a node.
    pub(crate) node: usize,
    /// Numbers of the network, of those that train (adapters, or the network's own), and of its largest
    /// segment.
    pub(crate) weights: f64,
    pub(crate) trained: f64,
    pub(crate) largest_segment: f64,
    /// Whether adapters train, beside weights that do not.
    pub(crate) is_adapted: bool,
    /// Bytes of a number in the type networks compute in.
    pub(crate) bytes: f64,
    /// Whether a moving average is kept.
    pub(crate) has_average: bool,
    /// Other values of the weights that train, which networks see in turn.
    pub(crate) n_copies: f64,
}

/// Bytes of a rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Held {
    pub(crate) weights: f64,
    pub(crate) gradients: f64,
    /// Masters, moments, the average, and other values of the weights.
    pub(crate) states: f64,
}

impl Sharded {
    /// Of `world` ranks, those among whom one copy of the network is divided.
    pub(crate) fn among(&self, world: usize) -> usize {
        if self.shard == Shard::Node { world.min(self.node) } else { world }
    }

    /// What one of `world` ranks holds.
    pub(crate) fn held(&self, world: usize) -> Held {
        let n = self.among(world) as f64;
        let Self { bytes, trained, .. } = *self;
        let states = 3.0 + f64::from(u8::from(self.has_average)) + self.n_copies;
        let divided = if self.is_adapted { world as f64 } else { n };
        // Where networks compute in f32 with what a rank holds, that is the masters.
        let is_shared = bytes == F32 && !self.is_adapted;
        let (weights, gradients) = match self.shard {
            Shard::States if is_shared && world == 1 => (0.0, trained),
            Shard::Auto | Shard::States => (self.weights, trained),
            Shard::All | Shard::Node => {
                let own = if is_shared { 0.0 } else { self.weights / n };
                let gathered =
                    if n == 1.0 { self.largest_segment } else { 2.0 * self.largest_segment };
                (own + gathered, if self.is_adapted { trained } else { F32 / bytes * trained / n })
            }
        };
        let adapters = if self.is_adapted { trained } else { 0.0 };
        // As networks see them; in f32 what is divided is that.
        let seen = match self.shard {
            _ if is_shared && (world == 1 || matches!(self.shard, Shard::All | Shard::Node)) => 0.0,
            Shard::All | Shard::Node if !self.is_adapted => trained / n,
            _ => trained,
        };
        Held {
            weights: bytes * (weights + adapters),
            gradients: bytes * gradients,
            states: F32 * states * trained / divided + bytes * self.n_copies * seen,
        }
    }

    /// What one of `world` ranks sends for an optimiser step: for its gradients and for new weights.
    pub(crate) fn step(&self, world: usize) -> [f64; 2] {
        let others_of_all = others(world);
        let n = self.among(world);
        match self.shard {
            Shard::All if !self.is_adapted => [0.0, 0.0],
            // Around a ring of nodes there and back.
            Shard::Node if !self.is_adapted => {
                [2.0 * F32 * self.trained / n as f64 * others(world / n), 0.0]
            }
            _ => [F32 * self.trained * others_of_all, self.bytes * self.trained * others_of_all],
        }
    }

    /// What one of `world` ranks sends for a pass of the network, `trains` saying whether it goes back as
    /// well: every segment is then gathered a second time.
    pub(crate) fn pass(&self, world: usize, trains: bool) -> f64 {
        if self.shard == Shard::States {
            return 0.0;
        }
        let uses = if trains { 2.0 } else { 1.0 };
        let is_added_up = trains && !self.is_adapted;
        let gradients = if is_added_up { F32 * self.trained } else { 0.0 };
        (uses * self.bytes * self.weights + gradients) * others(self.among(world))
    }
}

/// The share of a whole that a rank sends on when parts go round a ring.
pub(crate) fn others(world: usize) -> f64 {
    1.0 - 1.0 / world as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FLUX.1-dev's 11.9 billion, in billions.
    const FLUX: Sharded = Sharded {
        shard: Shard::States,
        node: 8,
        weights: 11.9,
        trained: 11.9,
        largest_segment: 0.34,
        is_adapted: false,
        bytes: 2.0,
        has_average: false,
        n_copies: 0.0,
    };

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9 * expected.abs().max(1.0), "{found} {expected}");
    }

    #[test]
    fn states_on_32_ranks_by_hand() {
        // 2·11.9 of weights, 2·11.9 of gradients, 12·11.9/32 of states: 52.1 GB.
        let Held { weights, gradients, states } = FLUX.held(32);
        assert_near(weights, 23.8);
        assert_near(gradients, 23.8);
        assert_near(states, 4.4625);
        // Of 47.6 GB of gradients and 23.8 of weights, 31 of 32 parts.
        let [sum, gather] = FLUX.step(32);
        assert_near(sum, 46.1125);
        assert_near(gather, 23.05625);
        assert_near(FLUX.pass(32, true), 0.0);
    }

    #[test]
    fn everything_divided_by_hand() {
        let all = Sharded { shard: Shard::All, ..FLUX };
        let Held { weights, gradients, states } = all.held(4);
        // 2·(11.9/4 + 2·0.34), 4·11.9/4, 12·11.9/4.
        assert_near(weights, 7.31);
        assert_near(gradients, 11.9);
        assert_near(states, 35.7);
        assert_eq!(all.step(4), [0.0, 0.0]);
        // 3 of 4 parts of 23.8, and of 2·23.8 + 47.6.
        assert_near(all.pass(4, false), 17.85);
        assert_near(all.pass(4, true), 71.4);
    }

    #[test]
    fn nodes_that_each_have_everything_by_hand() {
        let node = Sharded { shard: Shard::Node, ..FLUX };
        assert_eq!(node.held(4), Sharded { shard: Shard::All, ..FLUX }.held(4));
        let Held { weights, gradients, states } = node.held(32);
        // 2·(11.9/8 + 2·0.34), 4·11.9/8, 12·11.9/8.
        assert_near(weights, 4.335);
        assert_near(gradients, 5.95);
        assert_near(states, 17.85);
        // Of 5.95 GB twice 3 of 4 parts between nodes; of a pass 7 of 8 inside one.
        assert_near(node.step(32)[0], 8.925);
        assert_near(node.pass(32, false), 20.825);
        // Adapters are divided among all.
        let lora = Sharded { trained: 0.1, is_adapted: true, ..node };
        assert_near(lora.held(32).states, 1.2 / 32.0);
        assert_near(lora.held(32).gradients, 0.2);
        assert_near(lora.step(32)[0], 0.3875);
        assert_near(lora.pass(32, true), 41.65);
    }

    #[test]
    fn adapters_cross_and_the_rest_does_not() {
        let lora = Sharded { trained: 0.1, is_adapted: true, has_average: true, ..FLUX };
        let Held { weights, gradients, states } = lora.held(2);
        assert_near(weights, 24.0);
        assert_near(gradients, 0.2);
        assert_near(states, 0.8);
        let [sum, gather] = lora.step(2);
        assert_near(sum, 0.2);
        assert_near(gather, 0.1);
    }

    #[test]
    fn other_values_of_the_weights_count_as_networks_see_them_and_as_they_are_kept() {
        // 12·11.9/32, and twice 4·11.9/32 and 2·11.9.
        let both = Sharded { n_copies: 2.0, ..FLUX };
        assert_near(both.held(32).states, 4.4625 + 2.975 + 47.6);
        let all = Sharded { shard: Shard::All, ..both };
        assert_near(all.held(32).states, 4.4625 + 2.975 + 1.4875);
        let alone = Sharded { bytes: 4.0, ..both };
        assert_near(alone.held(1).states, 142.8 + 95.2);
    }

    #[test]
    fn alone_in_f32_weights_and_masters_are_one() {
        let alone = Sharded { bytes: 4.0, ..FLUX };
        assert_near(alone.held(1).weights, 0.0);
        assert_near(alone.held(1).states, 142.8);
        assert_eq!(alone.step(1), [0.0, 0.0]);
        assert_near(alone.held(2).weights, 47.6);
    }
}
