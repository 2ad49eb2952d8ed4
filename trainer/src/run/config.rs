//! What a run is told: the settings of its parts, composed.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use cluster::Group;
use flow::checkpoint::MAX_SHARD_BYTES;
use flow::pipeline::{Pipeline, fetched};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::layers::leaves;
use super::settings::remove;
use super::validation::ValidationConfig;
use crate::algorithm::{Methods, Setting, TrainingConfig};
use crate::group::GroupConfig;
use crate::group::seeds::{Use, family};
use crate::network::embeddings::Embeddings;
use crate::network::engine::segments;
use crate::network::lora::{Adapters, LoraConfig};
use crate::network::model::{Loading, Missing, Model};
use crate::network::optimizer::OptimizerConfig;
use crate::network::sharding::Shard;
use crate::reward::RewardConfig;
use crate::tensor::device::Compute;
use crate::tensor::parameters::{Mesh, Storage};

/// One run.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AlignConfig {
    /// Pipeline folder to start from.
    pub model: PathBuf,
    /// Folder for checkpoints, metrics and pictures.
    pub output: PathBuf,
    /// Training prompts: `.txt`, `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet`.
    pub prompts: PathBuf,
    /// Prompts of the sample sheets; the first few are drawn.
    pub sheet_prompts: PathBuf,
    /// Iterations of the whole run.
    pub iterations: usize,
    /// Ends the run, as if that were its last iteration, once it has taken so long.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Trains low-rank adapters in place of all weights, where given.
    #[serde(default)]
    pub lora: Option<LoraConfig>,
    /// Text embeddings made by `ng-train embed`; the text encoders then stay on disk.
    #[serde(default)]
    pub embeddings: Option<PathBuf>,
    /// Whether weights that do not train stay on disk and are read block by block, for models larger
    /// than memory.
    #[serde(default)]
    pub stream: bool,
    /// How groups come about.
    #[serde(flatten)]
    pub group: GroupConfig,
    /// What learns from them.
    #[serde(flatten)]
    pub training: TrainingConfig,
    /// The settings of every method.
    #[serde(flatten)]
    pub methods: Methods,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// What `ng-train eval` and validations report beside the rewards; nothing trains on it.
    #[serde(default)]
    pub judges: Vec<RewardConfig>,
    /// Rewards and judges score held-out prompts every so many iterations, before the first and after the last; 0
    /// never.
    #[serde(default)]
    pub validate_every: usize,
    /// Those prompts, and what follows from their scores.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// A checkpoint, a sheet and a curve every so many iterations.
    #[serde(default = "save_every")]
    pub save_every: usize,
    /// Checkpoints that stay, the newest.
    #[serde(default = "keep")]
    pub keep: usize,
    /// Ends the run where so many iterations in a row taught nothing, since no group's rewards differed; 0 never.
    #[serde(default = "stop_after_idle")]
    pub stop_after_idle: usize,
    /// Most GB (10⁹ bytes) of weights in one file.
    #[serde(default = "shard_gb")]
    pub shard_gb: f64,
    /// Whether backward recomputes each block, so that memory does not grow with depth.
    #[serde(default)]
    pub recompute: bool,
    /// How ranks work together.
    #[serde(default)]
    pub ranks: RanksConfig,
}

/// How the ranks of a run work together.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RanksConfig {
    /// How they hold the network.
    #[serde(default)]
    pub shard: Shard,
    /// Seconds until all ranks must have come.
    #[serde(default = "join_seconds")]
    pub join_seconds: f64,
    /// Seconds that a rank waits for another one in one operation; longer than a group's rewards, a sheet
    /// of samples or a checkpoint can take, and than any reward's 60·patience + (retries + 1)·timeout, whose
    /// patience is none where it is not required.
    #[serde(default = "step_seconds")]
    pub step_seconds: f64,
}

fn join_seconds() -> f64 {
    300.0
}
fn step_seconds() -> f64 {
    1200.0
}

impl RanksConfig {
    /// Refuses to give a rank up while it may still wait for one of `rewards`, in the list of that `name`.
    fn outlasts(&self, rewards: &[RewardConfig], name: &str) -> Result<()> {
        for (index, reward) in rewards.iter().enumerate() {
            let Some(timeout) = reward.kind.timeout() else { continue };
            let patience = if reward.required { reward.patience } else { 0.0 };
            let longest = 60.0 * patience + f64::from(reward.retries + 1) * timeout;
            ensure!(
                self.step_seconds > longest,
                "ranks.step_seconds = {}: a rank may wait {longest} s for {name}.{index} (60·patience + (retries + \
                 1)·timeout), and would be given up meanwhile; raise ranks.step_seconds above that, or lower \
                 {name}.{index}.patience, in minutes, retries or timeout",
                self.step_seconds
            );
        }
        Ok(())
    }
}

impl Default for RanksConfig {
    fn default() -> Self {
        Self { shard: Shard::default(), join_seconds: join_seconds(), step_seconds: step_seconds() }
    }
}

fn save_every() -> usize {
    50
}
fn keep() -> usize {
    2
}
fn stop_after_idle() -> usize {
    20
}
fn shard_gb() -> f64 {
    MAX_SHARD_BYTES as f64 / 1e9
}

impl AlignConfig {
    /// What the algorithm is made with.
    ///
    /// # Errors
    /// When there is none of that name.
    pub(crate) fn setting(&self) -> Result<Setting<'_>> {
        Setting::new(&self.group, &self.training, &self.methods)
    }

    /// Why the setting `key` changes nothing in this run; nothing where it does.
    ///
    /// # Errors
    /// As [`AlignConfig::setting`].
    pub(crate) fn ignores(&self, key: &str) -> Result<Option<&'static str>> {
        if key == "advantage.quasi_norm" && !self.group.advantage.rescale {
            return Ok(Some("advantage.rescale = false divides by no norm"));
        }
        if key.starts_with("validation.") && self.validate_every == 0 {
            return Ok(Some("validate_every = 0 validates nothing"));
        }
        Ok(self.setting()?.ignores(key))
    }

    /// The setting that leaves `key` unread where [`AlignConfig::ignores`] says so.
    pub(crate) fn leaves_unread(&self, key: &str) -> &'static str {
        let by_algorithm = self.setting().is_ok_and(|setting| setting.ignores(key).is_some());
        match key.split('.').next() {
            Some("validation") => "validate_every",
            Some("advantage") if !by_algorithm => "advantage.rescale",
            _ => "algorithm",
        }
    }

    /// Every setting that this run reads, with B, K and the number of updates as they come out.
    ///
    /// # Errors
    /// As [`AlignConfig::setting`].
    pub(crate) fn resolved(&self) -> Result<Table> {
        let setting = self.setting()?;
        let mut table = Table::try_from(self)?;
        let numbers = [setting.n_anchors, setting.n_updates, setting.n_train_steps];
        for (name, number) in ["anchors", "updates", "train_steps"].into_iter().zip(numbers) {
            table.insert(name.to_owned(), i64::try_from(number)?.into());
        }
        let mut unread = vec!["timestep_fraction".to_owned()];
        for (key, _) in leaves(&table) {
            if self.ignores(&key)?.is_some() {
                unread.push(key);
            }
        }
        for key in &unread {
            remove(&mut table, key);
        }
        Ok(table)
    }

    pub(crate) fn max_shard_bytes(&self) -> usize {
        (self.shard_gb * 1e9) as usize
    }

    /// The model, ready to train; what trains is divided among `ranks`.
    pub(crate) fn load(&self, compute: Compute, ranks: &Group) -> Result<Model> {
        if ranks.world() > 1 {
            self.ranks.outlasts(&self.group.rewards, "rewards")?;
            self.ranks.outlasts(&self.judges, "judges")?;
        }
        self.open(compute, ranks, Missing::Refuse)
    }

    /// [`AlignConfig::load`] of a folder that may lack weights.
    pub(crate) fn open(&self, compute: Compute, ranks: &Group, missing: Missing) -> Result<Model> {
        let trains = self.lora.is_none();
        let storage = match self.ranks.shard {
            Shard::All => Storage::Divided { mesh: Mesh::flat(ranks), trains },
            Shard::Node => Storage::Divided { mesh: Mesh::by_node(ranks, compute.device)?, trains },
            Shard::Auto | Shard::States if trains => Storage::Trainable(ranks.clone()),
            Shard::Auto | Shard::States if self.stream => Storage::Streamed,
            Shard::Auto | Shard::States => Storage::Frozen,
        };
        let stream_text = self.stream || self.embeddings.is_some();
        let loading = Loading { compute, storage, stream_text };
        // Before weights are read.
        let from = match &self.lora {
            Some(lora) => lora.open(&Pipeline::open(&self.model)?)?,
            None => None,
        };
        let mut model = Model::open(&self.model, loading, missing)?;
        model.embeddings = self.embeddings.as_deref().map(Embeddings::open).transpose()?;
        if let Some(lora) = &self.lora {
            let (segments, noise) =
                (segments(&model.pipeline.transformer), family(self.group.seed, Use::Weights));
            let adapters = Adapters::new(lora, from.as_ref(), &segments, noise, compute, ranks)?;
            model.engine.adapt(adapters);
        }
        model.engine.train();
        model.engine.recompute = self.recompute || self.stream;
        model.engine.rounds_alike = self.setting()?.feels_rounding();
        Ok(model)
    }

    /// Refuses files that are not there, with what puts them there.
    ///
    /// # Errors
    /// One line that names the setting.
    pub(crate) fn check_files(&self) -> Result<()> {
        let named =
            [("prompts", Some(&self.prompts)), ("sheet_prompts", Some(&self.sheet_prompts))];
        let folders = [
            ("model", Some(&self.model)),
            ("embeddings", self.embeddings.as_ref()),
            ("validation.prompts", self.validation.prompts.as_ref()),
        ];
        for (key, path) in named.into_iter().chain(folders) {
            let Some(path) = path.filter(|path| !path.exists()) else { continue };
            bail!("{key} = {}: no such file or folder{}", path.display(), hint(path));
        }
        ensure!(
            self.output.is_dir() || !self.output.exists(),
            "output = {}: it is a file, name a folder",
            self.output.display()
        );
        for (list, rewards) in [("rewards", &self.group.rewards), ("judges", &self.judges)] {
            for (index, reward) in rewards.iter().enumerate() {
                let Value::Table(table) = Value::try_from(reward)? else { continue };
                for name in FILES_OF_REWARDS {
                    let Some(path) = table.get(name).and_then(Value::as_str) else { continue };
                    // A chat's model is a name.
                    let is_file = table.get("url").is_none();
                    if is_file && !Path::new(path).exists() {
                        let kind = table.get("kind").and_then(Value::as_str).unwrap_or_default();
                        bail!(
                            "{list}.{index}.{name} = {path}: no such file{}",
                            source_of(kind, name)
                        );
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn validate(&self) -> Result<()> {
        ensure!(
            !self.stream || self.lora.is_some(),
            "stream = true: only adapters train beside weights that stay on disk; add [lora]"
        );
        ensure!(
            !self.stream || matches!(self.ranks.shard, Shard::Auto | Shard::States),
            "stream = true leaves weights on disk, ranks.shard divides them among ranks: choose one"
        );
        ensure!(self.iterations > 0, "iterations = 0: nothing to do");
        self.group.validate()?;
        let minutes = self.minutes.unwrap_or(1.0);
        ensure!(minutes > 0.0 && minutes.is_finite(), "minutes = {minutes}: above 0");
        ensure!(
            self.shard_gb > 0.0 && self.shard_gb.is_finite(),
            "shard_gb = {}: above 0",
            self.shard_gb
        );
        ensure!(self.save_every > 0, "save_every must be at least 1");
        for (name, seconds) in
            [("join_seconds", self.ranks.join_seconds), ("step_seconds", self.ranks.step_seconds)]
        {
            let is_possible = seconds > 0.0 && seconds < 1e6;
            ensure!(is_possible, "ranks.{name} = {seconds}: above 0, below 1e6");
        }
        ensure!(self.keep > 0, "keep must be at least 1");
        ensure!(!self.output.as_os_str().is_empty(), "output is empty: name a folder");
        self.optimizer.validate()?;
        self.lora.iter().try_for_each(LoraConfig::validate)?;
        RewardConfig::validate_all(&self.group.rewards, "rewards")?;
        ensure!(
            self.group.rewards.iter().any(|reward| reward.weight != 0.0),
            "rewards: none has a weight other than 0, so nothing would be learnt"
        );
        RewardConfig::validate_all(&self.judges, "judges")?;
        self.validation.validate(self)?;
        self.setting()?.validate()
    }
}

/// Settings of a reward that name files.
pub(crate) const FILES_OF_REWARDS: [&str; 5] =
    ["model", "weights", "tokenizer", "clip", "characters"];

/// What a path that is not there may have been meant to be.
fn hint(path: &Path) -> String {
    let from = std::env::current_dir().unwrap_or_default();
    let fetch = fetched(path).filter(|_| path.parent().is_some_and(|owner| !owner.exists()));
    let fetch = fetch.map(|fetch| format!("; {fetch}")).unwrap_or_default();
    format!(" (paths start at {}{fetch})", from.display())
}

/// Where the file `name` of a reward of `kind` is published.
fn source_of(kind: &str, name: &str) -> &'static str {
    match (kind, name) {
        ("hpsv2", "weights") => {
            ": `hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir rewards` gets it"
        }
        ("pickscore", "weights") => {
            ": `hf download yuvalkirstain/PickScore_v1 model.safetensors config.json --local-dir \
             rewards/PickScore_v1` gets it"
        }
        ("image-reward", "weights") => {
            ": `hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir rewards` gets it"
        }
        ("image-reward", "tokenizer") => {
            ": `hf download google-bert/bert-base-uncased tokenizer.json --local-dir \
             rewards/bert-base-uncased` gets it"
        }
        ("aesthetic", "weights") => {
            ": sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
        }
        ("ocr", "model") => ": `make runtime` in the repository gets PP-OCR's models",
        ("clip" | "aesthetic", _) => {
            ": `hf download openai/clip-vit-large-patch14 --local-dir DIR` gets a CLIP model"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_wait_longer_for_each_other_than_for_a_reward() {
        let reward = |text: &str| -> RewardConfig {
            toml::from_str(&format!("name = 'r'\nweight = 1.0\n{text}")).unwrap()
        };
        let checked = |step_seconds: f64, more: &str| {
            let ranks = RanksConfig { step_seconds, ..RanksConfig::default() };
            let server = format!("kind = 'server'\nurl = 'http://a'\n{more}");
            ranks.outlasts(&[reward("kind = 'colour'"), reward(&server)], "rewards")
        };
        assert!(checked(RanksConfig::default().step_seconds, "").is_ok());
        let slow = "patience = 10\ntimeout = 180\nretries = 1";
        assert!(checked(961.0, slow).is_ok());
        let refused = checked(960.0, slow).unwrap_err().to_string();
        for part in ["ranks.step_seconds = 960", "960 s for rewards.1", "rewards.1.patience"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(checked(361.0, "patience = 10\nrequired = false").is_ok());
        let pair = "kind = 'pairwise'\njudge = {kind = 'chat', url = 'http://a', model = 'm', timeout = 300}";
        let ranks = RanksConfig::default();
        assert!(ranks.outlasts(&[reward(pair)], "judges").is_err());
    }
}
