//! One file of weights, mapped: safetensors or GGUF, told apart by what is in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::SafeTensors;

use super::stored::{Coding, Stored};
use super::{CheckpointError, Result, gguf, open_for_reading};

/// Extensions of files that PyTorch pickles.
const PICKLES: [&str; 4] = ["bin", "pt", "pth", "ckpt"];
/// How files begin that are something else, and what they are.
const OTHERS: [(&[u8], &str); 5] = [
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder",
    ),
    (
        b"PK\x03\x04",
        "a zip archive, as PyTorch pickles are: name it .bin, and `ng-train convert` reads it without \
         running it",
    ),
    (
        b"\x80\x02",
        "a PyTorch pickle: name it .bin, and `ng-train convert` reads it without running it",
    ),
    (b"<!DOCTYPE", "a web page, not the file itself: download it again"),
    (b"<html", "a web page, not the file itself: download it again"),
];

pub(super) struct Shard {
    pub(super) path: PathBuf,
    map: Mmap,
    pub(super) tensors: BTreeMap<String, Stored>,
    pub(super) texts: BTreeMap<String, String>,
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if is_pickle(path) {
            let why = "a pickle, which could run code, is not read here: `ng-train convert` makes \
                       safetensors of it without running it";
            return Err(CheckpointError::malformed(path, why));
        }
        let file = open_for_reading(path)?;
        let map = map(&file).map_err(CheckpointError::io(path))?;
        let malformed = |why: String| CheckpointError::malformed(path, why);
        if let Some(what) = other_than_weights(&map) {
            return Err(malformed(what.into()));
        }
        let (tensors, texts) = if map.starts_with(gguf::MAGIC) {
            let header = gguf::parse(&map).map_err(malformed)?;
            (header.tensors, header.texts)
        } else {
            safetensors(&map)
                .map_err(|error| malformed(format!("not a whole safetensors file ({error})")))?
        };
        Ok(Self { path: path.to_owned(), map, tensors, texts })
    }

    /// Bytes of one of its tensors.
    pub(super) fn bytes(&self, stored: &Stored) -> &[u8] {
        &self.map[stored.range.clone()]
    }

    /// Lets go of the memory behind what was read so far.
    pub(super) fn release(&self) {
        #[expect(unsafe_code, reason = "the only way to give mapped memory back early")]
        // SAFETY: the map is read-only and of a file, so that its pages come back as they were.
        let advised = unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) };
        // Advice may be refused; then memory is merely given back later.
        drop(advised);
    }
}

fn map(file: &File) -> std::io::Result<Mmap> {
    #[expect(unsafe_code, reason = "mapping is the only way to read weights larger than memory")]
    // SAFETY: the map is read-only; weights are replaced by rename, never written in place.
    unsafe {
        Mmap::map(file)
    }
}

type Contents = (BTreeMap<String, Stored>, BTreeMap<String, String>);

fn safetensors(map: &[u8]) -> std::result::Result<Contents, safetensors::SafeTensorError> {
    let (header_len, header) = SafeTensors::read_metadata(map)?;
    let start = header_len + 8;
    let of = |name: String| {
        let info = header.info(&name)?;
        let (from, to) = info.data_offsets;
        let range = start + from..start + to;
        Some((name, Stored { coding: Coding::Plain(info.dtype), shape: info.shape.clone(), range }))
    };
    let tensors = header.offset_keys().into_iter().filter_map(of).collect();
    let texts = header.metadata().iter().flatten();
    Ok((tensors, texts.map(|(key, text)| (key.clone(), text.clone())).collect()))
}

/// Whether `path` is named like a file that PyTorch pickled.
pub fn is_pickle(path: &Path) -> bool {
    path.extension().is_some_and(|extension| PICKLES.iter().any(|known| extension == *known))
}

/// What a file is that begins with `bytes`, if it is nothing that is read here.
pub(super) fn other_than_weights(bytes: &[u8]) -> Option<&'static str> {
    // The length of a safetensors header can begin like anything; the header itself follows it.
    if bytes.get(8) == Some(&b'{') {
        return None;
    }
    OTHERS.iter().find(|(start, _)| bytes.starts_with(start)).map(|(_, what)| *what)
}
