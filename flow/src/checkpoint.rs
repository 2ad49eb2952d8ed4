//! Weights on disk: safetensors files, single or sharded by an index, mapped and never copied whole.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, UncheckedAdvice};
pub use safetensors::Dtype;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::ops::shapes::Manifest;

mod write;

pub use write::{Entry, MAX_SHARD_BYTES, Values, write_atomically, write_sharded, write_tensors};

/// What can be wrong with weights.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder that cannot be read or written.
    #[error("{path}: {reason}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// A file that is not what its name says.
    #[error("{path}: {why}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Tensors that do not fit the network.
    #[error("{path} does not fit its config.json: {list}")]
    Misfit {
        /// Folder of the weights.
        path: PathBuf,
        /// Missing, unexpected and mis-shaped tensors.
        list: String,
    },
}

impl CheckpointError {
    /// The I/O error of `path`.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |reason| Self::Io { path, reason }
    }

    /// `path` is not what it should be, because of `why`.
    pub fn malformed(path: &Path, why: impl std::fmt::Display) -> Self {
        Self::Malformed { path: path.to_owned(), why: why.to_string() }
    }
}

type Result<T> = std::result::Result<T, CheckpointError>;

/// Extensions of files that PyTorch pickles.
const PICKLES: [&str; 4] = ["bin", "pt", "pth", "ckpt"];
/// Misfits named in one message.
const MAX_MISFITS: usize = 12;
/// Largest header and index read into memory.
const MAX_INDEX_BYTES: u64 = 100 << 20;

/// One tensor of a mapped file.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// Little-endian values, row-major.
    pub bytes: &'a [u8],
}

impl View<'_> {
    /// The values as f32, converted from bf16 or f16 where needed.
    ///
    /// # Errors
    /// Names the type when it is not a float of at most 32 bits.
    pub fn to_f32(&self) -> std::result::Result<Vec<f32>, String> {
        let pairs = || self.bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Dtype::F32 => Ok(self
                .bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect()),
            Dtype::BF16 => Ok(pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
            Dtype::F16 => Ok(pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
            other => Err(format!("unsupported type {other:?}: only F32, F16 and BF16 are read")),
        }
    }
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    data_start: usize,
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        if is_pickle(path) {
            let why = "a pickle, which could run code, is not read here: `ng-train convert` makes \
                       safetensors of it without running it";
            return Err(CheckpointError::malformed(path, why));
        }
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        #[expect(
            unsafe_code,
            reason = "mapping is the only way to read weights larger than memory"
        )]
        // SAFETY: the map is read-only; weights are replaced by rename, never written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io(path))?;
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            CheckpointError::malformed(path, format!("not a whole safetensors file ({error})"))
        })?;
        Ok(Self { path: path.to_owned(), map, header, data_start: header_len + 8 })
    }

    fn view(&self, name: &str) -> Option<View<'_>> {
        let info = self.header.info(name)?;
        let (from, to) = info.data_offsets;
        let bytes = &self.map[self.data_start + from..self.data_start + to];
        Some(View { dtype: info.dtype, shape: &info.shape, bytes })
    }
}

/// The weights of one component, or any set of safetensors files.
pub struct Weights {
    path: PathBuf,
    shards: Vec<Shard>,
    /// Shard of each tensor, and its name there.
    place_of: BTreeMap<String, (usize, String)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// `dir/stem.safetensors`, or the shards that `dir/stem.safetensors.index.json` names.
    ///
    /// # Errors
    /// When neither exists, a file is truncated, or the index points outside the folder.
    pub fn open(dir: &Path, stem: &str) -> Result<Self> {
        let single = dir.join(format!("{stem}.safetensors"));
        if single.exists() {
            return Ok(Self { path: dir.to_owned(), ..Self::open_file(&single)? });
        }
        let index_path = dir.join(format!("{stem}.safetensors.index.json"));
        if !index_path.exists() {
            let mut why =
                format!("no {stem}.safetensors and no {stem}.safetensors.index.json in it");
            let pickles = ["diffusion_pytorch_model.bin", "pytorch_model.bin"];
            if let Some(pickle) = pickles.iter().find(|file| dir.join(file).exists()) {
                let _ = write!(
                    why,
                    "; {pickle} is a pickle: `ng-train convert {pickle} {stem}.safetensors` reads it \
                     without running it"
                );
            }
            return Err(CheckpointError::malformed(dir, why));
        }
        let text = read_bounded(&index_path)?;
        let index: Index = serde_json::from_slice(&text)
            .map_err(|error| CheckpointError::malformed(&index_path, error))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort();
        files.dedup();
        let mut shards = Vec::with_capacity(files.len());
        for file in &files {
            if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
                let why = format!("names {file:?}, which is not a file of this folder");
                return Err(CheckpointError::malformed(&index_path, why));
            }
            shards.push(Shard::open(&dir.join(file))?);
        }
        let mut place_of = BTreeMap::new();
        for (name, file) in &index.weight_map {
            let at = files.binary_search(&file).expect("collected above");
            if shards[at].view(name).is_none() {
                let why = format!("says that {name} is in {file}, which does not hold it");
                return Err(CheckpointError::malformed(&index_path, why));
            }
            place_of.insert(name.clone(), (at, name.clone()));
        }
        Ok(Self { path: dir.to_owned(), shards, place_of })
    }

    /// The tensors of one safetensors file.
    ///
    /// # Errors
    /// When it is missing or not whole.
    pub fn open_file(path: &Path) -> Result<Self> {
        let shard = Shard::open(path)?;
        let names = shard.header.offset_keys().into_iter();
        let place_of = names.map(|name| (name.clone(), (0, name))).collect();
        Ok(Self { path: path.to_owned(), shards: vec![shard], place_of })
    }

    /// Puts `prefix` before every name that lacks it.
    #[must_use]
    pub fn with_prefix(mut self, prefix: &str) -> Self {
        self.place_of = std::mem::take(&mut self.place_of)
            .into_iter()
            .map(|(name, place)| {
                let whole = if name.starts_with(prefix) { name } else { format!("{prefix}{name}") };
                (whole, place)
            })
            .collect();
        self
    }

    /// The same weights under another name in messages.
    #[must_use]
    pub fn called(self, path: &Path) -> Self {
        Self { path: path.to_owned(), ..self }
    }

    /// The folder or file they came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place_of.keys().map(String::as_str)
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let (shard, stored) = self.place_of.get(name)?;
        self.shards[*shard].view(stored)
    }

    /// The tensor called `name`, as f32.
    ///
    /// # Errors
    /// When there is none, or it is not a float.
    pub fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let malformed = |why: String| CheckpointError::malformed(&self.path, why);
        let view = self.get(name).ok_or_else(|| malformed(format!("no tensor {name} in it")))?;
        view.to_f32().map_err(|why| malformed(format!("{name}: {why}")))
    }

    /// The `__metadata__` entry `key`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.iter().find_map(|shard| {
            let metadata = shard.header.metadata().as_ref()?;
            metadata.get(key).map(String::as_str)
        })
    }

    /// Lets go of the memory behind what was read so far; it is read from disk again when asked for.
    pub fn release(&self) {
        for shard in &self.shards {
            #[expect(unsafe_code, reason = "the only way to give mapped memory back early")]
            // SAFETY: the map is read-only and of a file, so that its pages come back as they were.
            let advised = unsafe { shard.map.unchecked_advise(UncheckedAdvice::DontNeed) };
            // Advice may be refused; then memory is merely given back later.
            drop(advised);
        }
    }

    /// Files these weights are mapped from.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// Compares names, shapes and types with what the network uses; `ignored` names may be present.
    ///
    /// # Errors
    /// One message that lists what is missing, unexpected, mis-shaped or mis-typed, if that is much the
    /// first of it.
    pub fn check(&self, manifest: &Manifest, ignored: &[&str]) -> Result<()> {
        let mut list = Vec::new();
        for (name, shape) in manifest.entries() {
            match self.get(name) {
                None => list.push(format!("{name} {shape:?} is missing")),
                Some(view) if view.shape != shape => {
                    list.push(format!("{name} has shape {:?} instead of {shape:?}", view.shape));
                }
                Some(view) if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                    list.push(format!("{name} has type {:?} instead of a float", view.dtype));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<&str> =
            manifest.entries().map(|(name, _)| name).chain(ignored.iter().copied()).collect();
        list.extend(
            self.names().filter(|n| !known.contains(n)).map(|n| format!("{n} is unexpected")),
        );
        if list.is_empty() {
            return Ok(());
        }
        if list.len() > MAX_MISFITS {
            let n_more = list.len() - MAX_MISFITS;
            list.truncate(MAX_MISFITS);
            list.push(format!("and {n_more} more"));
        }
        Err(CheckpointError::Misfit { path: self.path.clone(), list: list.join("; ") })
    }
}

/// Whether `path` is named like a file that PyTorch pickled.
pub fn is_pickle(path: &Path) -> bool {
    path.extension().is_some_and(|extension| PICKLES.iter().any(|known| extension == *known))
}

/// Reads a small file whole: a regular one, since a pipe or a device has no end that can be known.
///
/// # Errors
/// When it is missing, no regular file, or larger than any config or index is.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(CheckpointError::io(path))?;
    if !metadata.is_file() {
        let why = "is no regular file: give a file instead of a folder, pipe or device";
        return Err(CheckpointError::malformed(path, why));
    }
    let file = File::open(path).map_err(CheckpointError::io(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes).map_err(CheckpointError::io(path))?;
    if bytes.len() as u64 > MAX_INDEX_BYTES {
        let why = format!(
            "is {} bytes long, more than a file of its kind can be",
            metadata.len().max(MAX_INDEX_BYTES + 1)
        );
        return Err(CheckpointError::malformed(path, why));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::shapes::Shapes;
    use crate::ops::{Ops, ParamPath};

    fn manifest() -> Manifest {
        let shapes = Shapes::new();
        shapes.linear(&ParamPath::root().at("proj"), &vec![1, 2], 2, 3, true);
        shapes.manifest()
    }

    fn write(dir: &Path, file: &str, entries: &[Entry<'_>]) {
        write_tensors(&dir.join(file), entries, &[("note", "kept".into())]).unwrap();
    }

    #[test]
    fn a_file_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let values = [1.5, -2.0, 3.25, 0.0, 1e-8, 4.0];
        write(
            dir.path(),
            "w.safetensors",
            &[
                Entry::f32("proj.weight", &[3, 2], &values),
                Entry::f32("proj.bias", &[3], &[0.0; 3]),
            ],
        );
        let weights = Weights::open(dir.path(), "w").unwrap();
        assert_eq!(weights.f32("proj.weight").unwrap(), values);
        assert_eq!(weights.metadata("note"), Some("kept"));
        weights.check(&manifest(), &[]).unwrap();
    }

    #[test]
    fn one_message_lists_every_misfit() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            "w.safetensors",
            &[Entry::f32("proj.weight", &[2, 3], &[0.0; 6]), Entry::i64("extra", &[1], &[0])],
        );
        let weights = Weights::open(dir.path(), "w").unwrap();
        let message = weights.check(&manifest(), &[]).unwrap_err().to_string();
        for part in [
            "proj.weight has shape [2, 3] instead of [3, 2]",
            "proj.bias [3] is missing",
            "extra is unexpected",
        ] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn half_floats_widen() {
        let bytes: Vec<u8> =
            [1.5f32, -0.25].iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        let view = View { dtype: Dtype::BF16, shape: &[2], bytes: &bytes };
        assert_eq!(view.to_f32().unwrap(), [1.5, -0.25]);
        let view = View { dtype: Dtype::I64, shape: &[0], bytes: &[] };
        assert!(view.to_f32().is_err());
    }

    #[test]
    fn broken_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "w.safetensors", &[Entry::f32("a", &[64], &[1.0; 64])]);
        let whole = fs::read(dir.path().join("w.safetensors")).unwrap();
        for cut in [0, 4, 40, whole.len() - 1] {
            fs::write(dir.path().join("w.safetensors"), &whole[..cut]).unwrap();
            let message = Weights::open(dir.path(), "w").err().expect("truncated").to_string();
            assert!(message.contains("w.safetensors"), "{message}");
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        for (header, length) in [
            (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,64]}}"#, None),
            (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}"#, None),
            (
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#,
                None,
            ),
            (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#, None),
            (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, Some(u64::MAX)),
            (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, Some(1 << 40)),
            ("[[[[", None),
        ] {
            let length = length.unwrap_or(header.len() as u64);
            let file = [&length.to_le_bytes(), header.as_bytes(), &[0; 16]].concat();
            fs::write(&path, file).unwrap();
            let message = Weights::open_file(&path).err().expect(header).to_string();
            assert!(message.contains("w.safetensors") && !message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn pickles_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["pytorch_model.bin", "lora.pt"] {
            fs::write(dir.path().join(file), b"PK").unwrap();
            let message = Weights::open_file(&dir.path().join(file)).err().unwrap().to_string();
            assert!(message.contains(file) && message.contains("ng-train convert"), "{message}");
        }
        let message = Weights::open(dir.path(), "model").err().unwrap().to_string();
        assert!(message.contains("pytorch_model.bin is a pickle"), "{message}");
    }

    #[test]
    fn an_index_stays_in_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        for target in ["../w.safetensors", "/etc/passwd", "absent.safetensors"] {
            let index = format!(r#"{{"weight_map": {{"a": "{target}"}}}}"#);
            fs::write(dir.path().join("w.safetensors.index.json"), index).unwrap();
            assert!(Weights::open(dir.path(), "w").is_err(), "{target}");
        }
    }

    #[test]
    fn shards_are_found_by_the_index() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "w-1.safetensors", &[Entry::f32("a", &[1], &[1.0])]);
        write(dir.path(), "w-2.safetensors", &[Entry::f32("b", &[1], &[2.0])]);
        let index = r#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}"#;
        fs::write(dir.path().join("w.safetensors.index.json"), index).unwrap();
        let weights = Weights::open(dir.path(), "w").unwrap();
        assert_eq!(weights.f32("b").unwrap(), [2.0]);
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
    }
}
