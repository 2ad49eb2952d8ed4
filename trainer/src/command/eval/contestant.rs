//! What is compared: pipelines, and pipelines with a LoRA on them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use flow::log;
use flow::lora;
use flow::pipeline::Pipeline;
use flow::usage::Usage;

use super::stamp;
use crate::network::embeddings::Embeddings;
use crate::network::model::{Loading, Model};
use crate::run::align::ALIGNED;
use crate::run::config::AlignConfig;
use crate::tensor::device::Compute;

/// Files and folders of a pipeline that images follow from.
const PARTS: [&str; 8] = [
    "model_index.json",
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "transformer",
    "vae",
];

/// One column of the comparison.
pub(super) struct Contestant {
    /// As it was typed.
    pub(super) name: String,
    pipeline: PathBuf,
    /// Adapters and their scale.
    lora: Option<(PathBuf, f64)>,
}

impl Contestant {
    /// Those of the command line: a LoRA, a file or a folder of adapters alone, goes on the nearest
    /// pipeline before it. A folder that holds such stands for all of them, in the order of their names,
    /// and its LoRA go on the pipeline before the folder.
    ///
    /// # Errors
    /// When there is none before it, or a folder is no pipeline.
    pub(super) fn all(names: &[String]) -> Result<Vec<Self>> {
        let mut contestants: Vec<Self> = Vec::new();
        for name in names {
            let base = contestants.last().map(|last| last.pipeline.clone());
            let below = below(name);
            if below.is_empty() {
                contestants.push(Self::open(name.clone(), base)?);
                continue;
            }
            log::note(&format!("note: {name}: takes {}", below.join(", ")));
            for below in below {
                let name = format!("{}/{below}", name.trim_end_matches('/'));
                contestants.push(Self::open(name, base.clone())?);
            }
        }
        Ok(contestants)
    }

    /// The one called `name`; a LoRA goes on the pipeline `base`.
    fn open(name: String, base: Option<PathBuf>) -> Result<Self> {
        let lora = lora::scaled_path(&name).ok().filter(|(path, _)| is_lora(path));
        let pipeline = match (&lora, base) {
            (None, _) => Pipeline::open(Path::new(&name))?.dir,
            (Some(_), Some(base)) => base,
            (Some(_), None) => bail!(Usage(format!(
                "--model {name} is a LoRA: give the pipeline it goes on before it"
            ))),
        };
        Ok(Self { name, pipeline, lora })
    }

    /// The last part of its name.
    pub(super) fn last_name(&self) -> &str {
        self.name.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default()
    }

    /// Stamps of its files, and the LoRA's scale.
    pub(super) fn stamps(&self) -> Result<Vec<String>> {
        let mut stamps = Vec::new();
        for part in PARTS {
            let path = self.pipeline.join(part);
            if path.exists() {
                stamps.extend(stamp::of(&path)?);
            }
        }
        if let Some((path, scale)) = &self.lora {
            let file = lora::file(path)?;
            stamps.extend(stamp::of(&file)?);
            if let Some(settings) = lora::settings_beside(&file) {
                stamps.extend(stamp::of(&settings)?);
            }
            stamps.push(format!("at scale {scale}"));
        }
        Ok(stamps)
    }

    /// Its model, which is `held` with other adapters where that is of the same pipeline.
    pub(super) fn load(
        &self,
        held: Option<Model>,
        config: &AlignConfig,
        compute: Compute,
    ) -> Result<Model> {
        let is_same = |model: &Model| {
            self.lora.is_some() && !model.is_merged && model.pipeline.dir == self.pipeline
        };
        let mut model = match held.filter(is_same) {
            Some(model) => model,
            None => open(&self.pipeline, config, compute)?,
        };
        model.add_loras(self.lora.as_slice())?;
        Ok(model)
    }
}

/// The model in `folder`, held as `config` holds its own.
fn open(folder: &Path, config: &AlignConfig, compute: Compute) -> Result<Model> {
    let mut loading = Loading::to_sample(compute, config.stream);
    loading.stream_text |= config.embeddings.is_some();
    let mut model = Model::load(folder, loading)?;
    let cache = config.embeddings.as_deref();
    model.embeddings = cache.map(|cache| Embeddings::of(cache, folder)).transpose()?;
    Ok(model)
}

fn is_lora(path: &Path) -> bool {
    path.is_file() || (path.is_dir() && lora::file(path).is_ok())
}

/// What the folder `name` holds, where it is no checkpoint itself: checkpoints, and of runs what they ended with.
fn below(name: &str) -> Vec<String> {
    let folder = Path::new(name);
    if is_checkpoint(folder) || lora::scaled_path(name).is_ok_and(|(path, _)| is_lora(&path)) {
        return Vec::new();
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    let checkpoint = |name: String| {
        let places = [name.clone(), format!("{name}/{ALIGNED}")];
        places.into_iter().find(|place| is_checkpoint(&folder.join(place)))
    };
    names.into_iter().filter_map(checkpoint).collect()
}

fn is_checkpoint(folder: &Path) -> bool {
    ["model_index.json", lora::FILE, lora::PEFT].iter().any(|file| folder.join(file).is_file())
}

/// The shortest ends of `names` that tell them apart, for headers.
pub(super) fn short(names: &[&str]) -> Vec<String> {
    let ends = |n: usize| -> Vec<String> {
        let end = |name: &&str| {
            let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty()).collect();
            parts[parts.len().saturating_sub(n)..].join("/")
        };
        names.iter().map(end).collect()
    };
    let longest = names.iter().map(|name| name.split('/').count()).max().unwrap_or(1);
    let distinct = |ends: &Vec<String>| (1..ends.len()).all(|i| !ends[..i].contains(&ends[i]));
    (1..longest).map(ends).find(distinct).unwrap_or_else(|| ends(longest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lora_goes_on_the_pipeline_before_it() {
        let home = tempfile::tempdir().unwrap();
        let place = |name: &str| home.path().join(name).to_str().unwrap().to_owned();
        let fixture = |name: &str| format!("../tests/fixtures/{name}/pipeline");
        let (base, other, lora) = (fixture("tiny-flux"), place("b:x"), place("aligned"));
        let schnell = std::path::absolute(fixture("tiny-schnell")).unwrap();
        std::os::unix::fs::symlink(schnell, &other).unwrap();
        std::fs::create_dir(&lora).unwrap();
        std::fs::write(Path::new(&lora).join(lora::FILE), "").unwrap();
        let names = [base.clone(), lora.clone(), other.clone(), format!("{lora}:0.5")];
        let found = Contestant::all(&names).unwrap();
        let pipelines: Vec<&Path> = found.iter().map(|one| &*one.pipeline).collect();
        assert_eq!(pipelines, [&base, &base, &other, &other].map(Path::new));
        let scales: Vec<Option<f64>> =
            found.iter().map(|one| one.lora.as_ref().map(|(_, scale)| *scale)).collect();
        assert_eq!(scales, [None, Some(1.0), None, Some(0.5)]);
        let stamps: Vec<Vec<String>> = found.iter().map(|one| one.stamps().unwrap()).collect();
        assert_eq!(stamps[1][..stamps[0].len()], stamps[0]);
        assert_eq!(stamps[1].len(), stamps[0].len() + 2);
        assert_eq!(stamps[3].last().unwrap(), "at scale 0.5");
        // Its factors follow from the settings beside it.
        std::fs::write(Path::new(&lora).join("adapter_config.json"), "{}").unwrap();
        let with_settings = found[1].stamps().unwrap();
        assert_eq!(with_settings.len(), stamps[1].len() + 1);
        assert!(
            with_settings.iter().any(|stamp| stamp.starts_with("adapter_config.json, 2 bytes"))
        );
        let error = Contestant::all(&names[1..]).err().unwrap();
        assert!(error.is::<Usage>() && error.to_string().contains("before it"), "{error}");
    }

    #[test]
    fn a_folder_stands_for_the_checkpoints_in_it() {
        let home = tempfile::tempdir().unwrap();
        let touch = |file: &str| {
            let path = home.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        for file in [
            "b/aligned/model_index.json",
            "b/checkpoints/iteration-000002/model_index.json",
            "a/model_index.json",
            "c/adapter_model.safetensors",
            ".saving/model_index.json",
            "parts/vae/diffusion_pytorch_model.safetensors",
            "notes.txt",
        ] {
            touch(file);
        }
        let found = |name: &str| below(home.path().join(name).to_str().unwrap());
        assert_eq!(found(""), ["a", "b/aligned", "c"]);
        assert_eq!(found("b"), ["aligned"]);
        assert_eq!(found("b/checkpoints"), ["iteration-000002"]);
        for name in ["a", "c", "parts", "absent"] {
            assert_eq!(found(name), [""; 0], "{name}");
        }

        // Its LoRA go on the pipeline before it, whatever else it holds.
        fs::remove_dir_all(home.path().join("a")).unwrap();
        fs::remove_dir_all(home.path().join("b")).unwrap();
        let fixture = |name: &str| format!("../tests/fixtures/{name}/pipeline");
        let schnell = std::path::absolute(fixture("tiny-schnell")).unwrap();
        std::os::unix::fs::symlink(schnell, home.path().join("b")).unwrap();
        let names = [fixture("tiny-flux"), format!("{}/", home.path().display())];
        let found = Contestant::all(&names).unwrap();
        let pipelines: Vec<&Path> = found.iter().map(|one| &*one.pipeline).collect();
        let below = |name: &str| home.path().join(name);
        assert_eq!(pipelines, [Path::new(&names[0]), &below("b"), Path::new(&names[0])]);
        assert_eq!(found[2].name, typed(&below("c")));
    }

    fn typed(path: &Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn headers_are_as_long_as_it_takes_to_tell_them_apart() {
        assert_eq!(short(&["assets/signs", "out/aligned"]), ["signs", "aligned"]);
        assert_eq!(short(&["out/a/aligned/", "out/b/aligned"]), ["a/aligned", "b/aligned"]);
        assert_eq!(short(&["x/a", "x/a"]), ["x/a", "x/a"]);
    }
}
