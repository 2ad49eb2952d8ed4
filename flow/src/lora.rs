//! Low-rank adapters on disk, as diffusers and PEFT write them (`pytorch_lora_weights.safetensors`).
//!
//! A layer `W` `[n_out, n_in]` becomes `W + scale·(α/r)·B·A`, with `A` `[r, n_in]` and `B` `[n_out, r]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointError, Entry, Weights, write_tensors};
use crate::ops::shapes::Manifest;

type Result<T> = std::result::Result<T, CheckpointError>;

/// The file that `FluxPipeline.load_lora_weights` looks for in a folder.
pub const FILE: &str = "pytorch_lora_weights.safetensors";
/// Name of the adapted component in the file.
const COMPONENT: &str = "transformer.";
/// What follows a layer's path in the name of its A.
pub const A: &str = "lora_A.weight";
/// What follows a layer's path in the name of its B.
pub const B: &str = "lora_B.weight";
/// Endings of A and B: of PEFT, and of diffusers before it.
const ENDINGS: [[&str; 2]; 2] = [[A, B], ["lora.down.weight", "lora.up.weight"]];

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

/// The adapters of a file.
pub struct Lora {
    weights: Weights,
    scale: f64,
    layers: BTreeMap<String, Layer>,
}

struct Layer {
    /// Names of A and B in the file.
    names: [String; 2],
    rank: usize,
    n_in: usize,
    n_out: usize,
    /// α/r.
    factor: f64,
}

impl Lora {
    /// The adapters of `path`, a file or the folder of a [`FILE`], to be used at `scale`.
    ///
    /// # Errors
    /// When it is no LoRA of a FLUX transformer in diffusers' names.
    pub fn open(path: &Path, scale: f64) -> Result<Self> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let weights = Weights::open_file(&path)?;
        let malformed = |why: String| CheckpointError::malformed(&path, why);
        let alpha = Alpha::of(&weights).map_err(malformed)?;
        let mut layers = BTreeMap::new();
        for name in weights.names() {
            if alpha.knows(name) {
                continue;
            }
            let Some((layer, endings)) = split(name) else {
                let why = "unsupported: only LoRA of the transformer in diffusers' names is read \
                           (transformer.….lora_A.weight)";
                return Err(malformed(format!("tensor {name} is {why}")));
            };
            let names = endings.map(|ending| format!("{COMPONENT}{layer}.{ending}"));
            let shape = |name: &str| match weights.get(name).map(|view| view.shape) {
                Some(&[rows, columns]) => Ok([rows, columns]),
                Some(shape) => Err(malformed(format!("{name} has shape {shape:?}, not a matrix"))),
                None => Err(malformed(format!("{name} is missing"))),
            };
            let ([rank, n_in], [n_out, inner]) = (shape(&names[0])?, shape(&names[1])?);
            if rank != inner || rank == 0 {
                let why = format!("{layer}: A has {rank} rows and B {inner} columns");
                return Err(malformed(why));
            }
            let factor = alpha.of_layer(layer, rank).map_err(malformed)?;
            layers.insert(layer.to_owned(), Layer { names, rank, n_in, n_out, factor });
        }
        if layers.is_empty() {
            return Err(malformed("no adapters in it".into()));
        }
        Ok(Self { weights, scale, layers })
    }

    /// Layers with an adapter, by their path in the transformer.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers.keys().map(String::as_str)
    }

    /// Makes sure that every adapter fits a layer of `manifest`.
    ///
    /// # Errors
    /// One message that lists those that do not.
    pub fn check(&self, manifest: &Manifest) -> Result<()> {
        let known: BTreeMap<&str, &[usize]> = manifest.entries().collect();
        let misfit = |(layer, adapter): (&String, &Layer)| {
            let wanted = [adapter.n_out, adapter.n_in];
            match known.get(format!("{layer}.weight").as_str()) {
                Some(shape) if **shape == wanted => None,
                Some(shape) => {
                    Some(format!("{layer} has shape {shape:?}, its adapter is for {wanted:?}"))
                }
                None => Some(format!("{layer} is no layer of the model")),
            }
        };
        let list: Vec<String> = self.layers.iter().filter_map(misfit).collect();
        if list.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::malformed(self.weights.path(), list.join("; ")))
    }

    /// The factors of `layer`, if it has an adapter.
    ///
    /// # Errors
    /// When they are not floats.
    pub fn factors(&self, layer: &str) -> Result<Option<Factors>> {
        let Some(Layer { names: [a, b], rank, factor, .. }) = self.layers.get(layer) else {
            return Ok(None);
        };
        let by = (self.scale * factor) as f32;
        let b = self.weights.f32(b)?.into_iter().map(|x| x * by).collect();
        Ok(Some(Factors { rank: *rank, a: self.weights.f32(a)?, b }))
    }
}

impl Factors {
    /// Adds B·A to `weight` `[n_out, n_in]`.
    pub fn add_to(&self, weight: &mut [f32]) {
        let (n_in, n_out) = (self.a.len() / self.rank, self.b.len() / self.rank);
        assert_eq!(weight.len(), n_in * n_out, "checked against the manifest");
        for (row, b) in weight.chunks_exact_mut(n_in).zip(self.b.chunks_exact(self.rank)) {
            for (b, a) in b.iter().zip(self.a.chunks_exact(n_in)) {
                for (w, a) in row.iter_mut().zip(a) {
                    *w += b * a;
                }
            }
        }
    }
}

/// Layer path and endings of A and B, from either's name.
fn split(name: &str) -> Option<(&str, [&'static str; 2])> {
    let name = name.strip_prefix(COMPONENT)?;
    ENDINGS.into_iter().find_map(|pair| {
        let layer = pair.iter().find_map(|ending| name.strip_suffix(ending)?.strip_suffix('.'))?;
        Some((layer, pair))
    })
}

/// What a file says of α; without it α = r.
struct Alpha {
    /// From PEFT's configuration in the metadata.
    of_all: Option<f64>,
    patterns: BTreeMap<String, f64>,
    /// From tensors `….alpha`.
    of_layers: BTreeMap<String, f64>,
}

impl Alpha {
    fn of(weights: &Weights) -> std::result::Result<Self, String> {
        let mut of_layers = BTreeMap::new();
        for name in weights.names() {
            let layer = name.strip_prefix(COMPONENT).and_then(|name| name.strip_suffix(".alpha"));
            if let Some(layer) = layer {
                let values = weights.f32(name).map_err(|error| error.to_string())?;
                let &[alpha] = values.as_slice() else {
                    return Err(format!("{name} holds {} numbers, not one", values.len()));
                };
                of_layers.insert(layer.to_owned(), f64::from(alpha));
            }
        }
        let metadata: serde_json::Value = match weights.metadata("lora_adapter_metadata") {
            None => serde_json::Value::Null,
            Some(text) => serde_json::from_str(text)
                .map_err(|error| format!("lora_adapter_metadata: {error}"))?,
        };
        let patterns = metadata["transformer.alpha_pattern"].as_object();
        let patterns = patterns.into_iter().flatten();
        Ok(Self {
            of_all: metadata["transformer.lora_alpha"].as_f64(),
            patterns: patterns.filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect(),
            of_layers,
        })
    }

    fn knows(&self, name: &str) -> bool {
        let layer = name.strip_prefix(COMPONENT).and_then(|name| name.strip_suffix(".alpha"));
        layer.is_some_and(|layer| self.of_layers.contains_key(layer))
    }

    /// α/r of `layer`.
    fn of_layer(&self, layer: &str, rank: usize) -> std::result::Result<f64, String> {
        let pattern = self.patterns.iter().find(|(key, _)| layer.ends_with(key.as_str()));
        let alpha = self.of_layers.get(layer).copied().or(pattern.map(|(_, alpha)| *alpha));
        let factor = alpha.or(self.of_all).map_or(1.0, |alpha| alpha / rank as f64);
        if !factor.is_finite() {
            return Err(format!("{layer}: alpha is not finite"));
        }
        Ok(factor)
    }
}

/// `FILE` or `FILE:SCALE`, as people type a LoRA and its scale (1 if not given).
///
/// # Errors
/// When the scale is no finite number.
pub fn scaled_path(text: &str) -> std::result::Result<(PathBuf, f64), String> {
    match text.rsplit_once(':') {
        Some((path, scale)) if !path.is_empty() && !scale.contains('/') => match scale.parse() {
            Ok(scale) if f64::is_finite(scale) => Ok((path.into(), scale)),
            _ => Err(format!("{scale:?} is no scale: FILE or FILE:SCALE is needed")),
        },
        _ => Ok((text.into(), 1.0)),
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
    write_tensors(&folder.join(FILE), &entries, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: &str = "transformer_blocks.0.attn.to_q";

    fn pair(dir: &Path, endings: [&str; 2], more: Vec<Entry<'_>>, metadata: &[(&str, String)]) {
        let name = |ending: &str| format!("transformer.{LAYER}.{ending}");
        let mut entries = vec![
            Entry::f32(name(endings[0]), &[2, 3], &[1.0, 0.0, 2.0, 0.0, 1.0, 0.0]),
            Entry::f32(name(endings[1]), &[2, 2], &[1.0, 0.0, 0.5, 2.0]),
        ];
        entries.extend(more);
        write_tensors(&dir.join(FILE), &entries, metadata).unwrap();
    }

    fn merged(dir: &Path, scale: f64) -> Vec<f32> {
        let lora = Lora::open(dir, scale).unwrap();
        let mut weight = vec![10.0; 6];
        lora.factors(LAYER).unwrap().unwrap().add_to(&mut weight);
        assert!(lora.factors("proj_out").unwrap().is_none());
        weight
    }

    #[test]
    fn both_spellings_and_every_alpha_are_read() {
        let dir = tempfile::tempdir().unwrap();
        // B·A = [[1, 0, 2], [0.5, 2, 1]]
        for endings in ENDINGS {
            pair(dir.path(), endings, Vec::new(), &[]);
            assert_eq!(merged(dir.path(), 1.0), [11.0, 10.0, 12.0, 10.5, 12.0, 11.0]);
        }
        let twice = [12.0, 10.0, 14.0, 11.0, 14.0, 12.0];
        assert_eq!(merged(dir.path(), 2.0), twice);
        let alpha = Entry::f32(format!("transformer.{LAYER}.alpha"), &[], &[4.0]);
        pair(dir.path(), ENDINGS[0], vec![alpha], &[]);
        assert_eq!(merged(dir.path(), 1.0), twice);
        let peft = r#"{"transformer.r": 2, "transformer.lora_alpha": 4}"#;
        pair(dir.path(), ENDINGS[0], Vec::new(), &[("lora_adapter_metadata", peft.into())]);
        assert_eq!(merged(dir.path(), 1.0), twice);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        pair(dir.path(), ENDINGS[0], Vec::new(), &[]);
        let lora = Lora::open(dir.path(), 1.0).unwrap();
        let manifest = |n_out| Manifest::new([(format!("{LAYER}.weight"), vec![n_out, 3])]);
        lora.check(&manifest(2)).unwrap();
        assert!(lora.check(&manifest(5)).unwrap_err().to_string().contains(LAYER));
        let kohya = Entry::f32("lora_unet_double_blocks_0.lora_down.weight", &[1, 1], &[0.0]);
        pair(dir.path(), ENDINGS[0], vec![kohya], &[]);
        let error = Lora::open(dir.path(), 1.0).err().unwrap().to_string();
        assert!(error.contains("lora_unet_double_blocks_0") && error.contains("unsupported"));
    }
}
