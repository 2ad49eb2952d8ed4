//! Files of every kind on the small model of the fixtures, against the formula computed here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tempfile::TempDir;

use super::*;
use crate::checkpoint::{Dtype, write_tensors};
use crate::noise::Noise;
use crate::pipeline::Pipeline;

mod fuzz;
mod kinds;
mod names;
mod refusals;
mod settings;

/// Width of the model.
const D: usize = 48;
const TRANSFORMER: Component = Component::Transformer;

static PIPELINE: LazyLock<Pipeline> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    Pipeline::open(&folder.join("../tests/fixtures/tiny-flux/pipeline")).unwrap()
});

fn weights(component: Component) -> Weights {
    PIPELINE.weights(component).unwrap()
}

/// A LoRA file, and what it adds to which parameters.
struct File {
    folder: TempDir,
    name: String,
    noise: Noise,
    entries: Vec<Entry<'static>>,
    metadata: Vec<(&'static str, String)>,
    deltas: BTreeMap<(Component, String), Vec<f64>>,
}

impl File {
    fn new(seed: u64) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            name: "style.safetensors".into(),
            noise: Noise::new(seed),
            entries: Vec::new(),
            metadata: Vec::new(),
            deltas: BTreeMap::new(),
        }
    }

    /// A random tensor.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Vec<f64> {
        let n = shape.iter().product();
        let values = self.noise.normal(self.entries.len() as u64, n);
        let values: Vec<f32> = values.into_iter().map(|value| 0.2 * value).collect();
        self.entries.push(Entry::f32(name, shape, &values));
        values.into_iter().map(f64::from).collect()
    }

    fn number(&mut self, name: &str, value: f32) {
        self.entries.push(Entry::f32(name, &[], &[value]));
    }

    /// A `[r, n_in]` and B `[n_out, r]` called `names`; gives `factor`·B·A.
    fn pair(
        &mut self,
        names: [&str; 2],
        [n_out, n_in]: [usize; 2],
        r: usize,
        factor: f64,
    ) -> Vec<f64> {
        let a = self.tensor(names[0], &[r, n_in]);
        let b = self.tensor(names[1], &[n_out, r]);
        scaled(&product(&b, &a, r), factor)
    }

    /// [`File::pair`] with the usual endings after `path`.
    fn lora(&mut self, path: &str, shape: [usize; 2], r: usize, factor: f64) -> Vec<f64> {
        let names = [A, B].map(|ending| format!("{path}.{ending}"));
        self.pair([&names[0], &names[1]], shape, r, factor)
    }

    /// [`File::pair`] as kohya names it, with its alpha.
    fn kohya(&mut self, path: &str, shape: [usize; 2], r: usize, alpha: f64) -> Vec<f64> {
        let names = ["lora_down", "lora_up"].map(|ending| format!("{path}.{ending}.weight"));
        self.number(&format!("{path}.alpha"), alpha as f32);
        self.pair([&names[0], &names[1]], shape, r, alpha / r as f64)
    }

    /// Notes that `delta` is added to a parameter of the transformer.
    fn adds(&mut self, parameter: &str, delta: &[f64]) {
        self.deltas.insert((TRANSFORMER, parameter.to_owned()), delta.to_vec());
    }

    /// The same for parameters whose rows lie one below the other in `delta`.
    fn adds_to_all(&mut self, parameters: &[&str], rows: &[usize], delta: &[f64]) {
        let n_columns = delta.len() / rows.iter().sum::<usize>();
        let mut rest = delta;
        for (parameter, rows) in parameters.iter().zip(rows) {
            let (now, later) = rest.split_at(rows * n_columns);
            self.adds(parameter, now);
            rest = later;
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    fn write(&self) {
        write_tensors(&self.path(), &self.entries, &self.metadata).unwrap();
    }

    fn open_at(&self, scale: f64) -> Result<Lora> {
        self.write();
        Lora::open(&self.path(), scale, &Layers::of(&PIPELINE))
    }

    fn open(&self) -> Lora {
        self.open_at(1.0).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Why it is refused, in one line.
    fn refused(&self) -> String {
        let message = self.open_at(1.0).err().expect("a refusal").to_string();
        assert!(message.len() < 400 && !message.contains('\n'), "{message}");
        message
    }

    /// Every weight of the model must be its own plus what was noted, and no other be touched.
    fn check(&self) {
        for scale in [1.0, -0.5] {
            self.check_at(scale);
        }
    }

    fn check_at(&self, scale: f64) {
        check(&[self.open_at(scale).unwrap_or_else(|error| panic!("{error}"))], |key| {
            Some(scaled(self.deltas.get(key)?, scale))
        });
    }
}

/// Compares what `loras` make of every weight with the model's plus `delta`.
fn check(loras: &[Lora], delta: impl Fn(&(Component, String)) -> Option<Vec<f64>>) {
    for component in [TRANSFORMER, Component::TextEncoder, Component::TextEncoder2] {
        let weights = weights(component);
        for (name, _) in PIPELINE.manifest(component).entries() {
            let got = merged(loras, component, &weights, name).unwrap();
            let Some(delta) = delta(&(component, name.to_owned())) else {
                assert!(got.is_none(), "{name} is touched");
                continue;
            };
            let got = got.unwrap_or_else(|| panic!("{name} is not touched"));
            let own = weights.f32(name).unwrap();
            assert_eq!(own.len(), delta.len(), "{name}");
            let largest = own.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for ((got, own), delta) in got.iter().zip(own).zip(delta) {
                let off = (f64::from(*got) - f64::from(own) - delta).abs();
                assert!(off <= 1e-6 * f64::from(largest).max(1.0), "{name}: {off:e}");
            }
        }
    }
}

fn scaled(values: &[f64], by: f64) -> Vec<f64> {
    values.iter().map(|value| by * value).collect()
}

/// `a` `[n, r]` times `b` `[r, m]`.
fn product(a: &[f64], b: &[f64], r: usize) -> Vec<f64> {
    let m = b.len() / r;
    let row = |row: &[f64], column: usize| (0..r).map(|k| row[k] * b[k * m + column]).sum::<f64>();
    a.chunks(r).flat_map(|a| (0..m).map(move |column| row(a, column)).collect::<Vec<_>>()).collect()
}

fn model_weight(parameter: &str) -> Vec<f64> {
    weights(TRANSFORMER).f32(parameter).unwrap().into_iter().map(f64::from).collect()
}
