//! The velocity network as training uses it: without gradients for rollouts, and forward with backward
//! for updates, block by block where memory matters.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::Result;
use flow::models::transformer::{Inputs, State, TransformerConfig};
use flow::ops::Rope;
use flow::ops::shapes::{Manifest, Shapes};
use tch::{Tensor, no_grad};

use super::condition::Condition;
use super::inference::{Inference, rows_of};
use super::learning::{Kept, Learner};
use super::lora::Adapters;
use crate::tensor::eager::{Addition, Eager};
use crate::tensor::parameters::{Changed, Parameters, Pass};

/// The velocity network.
pub(crate) struct Engine {
    config: TransformerConfig,
    parameters: Parameters,
    /// Low-rank adapters on its linear layers.
    adapters: Option<Adapters>,
    /// The network without gradients where libtorch is slower, and the version of its parameters.
    inference: RefCell<Option<(u64, Rc<Inference>)>>,
    /// Ways forward of what is going to train.
    kept: RefCell<Kept>,
    /// Whether velocities without gradients must round as those with gradients do.
    pub(crate) rounds_alike: bool,
    /// Whether backward recomputes each block from its input, so that activations of one block at a
    /// time are held.
    pub(crate) recompute: bool,
}

/// One manifest a segment: prologue, every block, epilogue. A parameter belongs to its first user.
pub(crate) fn segments(config: &TransformerConfig) -> Vec<Manifest> {
    let shape = |n: &[usize]| n.to_vec();
    let (x, c) = (shape(&[1, 1, config.in_channels]), shape(&[1, 1, config.joint_attention_dim]));
    let (pooled, scalar, ids) =
        (shape(&[1, config.pooled_projection_dim]), shape(&[1]), shape(&[1, 3]));
    let inputs = Inputs {
        hidden_states: &x,
        encoder_hidden_states: &c,
        pooled_projections: &pooled,
        timestep: &scalar,
        img_ids: &ids,
        txt_ids: &ids,
        guidance: Some(&scalar),
    };
    let dry = Shapes::new();
    let mut state = config.prologue(&dry, &inputs);
    let mut manifests = vec![dry.manifest()];
    for index in 0..config.n_blocks() {
        let dry = Shapes::new();
        state = config.block(&dry, index, &state);
        manifests.push(dry.manifest());
    }
    let dry = Shapes::new();
    config.epilogue(&dry, &state);
    manifests.push(dry.manifest());
    manifests
}

type T = Rc<Tensor>;

impl Engine {
    pub(crate) fn new(config: TransformerConfig, parameters: Parameters) -> Self {
        let (inference, kept) = (RefCell::new(None), RefCell::default());
        let (rounds_alike, recompute) = (false, false);
        Self { config, parameters, adapters: None, inference, kept, rounds_alike, recompute }
    }

    /// Puts adapters on the linear layers.
    pub(crate) fn adapt(&mut self, adapters: Adapters) {
        self.adapters = Some(adapters);
        *self.inference.get_mut() = None;
    }

    /// Puts other values in place of some parameters.
    pub(crate) fn change(&mut self, changed: Changed) -> Result<()> {
        *self.inference.get_mut() = None;
        self.parameters.change(changed)
    }

    /// What training changes: the adapters where there are any, else every parameter.
    pub(crate) fn trained(&self) -> &Parameters {
        self.adapters.as_ref().map_or(&self.parameters, Adapters::parameters)
    }

    /// Lets gradients accumulate on [`Engine::trained`].
    pub(crate) fn train(&mut self) {
        self.adapters.as_mut().map_or(&mut self.parameters, Adapters::parameters_mut).train();
    }

    /// Type of activations.
    pub(crate) fn kind(&self) -> tch::Kind {
        self.parameters.kind()
    }

    /// The adapters, where there are any.
    pub(crate) fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// The interpreter of segment `index`: prologue, every block, epilogue.
    fn segment(&self, index: usize) -> Result<Eager<'_>> {
        let addition = self.adapters.as_ref().map(|adapters| adapters as &dyn Addition);
        Ok(self.parameters.segment(index)?.with(addition))
    }

    /// Velocity `[B, S, C]` of `x_t` `[B, S, C]` at times `t` `[B]`, in f32, without gradients.
    ///
    /// # Errors
    /// When weights cannot be read, or a rank that holds a part of them has failed.
    pub(crate) fn velocity(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor> {
        match self.inference(n_tokens(x_t, condition)) {
            Some(inference) => Ok(inference.velocity(x_t, t, condition)),
            None => no_grad(|| self.forward(x_t, t, condition)),
        }
    }

    /// The same; its `trained` rows are going to train before the parameters change. Where libtorch is slower, the
    /// network remembers them, and they go forward once.
    ///
    /// # Errors
    /// As [`Engine::velocity`].
    pub(crate) fn velocity_to_train(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        trained: &[i64],
    ) -> Result<Tensor> {
        let tokens = n_tokens(x_t, condition);
        let is_kept = !trained.is_empty() && self.learns_plainly(tokens);
        let Some(inference) = self.inference(tokens).filter(|_| is_kept) else {
            return self.velocity(x_t, t, condition);
        };
        let (learner, kept) = (self.learner(), &mut self.kept.borrow_mut());
        let of_trained = learner.velocity(kept, &inference, [x_t, t], condition, trained);
        let v = x_t.zeros_like().index_copy(0, &Tensor::from_slice(trained), &of_trained);
        let others: Vec<i64> =
            rows_of(x_t).into_iter().filter(|row| !trained.contains(row)).collect();
        if others.is_empty() {
            return Ok(v);
        }
        let rows = Tensor::from_slice(&others);
        let [x_t, t] = [x_t, t].map(|x| x.index_select(0, &rows));
        Ok(v.index_copy(0, &rows, &self.velocity(&x_t, &t, &condition.rows(&rows))?))
    }

    /// Drops what is remembered.
    pub(crate) fn forget(&self) {
        self.kept.take();
    }

    fn learner(&self) -> Learner<'_> {
        Learner { config: &self.config, parameters: &self.parameters }
    }

    /// Stands wherever ranks may have computed different numbers of velocities and gradients, before they do
    /// anything else together; see [`Parameters::attend`].
    ///
    /// # Errors
    /// When a rank has failed.
    pub(crate) fn attend(&self) -> Result<()> {
        self.parameters.attend()
    }

    /// Whether a network with `tokens` tokens a sample is run without libtorch.
    fn is_plain(&self, tokens: usize) -> bool {
        let parameters = &self.parameters;
        let is_held = !parameters.is_streamed() && !parameters.is_gathered();
        parameters.compute().is_plain() && is_held && Inference::is_worthwhile(&self.config, tokens)
    }

    /// Whether its gradients are found without libtorch.
    fn learns_plainly(&self, tokens: usize) -> bool {
        self.is_plain(tokens) && self.adapters.is_none() && !self.recompute
    }

    /// Another way to velocities, where it is faster, with the parameters as they are.
    fn inference(&self, tokens: usize) -> Option<Rc<Inference>> {
        let (parameters, adapters) = (&self.parameters, self.adapters.as_ref());
        let learns_alike = self.learns_plainly(tokens);
        let is_free = !self.rounds_alike && !adapters.is_some_and(Adapters::are_training);
        if !self.is_plain(tokens) || !(learns_alike || is_free) {
            return None;
        }
        let mut known = self.inference.borrow_mut();
        if known.as_ref().is_none_or(|(version, _)| *version != parameters.version()) {
            *known = None;
            let made = Inference::new(&self.config, parameters, adapters);
            *known = Some((parameters.version(), Rc::new(made)));
        }
        known.as_ref().map(|(_, inference)| inference.clone())
    }

    /// The velocity with its graph, for losses that train the text encoders as well.
    ///
    /// # Errors
    /// As [`Engine::velocity`].
    pub(crate) fn forward(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor> {
        let (config, owned) = (&self.config, self.inputs(x_t, t, condition));
        self.parameters.begin(Pass::Forward)?;
        let mut state = config.prologue(&self.segment(0)?, &owned.borrow());
        for index in 0..config.n_blocks() {
            state = config.block(&self.segment(index + 1)?, index, &state);
        }
        let v = config.epilogue(&self.segment(config.n_blocks() + 1)?, &state);
        Ok(v.to_kind(tch::Kind::Float))
    }

    /// Runs the network forward, asks `gradient` for dJ/dv (same shape as v, f32) and accumulates its
    /// product with dv/dθ on the parameters.
    ///
    /// # Errors
    /// As [`Engine::velocity`]; those of `gradient`.
    pub(crate) fn forward_backward(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        gradient: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        if self.recompute || self.parameters.is_gathered() {
            return self.blockwise(x_t, t, condition, gradient);
        }
        if self.learns_plainly(n_tokens(x_t, condition)) {
            let mut kept = self.kept.borrow_mut();
            return self.learner().forward_backward(&mut kept, [x_t, t], condition, gradient);
        }
        let v = self.forward(x_t, t, condition)?;
        let of_v = gradient(&v.detach())?;
        (v * of_v).sum(tch::Kind::Float).backward();
        Ok(())
    }

    fn blockwise(
        &self,
        x_t: &Tensor,
        t: &Tensor,
        condition: &Condition,
        gradient: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let (config, owned) = (&self.config, self.inputs(x_t, t, condition));
        let (parameters, n_blocks) = (&self.parameters, config.n_blocks());
        parameters.begin(Pass::Training)?;
        let mut inputs: Vec<State<T>> = Vec::with_capacity(n_blocks + 1);
        no_grad(|| {
            let mut state = config.prologue(&self.segment(0)?, &owned.borrow());
            for index in 0..n_blocks {
                let next = config.block(&self.segment(index + 1)?, index, &state);
                inputs.push(std::mem::replace(&mut state, next));
            }
            inputs.push(state);
            anyhow::Ok(())
        })?;
        let last = leaf(&inputs.pop().expect("one state at least"));
        let ops = self.segment(n_blocks + 1)?;
        let v = config.epilogue(&ops, &last);
        let of_v = gradient(&v.detach().to_kind(tch::Kind::Float))?;
        (&*v * of_v).sum(tch::Kind::Float).backward();
        drop(v);
        parameters.collect(n_blocks + 1, ops)?;
        let mut upstream = gradients(&last);
        for index in (0..n_blocks).rev() {
            let input = leaf(&inputs.pop().expect("one state a block"));
            let ops = self.segment(index + 1)?;
            inject(&config.block(&ops, index, &input), &upstream);
            parameters.collect(index + 1, ops)?;
            upstream = gradients(&input);
        }
        let ops = self.segment(0)?;
        inject(&config.prologue(&ops, &owned.borrow()), &upstream);
        parameters.collect(0, ops)
    }

    fn inputs(&self, x_t: &Tensor, t: &Tensor, condition: &Condition) -> OwnedInputs {
        let kind = self.parameters.kind();
        let float = |x: &Tensor| Rc::new(x.to_kind(kind));
        let n_text = condition.text.size()[1];
        OwnedInputs {
            x_t: float(x_t),
            text: float(&condition.text),
            pooled: float(&condition.pooled),
            t: float(t),
            img_ids: Rc::new(condition.img_ids.shallow_clone()),
            txt_ids: Rc::new(Tensor::zeros([n_text, 3], (tch::Kind::Float, x_t.device()))),
            guidance: float(&condition.guidance),
        }
    }
}

/// Tokens of a sample.
fn n_tokens(x_t: &Tensor, condition: &Condition) -> usize {
    (x_t.size()[1] + condition.text.size()[1]) as usize
}

struct OwnedInputs {
    x_t: T,
    text: T,
    pooled: T,
    t: T,
    img_ids: T,
    txt_ids: T,
    guidance: T,
}

impl OwnedInputs {
    fn borrow(&self) -> Inputs<'_, T> {
        Inputs {
            hidden_states: &self.x_t,
            encoder_hidden_states: &self.text,
            pooled_projections: &self.pooled,
            timestep: &self.t,
            img_ids: &self.img_ids,
            txt_ids: &self.txt_ids,
            guidance: Some(&self.guidance),
        }
    }
}

/// The same values, cut from their history and asking for gradients.
fn leaf(state: &State<T>) -> State<T> {
    let cut = |x: &T| Rc::new(x.detach().set_requires_grad(true));
    State {
        x: cut(&state.x),
        c: cut(&state.c),
        temb: cut(&state.temb),
        rope: Rope { cos: state.rope.cos.clone(), sin: state.rope.sin.clone() },
    }
}

/// Gradients that reached a leaf: x, c, temb; undefined where none did.
fn gradients(state: &State<T>) -> [Tensor; 3] {
    [&state.x, &state.c, &state.temb].map(|x| x.grad())
}

/// Carries `upstream` through the graph of `state`.
fn inject(state: &State<T>, upstream: &[Tensor; 3]) {
    let parts = [&state.x, &state.c, &state.temb];
    let products: Vec<Tensor> = parts
        .iter()
        .zip(upstream)
        .filter(|(part, gradient)| part.requires_grad() && gradient.defined())
        .map(|(part, gradient)| (&***part * gradient).sum(tch::Kind::Float))
        .collect();
    if let Some(total) = products.into_iter().reduce(|a, b| a + b) {
        total.backward();
    }
}
