//! What trains, as files: a file a rank with its parts of every state, read by any number of ranks.
//!
//! A file holds `kind.index` of each segment, flat and f32: `master`, the optimiser's `m`, `v` and `ema`,
//! and what an algorithm keeps. All parts in the order of ranks are the whole, and zeros behind it.

use std::cell::OnceCell;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::{Dtype, Entry, Weights};
use flow::lora::B;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use super::engine::Engine;
use crate::tensor::parameters::Parameters;
use crate::tensor::stored::{bytes_of, later};

/// What the names of files begin with.
const STEM: &str = "training_state";
const END: &str = ".safetensors";
/// Metadata: a [`Layout`].
const LAYOUT: &str = "layout";
/// The weights that train, and their moving average.
pub(crate) const MASTER: &str = "master";
pub(crate) const AVERAGE: &str = "ema";

/// The file of `rank` in a world of `world`.
pub(crate) fn file_name(rank: usize, world: usize) -> String {
    match world {
        1 => format!("{STEM}{END}"),
        _ => format!("{STEM}-{:05}-of-{world:05}{END}", rank + 1),
    }
}

/// World of the file `name`, and nothing of other files.
fn world_of(name: &str) -> Option<usize> {
    match name.strip_prefix(STEM)?.strip_suffix(END)? {
        "" => Some(1),
        numbers => numbers.split_once("-of-")?.1.parse().ok(),
    }
}

/// Names and shapes of what trains, by segment, in the order in which its numbers lie.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Layout {
    segments: Vec<Vec<(String, Vec<usize>)>>,
    /// α/r, where adapters train.
    adapters: Option<f64>,
}

impl Layout {
    pub(crate) fn of(engine: &Engine) -> Self {
        let adapters = engine.adapters().map(super::lora::Adapters::scale);
        Self { segments: engine.trained().layout(), adapters }
    }

    /// As an item of a file's metadata.
    pub(crate) fn metadata(&self) -> Result<(&'static str, String)> {
        Ok((LAYOUT, serde_json::to_string(self)?))
    }

    /// Whether these are adapters.
    pub(crate) fn is_of_adapters(&self) -> bool {
        self.adapters.is_some()
    }
}

/// This rank's parts, one a segment, of one kind of state.
pub(crate) fn entries<'a>(
    kind: &str,
    parts: impl IntoIterator<Item = &'a Tensor>,
) -> Vec<Entry<'static>> {
    let parts = parts.into_iter().enumerate();
    parts.map(|(index, part)| later(format!("{kind}.{index}"), part)).collect()
}

/// The files of one checkpoint; each is opened when something of it is needed.
pub(crate) struct Shards {
    folder: PathBuf,
    files: Vec<OnceCell<Weights>>,
}

impl Shards {
    /// Finds the files in `folder`.
    ///
    /// # Errors
    /// When there are none, or those of several worlds.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let failed = || format!("cannot read {}", folder.display());
        let mut worlds = Vec::new();
        for entry in fs::read_dir(folder).with_context(failed)? {
            let name = entry.with_context(failed)?.file_name();
            worlds.extend(world_of(&name.to_string_lossy()));
        }
        worlds.sort_unstable();
        worlds.dedup();
        let [world] = worlds[..] else {
            let what = if worlds.is_empty() { "no" } else { "more than one" };
            return Err(anyhow!(
                "{}: holds {what} state of a run: name a checkpoint, as in \
                 RUN/checkpoints/iteration-000050",
                folder.display()
            ));
        };
        let files = (0..world).map(|_| OnceCell::new()).collect();
        Ok(Self { folder: folder.to_owned(), files })
    }

    /// Ranks that have written it.
    pub(crate) fn world(&self) -> usize {
        self.files.len()
    }

    fn path(&self, rank: usize) -> PathBuf {
        self.folder.join(file_name(rank, self.world()))
    }

    fn file(&self, rank: usize) -> Result<&Weights> {
        if let Some(open) = self.files[rank].get() {
            return Ok(open);
        }
        let opened = Weights::open_file(&self.path(rank))?;
        Ok(self.files[rank].get_or_init(|| opened))
    }

    /// What the first file says of the whole.
    ///
    /// # Errors
    /// When it says nothing.
    pub(crate) fn metadata(&self, key: &str) -> Result<&str> {
        let path = || self.path(0);
        let missing = || {
            format!(
                "{}: no {key} in its metadata: written by an older version of this program, which cannot \
                 be resumed",
                path().display()
            )
        };
        self.file(0)?.metadata(key).with_context(missing)
    }

    /// What the numbers are of.
    ///
    /// # Errors
    /// As [`Shards::metadata`].
    pub(crate) fn layout(&self) -> Result<Layout> {
        let text = self.metadata(LAYOUT)?;
        serde_json::from_str(text)
            .with_context(|| format!("{}: its layout", self.path(0).display()))
    }

    /// Puts this rank's part of `kind` into `parts`, one a segment of `parameters`.
    ///
    /// # Errors
    /// When a file cannot be read or holds something else.
    pub(crate) fn restore<'a>(
        &self,
        kind: &str,
        parts: impl IntoIterator<Item = &'a Tensor>,
        parameters: &[&Parameters],
    ) -> Result<()> {
        let spans = parameters.iter().flat_map(|network| network.spans());
        for (index, (part, span)) in parts.into_iter().zip(spans).enumerate() {
            self.read(&format!("{kind}.{index}"), span.whole, span.own, part)?;
        }
        Ok(())
    }

    /// Puts the numbers `range` of the flat tensor `name`, all of which are `whole`, at the beginning of `into`; no
    /// more than one file's are held beside it.
    fn read(&self, name: &str, whole: usize, range: Range<usize>, into: &Tensor) -> Result<()> {
        let each = whole.div_ceil(self.world());
        for rank in 0..self.world() {
            let held = rank * each..((rank + 1) * each).min(whole);
            let wanted = range.start.max(held.start)..range.end.min(held.end);
            if wanted.is_empty() {
                continue;
            }
            let file = self.file(rank)?;
            let malformed =
                || anyhow!("{}: no {name} of {each} numbers", self.path(rank).display());
            let view = file.get(name).with_context(malformed)?;
            ensure!(view.dtype == Dtype::F32 && view.shape == [each], malformed());
            let [from, to] =
                [wanted.start, wanted.end].map(|at| (at - held.start) * size_of::<f32>());
            let n = wanted.len() as i64;
            let part = Tensor::from_data_size(&view.bytes[from..to], &[n], Kind::Float);
            file.release();
            no_grad(|| into.narrow(0, (wanted.start - range.start) as i64, n).copy_(&part));
        }
        Ok(())
    }

    /// The weights worth having, under the names that they have in a pipeline folder or a file of adapters:
    /// the moving average where one was kept. Each is read when it is written.
    ///
    /// # Errors
    /// When the first file cannot be read.
    pub(crate) fn weights(&self, layout: &Layout) -> Result<Vec<Entry<'_>>> {
        let is_averaged = self.file(0)?.shape(&format!("{AVERAGE}.0")).is_some();
        let kind = if is_averaged { AVERAGE } else { MASTER };
        let mut entries = Vec::new();
        for (index, segment) in layout.segments.iter().enumerate() {
            let flat = format!("{kind}.{index}");
            let lengths = segment.iter().map(|(_, shape)| shape.iter().product::<usize>());
            let whole: usize = lengths.clone().sum();
            let mut end = 0;
            for ((name, shape), n) in segment.iter().zip(lengths) {
                let range = end..end + n;
                end += n;
                let factor = layout.adapters.filter(|_| name.ends_with(B)).unwrap_or(1.0);
                let flat = flat.clone();
                entries.push(Entry::made(name, shape, Dtype::F32, move || {
                    let values = Tensor::empty([n as i64], (Kind::Float, Device::Cpu));
                    let read = self.read(&flat, whole, range.clone(), &values);
                    read.map_err(std::io::Error::other)?;
                    Ok(bytes_of(&(values * factor)))
                }));
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }
}

#[cfg(test)]
mod tests;
