//! Checkpoints of one kind made from those of another.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use flow::checkpoint::{MAX_SHARD_BYTES, is_pickle, write_sharded, write_tensors};
use flow::log;
use flow::pipeline::{Component, Pipeline, fetched};
use flow::staged::Staged;
use flow::usage::Usage;

use crate::data::pickle;
use crate::network::save;

/// How the name of an index of pickled files ends.
const SHARDS: &str = ".bin.index.json";

/// Writes `to` from `from`: with `like`, a pipeline folder from a checkpoint in one file and, for what that
/// lacks, the folder `like`; else from a pipeline folder its transformer as one file in BFL's names, or from a
/// pickled file, or the index of several, a safetensors file.
///
/// # Errors
/// When `from` is neither, does not fit `like`, or `to` cannot be written. Nothing is left behind then.
pub(crate) fn run(from: &Path, to: &Path, like: Option<&Path>) -> Result<()> {
    if let Some(fetch) = fetched(from).filter(|_| !from.exists()) {
        bail!("{}: no such file or folder: {fetch}", from.display());
    }
    let replaced = to.is_file();
    match like {
        Some(like) => folder(from, to, like)?,
        None if from.is_dir() => one_file(from, to)?,
        None if from.to_string_lossy().ends_with(SHARDS) => pickle::convert_sharded(from, to)?,
        None => {
            let unknown = "no pickle and no pipeline folder; of a checkpoint in one file --like FOLDER \
                           makes a pipeline folder";
            ensure!(
                !from.is_file() || is_pickle(from),
                Usage(format!("{}: {unknown}", from.display()))
            );
            pickle::convert(from, to)?;
            log::note(&format!("note: {}", pickle::told(from, to)?));
        }
    }
    if replaced {
        log::note(&format!("note: {} was there and is replaced", to.display()));
    }
    println!("{}", to.display());
    Ok(())
}

/// The transformer of the pipeline folder `from`.
fn one_file(from: &Path, to: &Path) -> Result<()> {
    let is_named = to.extension().is_some_and(|extension| extension == "safetensors");
    ensure!(
        is_named,
        Usage(format!("{}: the name of a .safetensors file is needed", to.display()))
    );
    let pipeline = Pipeline::open(from)?;
    let weights = pipeline.weights(Component::Transformer)?;
    tell(pipeline.notices());
    tell(weights.notices());
    Ok(write_tensors(to, &weights.bfl_entries()?, &[])?)
}

/// What the file `from` holds, and the rest of the pipeline folder `like`.
fn folder(from: &Path, to: &Path, like: &Path) -> Result<()> {
    ensure!(!to.exists(), "{} exists: remove it or choose another name", to.display());
    let like = Pipeline::open(like)?;
    tell(like.notices());
    let single = like.in_file(from)?;
    let mut staged = Staged::begin(to)?;
    let anew: Vec<Component> = single.networks.iter().map(|(component, _)| *component).collect();
    save::carry_over(&like.dir, &mut staged, &anew, None)?;
    for (component, weights) in &single.networks {
        let folder = staged.path().join(component.folder());
        write_sharded(&folder, component.stem(), &weights.entries(), MAX_SHARD_BYTES)?;
    }
    let (found, known) = (&single.pipeline.transformer, &like.transformer);
    if found != known {
        let path = staged.path().join(Component::Transformer.folder()).join("config.json");
        let values = [
            ("num_layers", found.num_layers.into()),
            ("num_single_layers", found.num_single_layers.into()),
            ("guidance_embeds", found.guidance_embeds.into()),
        ];
        save::edit_config(&path, &values)?;
    }
    if let [first, ..] = &single.left[..] {
        let n = single.left.len();
        log::note(&format!("note: {}: {n} tensors are left out ({first}, …)", from.display()));
    }
    let names: Vec<&str> = anew.iter().map(|component| component.folder()).collect();
    log::note(&format!(
        "note: {} from {}, all else from {}",
        names.join(", "),
        from.display(),
        like.dir.display()
    ));
    Ok(staged.publish(false)?)
}

fn tell(notices: &[String]) {
    for notice in notices {
        log::note(&format!("note: {notice}"));
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use flow::checkpoint::{Entry, Weights};

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-flux/pipeline")
    }

    fn assert_same(found: &Weights, expected: &Weights) {
        assert_eq!(found.names().collect::<Vec<_>>(), expected.names().collect::<Vec<_>>());
        for name in expected.names() {
            let (found, expected) = (found.get(name).unwrap(), expected.get(name).unwrap());
            assert_eq!((found.dtype, found.shape), (expected.dtype, expected.shape), "{name}");
            assert!(found.bytes == expected.bytes, "{name}");
        }
    }

    #[test]
    fn a_pipeline_goes_to_one_file_and_back() {
        let home = tempfile::tempdir().unwrap();
        let (file, back) = (home.path().join("flux.safetensors"), home.path().join("back"));
        run(&fixture(), &file, None).unwrap();
        run(&file, &back, Some(&fixture())).unwrap();
        let weights = |dir: &Path, part| Pipeline::open(dir).unwrap().weights(part).unwrap();
        for part in Component::ALL {
            assert_same(&weights(&back, part), &weights(&fixture(), part));
        }
        let again = home.path().join("again.safetensors");
        run(&back, &again, None).unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), std::fs::read(&again).unwrap());
        let message = run(&file, &back, Some(&fixture())).unwrap_err().to_string();
        assert!(message.contains("exists"), "{message}");
    }

    /// A model of another depth and without guidance, as fine-tunes are.
    #[test]
    fn the_config_says_what_the_file_has() {
        let home = tempfile::tempdir().unwrap();
        let (file, folder) = (home.path().join("flux.safetensors"), home.path().join("folder"));
        let transformer =
            Pipeline::open(&fixture()).unwrap().weights(Component::Transformer).unwrap();
        let is_kept = |entry: &Entry<'_>| {
            !["guidance_in", "double_blocks", "single_blocks.1"]
                .iter()
                .any(|p| entry.name.starts_with(p))
        };
        let entries = transformer.bfl_entries().unwrap();
        let kept: Vec<Entry<'_>> = entries.into_iter().filter(is_kept).collect();
        write_tensors(&file, &kept, &[]).unwrap();
        run(&file, &folder, Some(&fixture())).unwrap();
        let pipeline = Pipeline::open(&folder).unwrap();
        let config = &pipeline.transformer;
        assert_eq!((config.num_layers, config.num_single_layers), (0, 1));
        assert!(!config.guidance_embeds);
        pipeline.weights(Component::Transformer).unwrap();
    }

    #[test]
    fn what_cannot_be_converted_is_refused_and_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("x.safetensors");
        write_tensors(&file, &[Entry::f32("a", &[1], &[0.0])], &[]).unwrap();
        let to = home.path().join("to");
        for (from, to, like, says) in [
            (&file, &to, None, "--like FOLDER"),
            (&file, &to, Some(fixture()), "no network of a FLUX pipeline"),
            (&fixture(), &to, None, ".safetensors file is needed"),
        ] {
            let message = format!("{:#}", run(from, to, like.as_deref()).unwrap_err());
            assert!(message.contains(says), "{message}");
            assert!(!to.exists());
        }
    }
}
