//! Adapters on disk, in every form that trainers of FLUX write, read into one.
//!
//! A layer `W` `[n_out, n_in]` becomes `W + scale·f·Δ`. In a LoRA Δ = B·A with A `[r, n_in]`, B
//! `[n_out, r]`, and f = α/r, 1 where no α is said; [`delta`] has the other forms. Names of PEFT,
//! diffusers, kohya, BFL, ComfyUI, XLabs, ai-toolkit, OneTrainer and LyCORIS are understood; what a
//! file holds that cannot be applied is refused by name, or passed over with a notice.
//!
//! - [`place`]: what is typed, and which file of a folder is meant.
//! - [`key`], [`layers`]: a tensor's name taken apart; which layers a path means.
//! - [`settings`]: α and r where no tensor says them.
//! - [`read`]: tensors to adapters; [`adapter`], [`delta`]: what they do to weights.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::checkpoint::{CheckpointError, Entry, Weights, write_weights};
use crate::pipeline::Component;

mod adapter;
mod delta;
mod key;
mod layers;
mod place;
mod read;
mod settings;

use adapter::Adapter;
use delta::{Delta, Factor};
pub use layers::Layers;
pub use place::{FILE, PEFT, file, scaled_path};
pub use settings::settings_beside;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Name of the adapted component in files written here.
const COMPONENT: &str = "transformer.";
/// What follows a layer's path in the name of its A.
pub const A: &str = "lora_A.weight";
/// What follows a layer's path in the name of its B.
pub const B: &str = "lora_B.weight";

/// The two factors of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// r.
    pub rank: usize,
    /// A `[r, n_in]`.
    pub a: Vec<f32>,
    /// B `[n_out, r]`, with the scale and α/r multiplied in.
    pub b: Vec<f32>,
}

/// The adapters of a file. Values are read when they are used.
pub struct Lora {
    tensors: Weights,
    scale: f64,
    format: &'static str,
    adapters: Vec<Adapter>,
    /// Adapter and its part by component and layer.
    by_layer: BTreeMap<(Component, String), (usize, usize)>,
    notices: Vec<String>,
}

impl Lora {
    /// The adapters of `path`, a file or its folder, to be used at `scale` on a model of `layers`.
    ///
    /// # Errors
    /// When it is no LoRA, or not one of this model: all of it is checked here.
    pub fn open(path: &Path, scale: f64, layers: &Layers) -> Result<Self> {
        let path = file(path)?;
        let tensors = Weights::open_file(&path)?;
        let read::Read { adapters, format, notices } = read::read(&tensors, &path, layers)?;
        let mut by_layer = BTreeMap::new();
        for (index, adapter) in adapters.iter().enumerate() {
            for (part, layer) in adapter.target.parts.iter().enumerate() {
                by_layer.insert((layer.component, layer.layer.clone()), (index, part));
            }
        }
        Ok(Self { tensors, scale, format, adapters, by_layer, notices })
    }

    /// What a user is told: what it is, then what was left out of it or taken for granted.
    pub fn lines(&self) -> Vec<String> {
        let path = self.tensors.path().display();
        let notices = self.notices.iter().map(|notice| format!("note: {path}: {notice}"));
        std::iter::once(self.to_string()).chain(notices).collect()
    }

    /// Whether it changes the tensor `name` of `component`.
    pub fn changes_tensor(&self, component: Component, name: &str) -> bool {
        self.place(component, name).is_some()
    }

    /// Whether it changes a layer of `component`.
    pub fn changes(&self, component: Component) -> bool {
        self.by_layer.keys().any(|(known, _)| *known == component)
    }

    /// Whether it is no more than A and B of layers of the transformer.
    pub fn is_low_rank(&self) -> bool {
        self.adapters.iter().all(|adapter| {
            let is_plain = matches!(adapter.delta, Some((Delta::Plain(Factor::Product(..)), _)));
            let of_transformer = adapter.target.parts[0].component == Component::Transformer;
            of_transformer && is_plain && adapter.biases.is_empty() && adapter.magnitude.is_none()
        })
    }

    /// Layer and r of each A and B of the transformer's.
    pub fn ranks(&self) -> impl Iterator<Item = (&str, usize)> {
        self.by_layer.iter().filter_map(|((component, layer), (index, _))| {
            let (delta, _) = self.adapters[*index].delta.as_ref()?;
            let is_plain = matches!(delta, Delta::Plain(Factor::Product(..)));
            let of_transformer = *component == Component::Transformer;
            (is_plain && of_transformer).then_some((layer.as_str(), delta.rank()?))
        })
    }

    /// A and B of the transformer's `layer`, if it has them.
    ///
    /// # Errors
    /// When the file cannot be read any more.
    pub fn factors(&self, layer: &str) -> Result<Option<Factors>> {
        let Some(&(index, part)) = self.by_layer.get(&(Component::Transformer, layer.to_owned()))
        else {
            return Ok(None);
        };
        let adapter = &self.adapters[index];
        let Some((Delta::Plain(Factor::Product(b, a)), factor)) = &adapter.delta else {
            return Ok(None);
        };
        let (by, all) = ((self.scale * factor) as f32, self.tensors.f32(&b.name)?);
        let rows = adapter.target.rows(part).into_iter();
        let b = rows.flat_map(|rows| &all[rows.start * a.rows..rows.end * a.rows]);
        let b = b.map(|value| value * by).collect();
        Ok(Some(Factors { rank: a.rows, a: self.tensors.f32(&a.name)?, b }))
    }

    /// The layer of a parameter, its place among the adapters, and whether it is the bias.
    fn place(&self, component: Component, name: &str) -> Option<(&Adapter, usize, bool)> {
        let (layer, leaf) = name.rsplit_once('.')?;
        let &(index, part) = self.by_layer.get(&(component, layer.to_owned()))?;
        let adapter = &self.adapters[index];
        let is_changed = match leaf {
            "weight" => adapter.delta.is_some(),
            "bias" => !adapter.biases.is_empty(),
            _ => false,
        };
        is_changed.then_some((adapter, part, leaf == "bias"))
    }
}

/// The values of the parameter `name` of `component` with all of `loras` applied, one after the other,
/// to those of `weights`; nothing where none changes it.
///
/// # Errors
/// When a file cannot be read any more.
pub fn merged(
    loras: &[Lora],
    component: Component,
    weights: &Weights,
    name: &str,
) -> Result<Option<Vec<f32>>> {
    let Some(last) = loras.iter().rposition(|lora| lora.place(component, name).is_some()) else {
        return Ok(None);
    };
    let (before, lora) = (&loras[..last], &loras[last]);
    let under = |name: &str| match merged(before, component, weights, name)? {
        Some(values) => Ok(values),
        None => weights.f32(name),
    };
    let mut values = under(name)?;
    let (adapter, part, is_bias) = lora.place(component, name).expect("found above");
    if is_bias {
        adapter.change_bias(&lora.tensors, lora.scale, part, &mut values)?;
    } else {
        adapter.change_weight(&lora.tensors, lora.scale, part, &mut values, &under)?;
    }
    Ok(Some(values))
}

impl fmt::Display for Lora {
    /// What it is, in one line: format, kinds, layers, ranks, factors, scale.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} in {} names", self.tensors.path().display(), self.kinds(), self.format)?;
        let mut components: BTreeMap<Component, usize> = BTreeMap::new();
        for (component, _) in self.by_layer.keys() {
            *components.entry(*component).or_default() += 1;
        }
        for (component, n) in components.iter().rev() {
            write!(f, ", {n} layers of {}", component.folder())?;
        }
        let deltas = || self.adapters.iter().filter_map(|adapter| adapter.delta.as_ref());
        let ranks = deltas().filter_map(|(delta, _)| Some(delta.rank()? as f64));
        range(f, "rank", ranks)?;
        range(f, "alpha/r", deltas().map(|(_, factor)| *factor))?;
        write!(f, ", scale {}", self.scale)
    }
}

/// The least and the largest of `values`, if there are any.
fn range(
    f: &mut fmt::Formatter<'_>,
    what: &str,
    values: impl Iterator<Item = f64> + Clone,
) -> fmt::Result {
    let Some(least) = values.clone().reduce(f64::min) else { return Ok(()) };
    let most = values.fold(least, f64::max);
    let round = |value: f64| (value * 1e4).round() / 1e4;
    if least == most {
        return write!(f, ", {what} {}", round(least));
    }
    write!(f, ", {what} {} to {}", round(least), round(most))
}

impl Lora {
    /// The kinds of its adapters.
    fn kinds(&self) -> String {
        let mut kinds: Vec<&str> = Vec::new();
        for adapter in &self.adapters {
            let kind = match &adapter.delta {
                Some((Delta::Plain(Factor::Product(..)), _)) => "LoRA",
                Some((Delta::Kronecker(..), _)) => "LoKr",
                Some((Delta::Hadamard(..), _)) => "LoHa",
                Some((Delta::Plain(Factor::Whole(_)), _)) | None => "differences",
            };
            kinds.push(kind);
            if adapter.magnitude.is_some() {
                kinds.push("DoRA");
            }
        }
        kinds.sort_unstable();
        kinds.dedup();
        kinds.join(" and ")
    }
}

/// Writes `folder/`[`FILE`] with `entries` named `layer.lora_A.weight` and `layer.lora_B.weight`; B
/// holds α/r, so that readers which know no α agree with those that do.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(folder: &Path, mut entries: Vec<Entry<'_>>) -> Result<()> {
    for entry in &mut entries {
        entry.name.insert_str(0, COMPONENT);
    }
    write_weights(&folder.join(FILE), &entries, &[])
}

#[cfg(test)]
mod tests;
