//! What a picture or a model folder says about itself.

use std::{collections::BTreeMap, io::Write, path::Path};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::{export::Export, format, infotext::Infotext, networks};

/// Prints what is known of `path`, a picture of any program or a folder of an export.
///
/// # Errors
/// When it cannot be read or says nothing.
pub fn run(path: &Path, json: bool, mut lines: impl Write) -> Result<()> {
    if path.is_dir() {
        let known = folder(path)?;
        if json {
            return Ok(writeln!(lines, "{}", Value::Object(known))?);
        }
        for (name, value) in known {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            writeln!(lines, "{name}: {value}")?;
        }
        return Ok(());
    }
    let texts = format::texts(path)?;
    if texts.is_empty() {
        bail!("{} holds no parameters", path.display());
    }
    if json {
        return Ok(writeln!(lines, "{}", picture(&texts))?);
    }
    for (keyword, text) in &texts {
        match keyword.as_str() {
            "parameters" => writeln!(lines, "{text}")?,
            other => writeln!(lines, "{other}: {text}")?,
        }
    }
    Ok(())
}

/// The texts of a picture, and the parameters of A1111's kind taken apart.
fn picture(texts: &[(String, String)]) -> Value {
    let parameters = texts.iter().find(|(keyword, _)| keyword == "parameters");
    let parameters = parameters.map(|(_, text)| Infotext::parse(text));
    let texts: BTreeMap<&str, &str> = texts.iter().map(|(k, t)| (&**k, &**t)).collect();
    let parameters = parameters.map(|Infotext { prompt, negative, fields }| {
        let fields: serde_json::Map<String, Value> =
            fields.into_iter().map(|(name, value)| (name, value.into())).collect();
        json!({"prompt": prompt, "negative_prompt": negative, "fields": fields})
    });
    json!({"texts": texts, "parameters": parameters})
}

fn folder(path: &Path) -> Result<serde_json::Map<String, Value>> {
    let export = Export::open(path, None)?;
    let pipeline = &export.pipeline;
    let bytes = |component: &str| -> u64 {
        let folder = std::fs::read_dir(path.join(component)).into_iter().flatten();
        folder.filter_map(|entry| Some(entry.ok()?.path().metadata().ok()?.len())).sum()
    };
    let components = [
        networks::TEXT_ENCODER,
        networks::TEXT_ENCODER_2,
        networks::TRANSFORMER,
        networks::VAE_DECODER,
        networks::VAE_ENCODER,
    ];
    let megabytes = |component| format!("{:.1} MB", bytes(component) as f64 / 1e6);
    let mut known = serde_json::Map::new();
    let mut say = |name: &str, value: Value| known.insert(name.to_owned(), value);
    say("model", export.name.clone().into());
    for component in components {
        say(component, megabytes(component).into());
    }
    say("default size", format!("{0}x{0}", export.default_side()).into());
    say("embedded guidance", pipeline.transformer.guidance_embeds.into());
    let blocks = pipeline.transformer.n_blocks();
    say("blocks", blocks.into());
    say("text tokens", export.text_lengths()[1].into());
    let shift = pipeline.scheduler.grid(pipeline.latent_size(1024, 1024)?.tokens()).shift.factor();
    say("shift at 1024x1024", ((shift * 1e4).round() / 1e4).into());
    say("initial images", export.takes_images().into());
    if !export.description.precision.is_empty() {
        say("precision", export.description.precision.clone().into());
        say("target", export.description.target.clone().into());
    }
    for (name, scale) in &export.description.merged {
        say("merged", format!("{name} at {scale}").into());
    }
    Ok(known)
}
