//! A file's tensors, gathered into adapters: everything that can be wrong with them is found here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use super::adapter::{Adapter, Magnitude};
use super::delta::{Delta, Factor, Matrix};
use super::key::{self, Key, Slot};
use super::layers::{Layers, Meaning, Target};
use super::place;
use super::settings::{Beside, PEFT_FILE};
use crate::checkpoint::{CheckpointError, Dtype, Weights};

type Result<T> = std::result::Result<T, CheckpointError>;
/// With what is wrong, but not where.
type Explained<T> = std::result::Result<T, String>;

/// The adapters of a file, and what is to be said of it.
pub(super) struct Read {
    pub(super) adapters: Vec<Adapter>,
    /// Whose names it has.
    pub(super) format: &'static str,
    pub(super) notices: Vec<String>,
}

/// The tensors of one layer, by what they are to it.
type Slots = BTreeMap<Slot, String>;

/// A layer of the file.
struct Group {
    /// Its path there.
    path: String,
    target: Rc<Target>,
    /// Its path without what stands before the layer.
    layer: String,
    slots: Slots,
}

/// The adapters in `weights`, the file at `path`, for a model of `layers`.
///
/// # Errors
/// When the file is no LoRA of this model, in one line.
pub(super) fn read(weights: &Weights, path: &Path, layers: &Layers) -> Result<Read> {
    let malformed = |why: String| CheckpointError::malformed(path, why);
    let beside = Beside::read(weights, path)?;
    let mut notices = Vec::new();
    let (paths, is_unread) = paths(weights, &mut notices).map_err(malformed)?;
    let format = format_of(paths.keys());
    let control = widened_input(weights, &paths, layers);
    if let Some(n) = control {
        return Err(malformed(format!(
            "a FLUX control LoRA (it widens the transformer's first layer to {n} inputs), not one for \
             text to image: unsupported"
        )));
    }
    if let Some(why) = is_unread {
        return Err(malformed(why));
    }
    let groups = groups(paths, layers, &mut notices).map_err(malformed)?;
    let mut adapters = Vec::with_capacity(groups.len());
    let mut without_alpha = None;
    for group in &groups {
        let explain = |why| malformed(format!("{}: {why}", group.path));
        let adapter = adapter(weights, group, &beside).map_err(explain)?;
        let has_alpha = adapter.1;
        if !has_alpha && without_alpha.is_none() {
            without_alpha = Some(group);
        }
        adapters.push(adapter.0);
    }
    check_apart(&groups).map_err(malformed)?;
    check_magnitudes(&adapters, &beside).map_err(malformed)?;
    if let Some(group) = without_alpha {
        notices.extend(missing_alpha(group, path, &beside));
    }
    Ok(Read { adapters, format, notices })
}

/// The tensors by the path of their layer; and why one cannot be read, if there is one.
fn paths(
    weights: &Weights,
    notices: &mut Vec<String>,
) -> Explained<(BTreeMap<String, Slots>, Option<String>)> {
    let is_whole = |name: &str| {
        name.starts_with("transformer.") && Key::of(name).is_some_and(|key| key.slot == Slot::Down)
    };
    let has_copy = weights.names().any(is_whole);
    let mut paths: BTreeMap<String, Slots> = BTreeMap::new();
    let mut adapters = BTreeSet::new();
    let (mut unread, mut embeddings, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    for name in weights.names() {
        let Some(Key { path, slot, adapter }) = Key::of(name) else {
            let list = if key::is_embedding(name) { &mut embeddings } else { &mut unread };
            list.push(name);
            continue;
        };
        // As diffusers does: names of both kinds are one LoRA written twice.
        if has_copy && path.starts_with("lora_unet_") {
            copies.push(name);
            continue;
        }
        adapters.extend(adapter);
        if let Some(other) = paths.entry(path).or_default().insert(slot, name.to_owned()) {
            return Err(format!("{name} and {other} are the same tensor of one layer"));
        }
    }
    if adapters.len() > 1 {
        let names: Vec<String> = adapters.into_iter().collect();
        return Err(format!("holds several adapters ({}): save one of them", names.join(", ")));
    }
    let passed_over = |names: &[&str], what: &str| {
        let first = names.first()?;
        Some(format!("{} passed over: {what}", and_more(first, names.len())))
    };
    notices.extend(passed_over(&embeddings, "embeddings of words that this model does not know"));
    notices.extend(passed_over(&copies, "the file holds the LoRA in diffusers' names, too"));
    let unread = unread.first().map(|name| match key::other_kind(name) {
        Some(kind) => format!("{name} belongs to {kind}, which is unsupported: only LoRA, LoKr, LoHa, DoRA and differences are read"),
        None if paths.is_empty() => format!("no adapters in it, but such as {name}: is it a checkpoint?"),
        None => format!("tensor {name} is unsupported: it is no part of a LoRA, LoKr, LoHa or DoRA known here"),
    });
    if paths.is_empty() && unread.is_none() {
        return Err("no adapters in it".into());
    }
    Ok((paths, unread))
}

/// `name`, and how many more.
fn and_more(name: &str, n: usize) -> String {
    if n == 1 { name.to_owned() } else { format!("{name} and {} more", n - 1) }
}

/// Whose names the paths of a file are.
fn format_of<'a>(paths: impl Iterator<Item = &'a String>) -> &'static str {
    let mut best = "bare";
    for path in paths {
        let is_bfl = path.contains("double_blocks.") || path.contains("single_blocks.");
        return match path.as_str() {
            path if path.starts_with("lora_unet_") => "kohya",
            path if path.starts_with("lora_transformer_") => "OneTrainer",
            path if path.starts_with("lycoris_") => "LyCORIS",
            path if path.contains(".processor.") => "XLabs",
            path if path.starts_with("base_model.model.") => "PEFT",
            path if path.starts_with("diffusion_model.") => "ComfyUI",
            path if path.starts_with("transformer.") && is_bfl => "OneTrainer",
            path if path.starts_with("transformer.") => "diffusers",
            _ if is_bfl => "BFL",
            path => {
                if path.starts_with("lora_te") {
                    best = "kohya";
                }
                continue;
            }
        };
    }
    best
}

/// Inputs of the first layer, where the file makes it wider than the model's.
fn widened_input(
    weights: &Weights,
    paths: &BTreeMap<String, Slots>,
    layers: &Layers,
) -> Option<usize> {
    let known = layers.n_latent_inputs()?;
    paths.iter().find_map(|(path, slots)| {
        let Meaning::Layer(target, _) = layers.find(path) else { return None };
        let name = slots.get(&Slot::Down).or(slots.get(&Slot::Diff))?;
        let inputs = weights.get(name)?.shape.get(1).copied()?;
        (target.parts[0].layer == "x_embedder" && inputs > known).then_some(inputs)
    })
}

/// What the paths mean.
fn groups(
    paths: BTreeMap<String, Slots>,
    layers: &Layers,
    notices: &mut Vec<String>,
) -> Explained<Vec<Group>> {
    let n_paths = paths.len();
    let (mut groups, mut lacking, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    for (path, slots) in paths {
        match layers.find(&path) {
            Meaning::Layer(target, layer) => groups.push(Group { path, target, layer, slots }),
            Meaning::Lacking => lacking.push(path),
            Meaning::Unused => {
                notices
                    .push(format!("{path} passed over: FLUX makes no use of that layer of CLIP"));
            }
            Meaning::Unknown => unknown.push(path),
        }
    }
    if let Some(first) = unknown.first() {
        let n = unknown.len();
        return Err(format!(
            "{n} of {n_paths} layers in it are no layers of this model, such as {first}: it is a LoRA \
             of another model"
        ));
    }
    if let Some(first) = lacking.first() {
        return Err(format!(
            "made for a model that embeds guidance, such as FLUX.1-dev: this one has no {}",
            and_more(first, lacking.len())
        ));
    }
    if groups.is_empty() {
        return Err("nothing in it changes a layer that FLUX uses".into());
    }
    Ok(groups)
}

/// The adapter of one layer, and whether its factor is said.
fn adapter(weights: &Weights, group: &Group, beside: &Beside) -> Explained<(Adapter, bool)> {
    let Group { target, layer, slots, .. } = group;
    let delta = delta(weights, slots)?;
    let settings = beside.of(target.parts[0].component);
    let said = match (&delta, slots.get(&Slot::Alpha)) {
        (None | Some(Delta::Plain(Factor::Whole(_))), None) => Some(1.0),
        (None | Some(Delta::Plain(Factor::Whole(_))), Some(_)) => {
            return Err("an alpha without A and B".into());
        }
        (Some(delta), Some(name)) => {
            // Whole factors have no rank, and LyCORIS uses no alpha with them.
            let alpha = number(weights, name)?;
            Some(delta.rank().map_or(1.0, |rank| alpha / rank as f64))
        }
        (Some(delta), None) => settings.factor(layer, delta.rank().unwrap_or(1))?,
    };
    let factor = said.unwrap_or(1.0);
    if !factor.is_finite() {
        return Err("its alpha is not finite".into());
    }
    if let Some(delta) = &delta {
        check_shape(target, delta.shape())?;
    }
    let mut biases = Vec::new();
    for (slot, by) in [(Slot::UpBias, factor), (Slot::DiffBias, 1.0)] {
        if let Some(name) = slots.get(&slot) {
            check_bias(target, &shape(weights, name)?)?;
            check_values(weights, name)?;
            biases.push((name.clone(), by));
        }
    }
    let magnitude = slots.get(&Slot::Magnitude).map(|name| magnitude(weights, name, target));
    let magnitude = magnitude.transpose()?;
    if delta.is_none() && (biases.is_empty() || magnitude.is_some()) {
        return Err("is not whole: it lacks A and B".into());
    }
    let target = Rc::clone(target);
    let delta = delta.map(|delta| (delta, factor));
    Ok((Adapter { target, delta, biases, magnitude }, said.is_some()))
}

/// What the tensors of a layer add to its weight.
fn delta(weights: &Weights, slots: &Slots) -> Explained<Option<Delta>> {
    let get = |slot| slots.get(&slot).map(|name| matrix(weights, name)).transpose();
    let product = |a: Slot, b: Slot, what: &str| match (get(a)?, get(b)?) {
        (None, None) => Ok(None),
        (Some(a), Some(b)) if a.columns == b.rows => Ok(Some(Factor::Product(a, b))),
        (Some(a), Some(b)) => {
            let (inner, rank) = (a.columns, b.rows);
            Err(format!("{} has {inner} columns and {} has {rank} rows", a.name, b.name))
        }
        _ => Err(format!("one of {what} is missing")),
    };
    let factor =
        |whole: Slot, a: Slot, b: Slot, what: &str| match (get(whole)?, product(a, b, what)?) {
            (Some(_), Some(_)) => Err(format!("{what} are there beside their product")),
            (Some(whole), None) => Ok(Some(Factor::Whole(whole))),
            (None, product) => Ok(product),
        };
    let plain = factor(Slot::Diff, Slot::Up, Slot::Down, "A and B")?.map(Delta::Plain);
    let w1 = factor(Slot::Lokr1, Slot::Lokr1A, Slot::Lokr1B, "lokr_w1_a and lokr_w1_b")?;
    let w2 = factor(Slot::Lokr2, Slot::Lokr2A, Slot::Lokr2B, "lokr_w2_a and lokr_w2_b")?;
    let lokr = match (w1, w2) {
        (None, None) => None,
        (Some(w1), Some(w2)) => Some(Delta::Kronecker(w1, w2)),
        _ => return Err("one of lokr_w1 and lokr_w2 is missing".into()),
    };
    let w1 = product(Slot::Hada1A, Slot::Hada1B, "hada_w1_a and hada_w1_b")?;
    let w2 = product(Slot::Hada2A, Slot::Hada2B, "hada_w2_a and hada_w2_b")?;
    let loha = match (w1, w2) {
        (None, None) => None,
        (Some(w1), Some(w2)) if w1.shape() == w2.shape() => Some(Delta::Hadamard(w1, w2)),
        _ => return Err("hada_w1 and hada_w2 do not fit each other".into()),
    };
    let mut found = [plain, lokr, loha].into_iter().flatten();
    match (found.next(), found.next()) {
        (_, Some(_)) => Err("has adapters of two kinds".into()),
        (found, None) => Ok(found),
    }
}

/// The tensor `name` as a matrix: one of a norm has one column, one of a 1×1 convolution loses its axes.
fn matrix(weights: &Weights, name: &str) -> Explained<Matrix> {
    let shape = shape(weights, name)?;
    let (rows, columns) = match *shape.as_slice() {
        [rows] => (rows, 1),
        [rows, columns] | [rows, columns, 1, 1] => (rows, columns),
        _ => return Err(format!("{name} has shape {shape:?}, not a matrix")),
    };
    if rows == 0 || columns == 0 {
        return Err(format!("{name} is empty"));
    }
    check_values(weights, name)?;
    Ok(Matrix { name: name.to_owned(), rows, columns })
}

fn shape(weights: &Weights, name: &str) -> Explained<Vec<usize>> {
    Ok(weights.get(name).ok_or_else(|| format!("{name} is missing"))?.shape.to_vec())
}

fn check_values(weights: &Weights, name: &str) -> Explained<()> {
    let view = weights.get(name).ok_or_else(|| format!("{name} is missing"))?;
    let values = view.to_f32().map_err(|why| format!("{name}: {why}"))?;
    if values.iter().all(|value| value.is_finite()) {
        return Ok(());
    }
    Err(format!("{name} holds numbers that are not finite"))
}

/// The one number in the tensor `name`, whatever its type and shape.
fn number(weights: &Weights, name: &str) -> Explained<f64> {
    let view = weights.get(name).ok_or_else(|| format!("{name} is missing"))?;
    let n_values: usize = view.shape.iter().product();
    if n_values != 1 {
        return Err(format!("{name} holds {n_values} numbers, not one"));
    }
    let mut wide = [0; 8];
    wide[..view.bytes.len()].copy_from_slice(&view.bytes);
    let is_signed = matches!(view.dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
    if is_signed && view.bytes.last().is_some_and(|byte| byte & 0x80 != 0) {
        wide[view.bytes.len()..].fill(0xff);
    }
    Ok(match view.dtype {
        Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => u64::from_le_bytes(wide) as f64,
        _ if is_signed => i64::from_le_bytes(wide) as f64,
        _ => f64::from(view.to_f32().map_err(|why| format!("{name}: {why}"))?[0]),
    })
}

fn magnitude(weights: &Weights, name: &str, target: &Target) -> Explained<Magnitude> {
    let shape = shape(weights, name)?;
    let columns = target.parts[0].shape.get(1).copied();
    let of_rows = match *shape.as_slice() {
        [n] | [n, 1] | [n, 1, 1, 1] if n == target.n_out() => true,
        [1, n] | [1, n, 1, 1] if Some(n) == columns => false,
        _ => {
            let (rows, columns) = (target.n_out(), columns.unwrap_or(1));
            return Err(format!(
                "{name} (DoRA) has shape {shape:?}, but the layer has {rows} rows and {columns} columns"
            ));
        }
    };
    check_values(weights, name)?;
    Ok(Magnitude { name: name.to_owned(), of_rows })
}

fn check_shape(target: &Target, found: [usize; 2]) -> Explained<()> {
    let columns = target.parts[0].shape.get(1).copied().unwrap_or(1);
    let wanted = [target.n_out(), columns];
    if found == wanted {
        return Ok(());
    }
    let layers: Vec<&str> = target.parts.iter().map(|part| part.layer.as_str()).collect();
    Err(format!(
        "its adapter is for shape {found:?}, but the model has {wanted:?} in {}",
        layers.join(", ")
    ))
}

fn check_bias(target: &Target, found: &[usize]) -> Explained<()> {
    if !target.parts.iter().all(|part| part.has_bias) {
        return Err("adds to a bias, which the layer does not have".into());
    }
    if *found == [target.n_out()] {
        return Ok(());
    }
    Err(format!("its bias has shape {found:?}, but the layer has {} outputs", target.n_out()))
}

/// No parameter is changed by two layers of the file.
fn check_apart(groups: &[Group]) -> Explained<()> {
    let mut seen: BTreeMap<_, &str> = BTreeMap::new();
    for group in groups {
        for part in &group.target.parts {
            if let Some(other) = seen.insert((part.component, part.layer.as_str()), &group.path) {
                return Err(format!(
                    "{other} and {} change the same layer, {}",
                    group.path, part.layer
                ));
            }
        }
    }
    Ok(())
}

fn check_magnitudes(adapters: &[Adapter], beside: &Beside) -> Explained<()> {
    for adapter in adapters {
        let part = &adapter.target.parts[0];
        let settings = beside.of(part.component);
        if settings.use_dora && adapter.magnitude.is_none() && adapter.delta.is_some() {
            return Err(format!(
                "{} says use_dora, but {} has no magnitudes: a DoRA that is not whole",
                settings.source, part.layer
            ));
        }
    }
    Ok(())
}

/// What is to be said of a layer whose α is nowhere, where its format has one.
fn missing_alpha(group: &Group, path: &Path, beside: &Beside) -> Option<String> {
    let settings = beside.of(group.target.parts[0].component);
    let where_to = if !settings.source.is_empty() {
        format!("{} says no lora_alpha", settings.source)
    } else if group.path.starts_with("base_model.model.") || place::is_peft(path) {
        format!("no {PEFT_FILE} beside it says lora_alpha")
    } else {
        return None;
    };
    Some(format!(
        "{where_to}: alpha/r is taken as 1; if it was trained with another, give that as the scale"
    ))
}
