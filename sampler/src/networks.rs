//! The networks of an export, in ONNX Runtime.
//!
//! `B` images, `S` image tokens, `L` text tokens, `C` channels of a packed latent, `Z` latent
//! channels. File, input and output names are Optimum's.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use flow::{
    latents::LatentSize, models::transformer::image_ids, models::vae::VaeConfig,
    pipeline::Pipeline, tiles, tokens::PromptIds,
};
use onnx::{Binding, Cancel, Data, ElementType, Model, Options, Profile, Tensor};

use crate::{
    adapters::{self, Scaled, Slots},
    picture::{Picture, decoded},
    sample::Denoiser,
};

/// Folders of the graphs that make an image from text.
pub const TEXT_ENCODER: &str = "text_encoder";
pub const TEXT_ENCODER_2: &str = "text_encoder_2";
pub const TRANSFORMER: &str = "transformer";
pub const VAE_DECODER: &str = "vae_decoder";
/// Needed for an initial image alone.
pub const VAE_ENCODER: &str = "vae_encoder";

/// How graphs are run.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub options: Options,
    /// Shapes of each graph's inputs, where an engine is built for them.
    pub profiles: BTreeMap<&'static str, Profile>,
}

/// Makes sure that every graph is there.
///
/// # Errors
/// Names the first that is not.
pub fn check_files(folder: &Path) -> Result<()> {
    for component in [TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER] {
        let file = graph_file(folder, component);
        ensure!(
            file.is_file(),
            "{} is missing; make an export with `ng-export CHECKPOINT --out DIR`",
            file.display()
        );
    }
    Ok(())
}

/// `component/model.onnx` of an export.
pub fn graph_file(folder: &Path, component: &str) -> PathBuf {
    folder.join(component).join("model.onnx")
}

/// What the transformer is told about an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Pooled CLIP vector `[D]`.
    pooled: Vec<f32>,
    /// T5 tokens `[L, D]`.
    tokens: Vec<f32>,
    n_text: usize,
}

impl Condition {
    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.pooled) + size_of_val(&*self.tokens)
    }
}

/// Both text encoders.
pub struct TextEncoders {
    clip: Model,
    t5: Model,
}

impl TextEncoders {
    pub fn open(pipeline: &Pipeline, settings: &Settings) -> Result<Self> {
        let [clip, t5] = side_by_side([TEXT_ENCODER, TEXT_ENCODER_2], pipeline, settings)?;
        Ok(Self { clip, t5 })
    }

    /// Time spent in runs so far.
    pub fn busy(&self) -> Duration {
        self.clip.busy() + self.t5.busy()
    }

    /// Both encoders' view of a prompt.
    pub fn encode(&mut self, ids: &PromptIds, cancel: &Cancel) -> Result<Condition> {
        let row = |ids: &[i64]| Tensor::i64([1, ids.len()], ids.to_vec());
        let n_text = ids.t5.len();
        let pooled = row(&ids.clip)?;
        let pooled = run(&mut self.clip, ("input_ids", &pooled), "pooler_output", cancel)?;
        let tokens = row(&ids.t5)?;
        let tokens = run(&mut self.t5, ("input_ids", &tokens), "last_hidden_state", cancel)?;
        let of_tokens = |shape: &[usize]| matches!(*shape, [1, n, _] if n == n_text);
        for (model, output, shape, is_right) in [
            (&self.clip, "pooler_output", &pooled.shape, matches!(*pooled.shape, [1, _])),
            (&self.t5, "last_hidden_state", &tokens.shape, of_tokens(&tokens.shape)),
        ] {
            let file = model.path().display();
            ensure!(is_right, "{file}: output {output} of {n_text} tokens has shape {shape:?}");
        }
        Ok(Condition { pooled: pooled.into_f32()?, tokens: tokens.into_f32()?, n_text })
    }
}

/// The velocity network, with buffers for images of the shape it was last used for.
pub struct Transformer {
    model: Model,
    slots: Option<Slots>,
    bound: Option<(Shape, Binding)>,
}

/// What buffers are for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Shape {
    batch: usize,
    size: LatentSize,
    n_text: usize,
    /// See [`adapters::key`].
    loras: Vec<(u64, u64)>,
}

impl Transformer {
    /// With `slots` where the export has them.
    pub fn open(pipeline: &Pipeline, slots: Option<Slots>, settings: &Settings) -> Result<Self> {
        let model = open(pipeline, TRANSFORMER, settings)?;
        let known = ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"];
        let known = known.iter().chain(&["img_ids", "txt_ids", "guidance"]);
        for port in model.inputs() {
            ensure!(
                known.clone().any(|name| *name == port.name),
                "{}: input {port} is not one that Optimum's export of a FLUX transformer has",
                model.path().display()
            );
        }
        Ok(Self { model, slots, bound: None })
    }

    /// Time spent in runs so far.
    pub fn busy(&self) -> Duration {
        self.model.busy()
    }

    /// Type of its states, as the output names it.
    pub fn precision(&self) -> String {
        let port = self.model.inputs().iter().find(|port| port.name == "hidden_states");
        port.map_or_else(String::new, |port| port.element.to_string())
    }

    /// This network for images of one size with a condition each, and with guidance scales where the
    /// model embeds guidance.
    pub fn conditioned(
        &mut self,
        size: &LatentSize,
        conditions: &[Arc<Condition>],
        guidance: &[f32],
        loras: &[Scaled],
        cancel: &Cancel,
    ) -> Result<Conditioned<'_>> {
        let (batch, n_text) = (conditions.len(), conditions[0].n_text);
        let shape = Shape { batch, size: *size, n_text, loras: adapters::key(loras) };
        let all = |of: fn(&Condition) -> &Vec<f32>| {
            Data::F32(conditions.iter().flat_map(|condition| of(condition)).copied().collect())
        };
        let fixed = [
            ("encoder_hidden_states", all(|condition| &condition.tokens)),
            ("pooled_projections", all(|condition| &condition.pooled)),
            ("guidance", Data::F32(guidance.to_vec())),
        ];
        let takes = |name: &str| self.model.inputs().iter().any(|port| port.name == name);
        let mut fixed: Vec<(&str, Data)> =
            fixed.into_iter().filter(|(name, _)| takes(name)).collect();
        if self.bound.as_ref().is_none_or(|(bound, _)| *bound != shape) {
            let binding = self.bind(&shape, &fixed, loras)?;
            self.bound = Some((shape, binding));
            fixed.clear();
        }
        let (_, binding) = self.bound.as_mut().context("just bound")?;
        for (name, data) in &fixed {
            binding.set(name, data)?;
        }
        let states = Data::F32(Vec::new());
        Ok(Conditioned { model: &mut self.model, binding, states, batch, cancel: cancel.clone() })
    }

    fn bind(&self, shape: &Shape, fixed: &[(&str, Data)], loras: &[Scaled]) -> Result<Binding> {
        let &Shape { batch, size, n_text, .. } = shape;
        let n_states = [batch, size.tokens(), size.token_width()];
        let mut inputs = vec![
            ("hidden_states", Tensor::f32(n_states, vec![0.0; n_states.iter().product()])?),
            ("timestep", Tensor::f32([batch], vec![0.0; batch])?),
            ("img_ids", self.ids("img_ids", batch, &image_ids(size.rows(), size.columns()))?),
            ("txt_ids", self.ids("txt_ids", batch, &vec![0.0; 3 * n_text])?),
        ];
        for (name, data) in fixed {
            let Data::F32(values) = data else { bail!("{name} is no float") };
            let width = values.len() / batch;
            let dims = match *name {
                "encoder_hidden_states" => vec![batch, n_text, width / n_text],
                "pooled_projections" => vec![batch, width],
                _ => vec![batch],
            };
            inputs.push((name, Tensor::f32(dims, values.clone())?));
        }
        let adapted = match (&self.slots, loras) {
            (_, []) => Vec::new(),
            (Some(slots), loras) => adapters::inputs(loras, slots)?,
            (None, _) => bail!("{} has no slots for LoRAs", self.model.path().display()),
        };
        let adapted = adapted.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let inputs = inputs.iter().map(|(name, tensor)| (*name, tensor));
        let inputs: Vec<(&str, &Tensor)> = inputs.chain(adapted).collect();
        self.model.bind(&inputs, ("out_hidden_states", &n_states))
    }

    /// Position ids with the axes and the type that the graph asks for: pipelines before diffusers
    /// 0.31 repeated them over the batch.
    fn ids(&self, name: &str, batch: usize, ids: &[f32]) -> Result<Tensor> {
        let port = self.model.inputs().iter().find(|port| port.name == name);
        let port = port.with_context(|| {
            format!("{}: input `{name}` is missing", self.model.path().display())
        })?;
        let (shape, ids) = match port.shape.len() {
            3 => (vec![batch, ids.len() / 3, 3], ids.repeat(batch)),
            _ => (vec![ids.len() / 3, 3], ids.to_vec()),
        };
        if matches!(port.element, ElementType::I64 | ElementType::I32) {
            return Tensor::i64(shape, ids.into_iter().map(|id| id as i64).collect());
        }
        Tensor::f32(shape, ids)
    }
}

/// A [`Transformer`] with prompts; its states are packed latents `[B, S, C]`.
pub struct Conditioned<'a> {
    model: &'a mut Model,
    binding: &'a mut Binding,
    states: Data,
    batch: usize,
    cancel: Cancel,
}

impl Denoiser for Conditioned<'_> {
    fn velocity(&mut self, x_t: &[f32], t: f64, v_t: &mut [f32]) -> Result<()> {
        if let Data::F32(states) = &mut self.states {
            states.clear();
            states.extend_from_slice(x_t);
        }
        self.binding.set("hidden_states", &self.states)?;
        self.binding.set("timestep", &Data::F32(vec![t as f32; self.batch]))?;
        self.model.run_bound(self.binding, &self.cancel)?;
        self.binding.read(v_t)
    }
}

/// The autoencoder's second half.
pub struct Decoder {
    model: Model,
    config: VaeConfig,
}

impl Decoder {
    pub fn open(pipeline: &Pipeline, settings: &Settings) -> Result<Self> {
        Ok(Self { model: open(pipeline, VAE_DECODER, settings)?, config: pipeline.vae.clone() })
    }

    /// Time spent in runs so far.
    pub fn busy(&self) -> Duration {
        self.model.busy()
    }

    /// The image of `latents` `[Z, h, w]` as the flow has them: scaled and shifted. A large one is
    /// decoded in tiles.
    pub fn decode(
        &mut self,
        latents: &[f32],
        size: &LatentSize,
        cancel: &Cancel,
    ) -> Result<Picture> {
        let factor = self.config.factor();
        let pixels =
            tiles::decode(latents, size, factor, |part, size| self.pixels(part, size, cancel))?;
        decoded(&pixels, size.width * factor, size.height * factor)
    }

    /// Pixels `[3, f·h, f·w]` of a part.
    fn pixels(&mut self, latents: &[f32], size: &LatentSize, cancel: &Cancel) -> Result<Vec<f32>> {
        let unscale = |z: &f32| self.config.unscaled(f64::from(*z)) as f32;
        let unscaled = latents.iter().map(unscale).collect();
        let latent_sample = Tensor::f32([1, size.channels, size.height, size.width], unscaled)?;
        let sample = run(&mut self.model, ("latent_sample", &latent_sample), "sample", cancel)?;
        let factor = self.config.factor();
        let (width, height) = (size.width * factor, size.height * factor);
        ensure!(
            sample.shape == [1, 3, height, width],
            "{}: the image has shape {:?}, not [1, 3, {height}, {width}]",
            self.model.path().display(),
            sample.shape
        );
        sample.into_f32()
    }
}

/// The autoencoder's first half.
pub struct Encoder {
    model: Model,
    config: VaeConfig,
}

impl Encoder {
    pub fn open(pipeline: &Pipeline, settings: &Settings) -> Result<Self> {
        Ok(Self { model: open(pipeline, VAE_ENCODER, settings)?, config: pipeline.vae.clone() })
    }

    /// Time spent in runs so far.
    pub fn busy(&self) -> Duration {
        self.model.busy()
    }

    /// The latents `[Z, h, w]` of an image as the flow has them: the mean of what the encoder gives.
    pub fn encode(&mut self, picture: &Picture, cancel: &Cancel) -> Result<Vec<f32>> {
        let sample = Tensor::f32([1, 3, picture.height, picture.width], picture.to_sample())?;
        let output =
            self.model.outputs().first().context("the encoder has no output")?.name.clone();
        let moments = run(&mut self.model, ("sample", &sample), &output, cancel)?;
        let n = self.config.latent_channels * picture.width * picture.height
            / self.config.factor().pow(2);
        let mut z = moments.into_f32()?;
        ensure!(z.len() >= n, "{}: too few latents", self.model.path().display());
        z.truncate(n);
        let scale = |z: f32| self.config.scaled(f64::from(z)) as f32;
        Ok(z.into_iter().map(scale).collect())
    }
}

/// Opens graphs at the same time.
fn side_by_side<const N: usize>(
    components: [&str; N],
    pipeline: &Pipeline,
    settings: &Settings,
) -> Result<[Model; N]> {
    std::thread::scope(|scope| {
        let opened = components.map(|name| scope.spawn(move || open(pipeline, name, settings)));
        let opened = opened
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let opened: Vec<Model> = opened.into_iter().collect::<Result<_>>()?;
        opened.try_into().map_err(|_| anyhow::anyhow!("as many as were asked for"))
    })
}

fn open(pipeline: &Pipeline, component: &str, settings: &Settings) -> Result<Model> {
    let profile = settings.profiles.get(component).cloned();
    let options = Options { profile, ..settings.options.clone() };
    // Its files are read once for ONNX Runtime and once for their sums, at the same time.
    let (opened, checked) = thread::scope(|scope| {
        let check = scope.spawn(|| pipeline.check_folder(component));
        let opened = Model::open(graph_file(&pipeline.dir, component), &options);
        (opened, check.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    pipeline.check_unreplaced()?;
    checked?;
    opened
}

/// One output of one run, checked to be finite.
fn run(model: &mut Model, input: (&str, &Tensor), output: &str, cancel: &Cancel) -> Result<Tensor> {
    let tensors = model.run_until(&[input], &[output], cancel)?;
    let tensor = tensors.into_iter().next().context("the run has no output")?;
    ensure!(
        tensor.as_f32()?.iter().all(|value| value.is_finite()),
        "{}: output {output} is not finite",
        model.path().display()
    );
    Ok(tensor)
}
