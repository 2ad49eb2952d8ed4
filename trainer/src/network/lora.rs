//! Low-rank adapters (Hu et al. 2021) in training: W·x + (α/r)·B·A·x, with A `[r, n_in]`, B `[n_out, r]`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use cluster::Group;
use flow::log;
use flow::lora::{A, B, Layers, Lora};
use flow::noise::Noise;
use flow::ops::ParamPath;
use flow::ops::shapes::Manifest;
use flow::pipeline::Pipeline;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use crate::tensor::device::Compute;
use crate::tensor::eager::Addition;
use crate::tensor::parameters::{Parameters, Storage};

/// The linear layers that carry an adapter unless told otherwise: those of Flow-GRPO, DanceGRPO and
/// `diffusers`' FLUX training script.
const TARGETS: [&str; 12] = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
];

/// Rank r unless told otherwise.
pub(crate) const RANK: usize = 64;
/// Largest rank: FLUX's width and more.
const MAX_RANK: usize = 8192;

/// Settings of adapters that train.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank r.
    #[serde(default = "rank")]
    pub rank: usize,
    /// α: the product is scaled by α/r.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// Ends of the paths of adapted layers.
    #[serde(default = "targets")]
    pub targets: Vec<String>,
    /// Adapters to go on from, a file or its folder; without it, A is random and B is 0.
    #[serde(default)]
    pub from: Option<PathBuf>,
}

fn rank() -> usize {
    RANK
}
fn alpha() -> f64 {
    128.0
}
fn targets() -> Vec<String> {
    TARGETS.map(str::to_owned).to_vec()
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: rank(), alpha: alpha(), targets: targets(), from: None }
    }
}

impl LoraConfig {
    /// The adapters to go on from, on a model of `pipeline`; says what they are.
    ///
    /// # Errors
    /// When they are no LoRA of that model, or more than A and B of its transformer.
    pub(crate) fn open(&self, pipeline: &Pipeline) -> Result<Option<Lora>> {
        let Some(path) = &self.from else { return Ok(None) };
        let lora = Lora::open(path, 1.0, &Layers::of(pipeline)).context("lora.from")?;
        ensure!(
            lora.is_low_rank(),
            "lora.from: {lora}: only A and B of the transformer's layers can train on"
        );
        lora.lines().iter().for_each(|line| log::note(line));
        Ok(Some(lora))
    }

    /// The parameters of adapters on a network of `segments`, which go on from `from`.
    ///
    /// # Errors
    /// When no layer is a target, or `from` does not fit.
    pub(crate) fn manifests(
        &self,
        from: Option<&Lora>,
        segments: &[Manifest],
    ) -> Result<Vec<Manifest>> {
        let manifests: Vec<Manifest> = segments.iter().map(|s| self.manifest(s)).collect();
        ensure!(
            manifests.iter().any(|manifest| manifest.n_elements() > 0),
            "lora.targets: no layer of the model ends in one of [{}]",
            self.targets.join(", ")
        );
        if let Some(from) = from {
            self.check_from(from, &manifests)?;
        }
        Ok(manifests)
    }

    /// Makes sure that `from` has A and B of this rank on the layers of `manifests`, and on no others.
    fn check_from(&self, from: &Lora, manifests: &[Manifest]) -> Result<()> {
        let names = manifests.iter().flat_map(Manifest::entries).map(|(name, _)| factor(name));
        let targets: BTreeSet<&str> = names.map(|(layer, _)| layer).collect();
        let ranks: BTreeMap<&str, usize> = from.ranks().collect();
        let list = |what: &str, layers: Vec<&str>| {
            let first = layers.first()?;
            Some(format!("{} {what}, such as {first}", layers.len()))
        };
        let without = targets.iter().copied().filter(|layer| !ranks.contains_key(layer));
        let beside = ranks.keys().copied().filter(|layer| !targets.contains(layer));
        let other = ranks.iter().filter(|(_, rank)| **rank != self.rank).map(|(layer, _)| *layer);
        let found: BTreeSet<usize> = ranks.values().copied().collect();
        let ranks = found.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let misfits = [
            list("of lora.targets have no adapter", without.collect()),
            list("of its layers are none of lora.targets", beside.collect()),
            list(
                &format!("of its layers are not of lora.rank = {} but of rank {ranks}", self.rank),
                other.collect(),
            ),
        ];
        let misfits: Vec<String> = misfits.into_iter().flatten().collect();
        ensure!(misfits.is_empty(), "lora.from does not fit: {}", misfits.join("; "));
        Ok(())
    }

    /// Refuses what no adapter can have.
    pub(crate) fn validate(&self) -> Result<()> {
        let Self { rank, alpha, .. } = self;
        ensure!((1..=MAX_RANK).contains(rank), "lora.rank = {rank}: from 1 to {MAX_RANK}");
        ensure!(alpha.is_finite() && *alpha > 0.0, "lora.alpha = {alpha}: above 0");
        Ok(())
    }

    /// Names and shapes of A and B on the layers of `manifest` that the targets name.
    pub(crate) fn manifest(&self, manifest: &Manifest) -> Manifest {
        let layers = manifest.entries().filter_map(|(name, shape)| {
            let layer = name.strip_suffix(".weight")?;
            let is_target = self.targets.iter().any(|t| layer.ends_with(&format!(".{t}")));
            is_target.then_some((layer, shape))
        });
        Manifest::new(layers.flat_map(|(layer, shape)| pair(layer, shape, self.rank)))
    }
}

fn pair(layer: &str, shape: &[usize], rank: usize) -> [(String, Vec<usize>); 2] {
    let [n_out, n_in] = *shape else { panic!("{layer}: linear layers have matrices") };
    [(format!("{layer}.{A}"), vec![rank, n_in]), (format!("{layer}.{B}"), vec![n_out, rank])]
}

/// Adapters on the linear layers of a network, in its segments.
pub(crate) struct Adapters {
    parameters: Parameters,
    /// α/r.
    scale: f64,
}

impl Adapters {
    /// Adapters that train, on a network of `segments`: those of `from`, or new ones.
    ///
    /// # Errors
    /// When no layer is a target, or the adapters to go on from do not fit.
    pub(crate) fn new(
        config: &LoraConfig,
        from: Option<&Lora>,
        segments: &[Manifest],
        noise: Noise,
        compute: Compute,
        group: &Group,
    ) -> Result<Self> {
        config.validate()?;
        let manifests = config.manifests(from, segments)?;
        let scale = config.alpha / config.rank as f64;
        let mut streams = 0..;
        let value = |name: &str, shape: &[usize]| {
            let stream = streams.next().expect("endless");
            let (layer, is_a) = factor(name);
            let values = match from {
                Some(lora) => {
                    let found = lora.factors(layer)?.context("lora.from has no such adapter")?;
                    let unscaled = |b: f32| (f64::from(b) / scale) as f32;
                    if is_a { found.a } else { found.b.into_iter().map(unscaled).collect() }
                }
                None if is_a => {
                    let n = shape.iter().product();
                    let std = 1.0 / config.rank as f32;
                    noise.normal(stream, n).into_iter().map(|x| std * x).collect()
                }
                None => vec![0.0; shape.iter().product()],
            };
            Ok(Tensor::from_slice(&values))
        };
        let parameters =
            Parameters::build(&manifests, compute, Storage::Trainable(group.clone()), value)?;
        Ok(Self { parameters, scale })
    }

    /// A and B of several files, summed, to sample with.
    ///
    /// # Errors
    /// When one cannot be read any more.
    pub(crate) fn combined(
        loras: &[Lora],
        segments: &[Manifest],
        compute: Compute,
    ) -> Result<Self> {
        let stacked = |layer: &str| -> Result<Vec<flow::lora::Factors>> {
            let factors = loras.iter().filter_map(|lora| lora.factors(layer).transpose());
            Ok(factors.collect::<Result<_, _>>()?)
        };
        let mut manifests = Vec::new();
        for segment in segments {
            let mut entries = Vec::new();
            for (name, shape) in segment.entries() {
                let Some(layer) = name.strip_suffix(".weight") else { continue };
                let rank: usize = stacked(layer)?.iter().map(|factors| factors.rank).sum();
                if rank > 0 {
                    entries.extend(pair(layer, shape, rank));
                }
            }
            manifests.push(Manifest::new(entries));
        }
        let value = |name: &str, _: &[usize]| {
            let (layer, is_a) = factor(name);
            // A below A, B beside B.
            let parts = stacked(layer)?.into_iter().map(|f| {
                let (values, rows) = if is_a {
                    (f.a, f.rank as i64)
                } else {
                    let rows = f.b.len() / f.rank;
                    (f.b, rows as i64)
                };
                Tensor::from_slice(&values).reshape([rows, -1])
            });
            let parts: Vec<Tensor> = parts.collect();
            Ok(Tensor::cat(&parts, i64::from(!is_a)))
        };
        let parameters = Parameters::build(&manifests, compute, Storage::Frozen, value)?;
        Ok(Self { parameters, scale: 1.0 })
    }

    /// (α/r)·B·A, row by row, of the weight `name`, if its layer has an adapter.
    pub(crate) fn added_to(&self, name: &str) -> Option<Vec<f32>> {
        let layer = name.strip_suffix(".weight")?;
        let [a, b] = [A, B].map(|factor| self.parameters.named(&format!("{layer}.{factor}")));
        let added = no_grad(|| b.zip(a).map(|(b, a)| (b.matmul(&a) * self.scale).reshape([-1])))?;
        Some(Vec::try_from(&added.to_kind(Kind::Float)).expect("a tensor of f32"))
    }

    /// Whether they are training.
    pub(crate) fn are_training(&self) -> bool {
        self.parameters.is_trainable()
    }

    /// α/r.
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    pub(crate) fn parameters_mut(&mut self) -> &mut Parameters {
        &mut self.parameters
    }
}

impl Addition for Adapters {
    /// (α/r)·B·A·x.
    fn of(&self, path: &ParamPath, x: &Tensor) -> Option<Tensor> {
        let [a, b] = [A, B].map(|name| self.parameters.named(path.at(name).as_str()));
        let (a, b): (Rc<Tensor>, Rc<Tensor>) = (a?, b?);
        let none: Option<&Tensor> = None;
        Some(x.linear(&a, none).linear(&b, none) * self.scale)
    }
}

/// Layer of a factor, and whether it is A.
fn factor(name: &str) -> (&str, bool) {
    let (layer, is_a) = match name.strip_suffix(A) {
        Some(layer) => (layer, true),
        None => (name.strip_suffix(B).expect("A or B"), false),
    };
    (layer.trim_end_matches('.'), is_a)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::network::engine::segments;
    use crate::network::model::{Loading, Model};
    use crate::network::save;
    use crate::network::shards::{self, Layout, MASTER, Shards};
    use flow::latents::LatentSize;
    use flow::pipeline::Component;

    const SIZE: LatentSize = LatentSize { channels: 16, height: 4, width: 6 };

    fn model(stream: bool) -> Model {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let pipeline = folder.join("../tests/fixtures/tiny-flux/pipeline");
        let mut model = Model::load(&pipeline, Loading::to_sample(Compute::CPU, stream)).unwrap();
        // As libtorch rounds, which runs what is on disk.
        model.engine.recompute = true;
        model.engine.rounds_alike = true;
        model
    }

    fn with_new_adapters(stream: bool) -> Model {
        let mut model = model(stream);
        let segments = segments(&model.pipeline.transformer);
        let config = LoraConfig { rank: 3, alpha: 6.0, ..LoraConfig::default() };
        let noise = Noise::new(4);
        let adapters =
            Adapters::new(&config, None, &segments, noise, Compute::CPU, &Group::alone()).unwrap();
        model.engine.adapt(adapters);
        model
    }

    /// Adapters that do something: B is no longer 0.
    fn with_adapters(stream: bool) -> Model {
        let model = with_new_adapters(stream);
        for (stream, master) in (0..).zip(model.engine.trained().masters()) {
            let n = master.numel();
            let values = Tensor::from_slice(&Noise::new(8).normal(stream, n)) * 0.1;
            no_grad(|| master.shallow_clone().copy_(&values));
        }
        model
    }

    fn inputs(model: &Model) -> (Tensor, Tensor, crate::network::condition::Condition) {
        let condition = model.encode(&["red \"CAT\""], 3.5, &SIZE).unwrap();
        let x_t = model.pack(&[Noise::new(1).normal(0, SIZE.len())], &SIZE);
        (x_t, Tensor::from_slice(&[0.6f32]), condition)
    }

    fn velocity(model: &Model) -> Tensor {
        let (x_t, t, condition) = inputs(model);
        model.engine.velocity(&x_t, &t, &condition).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[]) / b.abs().max().double_value(&[])
    }

    #[test]
    fn weights_on_disk_give_the_same_bits() {
        assert_eq!(velocity(&model(true)), velocity(&model(false)));
        assert_eq!(velocity(&with_adapters(true)), velocity(&with_adapters(false)));
    }

    #[test]
    fn new_adapters_change_nothing_and_alone_are_trained() {
        let mut model = with_new_adapters(true);
        assert_eq!(velocity(&model), velocity(&self::model(false)));
        model.engine.train();
        model.engine.recompute = true;
        let (x_t, t, condition) = inputs(&model);
        model.engine.forward_backward(&x_t, &t, &condition, |v| Ok(v.ones_like())).unwrap();
        let gradients = model.engine.trained().take_gradients().unwrap();
        let total: f64 = gradients
            .iter()
            .flatten()
            .map(|gradient| gradient.values.abs().sum(Kind::Double).double_value(&[]))
            .sum();
        assert!(total > 0.0);
    }

    #[test]
    fn saved_adapters_read_back_alone_and_summed() {
        let (trained, home) = (with_adapters(false), tempfile::tempdir().unwrap());
        let layout = Layout::of(&trained.engine).metadata().unwrap();
        let masters = shards::entries(MASTER, trained.engine.trained().masters());
        let file = home.path().join(shards::file_name(0, 1));
        flow::checkpoint::write_tensors(&file, &masters, &[layout]).unwrap();
        save::weights(&Shards::open(home.path()).unwrap(), home.path(), 1).unwrap();
        std::fs::remove_file(file).unwrap();
        let expected = velocity(&trained);
        assert!(distance(&expected, &velocity(&model(false))) > 1e-2, "the case is not trivial");
        for scales in [&[1.0][..], &[0.25, 0.75]] {
            let files: Vec<(PathBuf, f64)> =
                scales.iter().map(|&scale| (home.path().to_owned(), scale)).collect();
            let mut read = model(false);
            read.add_loras(&files).unwrap();
            assert!(distance(&velocity(&read), &expected) < 1e-5, "{scales:?}");
        }
        let config = LoraConfig {
            rank: 3,
            alpha: 6.0,
            from: Some(home.path().to_owned()),
            ..LoraConfig::default()
        };
        let segments = segments(&trained.pipeline.transformer);
        let mut going_on = model(false);
        let noise = Noise::new(0);
        let from = config.open(&going_on.pipeline).unwrap();
        let new = |config: &LoraConfig| {
            Adapters::new(config, from.as_ref(), &segments, noise, Compute::CPU, &Group::alone())
        };
        going_on.engine.adapt(new(&config).unwrap());
        assert!(distance(&velocity(&going_on), &expected) < 1e-5);
        let other = LoraConfig { rank: 5, ..config.clone() };
        let refused = format!("{:#}", new(&other).err().unwrap());
        assert!(refused.contains("lora.rank = 5 but of rank 3"), "{refused}");
        let other = LoraConfig { targets: vec!["attn.to_q".into(), "proj_mlp".into()], ..config };
        let refused = format!("{:#}", new(&other).err().unwrap());
        let parts = ["2 of lora.targets have no adapter", "none of lora.targets"];
        assert!(parts.iter().all(|part| refused.contains(part)), "{refused}");
    }

    /// Whole differences go into the weights, wherever those are; A and B stay beside them.
    #[test]
    fn what_is_not_low_rank_is_merged_wherever_weights_are() {
        use flow::checkpoint::{Entry, write_tensors};
        let home = tempfile::tempdir().unwrap();
        let (layer, d) = ("transformer_blocks.0.attn.to_q", 48);
        let text = "text_model.encoder.layers.0.self_attn.q_proj";
        let [a, b] = [1, 2].map(|stream| Noise::new(9).normal(stream, 2 * d));
        let product = Tensor::from_slice(&b)
            .reshape([-1, 2])
            .matmul(&Tensor::from_slice(&a).reshape([2, -1]));
        let difference = Vec::<f32>::try_from(&product.reshape([-1])).unwrap();
        let write = |file: &str, entries: &[Entry<'_>]| {
            let path = home.path().join(file);
            write_tensors(&path, entries, &[]).unwrap();
            vec![(path, 0.3)]
        };
        let shape = model(false).pipeline.weights(Component::TextEncoder).unwrap();
        let shape = shape.shape(&format!("{text}.weight")).unwrap().to_vec();
        let of_text = Noise::new(9).normal(3, shape.iter().product());
        let of_text = Entry::f32(format!("text_encoder.{text}.diff"), &shape, &of_text);
        let factors = [
            Entry::f32(format!("{layer}.lora_A.weight"), &[2, d], &a),
            Entry::f32(format!("{layer}.lora_B.weight"), &[d, 2], &b),
        ];
        let whole = Entry::f32(format!("{layer}.diff"), &[d, d], &difference);
        let files = [
            write("factors.safetensors", &factors),
            write("whole.safetensors", std::slice::from_ref(&whole)),
            write("both.safetensors", &[whole, of_text]),
        ];
        let adapted = |stream: bool, files: &[(PathBuf, f64)]| {
            let mut model = model(stream);
            model.add_loras(files).unwrap();
            velocity(&model)
        };
        let [factors, whole, both] = files.each_ref().map(|files| adapted(false, files));
        assert!(distance(&factors, &whole) < 1e-5);
        assert!(
            distance(&whole, &velocity(&model(false))) > 1e-2 && distance(&both, &whole) > 1e-4
        );
        assert_eq!(adapted(true, &files[1]), whole);
        assert_eq!(adapted(true, &files[2]), both);
    }
}
