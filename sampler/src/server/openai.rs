//! The OpenAI images API: `POST /v1/images/generations` and `GET /v1/models`, with the names that
//! vLLM-Omni adds at top level.
//!
//! Every field is served, read and documented as without effect, or refused by name; docs/serve.md has
//! the list.

use std::{sync::Arc, time::UNIX_EPOCH};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use flow::solver::{SOLVERS, Solver};
use serde_json::{Map, Value, json};

use crate::request::Request;

use super::{
    app::RequestId,
    ask::{Ask, Limits, Names},
    encoded::Encoding,
    events,
    fields::Fields,
    job::{Board, Job, Source, State as JobState},
    loras,
    refusal::Refusal,
    service::{Service, Ticket},
};

const NAMES: Names =
    Names { size: "size", steps: "num_inference_steps", count: "n", guidance: "guidance_scale" };

/// `GET /v1/models`.
pub async fn models(State(service): State<Arc<Service>>) -> Json<Value> {
    let data: Vec<Value> = (0..service.cards.len()).map(|index| card(&service, index)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{name}`.
pub async fn model(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, Refusal> {
    let index = service.model(Some(&name))?;
    Ok(Json(card(&service, index)))
}

fn card(service: &Service, index: usize) -> Value {
    let card = &service.cards[index];
    json!({"id": card.name, "object": "model", "created": card.created, "owned_by": "ng-sample"})
}

/// `POST /v1/images/generations`.
pub async fn generate(
    State(service): State<Arc<Service>>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    fields: Fields,
) -> Result<Response, Refusal> {
    let wish = Wish::read(fields, service.limits)?;
    let model = service.model(wish.model.as_deref())?;
    loras::ensure(&service, model, &wish.ask.image.loras).await?;
    let job = service.submit(model, wish.ask, NAMES, Source::OpenAi, &request_id)?;
    let ticket = Ticket { service, job };
    let look = wish.look;
    if wish.stream {
        return Ok(events::stream(ticket, move |job, board, seen| {
            stream_events(job, board, &look, seen)
        }));
    }
    let board = ticket.job.ended().await;
    match &board.state {
        JobState::Done => Ok(Json(response(&ticket.job, &board, &look)).into_response()),
        state => Err(unfinished(state)),
    }
}

/// Why a job that ended has no images.
pub fn unfinished(state: &JobState) -> Refusal {
    match state {
        JobState::Failed(why) => Refusal::failed(format!("the image could not be made: {why}")),
        _ => Refusal::failed("the image was cancelled"),
    }
}

/// A request's fields.
struct Wish {
    model: Option<String>,
    ask: Ask,
    stream: bool,
    look: Look,
}

const QUALITIES: [&str; 6] = ["auto", "low", "medium", "high", "standard", "hd"];

/// What responses repeat of the request.
#[derive(Clone, Debug)]
struct Look {
    quality: &'static str,
    background: &'static str,
}

impl Wish {
    fn read(mut fields: Fields, limits: Limits) -> Result<Self, Refusal> {
        let f = &mut fields;
        let prompt = f.text("prompt")?.ok_or_else(|| {
            Refusal::field("prompt", "missing_required_parameter", "prompt is missing")
        })?;
        let model = f.text("model")?;
        let count = f.integer(NAMES.count, limits.image_range())?.map(|n| n as usize);
        let size = f.text("size")?.map(|text| size(f, &text)).transpose()?.flatten();
        let stream = f.flag("stream")?.unwrap_or(false);
        let partial = f.integer("partial_images", 0..=3)?.unwrap_or(0) as usize;
        if partial > 0 && !stream {
            return Err(f.invalid("partial_images", "it needs stream: true"));
        }
        if stream && count.is_some_and(|n| n > 1) {
            let why = "a stream carries one image; send n requests, or leave stream out";
            return Err(f.invalid("n", why));
        }
        let look = look(f)?;
        without_effect(f)?;
        refuse_what_is_not_served(f)?;
        let image = Request {
            prompt,
            width: size.map(|(width, _)| width),
            height: size.map(|(_, height)| height),
            steps: f.integer(NAMES.steps, limits.step_range())?.map(|n| n as usize),
            solver: solver(f, "solver")?,
            seed: seed(f, "seed")?,
            guidance: f.number(NAMES.guidance, 0.0..=20.0)?.map(|scale| scale as f32),
            shift: f.number("shift", 0.01..=100.0)?,
            loras: lora(f)?,
            ..Request::default()
        };
        let ask = Ask { image, count, encoding: encoding(f)?, previews: partial };
        fields.finish()?;
        Ok(Self { model, ask, stream, look })
    }
}

/// `auto` is `None`.
fn size(fields: &Fields, text: &str) -> Result<Option<(usize, usize)>, Refusal> {
    if text == "auto" {
        return Ok(None);
    }
    let side = |text: &str| {
        text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<usize>().ok())?
    };
    let sides =
        text.split_once('x').and_then(|(width, height)| Some((side(width)?, side(height)?)));
    let wrong = || fields.invalid("size", &format!("{text:?} is not auto or WIDTHxHEIGHT"));
    sides.map(Some).ok_or_else(wrong)
}

fn look(f: &mut Fields) -> Result<Look, Refusal> {
    let quality = f.choice("quality", &QUALITIES)?;
    let quality = quality.filter(|name| ["low", "medium", "high"].contains(name)).unwrap_or("auto");
    let background = f.choice("background", &["auto", "opaque", "transparent"])?;
    if background == Some("transparent") {
        let why = "transparent is not served: the images have no alpha channel";
        return Err(f.invalid("background", why));
    }
    let format = f.choice("response_format", &["b64_json", "url"])?;
    if format == Some("url") {
        let why = "url is not served: no files are kept; use b64_json";
        return Err(f.invalid("response_format", why));
    }
    Ok(Look { quality, background: "opaque" })
}

/// Fields that are checked and change nothing here.
fn without_effect(f: &mut Fields) -> Result<(), Refusal> {
    f.choice("moderation", &["auto", "low"])?;
    f.choice("style", &["vivid", "natural"])?;
    f.text("user")?;
    f.choice("generator_device", &["cpu", "cuda"])?;
    f.flag("vae_use_tiling")?;
    Ok(())
}

/// Fields whose neutral value is all that a FLUX export can do.
fn refuse_what_is_not_served(f: &mut Fields) -> Result<(), Refusal> {
    if f.text("negative_prompt")?.is_some_and(|text| !text.is_empty()) {
        let why = "not served: the model has no classifier-free guidance; leave it out";
        return Err(f.invalid("negative_prompt", why));
    }
    if f.number("true_cfg_scale", 0.0..=20.0)?.is_some_and(|scale| scale != 1.0) {
        let why = "only 1 is served: the model has no classifier-free guidance";
        return Err(f.invalid("true_cfg_scale", why));
    }
    Ok(())
}

/// A solver by its name.
pub fn solver(f: &mut Fields, field: &str) -> Result<Option<Solver>, Refusal> {
    let Some(name) = f.text(field)? else { return Ok(None) };
    let solver = Solver::by_name(&name).ok_or_else(|| {
        let names = SOLVERS.map(|(name, _)| name).join(", ");
        f.invalid(field, &format!("{name:?} is not one of {names}"))
    })?;
    Ok(Some(solver))
}

/// A seed; −1 is a new one each time.
pub fn seed(f: &mut Fields, field: &str) -> Result<Option<u64>, Refusal> {
    let seed = f.integer(field, -1..=i128::from(u64::MAX))?;
    Ok(seed.and_then(|seed| u64::try_from(seed).ok()))
}

/// Largest scale of a LoRA, either way.
pub const MAX_SCALE: f64 = 10.0;

/// `lora: {name, scale}`.
pub fn lora(f: &mut Fields) -> Result<Vec<(String, f64)>, Refusal> {
    let Some(mut lora) = f.object("lora")? else { return Ok(Vec::new()) };
    let name = lora.text("name")?;
    if lora.text("path")?.is_some() {
        let why = "files are not read for clients; give the name of one in the server's folder";
        return Err(lora.invalid("path", why));
    }
    let scale = lora.number("scale", -MAX_SCALE..=MAX_SCALE)?.unwrap_or(1.0);
    let name = name.ok_or_else(|| lora.invalid("name", "it is missing"))?;
    lora.finish()?;
    Ok(vec![(name, scale)])
}

/// `output_format` and `output_compression`.
fn encoding(f: &mut Fields) -> Result<Encoding, Refusal> {
    let format = f.choice("output_format", &["png", "jpeg", "webp"])?.unwrap_or("png");
    let quality = f.integer("output_compression", 0..=100)?.map(|n| n as u8);
    match (format, quality) {
        ("jpeg", quality) => Ok(Encoding::Jpeg(quality.unwrap_or(100).max(1))),
        (_, Some(0..=99)) => {
            let why = format!("{format} is written without loss; only jpeg can be below 100");
            Err(f.invalid("output_compression", &why))
        }
        ("webp", _) => Ok(Encoding::WebP),
        _ => Ok(Encoding::Png),
    }
}

fn response(job: &Job, board: &Board, look: &Look) -> Value {
    let created = job.created.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let data: Vec<Value> = board
        .images
        .iter()
        .flatten()
        .zip(job.drawing.first.seed..)
        .map(|(file, seed)| json!({"b64_json": BASE64_STANDARD.encode(file), "seed": seed}))
        .collect();
    let mut body = json!({
        "created": created,
        "data": data,
        "background": look.background,
        "output_format": job.drawing.encoding.name(),
        "size": job.drawing.size_name(),
        "usage": usage(),
    });
    if !job.drawing.first.notices.is_empty() {
        body["notices"] = job.drawing.first.notices.clone().into();
    }
    // Here, unlike in a stream, `auto` is not among the values.
    if look.quality != "auto" {
        body["quality"] = look.quality.into();
    }
    body
}

/// Tokens are not what is paid for here, but clients need the object.
fn usage() -> Value {
    json!({
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    })
}

/// What is new on the board since `seen` partial images were sent.
fn stream_events(job: &Job, board: &Board, look: &Look, seen: &mut usize) -> Vec<events::Frame> {
    let of = |kind: &str, file: &Bytes| {
        let created = job.created.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut event = Map::new();
        event.insert("type".into(), format!("image_generation.{kind}").into());
        event.insert("b64_json".into(), BASE64_STANDARD.encode(file).into());
        event.insert("created_at".into(), created.into());
        event.insert("size".into(), job.drawing.size_name().into());
        event.insert("quality".into(), look.quality.into());
        event.insert("background".into(), look.background.into());
        event.insert("output_format".into(), job.drawing.encoding.name().into());
        event
    };
    let mut frames = Vec::new();
    for preview in &board.previews[*seen..] {
        let mut event = of("partial_image", &preview.file);
        event.insert("partial_image_index".into(), (*seen).into());
        frames.push(events::Frame::named("image_generation.partial_image", &event.into()));
        *seen += 1;
    }
    match &board.state {
        JobState::Queued | JobState::Running => {}
        JobState::Done => {
            for file in board.images.iter().flatten() {
                let mut event = of("completed", file);
                event.insert("usage".into(), usage());
                event.insert("seed".into(), job.drawing.first.seed.into());
                frames.push(events::Frame::named("image_generation.completed", &event.into()));
            }
            frames.push(events::Frame::done());
        }
        state => {
            let refusal = unfinished(state);
            frames.push(events::Frame::named("error", &json!({"error": refusal.object()})));
        }
    }
    frames
}
