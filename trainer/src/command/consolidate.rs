//! The weights of a checkpoint, whatever number of processes wrote it, as other programs read them.

use std::path::Path;

use anyhow::{Result, ensure};
use flow::checksums::Checksums;

use crate::network::save::{self, Target};
use crate::network::shards::Shards;

/// Writes what the checkpoint `from` holds to the new folder `out`: a pipeline, or adapters alone.
///
/// # Errors
/// When `from` is no whole checkpoint, or `out` is there.
pub(super) fn run(from: &Path, out: &Path, max_shard_bytes: usize) -> Result<()> {
    ensure!(!out.exists(), "{} exists: remove it or choose another --out", out.display());
    let shards = Shards::open(from)?;
    if let Some(list) = Checksums::open(from)? {
        list.check_all()?;
    }
    let target = Target { dir: out, max_shard_bytes, before: Some(from) };
    save::trained(&shards, from, target, |_| Ok(()))?;
    println!("{}", out.display());
    Ok(())
}
