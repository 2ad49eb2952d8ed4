//! Other values of the weights that train: a policy of the past, or the one a run started from.

use anyhow::Result;
use flow::checkpoint::{Entry, Weights};
use tch::{Device, Tensor, no_grad};

use crate::network::condition::Condition;
use crate::network::model::Model;
use crate::tensor::parameters::Parameters;

/// One flat tensor a segment.
pub(crate) struct Copies(Vec<Tensor>);

impl Copies {
    pub(crate) fn of(trained: &Parameters) -> Self {
        Self(trained.masters().map(Tensor::copy).collect())
    }

    /// Swaps these values with those in use; twice restores both to the bit.
    pub(crate) fn exchange(&self, trained: &Parameters) {
        no_grad(|| {
            for (master, other) in trained.masters().zip(&self.0) {
                let current = master.copy();
                master.shallow_clone().copy_(other);
                other.shallow_clone().copy_(&current);
            }
        });
        trained.refresh();
    }

    /// What these weights answer.
    pub(crate) fn velocity(
        &self,
        model: &Model,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Tensor {
        self.exchange(model.engine.trained());
        let v = model.engine.velocity(x_t, t, condition);
        self.exchange(model.engine.trained());
        v
    }

    /// Moves each value to `decay` of itself and the rest of the weight in use.
    pub(crate) fn follow(&self, trained: &Parameters, decay: f64) {
        no_grad(|| {
            for (master, other) in trained.masters().zip(&self.0) {
                let _ = other.shallow_clone().lerp_(master, 1.0 - decay);
            }
        });
    }

    /// What [`Copies::restore`] needs.
    pub(crate) fn entries(&self) -> Result<Vec<Entry<'static>>> {
        let entry = |(index, values): (usize, &Tensor)| {
            let values = Vec::<f32>::try_from(&values.to_device(Device::Cpu))?;
            Ok(Entry::f32(format!("behaviour.{index}"), &[values.len()], &values))
        };
        self.0.iter().enumerate().map(entry).collect()
    }

    /// Takes back what [`Copies::entries`] gave.
    pub(crate) fn restore(&self, state: &Weights) -> Result<()> {
        for (index, values) in self.0.iter().enumerate() {
            let stored = Tensor::from_slice(&state.f32(&format!("behaviour.{index}"))?);
            no_grad(|| values.shallow_clone().copy_(&stored));
        }
        Ok(())
    }
}
