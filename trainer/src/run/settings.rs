//! Run configurations: a preset or a TOML file, single settings replaced by `--set key=value`.
//!
//! A configuration may name another preset as its `base` and say only what differs. Where an `algorithm` is
//! named, its published settings go in front of what lies below that place, and behind what is said there.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use flow::checkpoint::read_bounded;
use flow::usage::Usage;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::config::AlignConfig;
use super::layers::{Layer, Layers, Origin};
use super::schema::{Fault, Schema, meant};
use crate::algorithm;

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../presets/", $name, ".toml")))),*]
    };
}

/// Presets of `ng-train align`.
pub const ALIGN_PRESETS: [(&str, &str); 38] = presets![
    "neighbor",
    "neighbor-plus",
    "neighbor-paper-literal",
    "neighbor-sde-matched",
    "neighbor-ar-copo",
    "dance-grpo",
    "flow-grpo",
    "flow-grpo-fast",
    "mix-grpo",
    "mix-grpo-flash",
    "mix-grpo-flash-star",
    "branch-grpo",
    "diffusion-nft",
    "flow-dppo",
    "v-grpo",
    "awm",
    "dgpo",
    "refl",
    "draft-lv",
    "signs",
    "signs-plus",
    "signs-paper-literal",
    "signs-sde-matched",
    "signs-ar-copo",
    "signs-dance-grpo",
    "signs-flow-grpo",
    "signs-flow-grpo-fast",
    "signs-mix-grpo",
    "signs-mix-grpo-flash",
    "signs-mix-grpo-flash-star",
    "signs-branch-grpo",
    "signs-diffusion-nft",
    "signs-flow-dppo",
    "signs-v-grpo",
    "signs-awm",
    "signs-dgpo",
    "emoji",
    "table-1",
];

/// Where a configuration comes from.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// A name in the command's list of presets.
    Preset(&'a str),
    /// A TOML file.
    File(&'a Path),
}

/// Reads a configuration and replaces settings: `key` is dotted, `value` is TOML or else a string.
///
/// # Errors
/// [`Usage`] when the preset is unknown or a setting does not fit; otherwise when the file cannot be read.
/// One line that names the key, where it is said, and what would fit.
pub fn read<T: DeserializeOwned + JsonSchema>(
    source: &Source<'_>,
    presets: &[(&str, &str)],
    settings: &[String],
) -> Result<T> {
    let mut layers = gathered(source, presets, settings)?;
    let schema = Schema::of::<T>();
    if schema.entries().iter().any(|entry| entry.key == "algorithm") {
        with_algorithm(&mut layers)?;
    }
    parsed(&layers, &schema, &layers.merged()?)
}

fn parsed<T: DeserializeOwned>(layers: &Layers, schema: &Schema, table: &Table) -> Result<T> {
    schema.check(table).map_err(|fault| layers.blame(&fault))?;
    let text = toml::to_string(table).context("the settings are no TOML")?;
    toml::from_str(&text).map_err(|error| anyhow!("{}: {}", layers.name(), error.message()))
}

/// A run that was read, and where each of its settings is from.
pub(crate) struct Run {
    pub(crate) config: AlignConfig,
    /// What the algorithm replaced and left out of settings that were meant for another.
    pub(crate) notes: Vec<String>,
    layers: Layers,
}

impl Run {
    /// Where `key` is said.
    pub(crate) fn origin(&self, key: &str) -> Option<String> {
        self.layers.origin(key)
    }
}

/// Reads and checks a run.
///
/// # Errors
/// As [`read`]; and where a setting is out of range, or the algorithm does not read it.
pub(crate) fn align(source: &Source<'_>, settings: &[String]) -> Result<Run> {
    let mut layers = gathered(source, &ALIGN_PRESETS, settings)?;
    let schema = Schema::of::<AlignConfig>();
    let place = with_algorithm(&mut layers)?;
    let mut table = layers.merged()?;
    let mut config: AlignConfig = parsed(&layers, &schema, &table)?;
    config.group.validate().map_err(|error| layers.explained(&error))?;
    let (name, mut notes) = (config.training.algorithm.clone(), Vec::new());
    for (index, layer) in layers.all().enumerate() {
        for (key, value) in layer.leaves() {
            let why = if index == place { None } else { config.ignores(&key)? };
            let cause = config.leaves_unread(&key);
            if let Some(why) = why.as_ref().filter(|_| layers.is_asked(index, cause, place)) {
                let what = match cause {
                    "algorithm" => format!("changes nothing under {name}: {why}"),
                    _ => format!("changes nothing: {why}"),
                };
                return Err(layers.blame(&Fault { key, what }));
            }
            let brought =
                layers[place].get(&key).filter(|brought| index < place && **brought != value);
            if why.is_some() && layers.is_last(index, &key) {
                remove(&mut table, &key);
                if cause == "algorithm" {
                    notes.push(format!("{key} = {value} of {} is left out", layer.origin));
                }
            } else if let Some(brought) = brought {
                let of = &layer.origin;
                notes.push(format!("{key} = {brought} in place of {value} of {of}"));
            }
        }
    }
    if table != layers.merged()? || !notes.is_empty() {
        config = parsed(&layers, &schema, &table)?;
    }
    config.validate().map_err(|error| layers.explained(&error))?;
    let is_asked = matches!(layers[place + 1].origin, Origin::File(_) | Origin::Set(_));
    let notes = if is_asked && !notes.is_empty() {
        vec![format!("algorithm {name} brings its authors' settings: {}", notes.join("; "))]
    } else {
        Vec::new()
    };
    Ok(Run { config, notes, layers })
}

/// Every setting of a configuration that is no run, defaults included, and where they are said.
///
/// # Errors
/// As [`read`].
pub(crate) fn resolved<T: DeserializeOwned + JsonSchema + Serialize>(
    source: &Source<'_>,
    presets: &[(&str, &str)],
    settings: &[String],
    validate: impl Fn(&T) -> Result<()>,
) -> Result<(Table, Layers)> {
    let layers = gathered(source, presets, settings)?;
    let config: T = parsed(&layers, &Schema::of::<T>(), &layers.merged()?)?;
    validate(&config).map_err(|error| Usage(error.to_string()))?;
    Ok((Table::try_from(config)?, layers))
}

/// The key of a single setting, KEY=VALUE.
pub(crate) fn key(setting: &str) -> &str {
    setting.split('=').next().unwrap_or_default().trim()
}

/// Takes `key` out of `table`.
pub(crate) fn remove(table: &mut Table, key: &str) {
    match key.split_once('.') {
        None => _ = table.remove(key),
        Some((first, rest)) => {
            if let Some(Value::Table(below)) = table.get_mut(first) {
                remove(below, rest);
                if below.is_empty() {
                    table.remove(first);
                }
            }
        }
    }
}

/// Bases, the configuration itself, and single settings, from the bottom to the top.
fn gathered(source: &Source<'_>, presets: &[(&str, &str)], settings: &[String]) -> Result<Layers> {
    let (origin, text) = match source {
        Source::Preset(name) => {
            (Origin::Preset((*name).to_owned()), preset(name, presets).map_err(Usage)?.to_owned())
        }
        Source::File(path) => {
            let text = String::from_utf8(read_bounded(path)?)
                .with_context(|| format!("{}: not UTF-8", path.display()))?;
            (Origin::File(path.to_path_buf()), text)
        }
    };
    let mut top = Layer::parsed(origin, text)?;
    let mut layers = Vec::new();
    while let Some(base) = top.take("base") {
        let said = &top.origin;
        let wrong = |what: String| Usage(format!("{said}: base: {what}"));
        let base =
            base.as_str().ok_or_else(|| wrong("the name of a preset belongs here".into()))?;
        let text = preset(base, presets).map_err(wrong)?;
        if layers.len() > presets.len() {
            bail!(wrong("they go round in a circle".into()));
        }
        let below = Layer::parsed(Origin::Preset(base.to_owned()), text.to_owned())?;
        layers.push(std::mem::replace(&mut top, below));
    }
    layers.push(top);
    layers.reverse();
    layers.extend(settings.iter().map(|setting| Layer::set(setting)).collect::<Result<Vec<_>>>()?);
    Ok(Layers::new(layers))
}

/// Puts the published settings of the algorithm below the place that names it, and says where they are.
fn with_algorithm(layers: &mut Layers) -> Result<usize> {
    let named = layers.all().rposition(|layer| layer.get("algorithm").is_some());
    let name = named.and_then(|index| layers[index].get("algorithm").cloned());
    let name = match &name {
        Some(Value::String(name)) => name.as_str(),
        None => algorithm::DEFAULT,
        // The schema refuses it.
        Some(_) => return Ok(0),
    };
    let Ok(text) = algorithm::named(name) else {
        let what = format!("there is no {name:?}{}", meant(name, algorithm::all().map(|(n, _)| n)));
        return Err(layers.blame(&Fault { key: "algorithm".to_owned(), what }));
    };
    let first_set = layers.all().position(|layer| matches!(layer.origin, Origin::Set(_)));
    let place = named.map_or(0, |index| first_set.map_or(index, |first| index.min(first)));
    layers.insert(place, Layer::parsed(Origin::Algorithm(name.to_owned()), text.to_owned())?);
    Ok(place)
}

fn preset<'a>(name: &str, presets: &[(&str, &'a str)]) -> Result<&'a str, String> {
    let found = presets.iter().find(|(known, _)| *known == name);
    let known = || presets.iter().map(|(known, _)| *known);
    found
        .map(|&(_, text)| text)
        .ok_or_else(|| format!("there is no preset {name:?}{}", meant(name, known())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::config::AlignConfig;

    fn preset(settings: &[&str]) -> Result<AlignConfig> {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        read(&Source::Preset("signs"), &ALIGN_PRESETS, &settings)
    }

    /// B, optimiser steps an iteration and the level of the noise.
    fn numbers(config: &AlignConfig) -> (usize, usize, f64) {
        let setting = config.setting().unwrap();
        (setting.n_anchors, setting.n_updates, config.methods.sde.level)
    }

    #[test]
    fn every_preset_reads() {
        for (name, _) in ALIGN_PRESETS {
            let source = Source::Preset(name);
            read::<AlignConfig>(&source, &ALIGN_PRESETS, &[]).unwrap().validate().unwrap();
        }
    }

    #[test]
    fn one_line_changes_the_algorithm_and_what_is_said_stays() {
        let signs = preset(&[]).unwrap();
        assert_eq!(numbers(&signs), (4, 1, 0.7));
        let dance = preset(&["algorithm=dance-grpo"]).unwrap();
        assert_eq!(numbers(&dance), (12, 3, 0.3));
        assert!(!dance.group.advantage.rescale && (dance.optimizer.eps - 1e-8).abs() < 1e-12);
        assert_eq!(dance.optimizer.learning_rate, signs.optimizer.learning_rate);
        let louder = preset(&["algorithm=dance-grpo", "sde.level=0.5", "updates=2"]).unwrap();
        assert_eq!(numbers(&louder), (12, 2, 0.5));
        let message = preset(&["algorithm=dance"]).unwrap_err().to_string();
        assert!(message.contains("dance-grpo") && message.contains("diffusion-nft"), "{message}");
        for (name, _) in algorithm::all() {
            preset(&[&format!("algorithm={name}")]).unwrap();
        }
    }

    #[test]
    fn a_file_may_say_only_what_differs_from_a_preset() {
        let folder = tempfile::tempdir().unwrap();
        let read_text = |text: &str| {
            let path = folder.path().join("mine.toml");
            std::fs::write(&path, text).unwrap();
            read::<AlignConfig>(&Source::File(&path), &ALIGN_PRESETS, &[])
        };
        let mine = "base = 'signs-dance-grpo'\niterations = 3\n[rollout]\nsteps = 9";
        let config = read_text(mine).unwrap();
        assert_eq!(
            (config.iterations, config.group.rollout.steps, config.group.rollout.batch),
            (3, 9, 96)
        );
        assert_eq!(config.training.algorithm, "dance-grpo");
        let message = read_text("base = 'sings'").unwrap_err().to_string();
        assert!(message.contains("signs"), "{message}");
        assert!(read_text("base = 3").is_err());
    }

    #[test]
    fn settings_replace_values() {
        let config = preset(&["iterations=7", "output=out/x", "rewards.0.weight=-1"]).unwrap();
        assert_eq!((config.iterations, config.group.rewards[0].weight), (7, -1.0));
        assert_eq!(config.output, Path::new("out/x"));
    }

    fn refused(settings: &[&str]) -> String {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        let error = align(&Source::Preset("signs"), &settings).err().expect("it is refused");
        assert!(error.is::<Usage>(), "{error:#}");
        format!("{error:#}")
    }

    #[test]
    fn mistakes_are_named_with_what_would_fit() {
        for (setting, says) in [
            ("iterationz=7", "iterationz: there is no such setting: did you mean iterations?"),
            ("iterations=many", "iterations: \"many\" where a whole number from 0 up belongs"),
            ("iterations=-3", "iterations: -3 where a whole number from 0 up belongs"),
            ("rollout.stepz=3", "rollout.stepz: there is no such setting: did you mean steps?"),
            (
                "rollout.size=[1, 2, 3]",
                "rollout.size: [1, 2, 3] where a list of 2 of: whole number",
            ),
            ("optimizer.learning_rate=fast", "optimizer.learning_rate: \"fast\" where a number"),
            ("neighbor.distance=max", "neighbor.distance: there is no \"max\""),
            ("rollout.solver=ddim", "rollout.solver: there is no \"ddim\"; there is dpmpp-2m, "),
            ("rewards.0.kind=orc", "rewards.0.kind: there is no \"orc\": did you mean ocr?"),
            (
                "rewards=[{name = 'j', kind = 'jpeg', weight = 1}]",
                "rewards.0.prefer: missing: one of",
            ),
            ("anchors=99", "anchors = 99: from 1 to group_size = 12"),
            ("algorithm=dance-grop", "there is no \"dance-grop\": did you mean dance-grpo?"),
            ("validation.best=x", "validation.best = \"x\": no reward or judge of that name"),
            (
                "sde.level=0.9",
                "sde.level: changes nothing under neighbor: the algorithm does not read it",
            ),
        ] {
            let message = refused(&[setting]);
            assert!(message.starts_with(&format!("--set {setting}: ")), "{message}");
            assert!(
                message.contains(says) && !message.contains('\n'),
                "{says:?} is not in {message:?}"
            );
        }
        assert!(preset(&["iterations"]).is_err());
        let unknown = read::<AlignConfig>(&Source::Preset("sings"), &ALIGN_PRESETS, &[]);
        assert!(unknown.unwrap_err().to_string().contains("did you mean signs?"));
    }

    /// What a preset says for validations is no mistake of someone who wants none.
    #[test]
    fn what_leaves_a_setting_unread_is_to_blame_only_below_it() {
        let of = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
            align(&Source::Preset("signs"), &settings)
        };
        let without = of(&["validate_every=0"]).unwrap();
        assert!(without.notes.is_empty(), "{:?}", without.notes);
        let resolved = without.config.resolved().unwrap();
        assert!(!resolved.contains_key("validation"), "{resolved}");
        for settings in [
            &["validate_every=0", "validation.count=3"][..],
            &["validation.count=3", "validate_every=0"],
        ] {
            let said = of(settings).err().unwrap().to_string();
            assert!(
                said.contains("--set validation.count=3: validation.count: changes nothing: "),
                "{said}"
            );
        }
        let said =
            of(&["advantage.rescale=false", "advantage.quasi_norm=1"]).err().unwrap().to_string();
        assert!(said.contains("divides by no norm"), "{said}");
    }

    #[test]
    fn mistakes_in_a_file_have_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        for (text, says) in [
            ("base = 'signs'\n\niterations = 'x'", "line 3: iterations: \"x\""),
            ("base = 'signs'\n[optimizer]\nlearning_rat = 1", "line 3: optimizer.learning_rat"),
            ("base = 'signs'\n[sde]\nlevel = 0.3", "line 3: sde.level: changes nothing"),
            (
                "base = 'signs'\n[[rewards]]\nname = 'a'\n[[rewards]]\nkind = 'jpg'",
                "rewards.0.kind",
            ),
            ("base = 'signs'\ngroup_size = 1", "line 2: group_size = 1: from 2"),
            ("base = 'nope'", "mine.toml: base: there is no preset \"nope\""),
            ("iterations = 3", "model: missing"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = format!("{:#}", align(&Source::File(&path), &[]).err().unwrap());
            assert!(message.contains(says) && message.contains("mine.toml"), "{says}: {message}");
        }
    }

    #[test]
    fn an_algorithm_brings_its_rollout_and_says_so() {
        let settings = ["algorithm=dance-grpo".to_owned(), "rollout.batch=7".to_owned()];
        let run = align(&Source::Preset("signs"), &settings).unwrap();
        let rollout = &run.config.group.rollout;
        assert_eq!((&*rollout.solver, rollout.steps, rollout.batch), ("euler", 25, 7));
        let note = run.notes.join("\n");
        assert!(note.contains("rollout.steps = 25 in place of 8 of preset signs"), "{note}");
        assert!(note.contains("sigma = 0.5 of preset signs is left out"), "{note}");
        assert_eq!(run.origin("rollout.steps").as_deref(), Some("algorithm dance-grpo"));
        assert!(align(&Source::Preset("signs-dance-grpo"), &[]).unwrap().notes.is_empty());
    }

    /// What a run leaves in its folder can be given to another.
    /// What has no base is an addition to one.
    #[test]
    fn settings_that_documents_show_are_read() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        let mut n_shown = 0;
        for entry in std::fs::read_dir(docs).unwrap() {
            let document = entry.unwrap().path();
            let text = std::fs::read_to_string(&document).unwrap_or_default();
            for shown in text.split("```toml\n").skip(1) {
                let shown = shown.split("```").next().unwrap_or_default();
                let base = if shown.contains("base = ") { "" } else { "base = \"signs\"\n" };
                std::fs::write(&path, format!("{base}{shown}")).unwrap();
                if let Err(error) = align(&Source::File(&path), &[]) {
                    panic!("{}: {error:#}", document.display());
                }
                n_shown += 1;
            }
        }
        assert!(n_shown > 4, "{n_shown}");
    }

    #[test]
    fn resolved_settings_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        for (name, _) in ALIGN_PRESETS {
            let resolved = align(&Source::Preset(name), &[]).unwrap().config.resolved().unwrap();
            std::fs::write(&path, toml::to_string(&resolved).unwrap()).unwrap();
            let again = align(&Source::File(&path), &[]).unwrap().config.resolved().unwrap();
            assert_eq!(resolved, again, "{name}");
        }
    }
}
