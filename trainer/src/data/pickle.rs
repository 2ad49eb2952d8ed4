//! PyTorch's pickled files (`.pt`, `.pth`, `.bin`, `.ckpt`) as weights, without running what is in them.
//!
//! The pickle is parsed, never executed; tensors go to a safetensors file one at a time, so that a file of
//! any size needs little memory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{Dtype, Entry, Values, Weights, is_pickle, write_tensors};
use pytorch_reader::{DType, PytorchError, PytorchReader, Tensor};
use tempfile::{NamedTempFile, TempPath};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Keys under which checkpoints keep their weights beside other things.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "module", "model"];
/// Name given to the tensor of a file that holds nothing else.
pub(crate) const BARE: &str = "tensor";
/// Longest pickle of a file with one tensor.
const MAX_BARE_PICKLE: u64 = 1 << 20;

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

/// The tensors of a safetensors or pickled file.
///
/// # Errors
/// When it is neither, or broken.
pub(crate) fn weights(path: &Path) -> Result<Weights> {
    if !is_pickle(path) {
        return Ok(Weights::open_file(path)?);
    }
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let converted = folder.path().join("weights.safetensors");
    convert(path, &converted)?;
    // The map outlives the file's name.
    Ok(Weights::open_file(&converted)?.called(path))
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
    if let Some(reader) =
        WRAPPERS.iter().find_map(|key| PytorchReader::with_top_level_key(path, key).ok())
    {
        return Ok(Opened { tensors: of(reader), _rewritten: None });
    }
    match PytorchReader::new(path) {
        Ok(reader) => Ok(Opened { tensors: of(reader), _rewritten: None }),
        Err(error @ PytorchError::InvalidFormat(_)) => {
            let Ok(rewritten) = in_dictionary(path) else { return Err(error.into()) };
            let reader = PytorchReader::new(&rewritten).map_err(|_| error)?;
            Ok(Opened { tensors: of(reader), _rewritten: Some(rewritten) })
        }
        Err(error) => Err(error.into()),
    }
}

/// The same archive with its root as the only value of a dictionary, which the reader wants.
fn in_dictionary(path: &Path) -> Result<TempPath> {
    let mut archive = ZipArchive::new(File::open(path)?)?;
    let mut writer = ZipWriter::new(NamedTempFile::new()?);
    for index in 0..archive.len() {
        let mut file = archive.by_index_raw(index)?;
        let name = file.name()?.into_owned();
        if !name.ends_with("/data.pkl") {
            writer.raw_copy_file(file)?;
            continue;
        }
        let mut pickle = Vec::new();
        file.by_ref().take(MAX_BARE_PICKLE).read_to_end(&mut pickle)?;
        let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        writer.start_file(name, stored)?;
        // PROTO 2, then EMPTY_DICT and the key; at the end SETITEM before STOP.
        let (Some(protocol @ [0x80, _]), Some((b'.', root))) =
            (pickle.get(..2), pickle.get(2..).and_then(<[u8]>::split_last).map(|(e, r)| (*e, r)))
        else {
            bail!("not a pickle of a tensor")
        };
        let key = [b"X".as_slice(), &(BARE.len() as u32).to_le_bytes(), BARE.as_bytes()].concat();
        writer.write_all(&[protocol, b"}", &key, root, b"s."].concat())?;
    }
    Ok(writer.finish()?.into_temp_path())
}

/// Refuses archives whose entries grow when they are read; PyTorch writes none.
fn ensure_not_deflated(path: &Path) -> Result<()> {
    let Ok(mut archive) = ZipArchive::new(File::open(path)?) else { return Ok(()) };
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index)?;
        ensure!(
            file.compression() == CompressionMethod::Stored,
            "its entry {} is compressed, which PyTorch never does: refused",
            file.name()?
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
}
