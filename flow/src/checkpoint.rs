//! Weights on disk: safetensors and GGUF files, single or sharded by an index, mapped and never copied whole.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
pub use safetensors::Dtype;

mod bfl;
mod blocks;
mod fit;
mod folder;
mod gguf;
mod names;
mod scales;
mod shard;
mod stored;
mod write;

pub(crate) use folder::is_weights;
use shard::Shard;
pub use shard::is_pickle;
pub use write::{
    Entry, MAX_SHARD_BYTES, Values, is_finite, write_atomically, write_sharded, write_tensors,
    write_weights,
};

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
        move |reason| match fs::read_link(&path) {
            Ok(target) if reason.kind() == io::ErrorKind::NotFound => {
                let why = format!("a broken link: {} is not there", target.display());
                Self::Malformed { path, why }
            }
            _ => Self::Io { path, reason },
        }
    }

    /// `path` is not what it should be, because of `why`.
    pub fn malformed(path: &Path, why: impl std::fmt::Display) -> Self {
        Self::Malformed { path: path.to_owned(), why: why.to_string() }
    }
}

type Result<T> = std::result::Result<T, CheckpointError>;

/// Largest header and index read into memory.
const MAX_INDEX_BYTES: u64 = 100 << 20;

/// One tensor.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Element type: of floats F32, F16 or BF16, whatever the file holds them in.
    pub dtype: Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// Little-endian values, row-major.
    pub bytes: Cow<'a, [u8]>,
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
            other => Err(format!("unsupported type {other:?}: only floats are read")),
        }
    }
}

/// The weights of one component, or of any file.
pub struct Weights {
    path: PathBuf,
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
    notices: Vec<String>,
}

/// Where a tensor comes from: rows of one in a file.
#[derive(Clone, Debug)]
struct Place {
    shard: usize,
    /// Its name there.
    stored: String,
    shape: Vec<usize>,
    /// Rows of the stored tensor that it is.
    rows: Range<usize>,
    /// Whether the halves of its rows change places.
    halves_swapped: bool,
    /// Shard and name of what it is multiplied by.
    scale: Option<(usize, String)>,
}

impl Weights {
    /// The weights in `dir` that are called `stem`: `stem.safetensors`, the shards of its index, or the one
    /// variant, GGUF or other safetensors file that is there alone.
    ///
    /// # Errors
    /// When there are none, or several; when a file is truncated, or the index points outside the folder.
    pub fn open(dir: &Path, stem: &str) -> Result<Self> {
        let folder::Found { files, index, notices } = folder::find(dir, stem)?;
        let shards = files.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>>>()?;
        let mut owners = BTreeMap::new();
        for (name, file) in index.iter().flat_map(|index| &index.files_of) {
            let at = files.iter().position(|path| path.ends_with(file)).expect("its own files");
            if !shards[at].tensors.contains_key(name) {
                let why = format!("says that {name} is in {file}, which does not hold it");
                let index = index.as_ref().map_or(dir, |index| &*index.path);
                return Err(CheckpointError::malformed(index, why));
            }
            owners.insert(name.as_str(), at);
        }
        let mut weights = Self::of(dir, shards, &owners)?;
        weights.notices.extend(notices);
        Ok(weights)
    }

    /// The tensors of one safetensors or GGUF file.
    ///
    /// # Errors
    /// When it is missing, not whole, or something else.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::of(path, vec![Shard::open(path)?], &BTreeMap::new())
    }

    /// `owners` is the shard whose tensor counts, for names that an index has.
    fn of(path: &Path, shards: Vec<Shard>, owners: &BTreeMap<&str, usize>) -> Result<Self> {
        let mut places = BTreeMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for (name, stored) in &shard.tensors {
                let place = Place {
                    shard: at,
                    stored: name.clone(),
                    shape: stored.shape.clone(),
                    rows: 0..stored.n_rows(),
                    halves_swapped: false,
                    scale: None,
                };
                if owners.get(name.as_str()).is_none_or(|&owner| owner == at) {
                    places.insert(name.clone(), place);
                }
            }
        }
        let mut weights = Self { path: path.to_owned(), shards, places, notices: Vec::new() };
        weights.attach_scales()?;
        Ok(weights)
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

    /// What was left out or taken in another way, a sentence each.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Shape of the tensor called `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.places.get(name)?.shape)
    }

    /// Type that [`Weights::get`] gives the tensor called `name`.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        let place = self.places.get(name)?;
        let stored = self.shards[place.shard].tensors.get(&place.stored)?;
        Some(if place.scale.is_some() { Dtype::F32 } else { stored.coding.dtype() })
    }

    /// The tensor called `name`: as it lies in the file, or floats made of what lies there.
    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let place = self.places.get(name)?;
        let shard = &self.shards[place.shard];
        let stored = shard.tensors.get(&place.stored)?;
        let bytes: Cow<'_, [u8]> = if place.halves_swapped {
            let whole = shard.bytes(stored);
            let n_row_bytes = whole.len() / stored.n_rows().max(1);
            Cow::Owned(
                place.parts().flat_map(|rows| of_rows(whole, rows, n_row_bytes)).copied().collect(),
            )
        } else {
            Cow::Borrowed(self.as_stored(name)?)
        };
        let view = View {
            dtype: stored.coding.dtype(),
            shape: &place.shape,
            bytes: stored.coding.widened(bytes),
        };
        Some(match &place.scale {
            Some(scale) => self.scaled(&view, place, scale),
            None => view,
        })
    }

    /// What the file holds of the tensor called `name`, in its coding and its order there.
    pub fn as_stored(&self, name: &str) -> Option<&[u8]> {
        let place = self.places.get(name)?;
        let shard = &self.shards[place.shard];
        let stored = shard.tensors.get(&place.stored)?;
        let whole = shard.bytes(stored);
        Some(of_rows(whole, place.rows.clone(), whole.len() / stored.n_rows().max(1)))
    }

    /// Where the file holds the tensor called `name` just as [`Weights::get`] gives it, if it does: the file,
    /// the first byte in it and the type.
    pub fn in_place(&self, name: &str) -> Option<(&Path, usize, Dtype)> {
        let place = self.places.get(name)?;
        let shard = &self.shards[place.shard];
        let stored = shard.tensors.get(&place.stored)?;
        let stored::Coding::Plain(dtype) = stored.coding else { return None };
        if dtype != stored.coding.dtype() || place.halves_swapped || place.scale.is_some() {
            return None;
        }
        let n_row_bytes = stored.range.len() / stored.n_rows().max(1);
        Some((&shard.path, stored.range.start + place.rows.start * n_row_bytes, dtype))
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

    /// The `__metadata__` entry `key`, or the text that a GGUF file has under it.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.iter().find_map(|shard| shard.texts.get(key).map(String::as_str))
    }

    /// Lets go of the memory behind what was read so far; it is read from disk again when asked for.
    pub fn release(&self) {
        self.shards.iter().for_each(Shard::release);
    }

    /// Files these weights are mapped from.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }
}

impl Place {
    /// Its rows in the order that it has them.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let Range { start, end } = self.rows;
        let middle = if self.halves_swapped { start + (end - start) / 2 } else { end };
        [middle..end, start..middle].into_iter()
    }
}

fn of_rows(bytes: &[u8], rows: Range<usize>, n_row_bytes: usize) -> &[u8] {
    &bytes[rows.start * n_row_bytes..rows.end * n_row_bytes]
}

/// Opens a regular file: a pipe or a device has no end that can be known.
///
/// # Errors
/// When it is none; of a broken link the message says so.
pub fn open_for_reading(path: &Path) -> Result<File> {
    let metadata = fs::metadata(path).map_err(CheckpointError::io(path))?;
    if !metadata.is_file() {
        let why = "is no regular file: give a file instead of a folder, pipe or device";
        return Err(CheckpointError::malformed(path, why));
    }
    File::open(path).map_err(CheckpointError::io(path))
}

/// Reads a small file whole.
///
/// # Errors
/// When it is missing, no regular file, larger than any config or index is, or a pointer of Git LFS.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = open_for_reading(path)?;
    let n_bytes = file.metadata().map_err(CheckpointError::io(path))?.len();
    let mut bytes = Vec::new();
    file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut bytes).map_err(CheckpointError::io(path))?;
    if bytes.len() as u64 > MAX_INDEX_BYTES {
        let why = format!(
            "is {} bytes long, more than a file of its kind can be",
            n_bytes.max(MAX_INDEX_BYTES + 1)
        );
        return Err(CheckpointError::malformed(path, why));
    }
    match shard::other_than_weights(&bytes) {
        Some(what) => Err(CheckpointError::malformed(path, what)),
        None => Ok(bytes),
    }
}

#[cfg(test)]
mod tests;
