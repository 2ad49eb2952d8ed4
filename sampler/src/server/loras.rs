//! LoRAs by name: which are there, loading and letting go while the server runs.
//!
//! Files come from one folder that the server was started with; clients name them and never their paths.

use std::{fs, path::Path, sync::Arc};

use axum::{
    Json,
    extract::{Path as Named, Query, State},
    http::StatusCode,
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{fields::Fields, refusal::Refusal, service::Service};

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
    let Some(folder) = service.loras.clone() else {
        let message = "the server was started without --loras DIR";
        return Err(Refusal::new(StatusCode::CONFLICT, "no_lora_folder", message));
    };
    let file = folder.join(format!("{name}.{EXTENSION}"));
    if !is_plain(&name) || !file.is_file() {
        let message =
            format!("name: no LoRA {name:?}; there are {}", available(&folder).join(", "));
        let param = Some("name".to_owned());
        let refusal = Refusal::new(StatusCode::NOT_FOUND, "lora_not_found", message);
        return Err(Refusal { param, ..refusal });
    }
    let export = service.cards[model].export.clone();
    let called = name.clone();
    // Reading it takes a while, and the server's threads are few.
    let loaded = tokio::task::spawn_blocking(move || export.load_lora(&called, &file)).await;
    match loaded {
        Ok(Ok(adapter)) => Ok(Json(
            json!({"name": name, "model": service.cards[model].name, "notes": adapter.lines}),
        )),
        Ok(Err(error)) => {
            Err(Refusal::field("name", "lora_not_usable", format!("name: {error:#}")))
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

/// Whether a name stays in its folder.
fn is_plain(name: &str) -> bool {
    let known = |c: char| c.is_alphanumeric() || "-_. ".contains(c);
    !name.is_empty() && !name.starts_with('.') && name.chars().all(known)
}
