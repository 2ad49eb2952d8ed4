//! The file of weights while it grows: hashed as it is written, beside the work that makes its bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use flow::checkpoint::read_bounded;
use flow::checksums::{Sum, Summing};

use super::DATA_FILE;

/// Says, beside the file, how many of its bytes are on disk.
pub(crate) const JOURNAL: &str = ".resume";
/// Larger tensors, in bytes, start at a multiple of [`PAGE`].
const MIN_ALIGNED: usize = 64 << 10;
const PAGE: u64 = 4096;
/// Start of any other tensor.
const CACHE_LINE: u64 = 64;
/// Pieces that wait to be written.
const WAITING: usize = 8;
/// Bytes between two entries in the journal.
const NOTED: u64 = 256 << 20;
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// What is done with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They are written.
    Written,
    /// They are written; those that an earlier run wrote are kept, and a later one can keep these.
    Resumed,
    /// They are counted.
    Counted,
}

/// The file.
pub(super) struct DataFile {
    path: PathBuf,
    writer: Option<Writer>,
    /// Bytes so far.
    n_bytes: u64,
    /// Bytes that were there before.
    n_held: u64,
}

struct Writer {
    pieces: SyncSender<Vec<u8>>,
    thread: JoinHandle<io::Result<Sum>>,
}

impl DataFile {
    /// The one in `folder`, begun when it is first needed.
    pub(super) fn in_folder<'a>(
        slot: &'a mut Option<Self>,
        folder: &Path,
        mode: Mode,
    ) -> Result<&'a mut Self> {
        if slot.is_none() {
            let path = folder.join(DATA_FILE);
            let create = || format!("cannot create {}", path.display());
            let (writer, n_held) = match mode {
                Mode::Counted => (None, u64::MAX),
                Mode::Written => {
                    let file = File::create(&path).with_context(create)?;
                    (Some(Writer::begin(file, 0, None)), 0)
                }
                Mode::Resumed => {
                    let journal = folder.join(JOURNAL);
                    let noted =
                        read_bounded(&journal).ok().and_then(|text| String::from_utf8(text).ok());
                    let noted = noted.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
                    let mut options = OpenOptions::new();
                    let options = options.read(true).write(true).create(true).truncate(false);
                    let file = options.open(&path).with_context(create)?;
                    let n_held = file.metadata().with_context(create)?.len().min(noted);
                    file.set_len(n_held).with_context(create)?;
                    (Some(Writer::begin(file, n_held, Some(journal))), n_held)
                }
            };
            *slot = Some(Self { path, writer, n_bytes: 0, n_held });
        }
        Ok(slot.as_mut().expect("made above"))
    }

    /// Where a tensor of `n_bytes` goes.
    pub(super) fn begin(&mut self, n_bytes: usize) -> Result<u64> {
        let to = if n_bytes < MIN_ALIGNED { CACHE_LINE } else { PAGE };
        let gap = self.n_bytes.next_multiple_of(to) - self.n_bytes;
        self.append(&[0; PAGE as usize][..gap as usize])?;
        Ok(self.n_bytes)
    }

    /// Whether the next `n_bytes` and what aligns them were there before.
    pub(super) fn holds(&self, n_bytes: usize) -> bool {
        self.n_bytes.saturating_add(n_bytes as u64 + 2 * PAGE) <= self.n_held
    }

    /// The next `n_bytes` were there before.
    pub(super) fn skip(&mut self, n_bytes: usize) {
        self.n_bytes += n_bytes as u64;
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let known = self.n_held.saturating_sub(self.n_bytes).min(bytes.len() as u64) as usize;
        self.n_bytes += bytes.len() as u64;
        if known == bytes.len() {
            return Ok(());
        }
        let writer = self.writer.as_ref().expect("what is counted is held");
        if writer.pieces.send(bytes[known..].to_vec()).is_err() {
            // It ended, and says why.
            self.ended()?;
        }
        Ok(())
    }

    /// Bytes of the file, and their sum where they were written.
    pub(super) fn finish(mut self) -> Result<(u64, Option<Sum>)> {
        let sum = self.ended()?;
        Ok((self.n_bytes, sum))
    }

    fn ended(&mut self) -> Result<Option<Sum>> {
        let Some(writer) = self.writer.take() else { return Ok(None) };
        let ended = writer.end();
        Ok(Some(ended.with_context(|| format!("cannot write {}", self.path.display()))?))
    }
}

impl Drop for DataFile {
    fn drop(&mut self) {
        // Nobody writes into a folder that is removed, and the journal is complete.
        drop(self.writer.take().map(Writer::end));
    }
}

impl Writer {
    fn begin(file: File, n_held: u64, journal: Option<PathBuf>) -> Self {
        let (pieces, waiting) = sync_channel(WAITING);
        Self {
            pieces,
            thread: thread::spawn(move || write(file, n_held, journal.as_deref(), &waiting)),
        }
    }

    fn end(self) -> io::Result<Sum> {
        drop(self.pieces);
        self.thread.join().expect("writing does not panic")
    }
}

/// Hashes the first `n_held` bytes of `file`, then writes and hashes all `pieces` behind them.
fn write(
    mut file: File,
    n_held: u64,
    journal: Option<&Path>,
    pieces: &Receiver<Vec<u8>>,
) -> io::Result<Sum> {
    let mut sum = Summing::default();
    let (mut left, mut chunk) = (n_held as usize, vec![0; if n_held > 0 { CHUNK } else { 0 }]);
    while left > 0 {
        let n = left.min(CHUNK);
        file.read_exact(&mut chunk[..n])?;
        sum.update(&chunk[..n]);
        left -= n;
    }
    file.seek(SeekFrom::Start(n_held))?;
    let (mut n_bytes, mut n_noted) = (n_held, n_held);
    let note = |file: &File, n_bytes: u64| {
        let Some(journal) = journal else { return Ok(()) };
        file.sync_data()?;
        fs::write(journal, n_bytes.to_string())
    };
    for piece in pieces {
        file.write_all(&piece)?;
        sum.update(&piece);
        n_bytes += piece.len() as u64;
        if n_bytes - n_noted >= NOTED {
            note(&file, n_bytes)?;
            n_noted = n_bytes;
        }
    }
    note(&file, n_bytes)?;
    Ok(sum.finish())
}
