//! What all ranks of a run must have in common before its first iteration.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use cluster::Group;
use flow::prompts::Prompt;
use sha2::{Digest, Sha256};

use super::config::AlignConfig;
use super::ready::Ready;
use super::record::content_of_pipeline;
use super::resume::Held;
use crate::group::ranks;
use crate::network::model::Model;
use crate::tensor::device::{Compute, precision_name};

/// What one rank has, by the names that people know it by.
type Said<'a> = Vec<(&'a str, String)>;

/// Compares the program, what was asked for, and what it is computed on.
///
/// # Errors
/// Names what differs, and between which ranks; on all of them.
pub(crate) fn of_settings(group: &Group, config: &AlignConfig, compute: Compute) -> Result<()> {
    let said = || {
        let device = if compute.device.is_cuda() { "cuda" } else { "cpu" };
        Ok(vec![
            ("program", env!("CARGO_PKG_VERSION").to_owned()),
            ("configuration", hash(serde_json::to_string(config)?.as_bytes())),
            ("kind of device", device.to_owned()),
            ("precision", precision_name(compute.kind).to_owned()),
        ])
    };
    compare(group, said)
}

/// Compares the files that settings name: those of the model, of which a rank may read but a part, prompts, adapters,
/// embeddings and rewards.
///
/// # Errors
/// As [`of_settings`].
pub(crate) fn of_files(
    group: &Group,
    config: &AlignConfig,
    held: &Held,
    ready: &Ready,
) -> Result<()> {
    let said = || {
        let mut said = vec![
            ("model", content_of_pipeline(&config.model)?),
            ("prompts", of_prompts(&ready.prompts)?),
            ("validation.prompts", of_prompts(&ready.held_out)?),
        ];
        let content: &BTreeMap<String, String> = &held.content;
        let others = content.iter().filter(|(key, _)| !["model", "prompts"].contains(&&***key));
        said.extend(others.map(|(key, content)| (&**key, content.clone())));
        Ok(said)
    };
    compare(group, said)
}

/// Compares the position and the weights that are about to train.
///
/// # Errors
/// As [`of_settings`].
pub(crate) fn of_position(start: usize, model: &Model) -> Result<()> {
    let trained = model.engine.trained();
    let said = || {
        let weights = format!("{:x?}", trained.fingerprints());
        Ok(vec![("position", start.to_string()), ("weights", hash(weights.as_bytes()))])
    };
    compare(trained.group(), said)
}

fn compare<'a>(group: &Group, said: impl FnOnce() -> Result<Said<'a>>) -> Result<()> {
    if group.world() == 1 {
        return Ok(());
    }
    let said = said()?;
    let owned = |(what, value): (&str, String)| (what.to_owned(), value);
    let own: Vec<(String, String)> = said.into_iter().map(owned).collect();
    check(&ranks::all(group, &own)?)
}

/// Refuses the first rank of which something differs from that of rank 0.
fn check(all: &[Vec<(String, String)>]) -> Result<()> {
    for (rank, told) in all.iter().enumerate() {
        let others = all[0].iter().filter(|own| !told.contains(own));
        let names: Vec<&str> = others.map(|(what, _)| &**what).collect();
        ensure!(
            names.is_empty(),
            "rank {rank} has another {} than rank 0: give all ranks the same files and settings",
            names.join(" and another ")
        );
    }
    Ok(())
}

fn of_prompts(prompts: &[Prompt]) -> Result<String> {
    Ok(hash(&serde_json::to_vec(prompts)?))
}

fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_differs_is_named() {
        let said = |weights: &str, start: &str| {
            let pair = |what: &str, value: &str| (what.to_owned(), value.to_owned());
            vec![pair("position", start), pair("weights", weights)]
        };
        assert!(check(&[said("a", "2"), said("a", "2")]).is_ok());
        let refused = |other| check(&[said("a", "2"), said("a", "2"), other]).unwrap_err();
        let both = refused(said("b", "0")).to_string();
        assert!(both.starts_with("rank 2 has another position and another weights than"), "{both}");
        assert!(refused(said("b", "2")).to_string().contains("another weights than rank 0"));
        assert!(refused(Vec::new()).to_string().contains("another position"));
    }
}
