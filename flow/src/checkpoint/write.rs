//! Writing weights: one file or shards with their index, a tensor at a time, each file whole or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::{CheckpointError, Result};
use crate::disk;

/// Name of what is no tensor in a header.
const METADATA: &str = "__metadata__";
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

    /// A tensor of `dtype` whose bytes `make` gives when they are written.
    pub fn made(
        name: impl Into<String>,
        shape: &[usize],
        dtype: Dtype,
        make: impl Fn() -> io::Result<Vec<u8>> + 'a,
    ) -> Self {
        let (name, shape, values) = (name.into(), shape.to_vec(), Values::Made(Box::new(make)));
        Self { name, shape, dtype, values }
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

    /// `bytes`, if they are as many as type and shape say, and finite where they are weights.
    fn whole<'b>(&self, bytes: &'b [u8], are_weights: bool) -> io::Result<&'b [u8]> {
        let expected = self.n_bytes();
        let name = &self.name;
        let why = if bytes.len() != expected {
            format!("{name} has {} bytes instead of {expected}", bytes.len())
        } else if are_weights && !is_finite(self.dtype, bytes) {
            format!("{name} holds a NaN or an infinity: such weights are not written")
        } else {
            return Ok(bytes);
        };
        Err(io::Error::new(io::ErrorKind::InvalidData, why))
    }
}

/// The start of a file: names and what they stand for, in this order.
struct Header(Vec<(String, Value)>);

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
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
    write_file(path, entries, metadata, false)
}

/// [`write_tensors`] for weights, which are finite.
///
/// # Errors
/// As that, and with the first tensor that holds a NaN or an infinity.
pub fn write_weights<'a>(
    path: &Path,
    entries: impl IntoIterator<Item = &'a Entry<'a>>,
    metadata: &[(&str, String)],
) -> Result<()> {
    write_file(path, entries, metadata, true)
}

fn write_file<'a>(
    path: &Path,
    entries: impl IntoIterator<Item = &'a Entry<'a>>,
    metadata: &[(&str, String)],
    are_weights: bool,
) -> Result<()> {
    let mut entries: Vec<&Entry<'_>> = entries.into_iter().collect();
    // Wide types first, so that all are aligned.
    entries.sort_by(|a, b| (b.dtype, &a.name).cmp(&(a.dtype, &b.name)));
    let mut header = header(&entries, metadata)
        .and_then(|header| serde_json::to_vec(&header).map_err(|error| error.to_string()))
        .map_err(|why| CheckpointError::malformed(path, why))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut beside = Beside::begin(path)?;
    write_parts(beside.file.as_file_mut(), &header, &entries, are_weights)
        .map_err(CheckpointError::io(path))?;
    beside.finish()
}

/// Tensors by their places in the file, metadata by name: equal contents make equal bytes.
fn header(
    entries: &[&Entry<'_>],
    metadata: &[(&str, String)],
) -> std::result::Result<Header, String> {
    let metadata: BTreeMap<&str, &str> = metadata
        .iter()
        .map(|(key, value)| (*key, value.as_str()))
        .chain([("format", "pt")])
        .collect();
    let mut header = Header(vec![(METADATA.to_owned(), json!(metadata))]);
    let mut names = BTreeSet::from([METADATA]);
    let mut end = 0;
    for entry in entries {
        if !names.insert(&entry.name) {
            return Err(format!(
                "cannot hold a tensor of the name {:?} beside another",
                entry.name
            ));
        }
        let data_offsets = (end, end + entry.n_bytes());
        end = data_offsets.1;
        let info = TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets };
        header.0.push((entry.name.clone(), json!(info)));
    }
    Ok(header)
}

/// Whether no float among `bytes` has all bits of its exponent set.
pub fn is_finite(dtype: Dtype, bytes: &[u8]) -> bool {
    let all_of_two = |exponent: u16| {
        bytes.chunks_exact(2).all(|b| u16::from_le_bytes([b[0], b[1]]) & exponent != exponent)
    };
    match dtype {
        Dtype::F32 => bytes
            .chunks_exact(4)
            .all(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0x7f80_0000 != 0x7f80_0000),
        Dtype::BF16 => all_of_two(0x7f80),
        Dtype::F16 => all_of_two(0x7c00),
        _ => true,
    }
}

fn write_parts(
    file: &mut File,
    header: &[u8],
    entries: &[&Entry<'_>],
    are_weights: bool,
) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(1 << 20, file);
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(header)?;
    for entry in entries {
        match &entry.values {
            Values::Held(bytes) => writer.write_all(entry.whole(bytes, are_weights)?)?,
            Values::Made(make) => writer.write_all(entry.whole(&make()?, are_weights)?)?,
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
        return write_weights(&dir.join(format!("{stem}.safetensors")), whole.iter().copied(), &[]);
    }
    let mut weight_map = BTreeMap::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("{stem}-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write_weights(&dir.join(&file), shard.iter().copied(), &[])?;
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
        let begin = || {
            disk::check_replaceable(path)?;
            let folder = disk::parent(path);
            disk::create_folders(folder)?;
            disk::begin_file(folder, path.file_name().unwrap_or_default())
        };
        let file = begin().map_err(CheckpointError::io(path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    fn finish(self) -> Result<()> {
        let Self { file, path } = self;
        let whole = || {
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)?;
            disk::sync_folder(disk::parent(&path))
        };
        whole().map_err(CheckpointError::io(&path))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
    fn equal_contents_are_equal_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, keys: &[&str]| {
            let entries = [Entry::f32("b", &[1], &[1.0]), Entry::f32("a", &[1], &[2.0])];
            let metadata: Vec<_> = keys.iter().map(|key| (*key, format!("of {key}"))).collect();
            let path = dir.path().join(name);
            write_tensors(&path, &entries, &metadata).unwrap();
            fs::read(path).unwrap()
        };
        let keys = ["one", "two", "three", "four", "five"];
        let mut reversed = keys;
        reversed.reverse();
        let first = file("1", &keys);
        assert_eq!(first, file("2", &reversed));
        assert_ne!(first, file("3", &keys[1..]));
        let weights = Weights::open_file(&dir.path().join("1")).unwrap();
        assert_eq!(weights.metadata("three"), Some("of three"));
    }

    #[test]
    fn what_cannot_be_read_again_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        for (entries, part) in [
            (vec![Entry::f32("__metadata__", &[1], &[1.0])], "__metadata__"),
            (vec![Entry::f32("a", &[1], &[1.0]), Entry::f32("a", &[1], &[1.0])], "\"a\""),
            (vec![Entry::f32("a", &[2], &[1.0])], "a has 4 bytes instead of 8"),
        ] {
            let message = write_tensors(&path, &entries, &[]).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [-1e-40, 0.0, bad];
            let half = Entry::bf16_made("b", &[1], move || vec![bad]);
            let f16 = half::f16::from_f32(bad).to_le_bytes();
            let f16 = Entry::raw("c", &[1], Dtype::F16, f16.to_vec());
            for entry in [Entry::f32("a", &[3], &values), half, f16] {
                let name = entry.name.clone();
                let entries = [Entry::f32("fine", &[1], &[f32::MAX]), entry];
                let said =
                    write_sharded(dir.path(), "w", &entries, 1 << 20).unwrap_err().to_string();
                assert!(said.contains(&format!("{name} holds a NaN or an infinity")), "{said}");
            }
            values[2] = f32::MIN;
            write_sharded(dir.path(), "w", &[Entry::f32("a", &[3], &values)], 1 << 20).unwrap();
        }
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
