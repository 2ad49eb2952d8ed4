//! What the paths in LoRA files mean: the layers of a pipeline by every name that trainers give them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use crate::naming;
use crate::ops::shapes::Manifest;
use crate::pipeline::{Component, Pipeline};

/// The layers of a pipeline that adapters can change, by every name.
pub struct Layers {
    shapes: BTreeMap<(Component, String), Vec<usize>>,
    /// Dots and underscores are one character here, because kohya's names have underscores only.
    by_name: BTreeMap<String, Rc<Target>>,
    /// Names of layers that FLUX can have and this model lacks.
    lacking: BTreeSet<String>,
}

/// The layers that one matrix of a file changes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Their rows lie one below the other in the file's matrix.
    pub(super) parts: Vec<Part>,
    /// Whether the halves of the file's rows change places.
    halves_swapped: bool,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) component: Component,
    /// Its path in the component.
    pub(super) layer: String,
    /// Shape of its weight.
    pub(super) shape: Vec<usize>,
    /// Whether it has a bias.
    pub(super) has_bias: bool,
}

impl Part {
    pub(super) fn n_out(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

/// What a path means.
pub(super) enum Meaning {
    /// A layer of the pipeline; its name in the file without prefixes.
    Layer(Rc<Target>, String),
    /// A layer that FLUX has and this model lacks.
    Lacking,
    /// A layer of CLIP that no prompt goes through.
    Unused,
    Unknown,
}

/// What trainers put before a layer's path, one after the other, dots as underscores.
const PREFIXES: [&str; 19] = [
    "base_model_",
    "model_",
    "module_",
    "diffusion_model_",
    "transformer_",
    "unet_",
    "lora_",
    "lycoris_",
    "te_",
    "te1_",
    "te2_",
    "te3_",
    "text_encoder_",
    "text_encoder_1_",
    "text_encoder_2_",
    "text_encoders_",
    "clip_l_",
    "t5xxl_",
    "t5_",
];
/// CLIP's last layer, which FLUX leaves out.
const UNUSED: &str = "text_projection";
/// What CLIP's layers are called with it and without.
const CLIP: &str = "text_model.";

impl Layers {
    /// Those of the transformer and both text encoders of `pipeline`.
    pub fn of(pipeline: &Pipeline) -> Self {
        let adapted = [Component::Transformer, Component::TextEncoder, Component::TextEncoder2];
        Self::new(adapted.map(|component| (component, pipeline.manifest(component))))
    }

    /// Those of the networks with these parameters.
    pub fn new(networks: impl IntoIterator<Item = (Component, Manifest)>) -> Self {
        let mut shapes = BTreeMap::new();
        for (component, manifest) in networks {
            for (name, shape) in manifest.entries() {
                shapes.insert((component, name.to_owned()), shape.to_vec());
            }
        }
        let mut layers =
            Self { shapes, by_name: BTreeMap::default(), lacking: BTreeSet::default() };
        layers.add_own_names();
        layers.add_names_of_bfl();
        layers
    }

    fn add_own_names(&mut self) {
        let all: Vec<Part> =
            self.shapes.keys().filter_map(|(c, name)| self.part(*c, name)).collect();
        for part in all {
            let name = part.layer.clone();
            let target = Rc::new(Target { parts: vec![part], halves_swapped: false });
            if let Some(short) = name.strip_prefix(CLIP) {
                self.by_name.insert(flat(short), Rc::clone(&target));
            }
            self.by_name.insert(flat(&name), target);
        }
    }

    fn part(&self, component: Component, name: &str) -> Option<Part> {
        let layer = name.strip_suffix(".weight")?;
        let shape = self.shapes.get(&(component, name.to_owned()))?.clone();
        let has_bias = self.shapes.contains_key(&(component, format!("{layer}.bias")));
        Some(Part { component, layer: layer.to_owned(), shape, has_bias })
    }

    fn add_names_of_bfl(&mut self) {
        let blocks = |kind: &str| {
            let transformer = self.shapes.keys().filter(|(c, _)| *c == Component::Transformer);
            let inside =
                transformer.filter_map(|(_, name)| name.strip_prefix(kind)?.split_once('.'));
            inside.filter_map(|(index, _)| index.parse().ok()).max().map_or(0, |n: usize| n + 1)
        };
        for layer in
            naming::layers(blocks("transformer_blocks."), blocks("single_transformer_blocks."))
        {
            let part = |name: &String| self.part(Component::Transformer, &format!("{name}.weight"));
            let Some(parts) = layer.diffusers.iter().map(part).collect::<Option<Vec<Part>>>()
            else {
                self.lacking.insert(flat(&layer.bfl));
                self.lacking.extend(layer.diffusers.iter().map(|name| flat(name)));
                continue;
            };
            for (name, range) in other_names(&layer.bfl, parts.len()) {
                let halves_swapped = layer.halves_swapped;
                let target = Target { parts: parts[range].to_vec(), halves_swapped };
                self.by_name.insert(flat(&name), Rc::new(target));
            }
        }
    }

    /// What the `path` of a tensor in a file means.
    pub(super) fn find(&self, path: &str) -> Meaning {
        let flat_path = flat(path);
        let mut starts = BTreeSet::from([0]);
        let mut lacking = false;
        while let Some(start) = starts.pop_first() {
            let rest = &flat_path[start..];
            if let Some(target) = self.by_name.get(rest) {
                return Meaning::Layer(Rc::clone(target), path[start..].to_owned());
            }
            if rest == UNUSED {
                return Meaning::Unused;
            }
            lacking |= self.lacking.contains(rest);
            let prefixes = PREFIXES.iter().filter(|prefix| rest.starts_with(**prefix));
            starts.extend(prefixes.map(|prefix| start + prefix.len()));
        }
        if lacking { Meaning::Lacking } else { Meaning::Unknown }
    }

    /// Inputs of the transformer's first layer.
    pub(super) fn n_latent_inputs(&self) -> Option<usize> {
        let name = (Component::Transformer, "x_embedder.weight".to_owned());
        self.shapes.get(&name)?.get(1).copied()
    }
}

impl Target {
    /// Rows of the file's matrix.
    pub(super) fn n_out(&self) -> usize {
        self.parts.iter().map(Part::n_out).sum()
    }

    /// Where the rows of part `index` come from: ranges of the file's rows, in the part's order.
    pub(super) fn rows(&self, index: usize) -> Vec<Range<usize>> {
        let start: usize = self.parts[..index].iter().map(Part::n_out).sum();
        let end = start + self.parts[index].n_out();
        let middle = if self.halves_swapped { start.midpoint(end) } else { start };
        [middle..end, start..middle].into_iter().filter(|range| !range.is_empty()).collect()
    }
}

/// Names under which trainers know all, or some, of the `n` layers that BFL's `layer` is made of.
fn other_names(layer: &str, n: usize) -> Vec<(String, Range<usize>)> {
    let mut names = vec![(layer.to_owned(), 0..n)];
    if n > 1 {
        // OneTrainer, and sd-scripts before it saves.
        names.extend((0..n).map(|k| (format!("{layer}.{k}"), k..k + 1)));
    }
    // XLabs: 1 is the image stream, 2 the text stream.
    let xlabs = [
        (".img_attn.qkv", ".processor.qkv_lora1", 3),
        (".txt_attn.qkv", ".processor.qkv_lora2", 3),
        (".img_attn.proj", ".processor.proj_lora1", 1),
        (".txt_attn.proj", ".processor.proj_lora2", 1),
        (".linear1", ".processor.qkv_lora", 3),
        (".linear2", ".processor.proj_lora", 1),
    ];
    // diffusers after `fuse_qkv_projections`.
    let fused = [(".img_attn.qkv", ".attn.to_qkv"), (".txt_attn.qkv", ".attn.to_added_qkv")];
    for (end, other, n) in xlabs {
        names.extend(layer.strip_suffix(end).map(|block| (format!("{block}{other}"), 0..n)));
    }
    for (end, other) in fused {
        let block = layer.strip_suffix(end).and_then(|block| block.strip_prefix("double_blocks"));
        names.extend(block.map(|block| (format!("transformer_blocks{block}{other}"), 0..n)));
    }
    names
}

fn flat(name: &str) -> String {
    name.replace('.', "_")
}
