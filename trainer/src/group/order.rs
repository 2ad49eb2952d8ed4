//! The order in which a run goes through its prompts.

use crate::data::splitmix::SplitMix64;

/// The order in which a run takes its prompts: all once an epoch, shuffled anew each epoch.
///
/// The order of an epoch follows from the seed and the epoch alone, so a run resumes from the number
/// of prompts it has taken.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    seed: u64,
    epoch: u64,
    permutation: Vec<usize>,
}

impl Order {
    /// # Panics
    /// If there are no prompts (`n` is zero).
    pub(crate) fn new(n: usize, seed: u64) -> Self {
        assert!(n > 0, "an order needs at least one prompt");
        Self { seed, epoch: 0, permutation: shuffled(n, seed, 0) }
    }

    /// The index, below n, of the prompt at `position` (counted from 0 over all epochs).
    pub(crate) fn at(&mut self, position: u64) -> usize {
        let n = self.permutation.len() as u64;
        let epoch = position / n;
        if epoch != self.epoch {
            self.permutation = shuffled(n as usize, self.seed, epoch);
            self.epoch = epoch;
        }
        self.permutation[(position % n) as usize]
    }
}

fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut permutation: Vec<usize> = (0..n).collect();
    SplitMix64::stream(seed, epoch).shuffle(&mut permutation);
    permutation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_holds_every_prompt_once_and_epochs_differ() {
        let mut order = Order::new(50, 7);
        let epochs: Vec<Vec<usize>> =
            (0..3).map(|e| (0..50).map(|k| order.at(e * 50 + k)).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    }

    #[test]
    fn a_resumed_order_continues_where_the_run_stopped() {
        let mut whole = Order::new(13, 99);
        let all: Vec<usize> = (0..60).map(|position| whole.at(position)).collect();
        let mut resumed = Order::new(13, 99);
        assert_eq!((37..60).map(|p| resumed.at(p)).collect::<Vec<_>>(), all[37..]);
        assert_eq!(resumed.at(3), all[3]);
        let mut other = Order::new(13, 100);
        assert_ne!((0..13).map(|p| other.at(p)).collect::<Vec<_>>(), all[..13]);
    }
}
