//! Embedding prompts once, and taking over what another program embedded.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::View;
use flow::log;
use flow::pipeline::{Component, read_json};
use flow::prompts::one_line;
use serde::Deserialize;
use tch::{Kind, Tensor};

use crate::data::{pickle, prompts};
use crate::network::embeddings::{self, Embeddings, Row, store};
use crate::network::model::{Loading, Model};
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::tensor::device::Compute;
use crate::tensor::eager::dims;
use crate::tensor::stored;

/// Prompts encoded in one pass over T5, and stored in one file.
const PROMPTS_A_FILE: usize = 64;
/// What to embed.
pub struct Options<'a> {
    /// Pipeline folder.
    pub model: &'a Path,
    /// Prompt file.
    pub prompts: &'a Path,
    /// Folder of the cache; what it holds already is kept.
    pub out: &'a Path,
    /// Where the encoders run.
    pub compute: Compute,
}

/// Embeds every prompt that the cache lacks, each text once. The encoders stay on disk and are read
/// block by block.
///
/// # Errors
/// When the model or the prompts cannot be read, or the cache was made for other text lengths.
pub fn run(options: &Options<'_>) -> Result<()> {
    let all = prompts::read(options.prompts)?;
    let encoders = embeddings::encoders(options.model)?;
    let known = Embeddings::open(options.out)?;
    known.check_made_by(options.model, || Ok(encoders.clone()))?;
    let mut seen = HashSet::new();
    let missing: Vec<&str> = all
        .iter()
        .map(|prompt| prompt.text.as_str())
        .filter(|text| !known.has(text) && seen.insert(*text))
        .collect();
    let n_known = all.len() - missing.len();
    log::note(&format!("prompts: {}, {n_known} of them known or alike", all.len()));
    prompts::tell_cut(options.model, missing.iter().copied())?;
    let model = Model::load(options.model, Loading::to_sample(options.compute, true))?;
    let stored = stored_kind(&model)?;
    let progress = Progress::new("embed", missing.len(), 0);
    for texts in missing.chunks(PROMPTS_A_FILE) {
        interrupt::check()?;
        let [text, pooled] = model.embed(texts)?.map(|rows| rows.to_kind(stored));
        let rows: Vec<Row<'_>> = (0..)
            .zip(texts)
            .map(|(row, prompt)| Row { prompt, tensors: [text.get(row), pooled.get(row)] })
            .collect();
        store(options.out, &rows, Some(&encoders))?;
        for _ in texts {
            progress.advance("");
        }
    }
    println!("{}", options.out.display());
    Ok(())
}

/// One prompt of DanceGRPO's `videos2caption.json`; each file holds one tensor.
///
/// Source: `fastvideo/data_preprocess/preprocess_flux_embedding.py` of DanceGRPO at 15cc71d.
#[derive(Deserialize)]
struct Imported {
    caption: String,
    prompt_embed_path: PathBuf,
    pooled_prompt_embeds_path: PathBuf,
}

/// Takes over the embeddings that DanceGRPO made: `list` is its `videos2caption.json`, the folders
/// `prompt_embed` and `pooled_prompt_embeds` lie beside it.
///
/// # Errors
/// When a file is missing, or not what its name says.
pub fn import(list: &Path, out: &Path) -> Result<()> {
    let items: Vec<Imported> = read_json(list)?;
    ensure!(!items.is_empty(), "{}: no prompts in it", list.display());
    let folder = list.parent().unwrap_or(Path::new("."));
    let known = Embeddings::open(out)?;
    let mut seen = HashSet::new();
    let mut is_new = |text: &String| !known.has(text) && seen.insert(text.clone());
    let missing: Vec<(&Imported, String)> = items
        .iter()
        .map(|item| (item, one_line(&item.caption)))
        .filter(|(_, text)| !text.is_empty() && is_new(text))
        .collect();
    let n_known = items.len() - missing.len();
    log::note(&format!("{} captions, {n_known} of them empty, known or alike", items.len()));
    let progress = Progress::new("import", missing.len(), 0);
    for items in missing.chunks(PROMPTS_A_FILE) {
        interrupt::check()?;
        let mut rows = Vec::with_capacity(items.len());
        for (item, prompt) in items {
            let text = bare(&folder.join("prompt_embed"), &item.prompt_embed_path, 2)?;
            let pooled =
                bare(&folder.join("pooled_prompt_embeds"), &item.pooled_prompt_embeds_path, 1)?;
            rows.push(Row { prompt, tensors: [text, pooled] });
            progress.advance("");
        }
        store(out, &rows, None)?;
    }
    println!("{}", out.display());
    Ok(())
}

/// The only tensor of a pickled file, which has `rank` axes.
fn bare(folder: &Path, file: &Path, rank: usize) -> Result<Tensor> {
    let path = folder.join(file);
    ensure!(
        file.file_name() == Some(file.as_os_str()),
        "{}: not a file of {}",
        file.display(),
        folder.display()
    );
    let weights = pickle::weights(&path)?;
    let view = weights.get(pickle::BARE);
    let shape = view.map(|view| view.shape.to_vec()).unwrap_or_default();
    ensure!(
        shape.len() == rank,
        "{}: one tensor of {rank} axes is needed, found shape {shape:?}",
        path.display()
    );
    Ok(stored::tensor(&weights, pickle::BARE)?.reshape(dims(&shape)))
}

/// Embeddings are stored in the type of T5's weights.
fn stored_kind(model: &Model) -> Result<Kind> {
    let weights = model.pipeline.weights(Component::TextEncoder2)?;
    let name = weights.names().next().context("a text encoder without weights")?;
    let View { dtype, .. } = weights.get(name).context("listed above")?;
    stored::kind_of(dtype)
}

#[cfg(test)]
mod tests {
    use flow::latents::LatentSize;

    use super::*;

    /// Files as DanceGRPO's preprocessing leaves them: rows of a batch, saved with all of it.
    #[test]
    fn embeddings_of_dance_grpo_are_taken_over() {
        let home = tempfile::tempdir().unwrap();
        let list = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/command/embed/fixtures/dance-grpo/videos2caption.json");
        for _ in 0..2 {
            import(&list, home.path()).unwrap();
        }
        assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 1);
        let cache = Embeddings::open(home.path()).unwrap();
        let [text, pooled] = cache.rows(&["a fox", "a hen"]).unwrap();
        assert_eq!((text.size(), pooled.size()), (vec![2, 4, 3], vec![2, 5]));
        let expected = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)) / 8.0;
        assert_eq!(text.reshape([-1]), expected);
        assert_eq!(pooled.double_value(&[1, 4]), -9.0);
    }

    /// Captions of DanceGRPO are lines as they stood, prompts are read without what surrounds them.
    #[test]
    fn spaces_around_a_caption_do_not_hide_it() {
        let home = tempfile::tempdir().unwrap();
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("src/command/embed/fixtures/dance-grpo/videos2caption.json");
        let source = home.path().join("source");
        for folder in ["prompt_embed", "pooled_prompt_embeds"] {
            std::fs::create_dir_all(source.join(folder)).unwrap();
            for file in std::fs::read_dir(fixture.with_file_name(folder)).unwrap() {
                let file = file.unwrap().path();
                std::fs::copy(&file, source.join(folder).join(file.file_name().unwrap())).unwrap();
            }
        }
        let list = std::fs::read_to_string(&fixture).unwrap();
        let list = list.replace("a fox", "\\ta fox ").replace("a hen", "a fox");
        std::fs::write(source.join("list.json"), list).unwrap();
        let cache = home.path().join("cache");
        import(&source.join("list.json"), &cache).unwrap();
        let cache = Embeddings::open(&cache).unwrap();
        cache.check(["a fox", " a fox\n"]).unwrap();
        assert!(cache.check(["a hen"]).is_err());

        // A cache whose keys are those of captions as they stood.
        let tensors = [cache.rows(&["a fox"]).unwrap()[0].get(0), Tensor::from_slice(&[1.0f32])];
        let old = home.path().join("old");
        store(&old, &[Row { prompt: "a hen ", tensors }], None).unwrap();
        let [text, _] = Embeddings::open(&old).unwrap().rows(&["a hen"]).unwrap();
        assert_eq!(text.size()[0], 1);
    }

    #[test]
    fn cached_conditions_are_those_of_the_encoders() {
        let home = tempfile::tempdir().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let pipeline = folder.join("tests/fixtures/tiny-flux/pipeline");
        let file = home.path().join("prompts.txt");
        let texts = ["red \"CAT\"", "blue \"OX\"", "red \"CAT\""];
        let embed = |texts: &[&str]| {
            std::fs::write(&file, texts.join("\n")).unwrap();
            let (model, prompts, out) = (&*pipeline, &*file, &*home.path().join("cache"));
            run(&Options { model, prompts, out, compute: Compute::CPU }).unwrap();
            std::fs::read_dir(out).unwrap().count()
        };
        assert_eq!((embed(&texts[..1]), embed(&texts), embed(&texts)), (1, 2, 2));
        Embeddings::of(&home.path().join("cache"), &pipeline).unwrap();
        let other = Embeddings::of(&home.path().join("cache"), &folder.join("assets/signs"));
        let error = other.err().unwrap().to_string();
        assert!(error.contains("other text encoders"), "{error}");

        let mut model = Model::load(&pipeline, Loading::to_sample(Compute::CPU, false)).unwrap();
        let size = LatentSize { channels: 16, height: 4, width: 4 };
        let encoded = model.encode(&texts, 3.5, &size).unwrap();
        model.embeddings = Some(Embeddings::open(&home.path().join("cache")).unwrap());
        let cached = model.encode(&texts, 3.5, &size).unwrap();
        assert_eq!((cached.text, cached.pooled), (encoded.text, encoded.pooled));
        let error = model.encode(&["absent"], 3.5, &size).err().unwrap();
        assert!(format!("{error:#}").contains("ng-train embed"), "{error:#}");
    }
}
