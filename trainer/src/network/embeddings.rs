//! Text embeddings on disk, so that training never holds the text encoders.
//!
//! A cache is a folder of safetensors files. A prompt's tensors are called `KEY.prompt_embeds` `[L, D]`
//! and `KEY.pooled_prompt_embeds` `[P]` after the arguments of `FluxPipeline`, where KEY is the SHA-256
//! of its text as one line in hexadecimal digits, and the text stands under KEY in the file's metadata, beside
//! what tells the encoders that made them from others.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::{Weights, write_tensors};
use flow::log;
use flow::pipeline::{Component, Pipeline};
use flow::prompts::one_line;
use flow::tokens::Tokenizers;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::tensor::eager::dims;
use crate::tensor::stored;

const TEXT: &str = "prompt_embeds";
const POOLED: &str = "pooled_prompt_embeds";

/// Metadata: [`encoders`] of the model that made a file.
const ENCODERS: &str = "encoders";
/// Bytes of each end of a tensor that tell it from another.
const END: usize = 64;
/// Its ids and their number tell tokenizers apart.
const PROBE: &str = "A photo of 12 red foxes, “naïve” & co., by the SEA.";

/// One prompt's text tokens `[L, D]` and pooled vector `[P]`.
pub(crate) struct Row<'a> {
    pub(crate) prompt: &'a str,
    pub(crate) tensors: [Tensor; 2],
}

/// What tells the tokenizers and text encoders of `model`, a pipeline folder, from others: how long texts are, and the
/// ends of each tensor, however files divide them.
///
/// # Errors
/// When they cannot be read.
pub(crate) fn encoders(model: &Path) -> Result<String> {
    let pipeline = Pipeline::open(model)?;
    let ids = Tokenizers::open(model, None)?.encode(PROBE);
    let ids = ids.map_err(|error| anyhow!("{}: cannot tokenise: {error}", model.display()))?;
    let mut digest = Sha256::new_with_prefix(format!("{:?} {:?}", ids.clip, ids.t5));
    for component in [Component::TextEncoder, Component::TextEncoder2] {
        let weights = pipeline.weights(component)?;
        let mut names: Vec<&str> = weights.names().collect();
        names.sort_unstable();
        for name in names {
            let bytes = weights.as_stored(name).context("a tensor that is listed is not there")?;
            let (dtype, shape) = (weights.dtype(name), weights.shape(name));
            digest.update(format!("{name} {dtype:?} {shape:?}"));
            digest.update(&bytes[..bytes.len().min(END)]);
            digest.update(&bytes[bytes.len().saturating_sub(END)..]);
        }
    }
    Ok(format!("{:x}", digest.finalize()))
}

/// Writes one file of the cache, made by `encoders`, where they are known.
pub(crate) fn store(out: &Path, rows: &[Row<'_>], encoders: Option<&str>) -> Result<()> {
    let keys: Vec<String> = rows.iter().map(|row| key(row.prompt)).collect();
    let (mut entries, mut metadata) = (Vec::new(), Vec::new());
    for (key, row) in keys.iter().zip(rows) {
        for (name, tensor) in [TEXT, POOLED].iter().zip(&row.tensors) {
            entries.push(stored::entry(&format!("{key}.{name}"), tensor)?);
        }
        metadata.push((key.as_str(), row.prompt.to_owned()));
    }
    metadata.extend(encoders.map(|encoders| (ENCODERS, encoders.to_owned())));
    let file = format!("embeddings-{}.safetensors", &keys[0][..16]);
    Ok(write_tensors(&out.join(file), &entries, &metadata)?)
}

/// A cache, mapped.
pub(crate) struct Embeddings {
    folder: PathBuf,
    files: Vec<Weights>,
    /// File of each prompt's tensors and their key in it, by the key of the prompt as one line.
    places: HashMap<String, (usize, String)>,
}

impl Embeddings {
    /// The cache in `folder`, empty where there is none.
    ///
    /// # Errors
    /// When a file of it is broken.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let mut paths = Vec::new();
        if folder.is_dir() {
            let listed = || format!("cannot read {}", folder.display());
            for entry in std::fs::read_dir(folder).with_context(listed)? {
                let path = entry.with_context(listed)?.path();
                if path.extension().is_some_and(|extension| extension == "safetensors") {
                    paths.push(path);
                }
            }
        }
        paths.sort();
        let files: Vec<Weights> =
            paths.iter().map(|path| Weights::open_file(path)).collect::<Result<_, _>>()?;
        let mut places = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for stored in file.names().filter_map(|name| name.strip_suffix(&format!(".{TEXT}"))) {
                let known = file.metadata(stored).map(|text| key(&one_line(text)));
                let known = known.unwrap_or_else(|| stored.to_owned());
                places.insert(known, (index, stored.to_owned()));
            }
        }
        Ok(Self { folder: folder.to_owned(), files, places })
    }

    /// The cache in `folder`, for prompts that the encoders of `model`, a pipeline folder, would encode alike; says so
    /// where files do not tell what made them.
    ///
    /// # Errors
    /// When a file of it is broken, or other encoders made it.
    pub(crate) fn of(folder: &Path, model: &Path) -> Result<Self> {
        let cache = Self::open(folder)?;
        cache.check_made_by(model, || encoders(model))?;
        Ok(cache)
    }

    /// Refuses a cache that other encoders made than `own` of `model`; asks for those where it tells any.
    pub(crate) fn check_made_by(
        &self,
        model: &Path,
        own: impl FnOnce() -> Result<String>,
    ) -> Result<()> {
        let folder = self.folder.display();
        let made_by: BTreeSet<Option<&str>> =
            self.files.iter().map(|file| file.metadata(ENCODERS)).collect();
        if made_by.contains(&None) {
            log::note(&format!(
                "note: {folder}: not all of it tells which text encoders made it; those are taken for the model's"
            ));
        }
        let made_by: BTreeSet<&str> = made_by.into_iter().flatten().collect();
        if !made_by.is_empty() {
            let own = own()?;
            ensure!(
                made_by.iter().all(|other| *other == own),
                "{folder}: made by other text encoders or for other text lengths than those of {}: run `ng-train \
                 embed` with this model and another folder",
                model.display()
            );
        }
        Ok(())
    }

    /// Whether it has `prompt`.
    pub(crate) fn has(&self, prompt: &str) -> bool {
        self.places.contains_key(&key(&one_line(prompt)))
    }

    /// Refuses `prompts` that it lacks.
    pub(crate) fn check<'a>(&self, prompts: impl IntoIterator<Item = &'a str>) -> Result<()> {
        prompts.into_iter().try_for_each(|prompt| self.file(prompt).map(|_| ()))
    }

    /// The file of a prompt's tensors, and their key.
    fn file(&self, prompt: &str) -> Result<(&Weights, &str)> {
        let place = self.places.get(&key(&one_line(prompt)));
        let (file, stored) = place.with_context(|| self.unknown(prompt))?;
        Ok((&self.files[*file], stored))
    }

    fn unknown(&self, prompt: &str) -> String {
        let folder = self.folder.display();
        format!("{folder}: no embedding of {prompt:?}: run `ng-train embed`")
    }

    /// Embeddings of `prompts` in f32 on the CPU: `[B, L, D]` and `[B, P]`.
    ///
    /// # Errors
    /// When one is not in the cache, or lengths differ.
    pub(crate) fn rows(&self, prompts: &[&str]) -> Result<[Tensor; 2]> {
        let mut rows = [Vec::new(), Vec::new()];
        for prompt in prompts {
            let (file, key) = self.file(prompt)?;
            for (rows, name) in rows.iter_mut().zip([TEXT, POOLED]) {
                let name = format!("{key}.{name}");
                let shape = file.get(&name).with_context(|| self.unknown(prompt))?.shape;
                let values = stored::tensor(file, &name)?.to_kind(Kind::Float);
                rows.push(values.reshape(dims(shape)));
            }
        }
        let [text, pooled] = &rows;
        for rows in &rows {
            ensure!(
                rows.iter().all(|row| row.size() == rows[0].size()),
                "{}: embeddings of different lengths in one batch",
                self.folder.display()
            );
        }
        Ok([Tensor::stack(text, 0), Tensor::stack(pooled, 0)])
    }
}

/// SHA-256 of the text, in hexadecimal digits.
fn key(prompt: &str) -> String {
    format!("{:x}", Sha256::digest(prompt.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sha_256() {
        assert_eq!(key("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
