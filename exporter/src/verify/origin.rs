//! Whether an export can have been made from a checkpoint, by the configs of both.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use flow::models::clip::ClipTextConfig;
use flow::models::t5::T5Config;
use flow::models::transformer::TransformerConfig;
use flow::models::vae::VaeConfig;
use flow::pipeline::{Component, read_json};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::part::Part;

/// A config's file in the folder of its network.
const CONFIG: &str = "config.json";
/// How a checkpoint's file stores weights, which makes no other network of them.
const STORAGE: &str = "quantization_config";
/// Differences that a message names.
const SHOWN: usize = 3;

type Entries = Map<String, Value>;

/// Compares the networks of `parts` in the export `folder` with those of `checkpoint`.
///
/// # Errors
/// When a config cannot be read, or says another network.
pub fn check(
    folder: &Path,
    checkpoint: &Path,
    parts: impl IntoIterator<Item = Part>,
) -> Result<()> {
    let mut differing = Vec::new();
    for part in parts {
        let component = part.component();
        let ours = folder.join(part.folder()).join(CONFIG);
        let theirs = checkpoint.join(component.folder()).join(CONFIG);
        let keys = match component {
            Component::TextEncoder => differences::<ClipTextConfig>(&ours, &theirs),
            Component::TextEncoder2 => differences::<T5Config>(&ours, &theirs),
            Component::Transformer => differences::<TransformerConfig>(&ours, &theirs),
            Component::Vae => differences::<VaeConfig>(&ours, &theirs),
        };
        differing.extend(keys?.into_iter().map(|key| format!("{} {key}", part.folder())));
    }
    let n_more = differing.len().saturating_sub(SHOWN);
    differing.truncate(SHOWN);
    let more = if n_more == 0 { String::new() } else { format!(", and {n_more} more") };
    ensure!(
        differing.is_empty(),
        "{} was not made from {}: {}{more}: give --checkpoint the one that it was made from",
        folder.display(),
        checkpoint.display(),
        differing.join(", ")
    );
    Ok(())
}

/// Entries by which `ours` and `theirs` are configs of two networks.
fn differences<T: DeserializeOwned + PartialEq>(ours: &Path, theirs: &Path) -> Result<Vec<String>> {
    let [(_, ours), (config, theirs)] = [read::<T>(ours)?, read::<T>(theirs)?];
    let mut keys: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let counts = |key: &&String| {
        let mut other = theirs.clone();
        match ours.get(*key) {
            Some(value) => other.insert((*key).clone(), value.clone()),
            None => other.remove(*key),
        };
        T::deserialize(Value::Object(other)).ok().as_ref() != Some(&config)
    };
    let shown = |of: &Entries, key| of.get(key).map_or("left out".into(), Value::to_string);
    let line =
        |key| format!("{key} is {} in it and {} there", shown(&ours, key), shown(&theirs, key));
    Ok(keys.into_iter().filter(counts).map(line).collect())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<(T, Entries)> {
    let mut entries: Entries = read_json(path)?;
    entries.retain(|key, value| !value.is_null() && key != STORAGE);
    let config = T::deserialize(Value::Object(entries.clone()));
    Ok((config.with_context(|| format!("cannot read {}", path.display()))?, entries))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_network_is_told_by_its_config() {
        let home = tempfile::tempdir().unwrap();
        let write = |of: &str, text: &str| {
            let folder = home.path().join(of).join("transformer");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(CONFIG), text).unwrap();
        };
        let [export, checkpoint] = ["export", "checkpoint"].map(|of| home.path().join(of));
        let checked = || check(&export, &checkpoint, [Part::Transformer]);
        write("export", r#"{"num_layers": 2, "_diffusers_version": "1", "out_channels": null}"#);
        write("checkpoint", r#"{"num_layers": 2, "_diffusers_version": "2"}"#);
        checked().unwrap();
        write("checkpoint", r#"{"num_layers": 3, "_diffusers_version": "2"}"#);
        let message = checked().unwrap_err().to_string();
        let says = "transformer num_layers is 2 in it and 3 there: give --checkpoint";
        assert!(message.contains(says) && !message.contains("_diffusers"), "{message}");
    }
}
