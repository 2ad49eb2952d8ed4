//! Our own API: a job is taken in at once, watched while it is drawn, and cancelled in any state.

use std::{sync::Arc, time::UNIX_EPOCH};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
    http::{
        StatusCode,
        header::{CACHE_CONTROL, CONTENT_TYPE, LOCATION},
    },
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::request::Request;

use super::{
    app::RequestId,
    ask::{Ask, Names},
    encoded::Encoding,
    events::{self, Frame},
    fields::Fields,
    job::{Board, Job, Source, State as JobState},
    loras,
    openai::{lora, seed, solver},
    refusal::Refusal,
    service::Service,
    store::Found,
};

const NAMES: Names = Names { size: "width", steps: "steps", count: "count", guidance: "guidance" };
/// Most previews of an image.
const MAX_PREVIEWS: i128 = 16;

/// `POST /api/jobs`: 202.
pub async fn create(
    State(service): State<Arc<Service>>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    mut fields: Fields,
) -> Result<Response, Refusal> {
    let (f, limits) = (&mut fields, service.limits);
    let model = f.text("model")?;
    let prompt = f.text("prompt")?;
    let prompt = prompt.ok_or_else(|| f.invalid("prompt", "it is missing"))?;
    let side = |f: &mut Fields, name| f.integer(name, 1..=1 << 20).map(|n| n.map(|n| n as usize));
    let image = Request {
        prompt,
        width: side(f, "width")?,
        height: side(f, "height")?,
        steps: f.integer(NAMES.steps, limits.step_range())?.map(|n| n as usize),
        solver: solver(f, "solver")?,
        seed: seed(f, "seed")?,
        guidance: f.number(NAMES.guidance, 0.0..=100.0)?.map(|scale| scale as f32),
        shift: f.number("shift", 0.01..=100.0)?,
        loras: lora(f)?,
        ..Request::default()
    };
    let ask = Ask {
        image,
        count: f.integer(NAMES.count, limits.image_range())?.map(|n| n as usize),
        encoding: encoding(f)?,
        previews: f.integer("previews", 0..=MAX_PREVIEWS)?.unwrap_or(0) as usize,
    };
    fields.finish()?;
    let model = service.model(model.as_deref())?;
    loras::ensure(&service, model, &ask.image.loras).await?;
    let job = service.submit(model, ask, NAMES, Source::Jobs, &request_id)?;
    let place = format!("/api/jobs/{}", job.id);
    Ok((StatusCode::ACCEPTED, [(LOCATION, place)], Json(status(&service, &job))).into_response())
}

/// `format` and `quality`.
fn encoding(f: &mut Fields) -> Result<Encoding, Refusal> {
    let format = f.choice("format", &["png", "jpeg", "webp"])?.unwrap_or("png");
    let quality = f.integer("quality", 1..=100)?.map(|n| n as u8);
    match (format, quality) {
        ("jpeg", quality) => Ok(Encoding::Jpeg(quality.unwrap_or(95))),
        (_, Some(_)) => Err(f.invalid("quality", &format!("{format} is written without loss"))),
        ("webp", None) => Ok(Encoding::WebP),
        (_, None) => Ok(Encoding::Png),
    }
}

/// `GET /api/jobs`.
pub async fn list(State(service): State<Arc<Service>>) -> Json<Value> {
    let jobs = service.store.of(Source::Jobs);
    let jobs: Vec<Value> = jobs.iter().map(|job| status(&service, job)).collect();
    Json(json!({"jobs": jobs}))
}

/// `GET /api/jobs/{id}`.
pub async fn get(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    let job = find(&service, &id)?;
    Ok(Json(status(&service, &job)))
}

/// `POST /api/jobs/{id}/cancel` and `DELETE /api/jobs/{id}`: 200, or 409 when it has ended.
pub async fn cancel(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refusal> {
    let job = find(&service, &id)?;
    if service.cancel(&job, "cancelled") {
        return Ok(Json(status(&service, &job)));
    }
    let message = format!("job {id} has ended: {}", job.see(|board| board.state.name()));
    Err(Refusal::new(StatusCode::CONFLICT, "job_ended", message))
}

/// `GET /api/jobs/{id}/images/{index}`: the file itself.
pub async fn image(
    State(service): State<Arc<Service>>,
    Path((id, index)): Path<(String, usize)>,
) -> Result<Response, Refusal> {
    let job = find(&service, &id)?;
    let file = job.see(|board| board.images.get(index).cloned().flatten()).ok_or_else(|| {
        let message = format!("job {id} has no image {index}, or not yet");
        Refusal::new(StatusCode::NOT_FOUND, "no_image", message)
    })?;
    job.fetched(index);
    let headers =
        [(CONTENT_TYPE, job.drawing.encoding.media_type()), (CACHE_CONTROL, "private, immutable")];
    Ok((headers, file).into_response())
}

/// `GET /api/jobs/{id}/events`: `progress`, `preview` and one of `done`, `failed`, `cancelled`.
pub async fn progress(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let job = find(&service, &id)?;
    Ok(events::stream(job, move |job, board, seen| frames(&service, job, board, seen)))
}

fn frames(service: &Service, job: &Job, board: &Board, seen: &mut usize) -> Vec<Frame> {
    let media_type = job.drawing.encoding.media_type();
    let url = |file: &Bytes| format!("data:{media_type};base64,{}", BASE64_STANDARD.encode(file));
    let mut frames = Vec::new();
    for preview in &board.previews[*seen..] {
        let data = json!({"image": preview.image, "step": preview.step, "url": url(&preview.file)});
        frames.push(Frame::named("preview", &data));
        *seen += 1;
    }
    let name = match &board.state {
        JobState::Queued | JobState::Running => "progress",
        state => state.name(),
    };
    frames.push(Frame::named(name, &status_of(service, job, board)));
    frames
}

fn find(service: &Service, id: &str) -> Result<Arc<Job>, Refusal> {
    let (status, code, message) = match service.store.find(id) {
        Found::Job(job) => return Ok(job),
        Found::Gone => (StatusCode::GONE, "job_gone", format!("job {id} is no longer kept")),
        Found::Never => (StatusCode::NOT_FOUND, "job_not_found", format!("no job {id}")),
    };
    Err(Refusal::new(status, code, message))
}

fn status(service: &Service, job: &Job) -> Value {
    status_of(service, job, &job.board())
}

fn status_of(service: &Service, job: &Job, board: &Board) -> Value {
    let (drawing, image) = (&job.drawing, &job.drawing.first);
    let created = job.created.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let images: Vec<Value> = (board.images.iter().zip(image.seed..).enumerate())
        .map(|(index, (file, seed))| {
            let url = file.as_ref().map(|_| format!("/api/jobs/{}/images/{index}", job.id));
            json!({"seed": seed, "url": url})
        })
        .collect();
    let loras: Vec<Value> = (image.loras.iter())
        .map(|(lora, scale)| json!({"name": lora.name, "scale": scale}))
        .collect();
    let error = match &board.state {
        JobState::Failed(why) => Some(why),
        _ => None,
    };
    json!({
        "id": job.id,
        "state": board.state.name(),
        "created": created,
        "model": service.cards[drawing.model].name,
        "prompt": image.prompt,
        "width": image.width,
        "height": image.height,
        "steps": image.steps,
        "solver": image.solver.name(),
        "guidance": image.guidance,
        "shift": image.shift,
        "notices": image.notices,
        "loras": loras,
        "images_ahead": service.queue.ahead(&job.id),
        "step": board.step,
        "of": board.of,
        "seconds_left": board.seconds_left(),
        "seconds": board.started.map(|_| board.run_time().as_secs_f64()),
        "images": images,
        "error": error,
    })
}
