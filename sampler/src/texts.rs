//! Encoded prompts, kept for the next image of the same prompt.

use std::{collections::VecDeque, sync::Arc};

use flow::tokens::PromptIds;

use crate::networks::Condition;

/// Most bytes of conditions that are kept: 30 prompts of FLUX.1-dev.
const MAX_BYTES: usize = 256 << 20;

/// Conditions by their tokens, the oldest dropped first.
#[derive(Default)]
pub struct Texts {
    kept: VecDeque<(Arc<PromptIds>, Arc<Condition>)>,
    bytes: usize,
    unbounded: bool,
}

impl Texts {
    /// From now on nothing is dropped.
    pub fn keep_all(&mut self) {
        self.unbounded = true;
    }

    /// The condition of these tokens.
    pub fn get(&self, ids: &PromptIds) -> Option<Arc<Condition>> {
        let mut kept = self.kept.iter();
        kept.find(|(known, _)| **known == *ids).map(|(_, condition)| condition.clone())
    }

    /// Keeps a condition.
    pub fn put(&mut self, ids: Arc<PromptIds>, condition: Arc<Condition>) {
        self.bytes += condition.bytes();
        self.kept.push_back((ids, condition));
        while !self.unbounded && self.bytes > MAX_BYTES && self.kept.len() > 1 {
            let dropped = self.kept.pop_front();
            self.bytes -= dropped.map_or(0, |(_, condition)| condition.bytes());
        }
    }
}
