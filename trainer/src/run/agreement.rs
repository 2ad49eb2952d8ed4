//! What all ranks of a run must have in common before its first iteration.

use anyhow::{Result, ensure};
use cluster::Group;
use flow::prompts::Prompt;
use sha2::{Digest, Sha256};

use super::config::AlignConfig;
use crate::group::ranks;
use crate::network::model::Model;

/// Compares the program, the configuration, the prompts, the position and the weights that are about to train.
///
/// # Errors
/// Names what differs, and between which ranks.
pub(crate) fn check(
    config: &AlignConfig,
    prompts: &[Prompt],
    start: usize,
    model: &Model,
) -> Result<()> {
    let ranks = model.engine.trained().group();
    if ranks.world() == 1 {
        return Ok(());
    }
    let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    let said = vec![
        ("program", env!("CARGO_PKG_VERSION").to_owned()),
        ("configuration", hash(serde_json::to_string(config)?.as_bytes())),
        ("prompts", hash(texts.join("\n").as_bytes())),
        ("position", start.to_string()),
        ("weights", weights(model)),
    ];
    compare(ranks, &said)
}

fn compare(group: &Group, said: &[(&str, String)]) -> Result<()> {
    let values: Vec<&String> = said.iter().map(|(_, value)| value).collect();
    let all: Vec<Vec<String>> = ranks::all(group, &serde_json::to_value(values)?)?
        .into_iter()
        .map(|told| serde_json::from_value(told).unwrap_or_default())
        .collect();
    for (rank, told) in all.iter().enumerate() {
        for (index, (what, _)) in said.iter().enumerate() {
            let [first, other] = [&all[0], told].map(|told| told.get(index));
            ensure!(
                first == other,
                "rank {rank} has another {what} than rank 0: give all ranks the same files and settings"
            );
        }
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

fn weights(model: &Model) -> String {
    hash(format!("{:x?}", model.engine.trained().fingerprints()).as_bytes())
}
