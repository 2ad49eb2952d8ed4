//! A diffusers pipeline folder: its configs, its components and what their weights must look like.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::checkpoint::{CheckpointError, Weights, is_weights, read_bounded};
use crate::checksums::{self, Checksums};
use crate::known;
use crate::latents::{LatentSize, PATCH, SizeError};
use crate::models::clip::ClipTextConfig;
use crate::models::t5::T5Config;
use crate::models::transformer::{Inputs, TransformerConfig};
use crate::models::vae::VaeConfig;
use crate::ops::shapes::{Manifest, Shapes};
use crate::schedule::SchedulerConfig;

mod foreign;
mod names;
mod place;
mod single;

pub use place::fetched;
pub use single::Single;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Pipelines whose components make images from text; Kontext does without a picture to change.
const CLASSES: [&str; 6] = [
    "FluxPipeline",
    "FluxKontextPipeline",
    "FluxImg2ImgPipeline",
    "FluxInpaintPipeline",
    "FluxKontextInpaintPipeline",
    "ORTFluxPipeline",
];
/// FLUX.1 is trained at this side, whatever its autoencoder's `sample_size` says.
const FLUX_IMAGE: usize = 1024;
/// An autoencoder's `sample_size` below this is meant.
const SMALL_IMAGE: usize = 512;

/// The networks of a FLUX pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Component {
    /// CLIP: the pooled vector.
    TextEncoder,
    /// T5: the text tokens.
    TextEncoder2,
    /// The velocity network.
    Transformer,
    /// The image autoencoder.
    Vae,
}

impl Component {
    /// All four.
    pub const ALL: [Self; 4] =
        [Self::TextEncoder, Self::TextEncoder2, Self::Transformer, Self::Vae];

    /// Its folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::TextEncoder2 => "text_encoder_2",
            Self::Transformer => "transformer",
            Self::Vae => "vae",
        }
    }

    /// Name of its weight file without `.safetensors`.
    pub fn stem(self) -> &'static str {
        match self {
            Self::TextEncoder | Self::TextEncoder2 => "model",
            Self::Transformer | Self::Vae => "diffusion_pytorch_model",
        }
    }
}

/// The configs of a pipeline folder, read and validated.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// The folder.
    pub dir: PathBuf,
    /// `transformer/config.json`.
    pub transformer: TransformerConfig,
    /// `vae/config.json` (`vae_decoder/config.json` in an export).
    pub vae: VaeConfig,
    /// `text_encoder/config.json`.
    pub text_encoder: ClipTextConfig,
    /// `text_encoder_2/config.json`.
    pub text_encoder_2: T5Config,
    /// `scheduler/scheduler_config.json`.
    pub scheduler: SchedulerConfig,
    /// What its files were when it was finished, where it says so.
    checksums: Option<Checksums>,
    notices: Vec<String>,
    /// The folder itself, whatever its name will stand for later.
    identity: Option<Identity>,
}

/// Device and inode.
type Identity = (u64, u64);

impl Pipeline {
    /// Reads the configs of a checkpoint folder or of an export made from one. Configs that were edited
    /// since the folder was finished are read as they are, and [`Pipeline::notices`] names them.
    ///
    /// # Errors
    /// When the folder is no FLUX pipeline, or a config is missing, malformed or unsupported.
    pub fn open(dir: &Path) -> Result<Self> {
        if let Some(why) = place::no_pipeline(dir) {
            return Err(CheckpointError::malformed(dir, why));
        }
        let vae = ["vae_decoder/config.json", "vae/config.json"]
            .into_iter()
            .find(|file| dir.join(file).is_file())
            .unwrap_or("vae/config.json");
        let identity = identity(dir);
        let checksums = Checksums::open(dir)?;
        let read = |file: &str| Ok(Cow::Owned(read_bounded(&dir.join(file))?));
        let configs = Self::from_configs(dir, vae, &read)?;
        let edited = checksums.as_ref().map_or(Ok(Vec::new()), Checksums::edited)?;
        let notice = |file: &str| {
            let (path, list) = (dir.join(file), checksums::FILE);
            format!("{}: edited since {list} was written, read as it is now", path.display())
        };
        let notices = edited.into_iter().map(notice).collect();
        let pipeline = Self { checksums, notices, identity, ..configs };
        pipeline.check_unreplaced()?;
        Ok(pipeline)
    }

    /// The configs of a published model, one of [`known::MODELS`]; its `dir` is the name and no folder.
    pub fn known(name: &str) -> Option<Self> {
        let files = known::files(name)?;
        let text = |file: &str| {
            let (_, text) = files.iter().find(|(known, _)| *known == file).expect("every config");
            Ok(Cow::Borrowed(text.as_bytes()))
        };
        let pipeline = Self::from_configs(Path::new(name), "vae/config.json", &text);
        Some(pipeline.expect("shipped configs are valid"))
    }

    fn from_configs(dir: &Path, vae: &str, read: &Read<'_>) -> Result<Self> {
        let index_path = dir.join("model_index.json");
        let index: serde_json::Value = parse(&index_path, &read("model_index.json")?)?;
        let class = index["_class_name"].as_str().unwrap_or_default();
        if !CLASSES.contains(&class) {
            let why = format!(
                "unsupported _class_name {class:?}: of the FLUX family only text to image is read ({}, …)",
                CLASSES[..2].join(", ")
            );
            return Err(CheckpointError::malformed(&index_path, why));
        }
        let source = Source { dir, read };
        let pipeline = Self {
            dir: dir.to_owned(),
            transformer: source.config("transformer/config.json", TransformerConfig::validate)?,
            vae: source.config(vae, VaeConfig::validate)?,
            text_encoder: source.config("text_encoder/config.json", ClipTextConfig::validate)?,
            text_encoder_2: source.config("text_encoder_2/config.json", T5Config::validate)?,
            scheduler: source
                .config("scheduler/scheduler_config.json", SchedulerConfig::validate)?,
            checksums: None,
            notices: Vec::new(),
            identity: None,
        };
        pipeline.check_seams()?;
        pipeline.check_scheduler(&index)?;
        Ok(pipeline)
    }

    /// Makes sure that the folder is still the one that was opened, so that nothing is a mixture of two.
    ///
    /// # Errors
    /// When another folder has its name, or none.
    pub fn check_unreplaced(&self) -> Result<()> {
        if self.identity.is_none() || identity(&self.dir) == self.identity {
            return Ok(());
        }
        let why = "was replaced while it was read: start again";
        Err(CheckpointError::malformed(&self.dir, why))
    }

    /// Libraries make the scheduler of the class in the index, so that both must say the same.
    fn check_scheduler(&self, index: &serde_json::Value) -> Result<()> {
        let own = self.scheduler.class();
        match index["scheduler"][1].as_str() {
            Some(class) if class != own => {
                let path = self.dir.join("scheduler/scheduler_config.json");
                let why = format!(
                    "its _class_name is {own}, but model_index.json says {class}: make both the same"
                );
                Err(CheckpointError::malformed(&path, why))
            }
            _ => Ok(()),
        }
    }

    /// The components must fit each other.
    fn check_seams(&self) -> Result<()> {
        let transformer = self.dir.join("transformer/config.json");
        let seams = [
            ("in_channels", self.transformer.in_channels, PATCH * PATCH * self.vae.latent_channels),
            (
                "joint_attention_dim",
                self.transformer.joint_attention_dim,
                self.text_encoder_2.d_model,
            ),
            (
                "pooled_projection_dim",
                self.transformer.pooled_projection_dim,
                self.text_encoder.hidden_size,
            ),
        ];
        for (field, found, expected) in seams {
            if found != expected {
                let why = format!(
                    "{field} is {found}, but the other components need {expected}{}",
                    if field == "in_channels" {
                        " (Fill, Control and Redux take more)"
                    } else {
                        ""
                    }
                );
                return Err(CheckpointError::malformed(&transformer, why));
            }
        }
        Ok(())
    }

    /// The latents of an image of `width`×`height` pixels.
    ///
    /// # Errors
    /// When the size is not a multiple of what one token covers.
    pub fn latent_size(
        &self,
        width: usize,
        height: usize,
    ) -> std::result::Result<LatentSize, SizeError> {
        LatentSize::of_image(self.vae.latent_channels, self.vae.factor(), width, height)
    }

    /// Side in pixels of the images the model was made for: `sample_size` of a small autoencoder, else
    /// FLUX's 1024.
    pub fn default_size(&self) -> usize {
        self.vae.sample_size.filter(|&side| side < SMALL_IMAGE).unwrap_or(FLUX_IMAGE)
    }

    /// Parameters of `component`, from a dry run of its network.
    pub fn manifest(&self, component: Component) -> Manifest {
        let shapes = Shapes::new();
        match component {
            Component::TextEncoder => {
                self.text_encoder
                    .forward(&shapes, &vec![1, self.text_encoder.max_position_embeddings]);
            }
            Component::TextEncoder2 => {
                self.text_encoder_2.forward(&shapes, &vec![1, 2]);
            }
            Component::Transformer => {
                self.dry_velocity(&shapes, 1, 1, 1);
            }
            Component::Vae => {
                let (z, factor) = (self.vae.latent_channels, self.vae.factor());
                self.vae.encode(&shapes, &vec![1, 3, 2 * factor, 2 * factor]);
                self.vae.decode(&shapes, &vec![1, z, 2, 2]);
            }
        }
        shapes.manifest()
    }

    /// One velocity of `batch` images of `tokens` image and `text` text tokens, on shapes alone.
    pub fn dry_velocity(&self, shapes: &Shapes, batch: usize, tokens: usize, text: usize) {
        let config = &self.transformer;
        config.forward(
            shapes,
            &Inputs {
                hidden_states: &vec![batch, tokens, config.in_channels],
                encoder_hidden_states: &vec![batch, text, config.joint_attention_dim],
                pooled_projections: &vec![batch, config.pooled_projection_dim],
                timestep: &vec![batch],
                img_ids: &vec![tokens, 3],
                txt_ids: &vec![text, 3],
                guidance: Some(&vec![batch]),
            },
        );
    }

    /// The weights of `component`, by the names of diffusers and transformers, checked against its manifest
    /// and the folder's `SHA256SUMS`.
    ///
    /// # Errors
    /// When files are missing, broken or damaged, or one message listing every tensor that does not fit.
    pub fn weights(&self, component: Component) -> Result<Weights> {
        let weights = self.unread_weights(component)?;
        self.check_folder(component.folder())?;
        Ok(weights)
    }

    /// [`Pipeline::weights`] without a look at `SHA256SUMS`, for who reads the files anyway and compares then.
    ///
    /// # Errors
    /// As there.
    pub fn unread_weights(&self, component: Component) -> Result<Weights> {
        let dir = self.dir.join(component.folder());
        if !dir.is_dir() {
            return Err(CheckpointError::malformed(&dir, "no such folder"));
        }
        let manifest = self.manifest(component);
        let weights = Weights::open(&dir, component.stem())?;
        let weights = names::usual(weights, component, &manifest)?;
        if component == Component::Transformer {
            self.check_guidance(&weights)?;
        }
        weights.check(&manifest, &[])?;
        Ok(weights)
    }

    /// What its files were when it was finished, where it says so.
    pub fn checksums(&self) -> Option<&Checksums> {
        self.checksums.as_ref()
    }

    /// What is to be said of the folder, a sentence each.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Compares the files of one of the pipeline's folders but its configs with its `SHA256SUMS`, where it
    /// has any: reads all of them once.
    ///
    /// # Errors
    /// Names the first that is missing or differs.
    pub fn check_folder(&self, folder: &str) -> Result<()> {
        let is_inside = |file: &str| file.strip_prefix(folder).is_some_and(|f| f.starts_with('/'));
        let picked = |file: &str| is_inside(file) && !checksums::is_config(file);
        self.checksums.iter().try_for_each(|list| list.check_where(picked))
    }

    /// Whether anything in the folder of `component` may be its weights.
    pub fn has_weights(&self, component: Component) -> bool {
        let entries = std::fs::read_dir(self.dir.join(component.folder())).into_iter().flatten();
        entries.flatten().any(|entry| is_weights(Path::new(&entry.file_name())))
    }

    fn check_guidance(&self, weights: &Weights) -> Result<()> {
        let embeds = self.transformer.guidance_embeds;
        let holds = weights.names().any(|name| name.contains("guidance_embedder"));
        if holds == embeds {
            return Ok(());
        }
        let path = self.dir.join("transformer/config.json");
        let has = if holds { "have a guidance embedder" } else { "have no guidance embedder" };
        let why = format!("guidance_embeds is {embeds}, but the weights {has}: set it to {holds}");
        Err(CheckpointError::malformed(&path, why))
    }
}

fn identity(dir: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(dir).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Reads a JSON file.
///
/// # Errors
/// When it is missing, or not the JSON that `T` describes.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &read_bounded(path)?)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|error| CheckpointError::malformed(path, error))
}

/// A config in which null is as good as left out.
fn parse_config<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    let mut entries: serde_json::Map<String, serde_json::Value> = parse(path, text)?;
    entries.retain(|_, value| !value.is_null());
    T::deserialize(serde_json::Value::Object(entries))
        .map_err(|error| CheckpointError::malformed(path, error))
}

type Read<'a> = dyn Fn(&str) -> Result<Cow<'static, [u8]>> + 'a;

/// Where configs come from: a folder, or the program itself.
struct Source<'a> {
    dir: &'a Path,
    read: &'a Read<'a>,
}

impl Source<'_> {
    fn config<T: DeserializeOwned, E: std::fmt::Display>(
        &self,
        file: &str,
        validate: impl Fn(&T) -> std::result::Result<(), E>,
    ) -> Result<T> {
        let path = self.dir.join(file);
        let config: T = parse_config(&path, &(self.read)(file)?)?;
        validate(&config).map_err(|error| CheckpointError::malformed(&path, error))?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts of the published checkpoints' headers.
    #[test]
    fn known_models_have_their_published_sizes() {
        for (name, transformer) in
            [("flux.1-dev", 11_901_408_320), ("flux.1-schnell", 11_891_178_560_usize)]
        {
            let pipeline = Pipeline::known(name).unwrap();
            let count = |component| pipeline.manifest(component).n_elements();
            assert_eq!(count(Component::Transformer), transformer, "{name}");
            assert_eq!(count(Component::TextEncoder), 123_060_480);
            assert_eq!(count(Component::TextEncoder2), 4_762_310_656);
            assert_eq!(count(Component::Vae), 83_819_683);
        }
        assert!(Pipeline::known("flux.9").is_none());
    }

    #[test]
    fn a_velocity_of_flux_costs_what_its_sizes_say() {
        let shapes = Shapes::new();
        Pipeline::known("flux.1-dev").unwrap().dry_velocity(&shapes, 1, 4096, 512);
        let tera = shapes.flops() / 1e12;
        assert!((70.0..78.0).contains(&tera), "{tera} TFLOP");
    }

    /// The repository's model, with its files listed.
    fn listed(home: &Path) -> PathBuf {
        let (model, copy) = (Path::new("../assets/signs"), home.join("model"));
        let mut staged = crate::staged::Staged::begin(&copy).unwrap();
        for file in crate::contents::of(model).unwrap() {
            let to = staged.path().join(&file.path);
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(file.source, to).unwrap();
        }
        assert!(staged.carry(model, |_| true).unwrap().is_empty(), "it lists nothing");
        staged.publish(true).unwrap();
        copy
    }

    #[test]
    fn a_folder_that_is_replaced_meanwhile_is_said() {
        let home = tempfile::tempdir().unwrap();
        let pipeline = Pipeline::open(&listed(home.path())).unwrap();
        pipeline.check_unreplaced().unwrap();
        listed(home.path());
        let said = pipeline.check_unreplaced().unwrap_err().to_string();
        assert!(said.contains("replaced while it was read: start again"), "{said}");
        Pipeline::known("flux.1-dev").unwrap().check_unreplaced().unwrap();
    }

    #[test]
    fn damage_is_seen_where_it_is_read_and_edited_configs_are_said() {
        let home = tempfile::tempdir().unwrap();
        let dir = listed(home.path());
        let pipeline = Pipeline::open(&dir).unwrap();
        pipeline.weights(Component::Vae).unwrap();
        let weights = dir.join("vae/diffusion_pytorch_model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        // Weights are replaced by rename, never written in place.
        std::fs::remove_file(&weights).unwrap();
        std::fs::write(&weights, bytes).unwrap();
        pipeline.weights(Component::TextEncoder).unwrap();
        let said = pipeline.weights(Component::Vae).err().unwrap().to_string();
        assert!(said.contains("diffusion_pytorch_model.safetensors: damaged"), "{said}");
        let config = dir.join("transformer/config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text + " ").unwrap();
        let edited = Pipeline::open(&dir).unwrap();
        let [said] = edited.notices() else { panic!("{:?}", edited.notices()) };
        assert!(said.contains("transformer/config.json: edited since SHA256SUMS"), "{said}");
        edited.weights(Component::Transformer).unwrap();
    }
}
