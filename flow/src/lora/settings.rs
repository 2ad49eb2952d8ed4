//! What stands beside the tensors: PEFT's configuration, in a file's metadata or in a file of its own.
//!
//! The factor of a layer is α/r, or α/√r with `use_rslora`; `rank_pattern` and `alpha_pattern` give
//! layers an r and α of their own. Source: PEFT's `tuners/lora/layer.py` and `get_pattern_key`.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::checkpoint::{CheckpointError, Weights, read_bounded};
use crate::pipeline::Component;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Metadata in which diffusers keeps PEFT's configurations.
const METADATA: &str = "lora_adapter_metadata";
/// PEFT's own file.
pub(super) const PEFT_FILE: &str = "adapter_config.json";
/// DanceGRPO's.
const DANCE_FILE: &str = "lora_config.json";
/// Kinds of PEFT's adapters that are read.
const KINDS: [&str; 3] = ["LORA", "LOHA", "LOKR"];
/// Initialisations of PEFT that leave the checkpoint's weights changed.
const CHANGING: [&str; 4] = ["pissa", "olora", "corda", "loftq"];

/// The configuration of one component's adapters.
#[derive(Default)]
pub(super) struct Settings {
    /// Where it stands.
    pub(super) source: String,
    rank: Option<usize>,
    alpha: Option<f64>,
    use_rslora: bool,
    /// Whether every layer should have magnitudes.
    pub(super) use_dora: bool,
    is_lora: bool,
    ranks: Patterns,
    alphas: Patterns,
}

/// Regular expressions of layers' names, sorted as PEFT sorts them, each with a number.
#[derive(Default)]
struct Patterns(Vec<(Regex, f64)>);

impl Patterns {
    fn find(&self, layer: &str) -> std::result::Result<Option<f64>, String> {
        for (pattern, value) in &self.0 {
            if pattern.is_match(layer).map_err(|error| format!("{pattern}: {error}"))? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

/// The file of settings that counts for the LoRA `file`: PEFT's `adapter_config.json` or DanceGRPO's
/// `lora_config.json` beside it.
pub fn settings_beside(file: &Path) -> Option<PathBuf> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let found = [PEFT_FILE, DANCE_FILE].map(|name| folder.join(name));
    found.into_iter().find(|found| found.is_file() && super::place::owns_settings(file))
}

impl Settings {
    /// The factor of a layer whose A has `rank` rows, by its names with and without what PEFT's own has
    /// before it; nothing where α is not said.
    ///
    /// # Errors
    /// When the file says another rank, or a pattern cannot be matched.
    pub(super) fn factor(
        &self,
        layer: &str,
        rank: usize,
    ) -> std::result::Result<Option<f64>, String> {
        let Self { source, .. } = self;
        let explain = |why| format!("{source}: {why}");
        let of_layer = self.ranks.find(layer).map_err(explain)?;
        let said = of_layer.or(self.rank.map(|rank| rank as f64));
        if let Some(said) = said.filter(|said| self.is_lora && *said != rank as f64) {
            return Err(format!("{source} says r = {said} of {layer}, whose A has {rank} rows"));
        }
        let Some(alpha) = self.alphas.find(layer).map_err(explain)?.or(self.alpha) else {
            return Ok(None);
        };
        let rank = said.unwrap_or(rank as f64);
        Ok(Some(alpha / if self.use_rslora { rank.sqrt() } else { rank }))
    }

    /// Reads PEFT's configuration, whose entries begin with `prefix`.
    fn of(
        object: &Map<String, Value>,
        prefix: &str,
        source: &str,
    ) -> std::result::Result<Self, String> {
        let get = |key: &str| object.get(&format!("{prefix}{key}")).unwrap_or(&Value::Null);
        let number = |key: &str| match get(key) {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("{key} is {value}, not a number")),
            },
        };
        let patterns = |key: &str| patterns(get(key)).map_err(|why| format!("{key}: {why}"));
        let kind = get("peft_type").as_str().unwrap_or(KINDS[0]);
        if !KINDS.contains(&kind) {
            return Err(format!("adapters of kind {kind} are not supported"));
        }
        let way = get("init_lora_weights").as_str().unwrap_or_default();
        if CHANGING.iter().any(|known| way.to_lowercase().starts_with(known)) {
            return Err(format!(
                "init_lora_weights = {way:?} has changed the weights below the adapters: convert \
                 them by PEFT's path_initial_model_for_weight_conversion"
            ));
        }
        let rank = match number("r")?.or(number("lora_rank")?) {
            None => None,
            Some(rank) if rank >= 1.0 && rank.fract() == 0.0 => Some(rank as usize),
            Some(rank) => return Err(format!("r = {rank} is no rank")),
        };
        let alpha = number("lora_alpha")?;
        Ok(Self {
            source: source.to_owned(),
            rank,
            alpha: if alpha.is_none() { number("alpha")? } else { alpha },
            use_rslora: get("use_rslora") == &Value::Bool(true),
            use_dora: get("use_dora") == &Value::Bool(true),
            is_lora: kind == KINDS[0],
            ranks: patterns("rank_pattern")?,
            alphas: patterns("alpha_pattern")?,
        })
    }
}

fn patterns(value: &Value) -> std::result::Result<Patterns, String> {
    let object = match value {
        Value::Null => return Ok(Patterns::default()),
        Value::Object(object) => object,
        other => return Err(format!("{other} is no object")),
    };
    let entry = |(key, value): (&String, &Value)| {
        let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        let number = number.ok_or_else(|| format!("{key:?} is {value}, not a number above 0"))?;
        // PEFT's `get_pattern_key`: the whole name, or what follows one of its dots.
        let pattern = Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"));
        Ok((pattern.map_err(|_| format!("{key:?} is no regular expression"))?, number))
    };
    object.iter().map(entry).collect::<std::result::Result<_, _>>().map(Patterns)
}

/// What stands beside the tensors of one file, a component each.
pub(super) struct Beside {
    of_components: Vec<(Component, Settings)>,
    /// What holds of every layer.
    of_all: Settings,
}

impl Beside {
    /// What the metadata of `weights` says, else a configuration beside the file `path`.
    ///
    /// # Errors
    /// When it is no configuration, or says something that is not supported.
    pub(super) fn read(weights: &Weights, path: &Path) -> Result<Self> {
        let of_all = Self::file_beside(path)?;
        let mut of_components = Vec::new();
        if let Some(text) = weights.metadata(METADATA) {
            let explain = |why: &dyn std::fmt::Display| {
                CheckpointError::malformed(path, format!("{METADATA}: {why}"))
            };
            let value: Value = serde_json::from_str(text).map_err(|error| explain(&error))?;
            let object = match value {
                Value::Object(object) => object,
                Value::Null => Map::default(),
                Value::Array(values) if values.is_empty() => Map::default(),
                _ => return Err(explain(&"not an object of settings")),
            };
            for component in
                [Component::Transformer, Component::TextEncoder, Component::TextEncoder2]
            {
                let prefix = format!("{}.", component.folder());
                if object.keys().any(|key| key.starts_with(&prefix)) {
                    let settings = Settings::of(&object, &prefix, METADATA);
                    of_components.push((component, settings.map_err(|why| explain(&why))?));
                }
            }
        }
        Ok(Self { of_components, of_all })
    }

    fn file_beside(path: &Path) -> Result<Settings> {
        let Some(file) = settings_beside(path) else { return Ok(Settings::default()) };
        let malformed = |why: String| CheckpointError::malformed(&file, why);
        let value: Value = serde_json::from_slice(&read_bounded(&file)?)
            .map_err(|error| malformed(error.to_string()))?;
        let nested = value.get("lora_params").unwrap_or(&value).as_object();
        let object = nested.ok_or_else(|| malformed("not an object of settings".into()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        Settings::of(object, "", &name).map_err(malformed)
    }

    /// What holds of the layers of `component`.
    pub(super) fn of(&self, component: Component) -> &Settings {
        let own = self.of_components.iter().find(|(known, _)| *known == component);
        own.map_or(&self.of_all, |(_, settings)| settings)
    }
}
