//! LoRAs by name: which are there, loading and letting go while the server runs.
//!
//! Files come from one folder that the server was started with; clients name them and never their paths.
//! A request that names one which is not loaded has it loaded first.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json,
    extract::{Path as Named, Query, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{ask::Card, fields::Fields, refusal::Refusal, service::Service};

const EXTENSION: &str = "safetensors";

/// What `GET` and `DELETE` take.
#[derive(Debug, Deserialize)]
pub struct Choice {
    model: Option<String>,
}

/// `GET /api/loras`: those that are loaded, and those that can be.
pub async fn list(State(service): State<Arc<Service>>) -> Json<Value> {
    let loaded: Vec<Value> = service
        .cards
        .iter()
        .map(|card| {
            json!({"model": card.name, "slots": card.has_slots(), "loras": card.export.loras()})
        })
        .collect();
    Json(json!({"loaded": loaded, "available": service.loras.as_deref().map(available)}))
}

/// `POST /api/loras`: loads the file of that name; one of the name that is loaded is replaced.
pub async fn load(
    State(service): State<Arc<Service>>,
    mut fields: Fields,
) -> Result<Json<Value>, Refusal> {
    let name = fields.text("name")?.ok_or_else(|| fields.invalid("name", "it is missing"))?;
    let model = service.model(fields.text("model")?.as_deref())?;
    fields.finish()?;
    let Some(folder) = &service.loras else {
        let message = "the server was started without --loras DIR";
        return Err(Refusal::new(StatusCode::CONFLICT, "no_lora_folder", message));
    };
    let Some(file) = file(folder, &name) else {
        let names = available(folder).join(", ");
        let message = format!("name: no LoRA {name:?}; there are: {names}");
        let refusal = Refusal::new(StatusCode::NOT_FOUND, "lora_not_found", message);
        return Err(Refusal { param: Some("name".to_owned()), ..refusal });
    };
    let card = &service.cards[model];
    let notes = read(card, &name, file, "name").await?;
    Ok(Json(json!({"name": name, "model": card.name, "notes": notes})))
}

/// Has those of `loras` loaded that model number `model` can take and has not.
///
/// # Errors
/// 400 with param `lora` when there is none of that name, or it is no LoRA of this model.
pub async fn ensure(
    service: &Service,
    model: usize,
    loras: &[(String, f64)],
) -> Result<(), Refusal> {
    let card = &service.cards[model];
    let loaded = card.export.loras();
    for (name, _) in loras.iter().filter(|(name, _)| card.has_slots() && !loaded.contains(name)) {
        let folder = service.loras.as_deref();
        let Some(file) = folder.and_then(|folder| file(folder, name)) else {
            let names = known(service, card).join(", ");
            let message = format!("lora: no LoRA {name:?}; there are: {names}");
            return Err(Refusal::field("lora", "lora_not_found", message));
        };
        read(card, name, file, "lora").await?;
    }
    Ok(())
}

/// Names that a request may give `card`: those that are loaded and those of the folder.
pub fn known(service: &Service, card: &Card) -> Vec<String> {
    if !card.has_slots() {
        return Vec::new();
    }
    let mut names = card.export.loras();
    names.extend(service.loras.as_deref().map(available).unwrap_or_default());
    names.sort();
    names.dedup();
    names
}

/// Loads `file` as `name`; what there is to say about it.
async fn read(card: &Card, name: &str, file: PathBuf, field: &str) -> Result<Vec<String>, Refusal> {
    let (export, called) = (card.export.clone(), name.to_owned());
    // Reading it takes a while, and the server's threads are few.
    let loaded = tokio::task::spawn_blocking(move || export.load_lora(&called, &file)).await;
    match loaded {
        Ok(Ok(adapter)) => Ok(adapter.lines.clone()),
        Ok(Err(error)) => {
            let why = format!("{error:#}").replace('\n', " ");
            Err(Refusal::field(field, "lora_not_usable", format!("{field}: {why}")))
        }
        Err(_) => Err(Refusal::failed("the LoRA could not be read")),
    }
}

/// `DELETE /api/loras/{name}`: lets go of it; jobs that have it keep it.
pub async fn unload(
    State(service): State<Arc<Service>>,
    Named(name): Named<String>,
    Query(choice): Query<Choice>,
) -> Result<Json<Value>, Refusal> {
    let card = &service.cards[service.model(choice.model.as_deref())?];
    if card.export.unload_lora(&name) {
        return Ok(Json(json!({"name": name, "model": card.name})));
    }
    let message = format!("model {} has no LoRA {name:?} loaded", card.name);
    Err(Refusal::new(StatusCode::NOT_FOUND, "lora_not_found", message))
}

/// Names of the files in `folder`, in order.
fn available(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let name = path.file_stem()?.to_str()?.to_owned();
            let is_lora = path.extension().is_some_and(|extension| extension == EXTENSION);
            (is_lora && is_plain(&name)).then_some(name)
        })
        .collect();
    names.sort();
    names
}

/// The file called `name` in `folder`.
fn file(folder: &Path, name: &str) -> Option<PathBuf> {
    let file = folder.join(format!("{name}.{EXTENSION}"));
    (is_plain(name) && file.is_file()).then_some(file)
}

/// Whether a name stays in its folder.
fn is_plain(name: &str) -> bool {
    let known = |c: char| c.is_alphanumeric() || "-_. ".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(known)
}
