//! What the ranks of a run tell each other, beside tensors.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use cluster::Group;
use flow::log;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A number that arrives to the bit, whatever it is.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Exact(u64);

impl From<f64> for Exact {
    fn from(number: f64) -> Self {
        Self(number.to_bits())
    }
}

impl From<Exact> for f64 {
    fn from(exact: Exact) -> Self {
        Self::from_bits(exact.0)
    }
}

/// Leaves speaking to people to the first rank: from here on the others say what they do in files of their own below
/// `output`, or not at all.
///
/// # Errors
/// When such a file cannot be opened.
pub(crate) fn give_way(ranks: &Group, output: Option<&Path>) -> Result<()> {
    if ranks.is_first() {
        return Ok(());
    }
    let Some(output) = output else { return Ok(log::step_aside(None)?) };
    let folder = output.join("logs");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let file = folder.join(format!("rank-{:03}.log", ranks.rank()));
    log::step_aside(Some(&file)).with_context(|| format!("opening {}", file.display()))
}

/// What every rank says, by rank.
///
/// # Errors
/// When a rank cannot be reached.
pub(crate) fn all<T: Serialize + DeserializeOwned>(ranks: &Group, own: &T) -> Result<Vec<T>> {
    let texts = ranks.all_gather_bytes(&serde_json::to_vec(own)?)?;
    let read = |text: &Vec<u8>| serde_json::from_slice(text).context("a rank of another version");
    texts.iter().map(read).collect()
}

/// What every rank's `own` came to, by rank.
///
/// # Errors
/// On all ranks where any failed: its own error, or the first other's, which is named.
pub(crate) fn outcomes<T: Serialize + DeserializeOwned>(
    ranks: &Group,
    own: Result<T>,
) -> Result<Vec<T>> {
    if ranks.world() == 1 {
        return Ok(vec![own?]);
    }
    let told = told(ranks, &own)?;
    own?;
    let named = |(rank, outcome): (usize, Result<T, String>)| {
        outcome.map_err(|why| anyhow!("rank {rank}: {why}"))
    };
    told.into_iter().enumerate().map(named).collect()
}

/// As [`outcomes`], but the error is one that says that all ranks have it.
///
/// # Errors
/// As [`outcomes`]; [`cluster::Error::Shared`].
pub(crate) fn shared<T: Serialize + DeserializeOwned>(
    ranks: &Group,
    own: &Result<T>,
) -> Result<Vec<T>> {
    let named = |(rank, outcome): (usize, Result<T, String>)| {
        outcome.map_err(|why| cluster::Error::Shared { what: format!("rank {rank}: {why}") }.into())
    };
    told(ranks, own)?.into_iter().enumerate().map(named).collect()
}

/// What every rank's `own` came to, or why it failed, by rank.
///
/// # Errors
/// When a rank cannot be reached; what this one failed with comes first.
fn told<T: Serialize + DeserializeOwned>(
    ranks: &Group,
    own: &Result<T>,
) -> Result<Vec<Result<T, String>>> {
    let said = own.as_ref().map_err(|error| format!("{error:#}"));
    let told = all(ranks, &serde_json::to_value(&said)?);
    let told = told.map_err(|error| match said {
        Err(why) => error.context(why),
        Ok(_) => error,
    })?;
    let read = told.into_iter().map(serde_json::from_value).collect::<Result<_, _>>();
    read.context("a rank of another version")
}

/// What the first rank's `work` comes to, on all ranks; the others do not do it.
///
/// # Errors
/// Where it fails, on all ranks.
pub(crate) fn of_first<T: Serialize + DeserializeOwned>(
    ranks: &Group,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    // In a list, since what is nothing would look as if nothing were there.
    let own = if ranks.is_first() { work().map(|done| vec![done]) } else { Ok(Vec::new()) };
    outcomes(ranks, own)?.into_iter().flatten().next().context("rank 0 has said nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_arrive_to_the_bit() {
        for number in [0.1, -0.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE] {
            let text = serde_json::to_string(&Exact::from(number)).unwrap();
            let back: Exact = serde_json::from_str(&text).unwrap();
            assert_eq!(f64::from(back).to_bits(), number.to_bits());
        }
    }

    #[test]
    fn a_process_that_is_alone_has_everything() {
        assert_eq!(all(&Group::alone(), &"text".to_owned()).unwrap(), ["text"]);
        assert_eq!(of_first(&Group::alone(), || Ok(5)).unwrap(), 5);
        let failed = outcomes::<u8>(&Group::alone(), Err(anyhow!("full"))).unwrap_err();
        assert_eq!(failed.to_string(), "full");
    }
}
