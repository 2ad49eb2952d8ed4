//! The checkpoint's files that a graph uses where they lie: linked into its folder, and read once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::open_for_reading;
use flow::checksums::{Sum, Summing};

use super::{DATA_FILE, MIN_EXTERNAL, MODEL_FILE, Mode, Placement, stored};
use crate::element::Float;
use crate::graph::{Graph, Parameter};
use crate::precision::Storage;
use crate::weights::{Source, first_not_finite};

/// Smaller files, in bytes, are copied where nobody chose.
const MIN_LINKED: u64 = 1 << 30;
/// Bytes read at a time: they stay in a core's cache until they are hashed and looked at.
const CHUNK: usize = 256 << 10;

/// A linked file.
#[derive(Clone, Debug)]
pub struct Linked {
    /// The checkpoint's.
    pub file: PathBuf,
    /// Its name beside the graph.
    pub name: String,
    /// What the graph reads of it.
    pub tensors: Vec<Place>,
}

/// Where a tensor lies in a file.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub range: Range<usize>,
    /// What they are.
    pub float: Float,
}

/// File and first byte of `parameter` where the graph can read it there.
pub(super) fn in_place<'a>(
    parameter: &Parameter,
    source: Source<'a>,
) -> Option<(&'a Path, usize, Float)> {
    let (file, offset, dtype) = source.weights.in_place(&parameter.name)?;
    let float = Float::of(dtype)?;
    let fits = parameter.storage == Storage::Plain(float)
        && parameter.len() * float.size() >= MIN_EXTERNAL
        && !source.is_adapted(&parameter.name);
    fits.then_some((file, offset, float))
}

/// Files of the checkpoint that the graph needs more than half of, and their names in `folder`, where they now
/// are, too, unless they are only counted.
pub(super) fn link(
    folder: &Path,
    graph: &Graph,
    source: Source<'_>,
    placement: Placement,
    mode: Mode,
) -> Result<BTreeMap<PathBuf, Linked>> {
    if placement == Placement::Copied {
        return Ok(BTreeMap::new());
    }
    let mut needed: BTreeMap<&Path, u64> = BTreeMap::new();
    for parameter in &graph.parameters {
        if let Some((file, ..)) = in_place(parameter, source) {
            *needed.entry(file).or_default() += stored(parameter).2 as u64;
        }
    }
    let mut linked = BTreeMap::new();
    let mut taken = BTreeSet::from([MODEL_FILE.to_owned(), DATA_FILE.to_owned()]);
    for (file, n_bytes) in needed {
        let read = || format!("cannot read {}", file.display());
        let size = file.metadata().with_context(read)?.len();
        if 2 * n_bytes < size || (placement == Placement::Auto && size < MIN_LINKED) {
            continue;
        }
        // A folder of the hub is full of links; what they point at can be linked again.
        let real = file.canonicalize().with_context(read)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !taken.insert(name.clone()) {
            continue;
        }
        let made = if mode == Mode::Counted {
            linkable(&real, folder)
        } else {
            fs::hard_link(&real, folder.join(&name))
        };
        match made {
            Ok(()) => {
                let file = file.to_owned();
                _ = linked.insert(file.clone(), Linked { file, name, tensors: Vec::new() });
            }
            // Another file system, or one without links: a copy does.
            Err(_) if placement == Placement::Auto => {}
            Err(why) => bail!(
                "cannot link {} into the export ({why}): give an --out on the same file system, or \
                 --copy-weights",
                file.display()
            ),
        }
    }
    Ok(linked)
}

/// Whether `file` and what will be `folder` share a file system.
fn linkable(file: &Path, folder: &Path) -> std::io::Result<()> {
    let home = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    if file.metadata()?.dev() == home.metadata()?.dev() {
        return Ok(());
    }
    Err(std::io::ErrorKind::CrossesDevices.into())
}

/// The sums of `files`, each read once, several at a time, the largest first. `advance` hears how many numbers
/// were read since its last call, and stops the work by an error.
///
/// # Errors
/// When a file cannot be read, or a number in it that a graph reads is not finite.
pub fn scan(files: &[&Linked], advance: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<Vec<Sum>> {
    let mut order: Vec<usize> = (0..files.len()).collect();
    let size = |at: &usize| fs::metadata(&files[*at].file).map_or(0, |found| found.len());
    order.sort_by_key(size);
    let left = Mutex::new(order);
    let sums = Mutex::new(vec![Sum::default(); files.len()]);
    let work = || -> Result<()> {
        loop {
            let next = left.lock().expect("no panics").pop();
            let Some(at) = next else { return Ok(()) };
            let sum = read(files[at], advance).inspect_err(|_| {
                // The others have nothing left to do.
                left.lock().expect("no panics").clear();
            })?;
            sums.lock().expect("no panics")[at] = sum;
        }
    };
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(files.len());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("reading does not panic"))
    })?;
    Ok(sums.into_inner().expect("no panics"))
}

fn read(linked: &Linked, advance: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<Sum> {
    let path = &linked.file;
    let cannot = || format!("cannot read {}", path.display());
    let mut file = open_for_reading(path).with_context(cannot)?;
    let n_bytes = file.metadata().with_context(cannot)?.len() as usize;
    let (mut sum, mut chunk, mut at) = (Summing::default(), vec![0; CHUNK], 0);
    let mut places: Vec<&Place> = linked.tensors.iter().collect();
    places.sort_by_key(|place| place.range.start);
    // What several tensors share is looked at once.
    places.dedup_by(|a, b| a.range == b.range);
    let mut pass = |end: usize, place: Option<&Place>| -> Result<()> {
        while at < end {
            let bytes = &mut chunk[..(end - at).min(CHUNK)];
            file.read_exact(bytes).with_context(cannot)?;
            sum.update(bytes);
            if let Some(Place { name, range, float }) = place {
                if let Some((index, value)) = first_not_finite(*float, bytes) {
                    let index = (at - range.start) / float.size() + index;
                    let path = path.display();
                    bail!("{path}: {name} holds {value} at {index}: weights must be finite");
                }
                advance(bytes.len() / float.size())?;
            }
            at += bytes.len();
        }
        Ok(())
    };
    let mut last = 0;
    for place in places {
        ensure!(place.range.start >= last, "{}: {} overlaps another", path.display(), place.name);
        pass(place.range.start, None)?;
        pass(place.range.end, Some(place))?;
        last = place.range.end;
    }
    pass(n_bytes, None)?;
    Ok(sum.finish())
}
