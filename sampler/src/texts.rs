//! Encoded prompts, kept for the next image of the same prompt.

use std::{collections::VecDeque, mem, sync::Arc, time::Duration};

use flow::tokens::PromptIds;

use crate::networks::Condition;

/// Most bytes of conditions that are kept: 30 prompts of FLUX.1-dev.
const MAX_BYTES: usize = 256 << 20;

/// An encoded prompt.
#[derive(Clone)]
pub struct Read {
    pub condition: Arc<Condition>,
    /// What it took, and what of that networks took; zero for all images after the first.
    pub time: [Duration; 2],
}

/// Conditions by their tokens, the oldest dropped first.
#[derive(Default)]
pub struct Texts {
    kept: VecDeque<(Arc<PromptIds>, Read)>,
    bytes: usize,
    unbounded: bool,
}

impl Texts {
    /// From now on nothing is dropped.
    pub fn keep_all(&mut self) {
        self.unbounded = true;
    }

    /// Whether there is a condition of these tokens.
    pub fn has(&self, ids: &PromptIds) -> bool {
        self.kept.iter().any(|(known, _)| **known == *ids)
    }

    /// The condition of these tokens, and to the first who asks the time it took.
    pub fn take(&mut self, ids: &PromptIds) -> Option<Read> {
        let (_, read) = self.kept.iter_mut().find(|(known, _)| **known == *ids)?;
        Some(Read { condition: read.condition.clone(), time: mem::take(&mut read.time) })
    }

    /// Keeps a condition.
    pub fn put(&mut self, ids: Arc<PromptIds>, read: Read) {
        self.bytes += read.condition.bytes();
        self.kept.push_back((ids, read));
        while !self.unbounded && self.bytes > MAX_BYTES && self.kept.len() > 1 {
            let dropped = self.kept.pop_front();
            self.bytes -= dropped.map_or(0, |(_, read)| read.condition.bytes());
        }
    }
}
