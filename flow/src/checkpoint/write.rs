//! Writing weights: one file or shards with their index, a tensor at a time, each file whole or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use tempfile::NamedTempFile;

use super::{CheckpointError, Result};

/// Where diffusers splits files, too.
pub const MAX_SHARD_BYTES: usize = 10_000_000_000;

/// A tensor to be written.
pub struct Entry<'a> {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// Little-endian values, row-major; held, or made when their turn comes.
    pub values: Values<'a>,
}

/// Where the bytes of an [`Entry`] come from.
pub enum Values<'a> {
    /// They are there.
    Held(Cow<'a, [u8]>),
    /// They are made while the file is written, so that a model larger than memory can be.
    Made(Box<dyn Fn() -> io::Result<Vec<u8>> + 'a>),
    /// All are 0.
    Zero,
}

impl<'a> Entry<'a> {
    /// A tensor of `bytes` as they are.
    pub fn raw(
        name: impl Into<String>,
        shape: &[usize],
        dtype: Dtype,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        let values = Values::Held(bytes.into());
        Self { name: name.into(), shape: shape.to_vec(), dtype, values }
    }

    /// An f32 tensor.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::raw(name, shape, Dtype::F32, bytes)
    }

    /// An i64 tensor.
    pub fn i64(name: impl Into<String>, shape: &[usize], values: &[i64]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::raw(name, shape, Dtype::I64, bytes)
    }

    /// A bf16 tensor whose values `make` gives when they are written.
    pub fn bf16_made(
        name: impl Into<String>,
        shape: &[usize],
        make: impl Fn() -> Vec<f32> + 'a,
    ) -> Self {
        let bytes = move || {
            Ok(make().into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect())
        };
        let values = Values::Made(Box::new(bytes));
        Self { name: name.into(), shape: shape.to_vec(), dtype: Dtype::BF16, values }
    }

    /// A bf16 tensor of zeros that take no room on disk where the file system has holes.
    pub fn bf16_zero(name: impl Into<String>, shape: &[usize]) -> Self {
        let (name, shape) = (name.into(), shape.to_vec());
        Self { name, shape, dtype: Dtype::BF16, values: Values::Zero }
    }

    /// Bytes in the file.
    pub fn n_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes one safetensors file beside its place and renames it. Values of 0 that need not be written
/// leave holes where the file system has them.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_tensors<'a>(
    path: &Path,
    entries: impl IntoIterator<Item = &'a Entry<'a>>,
    metadata: &[(&str, String)],
) -> Result<()> {
    let mut metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    metadata.insert("format".into(), "pt".into());
    let mut entries: Vec<&Entry<'_>> = entries.into_iter().collect();
    // Wide types first, so that all are aligned.
    entries.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let data_offsets = (end, end + entry.n_bytes());
        end = data_offsets.1;
        let (dtype, shape) = (entry.dtype, entry.shape.clone());
        (entry.name.clone(), TensorInfo { dtype, shape, data_offsets })
    });
    let header = Metadata::new(Some(metadata), infos.collect())
        .map_err(|error| CheckpointError::malformed(path, error))?;
    let mut header =
        serde_json::to_vec(&header).map_err(|error| CheckpointError::malformed(path, error))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut beside = Beside::begin(path)?;
    write_parts(beside.file.as_file_mut(), &header, &entries).map_err(CheckpointError::io(path))?;
    beside.finish()
}

fn write_parts(file: &mut File, header: &[u8], entries: &[&Entry<'_>]) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(header)?;
    for entry in entries {
        match &entry.values {
            Values::Held(bytes) => writer.write_all(bytes)?,
            Values::Made(make) => writer.write_all(&make()?)?,
            Values::Zero => {
                writer.seek(SeekFrom::Current(entry.n_bytes() as i64))?;
            }
        }
    }
    writer.flush()?;
    let file = writer.get_mut();
    let end = file.stream_position()?;
    file.set_len(end)
}

/// Writes `dir/stem.safetensors`, or shards of at most `max_bytes` of values (but one tensor at least)
/// with the index that libraries read: `stem-00001-of-00003.safetensors`,
/// `stem.safetensors.index.json`.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_sharded(
    dir: &Path,
    stem: &str,
    entries: &[Entry<'_>],
    max_bytes: usize,
) -> Result<()> {
    let mut sorted: Vec<&Entry<'_>> = entries.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut shards: Vec<Vec<&Entry<'_>>> = vec![Vec::new()];
    let mut room = max_bytes;
    for entry in sorted {
        let n = entry.n_bytes();
        let last = shards.last_mut().expect("one at least");
        if n > room && !last.is_empty() {
            shards.push(vec![entry]);
            room = max_bytes;
        } else {
            last.push(entry);
        }
        room = room.saturating_sub(n);
    }
    if let [whole] = shards.as_slice() {
        return write_tensors(&dir.join(format!("{stem}.safetensors")), whole.iter().copied(), &[]);
    }
    let mut weight_map = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_tensors(&dir.join(&file), shard.iter().copied(), &[])?;
        weight_map.extend(shard.iter().map(|entry| (entry.name.clone(), file.clone())));
    }
    let total: usize = entries.iter().map(Entry::n_bytes).sum();
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    let text = format!("{index:#}\n");
    write_atomically(&dir.join(format!("{stem}.safetensors.index.json")), text.as_bytes())
}

/// Writes `bytes` to a temporary file beside `path`, flushes it to disk and renames it into place.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut beside = Beside::begin(path)?;
    beside.file.write_all(bytes).map_err(CheckpointError::io(path))?;
    beside.finish()
}

/// A temporary file beside the place it will take.
struct Beside {
    file: NamedTempFile,
    path: PathBuf,
}

impl Beside {
    fn begin(path: &Path) -> Result<Self> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(folder).map_err(CheckpointError::io(path))?;
        let file = NamedTempFile::new_in(folder).map_err(CheckpointError::io(path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    fn finish(self) -> Result<()> {
        let failed = CheckpointError::io(&self.path);
        let whole = || {
            self.file.as_file().sync_all()?;
            make_readable(self.file.as_file())?;
            self.file.persist(&self.path).map_err(|error| error.error)
        };
        whole().map(|_| ()).map_err(failed)
    }
}

/// Temporary files are private; what is left for people is not.
fn make_readable(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Weights;
    use super::*;

    #[test]
    fn shards_read_back_as_one() {
        let dir = tempfile::tempdir().unwrap();
        let value = |i: usize| vec![i as f32; 10];
        let entries: Vec<Entry<'_>> =
            (0..5).map(|i| Entry::f32(format!("t{i}"), &[2, 5], &value(i))).collect();
        // 40 bytes each: two a shard.
        write_sharded(dir.path(), "w", &entries, 100).unwrap();
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 4, "three shards and their index");
        assert!(dir.path().join("w-00003-of-00003.safetensors").is_file());
        let weights = Weights::open(dir.path(), "w").unwrap();
        for i in 0..5 {
            assert_eq!(weights.f32(&format!("t{i}")).unwrap(), value(i));
        }
    }

    #[test]
    fn what_fits_is_one_file_without_index() {
        let dir = tempfile::tempdir().unwrap();
        write_sharded(dir.path(), "w", &[Entry::f32("a", &[3], &[1.0; 3])], 1 << 20).unwrap();
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(names, ["w.safetensors"]);
    }

    #[test]
    fn values_can_be_made_when_their_turn_comes() {
        let dir = tempfile::tempdir().unwrap();
        let made = Entry::bf16_made("a", &[4], || vec![1.0, -0.5, 0.25, 3.0]);
        assert_eq!(made.n_bytes(), 8);
        write_tensors(&dir.path().join("w.safetensors"), [&made], &[]).unwrap();
        let weights = Weights::open(dir.path(), "w").unwrap();
        assert_eq!(weights.f32("a").unwrap(), [1.0, -0.5, 0.25, 3.0]);
    }

    #[test]
    fn zeros_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let zeros = [Entry::bf16_zero("z", &[1 << 22]), Entry::f32("a", &[1], &[2.0])];
        write_tensors(&path, &zeros, &[]).unwrap();
        let weights = Weights::open_file(&path).unwrap();
        assert!(weights.f32("z").unwrap().iter().all(|&x| x == 0.0));
        assert_eq!(weights.f32("a").unwrap(), [2.0]);
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.len() > 8 << 20);
        assert!(metadata.blocks() * 512 < metadata.len() / 2);
    }
}
