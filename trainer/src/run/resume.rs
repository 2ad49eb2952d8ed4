//! What a run holds to when it goes on: everything that its mathematics depends on. Of the rest, some may
//! change in silence, some is said.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};
use flow::models::transformer::GUIDANCE;
use serde::{Deserialize, Serialize};
use toml::Value;

use super::align::Options;
use super::config::{AlignConfig, FILES_OF_REWARDS};
use super::record::{self, content};
use crate::tensor::device::precision_name;

/// Settings that may change: none of them changes what is computed.
const FREE: [&str; 14] = [
    "iterations",
    "validate_every",
    "minutes",
    "save_every",
    "stop_after_idle",
    "shard_gb",
    "keep",
    "ranks.join_seconds",
    "ranks.step_seconds",
    "output",
    "sheet_prompts",
    "recompute",
    "stream",
    "rollout.batch",
];
/// The same of each reward.
const FREE_OF_REWARDS: [&str; 8] =
    ["url", "api_key_env", "ca", "timeout", "requests", "batch", "retries", "patience"];
/// Settings that may change and are said to have.
const SAID: [&str; 4] = ["optimizer.learning_rate", "optimizer.warmup", "prompts", "ranks.shard"];
/// Settings that name files; the names may change where the content stays.
const FILES: [&str; 4] = ["model", "prompts", "embeddings", "lora.from"];

/// What a checkpoint says of the run that wrote it.
#[derive(Deserialize, Serialize)]
pub(crate) struct Held {
    /// What networks compute in.
    precision: String,
    /// What else its last bits depend on: program, libtorch, device, threads.
    #[serde(default)]
    made_by: BTreeMap<String, String>,
    /// Every setting by its dotted key.
    settings: BTreeMap<String, Value>,
    /// [`content`] of the files that settings name.
    pub(super) content: BTreeMap<String, String>,
}

impl Held {
    /// What a run of `config` as `options` ask for it holds to.
    ///
    /// # Errors
    /// When a file that a setting names cannot be read.
    pub(crate) fn of(config: &AlignConfig, options: &Options) -> Result<Self> {
        let mut settings = BTreeMap::new();
        flatten(&Value::Table(config.resolved()?), "", &mut settings);
        settings.retain(|key, _| !key.starts_with("judges"));
        settings.entry("rollout.guidance".to_owned()).or_insert(Value::Float(GUIDANCE));
        let mut contents = BTreeMap::new();
        for (key, value) in settings.iter().filter(|(key, _)| is_file(key)) {
            let path = Path::new(value.as_str().unwrap_or_default());
            // The name of a model on a server is no file.
            if path.exists() {
                contents.insert(key.clone(), content(path)?);
            }
        }
        let precision = precision_name(options.compute.kind).to_owned();
        let made_by = record::made_by(options);
        let made_by = made_by.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Ok(Self { precision, made_by, settings, content: contents })
    }

    /// Refuses to go on where `before` would have been computed otherwise; returns what else has changed.
    ///
    /// # Errors
    /// One line with every key, its old and its new value.
    pub(crate) fn check(&self, before: &Self) -> Result<Vec<String>> {
        let (mut said, mut refused) = (Vec::new(), Vec::new());
        if before.precision != self.precision {
            let (old, new) = (&before.precision, &self.precision);
            refused.push(format!("--precision was {old} and is {new}"));
        }
        for (name, new) in &self.made_by {
            if let Some(old) = before.made_by.get(name).filter(|old| *old != new) {
                said.push(format!("{name} was {old} and is {new}: the last bits may differ"));
            }
        }
        for (key, line) in differences(&before.settings, &self.settings) {
            let is_same_content = || {
                let [old, new] = [before, self].map(|held| held.content.get(key));
                is_file(key) && old.is_some() && old == new
            };
            if is_free(key) || is_same_content() {
                continue;
            }
            if SAID.contains(&key) { said.push(line) } else { refused.push(line) }
        }
        if refused.is_empty() {
            return Ok(said);
        }
        bail!(
            "--resume goes on with the settings that the run was started with: {} (what may change is what \
             changes no number: saving, batches, servers' addresses, paths of the same files; and, said, the \
             learning rate, the prompts and ranks.shard)",
            refused.join("; ")
        )
    }

    /// What a checkpoint's metadata holds.
    ///
    /// # Errors
    /// When it is of another version of this program.
    pub(crate) fn read(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("what the run holds to cannot be read")
    }
}

fn is_free(key: &str) -> bool {
    let is_watching = key.starts_with("validation.");
    is_watching
        || FREE.contains(&key)
        || of_reward(key).is_some_and(|name| FREE_OF_REWARDS.contains(&name))
}

fn is_file(key: &str) -> bool {
    FILES.contains(&key) || of_reward(key).is_some_and(|name| FILES_OF_REWARDS.contains(&name))
}

/// The last part of a reward's key.
fn of_reward(key: &str) -> Option<&str> {
    key.strip_prefix("rewards.")?.rsplit('.').next()
}

/// Keys whose values differ between two tables of settings, by their dotted names, each with what to say of it.
pub(crate) fn changed(before: &Value, now: &Value) -> Vec<(String, String)> {
    let [before, now] = [before, now].map(|table| {
        let mut settings = BTreeMap::new();
        flatten(table, "", &mut settings);
        settings
    });
    let all = differences(&before, &now).into_iter();
    all.map(|(key, line)| (key.to_owned(), line)).collect()
}

fn differences<'a>(
    before: &'a BTreeMap<String, Value>,
    now: &'a BTreeMap<String, Value>,
) -> Vec<(&'a str, String)> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    let shown = |value: Option<&Value>| value.map_or("absent".to_owned(), Value::to_string);
    let line = |key: &'a String| {
        let (old, new) = (before.get(key), now.get(key));
        (old != new).then(|| (&**key, format!("{key} was {} and is {}", shown(old), shown(new))))
    };
    keys.into_iter().filter_map(line).collect()
}

/// Every value below `value` by its dotted key, list items by number.
fn flatten(value: &Value, key: &str, into: &mut BTreeMap<String, Value>) {
    let joined =
        |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                flatten(value, &joined(name), into);
            }
        }
        Value::Array(list) if list.iter().all(Value::is_table) => {
            for (index, value) in list.iter().enumerate() {
                flatten(value, &joined(&index.to_string()), into);
            }
        }
        other => _ = into.insert(key.to_owned(), other.clone()),
    }
}

#[cfg(test)]
mod tests {
    use toml::Table;

    use super::*;

    fn held(settings: &str, content: &[(&str, &str)]) -> Held {
        let mut flat = BTreeMap::new();
        flatten(&Value::Table(settings.parse::<Table>().unwrap()), "", &mut flat);
        let content = content.iter().map(|&(key, hash)| (key.to_owned(), hash.to_owned()));
        Held {
            precision: "f32".to_owned(),
            made_by: BTreeMap::from([("device".to_owned(), "cpu".to_owned())]),
            settings: flat,
            content: content.collect(),
        }
    }

    #[test]
    fn what_changes_no_number_may_change_and_the_rest_is_refused_by_name() {
        let before = "sigma = 0.3\nprompts = 'a.txt'\nmodel = 'a'\nsave_every = 3\n[optimizer]\n\
                      learning_rate = 1e-5\n[rollout]\nbatch = 4\n[[rewards]]\nurl = 'http://a'\nweight = 1.0";
        let before = held(before, &[("model", "1")]);
        let now = "sigma = 0.3\nprompts = 'b.txt'\nmodel = 'b'\nsave_every = 9\n[optimizer]\n\
                   learning_rate = 2e-5\n[rollout]\nbatch = 1\n[[rewards]]\nurl = 'http://b'\nweight = 1.0";
        let said = held(now, &[("model", "1")]).check(&before).unwrap();
        assert_eq!(
            said,
            [
                "optimizer.learning_rate was 0.00001 and is 0.00002",
                "prompts was \"a.txt\" and is \"b.txt\""
            ]
        );
        let refused = |settings: &str, content| {
            held(settings, &[("model", content)]).check(&before).unwrap_err().to_string()
        };
        assert!(refused(now, "2").contains("model was \"a\" and is \"b\""));
        let heavier = now.replace("weight = 1.0", "weight = 2.0");
        assert!(refused(&heavier, "1").contains("rewards.0.weight was 1.0 and is 2.0"));
        let other = Held { precision: "bf16".to_owned(), ..held(now, &[("model", "1")]) };
        let message = other.check(&before).unwrap_err().to_string();
        assert!(message.contains("--precision was f32 and is bf16"), "{message}");
        assert!(Held::read("[]").is_err());
        let made_by = BTreeMap::from([("device".to_owned(), "cuda:0".to_owned())]);
        let elsewhere = Held { made_by, ..held(now, &[("model", "1")]) };
        let said = elsewhere.check(&before).unwrap();
        assert_eq!(said[0], "device was cpu and is cuda:0: the last bits may differ");
    }
}
