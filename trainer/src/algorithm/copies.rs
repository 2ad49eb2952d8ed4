//! Other values of the weights that train: a policy of the past, or the one a run started from.

use anyhow::{Error, Result};
use flow::checkpoint::Entry;
use flow::panics::caught;
use tch::{Tensor, no_grad};

use crate::network::condition::Condition;
use crate::network::model::Model;
use crate::network::shards::{self, Shards};
use crate::tensor::parameters::{Others, Parameters};

/// What its parts are called in a checkpoint.
const KIND: &str = "behaviour";

/// Share of a lagging policy that an iteration keeps: `rate` for each of `n_steps` optimiser steps, at most
/// `max`. Source: DiffusionNFT, arXiv 2509.16117.
pub(crate) fn kept(rate: f64, n_steps: i64, max: f64) -> f64 {
    (rate * n_steps.max(0) as f64).min(max)
}

pub(crate) struct Copies {
    /// In f32, like the masters: this rank's part of each segment.
    parts: Vec<Tensor>,
    /// As networks see them; the parts themselves where masters share storage.
    shown: Others,
}

impl Copies {
    pub(crate) fn of(trained: &Parameters) -> Self {
        Self::with(trained, trained.masters().map(Tensor::copy).collect())
    }

    fn with(trained: &Parameters, parts: Vec<Tensor>) -> Self {
        let flats = if trained.shares_storage() {
            parts.iter().map(Tensor::shallow_clone).collect()
        } else {
            trained.seen().collect()
        };
        Self { parts, shown: trained.others(flats) }
    }

    /// Of `parts`, this rank's part of each segment in f32, which [`Copies::exchange`] may swap in place.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn given(trained: &Parameters, parts: &[Tensor]) -> Result<Self> {
        let copies = Self::with(trained, parts.iter().map(Tensor::shallow_clone).collect());
        copies.renew(trained)?;
        Ok(copies)
    }

    /// Swaps these values with those in use; twice restores both to the bit.
    pub(crate) fn exchange(&self, trained: &Parameters) {
        trained.exchange(&self.shown);
    }

    /// What these weights answer.
    ///
    /// # Errors
    /// As [`Engine::velocity`](crate::network::engine::Engine::velocity).
    pub(crate) fn velocity(
        &self,
        model: &Model,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor> {
        self.exchange(model.engine.trained());
        // Whatever happens, the weights in use come back.
        let v = caught(|| model.engine.velocity(x_t, t, condition));
        self.exchange(model.engine.trained());
        v.map_err(Error::msg).flatten()
    }

    /// Moves each value to `decay` of itself and the rest of the weight in use.
    ///
    /// # Errors
    /// When the ranks cannot put their parts together.
    pub(crate) fn follow(&self, trained: &Parameters, decay: f64) -> Result<()> {
        no_grad(|| {
            for (master, part) in trained.masters().zip(&self.parts) {
                let _ = part.shallow_clone().lerp_(master, 1.0 - decay);
            }
        });
        self.renew(trained)
    }

    fn renew(&self, trained: &Parameters) -> Result<()> {
        if trained.shares_storage() {
            return Ok(());
        }
        for (flat, part) in self.shown.flats.iter().zip(&self.parts) {
            let shown = trained.shown(part)?;
            no_grad(|| flat.shallow_clone().copy_(&shown.narrow(0, 0, flat.size()[0])));
        }
        Ok(())
    }

    /// What of this rank [`Copies::restore`] needs.
    pub(crate) fn entries(&self) -> Vec<Entry<'static>> {
        shards::entries(KIND, &self.parts)
    }

    /// Takes back what [`Copies::entries`] gave, of whatever number of ranks.
    pub(crate) fn restore(&self, state: &Shards, trained: &Parameters) -> Result<()> {
        state.restore(KIND, &self.parts, &[trained])?;
        self.renew(trained)
    }
}
