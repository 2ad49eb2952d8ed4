//! Which files of a component's folder are its weights.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{CheckpointError, Result, is_pickle, read_bounded};

/// The files of a component, and where its tensors are said to be.
pub(super) struct Found {
    pub(super) files: Vec<PathBuf>,
    pub(super) index: Option<Places>,
    pub(super) notices: Vec<String>,
}

/// What an index says.
pub(super) struct Places {
    pub(super) path: PathBuf,
    /// The file of each tensor.
    pub(super) files_of: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// What a file of the folder is to the weights `stem`; a variant is such as `fp16`, and empty for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind<'a> {
    Whole(&'a str),
    Index(&'a str),
    Shard(&'a str),
    Pickle,
    /// Weights of another name.
    Other,
}

/// The end of weight files' names.
const END: &str = "safetensors";
/// Other files that are read where nothing has the usual name.
const ALONE: [&str; 3] = [END, "sft", "gguf"];

/// How the name of an index of pickled weights ends.
const PICKLED_INDEX: &str = ".bin.index.json";
/// How pickled weights' names begin.
const PICKLED: [&str; 2] = ["pytorch_model", "diffusion_pytorch_model"];

impl<'a> Kind<'a> {
    fn of(name: &'a str, stem: &str) -> Option<Self> {
        let path = Path::new(name);
        let extension = path.extension().and_then(|extension| extension.to_str())?;
        let rest = name.strip_prefix(stem);
        let is_pickled = || PICKLED.iter().chain([&stem]).any(|usual| name.starts_with(usual));
        if name.ends_with(PICKLED_INDEX) && is_pickled() {
            return Some(Self::Pickle);
        }
        if let Some(index) = rest.and_then(|rest| rest.strip_suffix(".json")) {
            // .safetensors.index.fp16.json, .fp16.safetensors.index.json
            let (before, after) = index.split_once(&format!(".{END}.index"))?;
            let variant = [before, after].map(|part| part.strip_prefix('.').unwrap_or(part));
            return match variant {
                [variant, ""] | ["", variant] => Some(Self::Index(variant)),
                _ => None,
            };
        }
        if is_pickle(path) {
            return is_pickled().then_some(Self::Pickle);
        }
        let Some(middle) = rest.and_then(|rest| rest.strip_suffix(&format!(".{END}"))) else {
            return ALONE.contains(&extension).then_some(Self::Other);
        };
        let variant = middle.strip_prefix('.').unwrap_or(middle);
        Some(match middle.split_once("-of-") {
            Some((before, after)) => {
                // .fp16-00001-of-00002, -00001-of-00002.fp16
                let before = before.rsplit_once('-').map_or("", |(before, _)| before);
                let after = after.split_once('.').map_or("", |(_, after)| after);
                let before = before.strip_prefix('.').unwrap_or(before);
                Self::Shard(if before.is_empty() { after } else { before })
            }
            None if middle.is_empty() || middle.starts_with('.') => Self::Whole(variant),
            None => Self::Other,
        })
    }
}

/// Finds the weights `stem` in `dir`.
///
/// # Errors
/// When there are none, or it is not clear which are meant.
pub(super) fn find(dir: &Path, stem: &str) -> Result<Found> {
    let names = names(dir)?;
    let kinds: Vec<(&str, Kind<'_>)> =
        names.iter().filter_map(|name| Some((&**name, Kind::of(name, stem)?))).collect();
    let of = |wanted: &dyn Fn(Kind<'_>) -> bool| -> Vec<&str> {
        kinds.iter().filter(|(_, kind)| wanted(*kind)).map(|(name, _)| *name).collect()
    };
    let malformed = |why: String| Err(CheckpointError::malformed(dir, why));
    let mut variants: Vec<&str> = kinds
        .iter()
        .filter_map(|(_, kind)| match kind {
            Kind::Whole(variant) | Kind::Index(variant) => Some(*variant),
            _ => None,
        })
        .collect();
    variants.sort_unstable();
    variants.dedup();
    let variant = match variants[..] {
        ["", ..] => Some(""),
        [variant] => Some(variant),
        [] => None,
        _ => {
            let all = of(&|kind| matches!(kind, Kind::Whole(_) | Kind::Index(_)));
            let all = all.join(", ");
            return malformed(format!(
                "several variants, and none without: {all}; keep one of them"
            ));
        }
    };
    if let Some(variant) = variant {
        let whole = of(&|kind| kind == Kind::Whole(variant));
        let index = of(&|kind| kind == Kind::Index(variant));
        return match (&whole[..], &index[..]) {
            ([file], []) => Ok(Found::alone(dir, file)),
            ([], [index]) => {
                let shards = of(&|kind| kind == Kind::Shard(variant));
                sharded(dir, index, &shards)
            }
            _ => malformed(format!(
                "it holds {} and {}, which need not be the same weights: remove those that are not meant",
                whole.join(", "),
                index.join(", ")
            )),
        };
    }
    if let [first, ..] = of(&|kind| matches!(kind, Kind::Shard(_)))[..] {
        return malformed(format!("shards such as {first} without {stem}.{END}.index.json"));
    }
    match of(&|kind| kind == Kind::Other)[..] {
        [file] => return Ok(Found::alone(dir, file)),
        [] => {}
        ref several => {
            let several = several.join(", ");
            return malformed(format!(
                "no {stem}.{END} in it, but {several}: keep the one that is meant"
            ));
        }
    }
    // The index of several, if there is one.
    let mut pickles = of(&|kind| kind == Kind::Pickle);
    pickles.sort_by_key(|name| !name.ends_with(PICKLED_INDEX));
    let pickle = pickles.first().map(|pickle| {
        format!(
            "; {pickle} is a pickle: `ng-train convert {pickle} {stem}.{END}` reads it without running it"
        )
    });
    let pickle = pickle.unwrap_or_default();
    malformed(format!("no {stem}.{END} and no {stem}.{END}.index.json in it{pickle}"))
}

/// Whether `file` is named as weights or their index are, under any name that is read.
pub(crate) fn is_weights(file: &Path) -> bool {
    let is_index = || {
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        stem.contains(&format!(".{END}.index")) || stem.ends_with(".bin.index")
    };
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => is_index(),
        Some(extension) => ALONE.contains(&extension) || is_pickle(file),
        None => false,
    }
}

impl Found {
    fn alone(dir: &Path, file: &str) -> Self {
        Self { files: vec![dir.join(file)], index: None, notices: Vec::new() }
    }
}

/// The shards of an index; `present` are the folder's.
fn sharded(dir: &Path, index: &str, present: &[&str]) -> Result<Found> {
    let path = dir.join(index);
    let parsed = serde_json::from_slice(&read_bounded(&path)?);
    let Index { weight_map } = parsed.map_err(|error| CheckpointError::malformed(&path, error))?;
    let mut files: Vec<&String> = weight_map.values().collect();
    files.sort();
    files.dedup();
    for file in &files {
        if Path::new(file).file_name().is_none_or(|name| name != file.as_str()) {
            let why = format!("names {file:?}, which is not a file of this folder");
            return Err(CheckpointError::malformed(&path, why));
        }
    }
    let stale = present.iter().filter(|name| !files.iter().any(|file| file == *name));
    let notices = stale
        .map(|name| format!("{}: {name} is left out, {index} does not name it", dir.display()));
    let (files, notices) = (files.iter().map(|file| dir.join(file)).collect(), notices.collect());
    Ok(Found { files, index: Some(Places { path, files_of: weight_map }), notices })
}

/// Names of the files in a folder, links included, in alphabetical order.
fn names(dir: &Path) -> Result<Vec<String>> {
    let listed = fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = listed.map_err(CheckpointError::io(dir))?;
    let names = entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    Ok(names)
}
