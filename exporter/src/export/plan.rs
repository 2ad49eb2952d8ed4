//! What an export would write and how long that would take, without writing it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flow::checkpoint::open_for_reading;
use flow::checksums::Summing;
use flow::staged;
use indicatif::ProgressBar;

use super::{Prepared, Request, Summary, Table, megabytes};
use crate::element::Float;
use crate::graph::Parameter;
use crate::weights::encode::encode;
use crate::weights::first_not_finite;

/// Bytes of a linked file that are read to see how fast that goes.
const SAMPLE: u64 = 64 << 20;

/// What an export would be.
pub struct Plan {
    summaries: Vec<Summary>,
    n_rest_bytes: u64,
    n_free: Option<u64>,
    computing: Duration,
}

/// What `request` would write. Sizes are exact; the time is that of parts of the work, done and measured.
///
/// # Errors
/// As [`super::export`] before it begins to write.
pub fn plan(request: &Request) -> Result<Plan> {
    let prepared = Prepared::open(request, &ProgressBar::hidden())?;
    let summaries = prepared.count()?;
    let computing = prepared.time(&summaries)?;
    let n_free = staged::free_bytes(&request.target);
    Ok(Plan { n_rest_bytes: prepared.rest_bytes(), summaries, n_free, computing })
}

impl Prepared<'_> {
    /// Time to convert what is converted, from the largest tensor of each kind, and to read what is linked, from
    /// the first bytes of one file.
    fn time(&self, summaries: &[Summary]) -> Result<Duration> {
        let mut seconds = 0.0;
        for ((part, graph), summary) in self.graphs.iter().zip(summaries) {
            let weights = self.pipeline.unread_weights(part.component())?;
            let source = self.source(*part, &weights);
            if summary.written.n_linked > 0 {
                let file = weights.files().next().context("no file is linked")?;
                seconds += summary.written.n_linked as f64 / reading(file)?;
                continue;
            }
            let mut kinds: BTreeMap<String, (usize, &Parameter)> = BTreeMap::new();
            for parameter in &graph.parameters {
                let kind = format!("{:?} {:?}", parameter.storage, parameter.transposed);
                let (n, largest) = kinds.entry(kind).or_insert((0, parameter));
                *n += parameter.len();
                if parameter.len() > largest.len() {
                    *largest = parameter;
                }
            }
            for (n, largest) in kinds.into_values() {
                let values = source.of(largest)?;
                let (start, mut sum) = (Instant::now(), Summing::default());
                encode(largest, &values, graph.dialect.table.positive_scales, &mut |bytes| {
                    sum.update(bytes);
                    Ok(())
                })?;
                let took = start.elapsed().as_secs_f64();
                seconds += took * n as f64 / largest.len().max(1) as f64;
                weights.release();
            }
        }
        Ok(Duration::from_secs_f64(seconds))
    }
}

/// Bytes a second and thread that are hashed and looked at.
fn reading(file: &std::path::Path) -> Result<f64> {
    let cannot = || format!("cannot read {}", file.display());
    let (start, mut bytes) = (Instant::now(), Vec::new());
    open_for_reading(file)
        .with_context(cannot)?
        .take(SAMPLE)
        .read_to_end(&mut bytes)
        .with_context(cannot)?;
    let mut sum = Summing::default();
    sum.update(&bytes);
    let whole = bytes.len() / 4 * 4;
    // A header is no numbers: only the time counts.
    let _ = first_not_finite(Float::Bf16, &bytes[..whole]);
    Ok(bytes.len() as f64 / start.elapsed().as_secs_f64().max(1e-9))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Table(&self.summaries))?;
        let written = |summary: &Summary| summary.written.n_bytes;
        let n_bytes = self.summaries.iter().map(written).sum::<u64>() + self.n_rest_bytes;
        write!(f, "to be written: {} with configs and tokenizers", megabytes(n_bytes))?;
        if let Some(n_free) = self.n_free {
            let enough = if n_free >= n_bytes { "free there" } else { "free there: TOO LITTLE" };
            write!(f, "; {} {enough}", megabytes(n_free))?;
        }
        let seconds = self.computing.as_secs_f64();
        writeln!(
            f,
            "\ntime: about {seconds:.1} s of computing here, or the disk's if that is longer"
        )
    }
}
