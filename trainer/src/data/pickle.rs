//! PyTorch's pickled files (`.pt`, `.pth`, `.bin`, `.ckpt`) as weights, without running what is in them.
//!
//! The pickle is parsed, never executed; tensors go to a safetensors file one at a time, so that a file of
//! any size needs little memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{Dtype, Entry, Values, Weights, is_pickle, open_for_reading, write_tensors};
use flow::pipeline::read_json;
use pytorch_reader::{DType, PytorchError, PytorchReader, Tensor};
use serde::Deserialize;
use tempfile::{NamedTempFile, TempPath};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

mod left;
mod script;

/// Keys under which checkpoints keep their weights beside other things.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "module", "model"];
/// Name given to the tensor of a file that holds nothing else.
pub(crate) const BARE: &str = "tensor";
/// What wrappers of PyTorch and Lightning put before every name.
const PREFIXES: [&str; 3] = ["module.", "_orig_mod.", "model."];
/// Longest pickle that is rewritten.
const MAX_PICKLE: u64 = 16 << 20;

/// Writes the tensors of the pickled file `from` to the safetensors file `to`.
///
/// # Errors
/// When it is none, holds no tensors or lies about their sizes.
pub fn convert(from: &Path, to: &Path) -> Result<()> {
    let shown = || from.display().to_string();
    let size = from.metadata().with_context(shown)?.len();
    ensure_not_deflated(from).with_context(shown)?;
    let Opened { tensors, .. } = &open(from).with_context(shown)?;
    ensure!(!tensors.is_empty(), "{}: no tensors in it", from.display());
    // Tied weights share their bytes; nothing honest names them more than twice.
    let total: u64 = tensors.iter().map(|tensor| tensor.byte_len() as u64).sum();
    ensure!(
        total <= 2 * size,
        "{}: its tensors claim {total} bytes of a file of {size}",
        from.display()
    );
    let entries: Vec<Entry<'_>> = tensors.iter().map(entry).collect();
    Ok(write_tensors(to, &entries, &[])?)
}

/// What [`convert`] took of the file `from` and what it left there, in a sentence; `to` is what it wrote.
///
/// # Errors
/// When `to` cannot be read.
pub(crate) fn told(from: &Path, to: &Path) -> Result<String> {
    const SHOWN: usize = 8;
    let (n, (wrapper, left)) = (Weights::open_file(to)?.names().count(), left::of(from));
    let under = wrapper.map(|key| format!(" under {key:?}")).unwrap_or_default();
    let more = if left.len() > SHOWN {
        format!(" and {} more", left.len() - SHOWN)
    } else {
        String::new()
    };
    let shown = left.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    let rest = if left.is_empty() { String::new() } else { format!("; left out: {shown}{more}") };
    Ok(format!("{}: tensors{under}: {n}{rest}", from.display()))
}

/// Writes the tensors of the pickled files that `index` names to the safetensors file `to`.
///
/// # Errors
/// When the index is none, names files outside its folder, or one of them cannot be converted.
pub(crate) fn convert_sharded(index: &Path, to: &Path) -> Result<()> {
    let Index { weight_map } = read_json(index)?;
    let files: BTreeSet<&String> = weight_map.values().collect();
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let mut shards = Vec::new();
    for (at, file) in files.into_iter().enumerate() {
        let is_inside = Path::new(file).file_name().is_some_and(|name| name == file.as_str());
        ensure!(is_inside, "{}: names {file:?}, which is no file beside it", index.display());
        let converted = folder.path().join(format!("{at}.safetensors"));
        convert(&index.with_file_name(file), &converted)?;
        shards.push(Weights::open_file(&converted)?);
    }
    let entries: Vec<Entry<'_>> = shards.iter().flat_map(Weights::entries).collect();
    let found = |name: &String| entries.iter().any(|entry| entry.name == *name);
    if let Some(name) = weight_map.keys().find(|name| !found(name)) {
        bail!("{}: names {name}, which none of its files holds", index.display());
    }
    Ok(write_tensors(to, &entries, &[])?)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of a safetensors or pickled file, without what wrappers put before all of their names.
///
/// # Errors
/// When it is neither, or broken.
pub(crate) fn weights(path: &Path) -> Result<Weights> {
    let mut weights = stored(path)?;
    let of_all = |weights: &Weights, prefix: &str| {
        weights.names().next().is_some() && weights.names().all(|name| name.starts_with(prefix))
    };
    while let Some(prefix) = PREFIXES.iter().find(|prefix| of_all(&weights, prefix)) {
        weights = weights.renamed(|name| name.strip_prefix(prefix).map(str::to_owned));
    }
    Ok(weights)
}

fn stored(path: &Path) -> Result<Weights> {
    if !is_pickle(path) {
        return Ok(Weights::open_file(path)?);
    }
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let converted = folder.path().join("weights.safetensors");
    let room = |error: anyhow::Error| {
        if !is_full(&error) {
            return error;
        }
        error.context(format!(
            "{} has no room for {} as safetensors: TMPDIR names another folder, or convert it once with \
             ng-train convert",
            folder.path().display(),
            path.display()
        ))
    };
    convert(path, &converted).map_err(room)?;
    // The map outlives the file's name.
    Ok(Weights::open_file(&converted)?.called(path))
}

fn is_full(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::StorageFull)
}

/// Tensors that are read when asked for.
struct Opened {
    tensors: Vec<Tensor>,
    /// Where they are, if not in the file itself.
    _rewritten: Option<TempPath>,
}

/// The weights in a file: under a key that is known to hold them, or all tensors there are.
fn open(path: &Path) -> Result<Opened> {
    let of = |reader: PytorchReader| reader.into_tensors().into_values().collect();
    if let Some(pickle) = pickled(path).filter(|pickle| script::is_script(pickle)) {
        let plain = script::as_dictionaries(&pickle).context("a TorchScript archive")?;
        let rewritten = rewritten(path, &plain)?;
        let reader = PytorchReader::new(&rewritten).context("a TorchScript archive")?;
        return Ok(Opened { tensors: of(reader), _rewritten: Some(rewritten) });
    }
    if let Some(reader) =
        WRAPPERS.iter().find_map(|key| PytorchReader::with_top_level_key(path, key).ok())
    {
        return Ok(Opened { tensors: of(reader), _rewritten: None });
    }
    match PytorchReader::new(path) {
        Ok(reader) => Ok(Opened { tensors: of(reader), _rewritten: None }),
        Err(error @ PytorchError::InvalidFormat(_)) => {
            let dictionary = pickled(path).and_then(|pickle| in_dictionary(&pickle));
            let Some(Ok(rewritten)) = dictionary.map(|pickle| rewritten(path, &pickle)) else {
                return Err(error.into());
            };
            let reader = PytorchReader::new(&rewritten).map_err(|_| error)?;
            Ok(Opened { tensors: of(reader), _rewritten: Some(rewritten) })
        }
        Err(error) => Err(error.into()),
    }
}

/// The pickle of an archive, if `path` is one and it is not long.
fn pickled(path: &Path) -> Option<Vec<u8>> {
    let mut archive = ZipArchive::new(open_for_reading(path).ok()?).ok()?;
    let mut pickle = Vec::new();
    let is_pickle = |archive: &mut ZipArchive<File>, at: usize| {
        let file = archive.by_index_raw(at).ok()?;
        is_pickle_entry(&file.name().ok()?).then_some(at)
    };
    let at = (0..archive.len()).find_map(|at| is_pickle(&mut archive, at))?;
    let file = archive.by_index(at).ok()?;
    file.take(MAX_PICKLE + 1).read_to_end(&mut pickle).ok()?;
    (pickle.len() as u64 <= MAX_PICKLE).then_some(pickle)
}

fn is_pickle_entry(name: &str) -> bool {
    name.ends_with("/data.pkl")
}

/// A pickle with its root as the only value of a dictionary, which the reader wants.
fn in_dictionary(pickle: &[u8]) -> Option<Vec<u8>> {
    // PROTO 2, then EMPTY_DICT and the key; at the end SETITEM before STOP.
    let (protocol @ [0x80, _], rest) = pickle.split_at_checked(2)? else { return None };
    let (b'.', root) = rest.split_last()? else { return None };
    let key = [b"X".as_slice(), &(BARE.len() as u32).to_le_bytes(), BARE.as_bytes()].concat();
    Some([protocol, b"}", &key, root, b"s."].concat())
}

/// The same archive with another pickle, without code.
fn rewritten(path: &Path, pickle: &[u8]) -> Result<TempPath> {
    let mut archive = ZipArchive::new(open_for_reading(path)?)?;
    let mut writer = ZipWriter::new(NamedTempFile::new()?);
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index)?;
        let name = file.name()?.into_owned();
        if is_pickle_entry(&name) {
            let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            writer.start_file(name, stored)?;
            writer.write_all(pickle)?;
        } else if !is_code(&name) {
            writer.raw_copy_file(file)?;
        }
    }
    Ok(writer.finish()?.into_temp_path())
}

/// Whether an entry of a TorchScript archive holds code, which PyTorch compresses and nothing here reads.
fn is_code(name: &str) -> bool {
    name.split('/').nth(1) == Some("code")
}

/// Refuses archives whose entries grow when they are read; of tensors PyTorch writes none.
fn ensure_not_deflated(path: &Path) -> Result<()> {
    let Ok(mut archive) = ZipArchive::new(open_for_reading(path)?) else { return Ok(()) };
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index)?;
        let name = file.name()?;
        ensure!(
            file.compression() == CompressionMethod::Stored || is_code(&name),
            "its entry {name} is compressed, which PyTorch does to code alone: refused"
        );
    }
    Ok(())
}

fn entry(tensor: &Tensor) -> Entry<'_> {
    let dtype = match tensor.dtype() {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
    };
    Entry {
        name: tensor.name.clone(),
        shape: tensor.shape().to_vec(),
        dtype,
        values: Values::Made(Box::new(|| tensor.read().map_err(io::Error::other))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;

    fn fixture(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/pickle/fixtures").join(file)
    }

    #[test]
    fn every_container_of_torch_reads() {
        for file in ["plain.pt", "legacy.pth"] {
            let weights = weights(&fixture(file)).unwrap();
            assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "half", "strided"], "{file}");
            assert_eq!(weights.f32("a").unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
            assert_eq!(weights.f32("strided").unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
            assert_eq!(weights.get("strided").unwrap().shape, [3, 2]);
            assert_eq!(weights.get("half").unwrap().dtype, Dtype::BF16);
            assert_eq!(weights.path(), fixture(file));
        }
    }

    #[test]
    fn weights_are_found_beside_other_things() {
        let weights = weights(&fixture("nested.ckpt")).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["layer.weight"]);
        assert_eq!(weights.f32("layer.weight").unwrap(), [3.0, 3.0]);
    }

    #[test]
    fn what_stays_behind_is_told() {
        let home = tempfile::tempdir().unwrap();
        let to = home.path().join("to.safetensors");
        let told = |file| {
            convert(&fixture(file), &to).unwrap();
            told(&fixture(file), &to).unwrap()
        };
        let nested = told("nested.ckpt");
        assert!(nested.contains("tensors under \"state_dict\": 1; left out: "), "{nested}");
        assert!(told("plain.pt").ends_with("tensors: 3"));
    }

    /// What `torch.jit.script(module).save` writes, with compressed code and a class used twice.
    #[test]
    fn the_modules_of_a_script_are_names() {
        let weights = weights(&fixture("script.pt")).unwrap();
        let names = ["logit_scale", "pair.0.bias", "pair.0.weight", "pair.1.bias", "pair.1.weight"];
        let names: Vec<&str> =
            names.into_iter().chain(["resolution", "visual.conv1.weight"]).collect();
        assert_eq!(weights.names().collect::<Vec<_>>(), names);
        assert_eq!(weights.f32("logit_scale").unwrap(), [4.5]);
        assert_eq!(weights.f32("pair.1.bias").unwrap(), [2.0, 3.0]);
        assert_eq!(weights.shape("visual.conv1.weight"), Some(&[2, 3, 4, 4][..]));
    }

    #[test]
    fn shards_become_one_file() {
        let home = tempfile::tempdir().unwrap();
        for file in ["plain.pt", "nested.ckpt"] {
            std::fs::copy(fixture(file), home.path().join(file)).unwrap();
        }
        let index = home.path().join("pytorch_model.bin.index.json");
        let write = |name: &str, file: &str| {
            let text = format!(r#"{{"weight_map": {{"a": "plain.pt", "{name}": "{file}"}}}}"#);
            std::fs::write(&index, text).unwrap();
        };
        let to = home.path().join("model.safetensors");
        write("layer.weight", "nested.ckpt");
        convert_sharded(&index, &to).unwrap();
        let weights = Weights::open_file(&to).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "half", "layer.weight", "strided"]);
        assert_eq!(weights.f32("layer.weight").unwrap(), [3.0, 3.0]);
        for (name, file) in [("absent", "nested.ckpt"), ("b", "../plain.pt"), ("b", "no.pt")] {
            write(name, file);
            let message = format!("{:#}", convert_sharded(&index, &to).unwrap_err());
            assert!(message.contains(name) || message.contains(file), "{message}");
        }
    }

    #[test]
    fn wrappers_before_all_names_go() {
        let weights = weights(&fixture("training.pt")).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["logit_bias", "visual.weight"]);
        assert_eq!(weights.f32("visual.weight").unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn a_tensor_alone_has_a_name() {
        let weights = weights(&fixture("bare.pt")).unwrap();
        assert_eq!(weights.f32(BARE).unwrap(), [4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn hostile_files_are_named_and_nothing_is_written() {
        for (file, why) in [
            ("command.pt", "no tensors"),
            ("lying.pt", "storage"),
            ("deflated.pt", "compressed"),
            ("cut.pt", ""),
            ("text.bin", ""),
            ("absent.pt", "No such file"),
        ] {
            let home = tempfile::tempdir().unwrap();
            let to = home.path().join("out.safetensors");
            let message = format!("{:#}", convert(&fixture(file), &to).unwrap_err());
            assert!(message.contains(file) && message.contains(why), "{message}");
            assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "{file}");
        }
        assert!(!Path::new("was-run").exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

        /// Whatever becomes of a file's bytes, nothing larger is made of it.
        #[test]
        fn changed_files_are_converted_or_refused(
            file in prop::sample::select(&["plain.pt", "legacy.pth", "script.pt", "training.pt"][..]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = std::fs::read(fixture(file)).unwrap();
            let n = bytes.len();
            for (at, byte) in changes {
                bytes[at.index(n)] = byte;
            }
            let home = tempfile::tempdir().unwrap();
            let (from, to) = (home.path().join(file), home.path().join("out.safetensors"));
            std::fs::write(&from, bytes).unwrap();
            if convert(&from, &to).is_ok() {
                prop_assert!(to.metadata().unwrap().len() <= 2 * n as u64 + 4096);
            }
        }
    }
}
