//! The part of the A1111 web UI's API that clients use for text to image.
//!
//! Source of the shapes: `modules/api/models.py` of AUTOMATIC1111/stable-diffusion-webui.

use std::sync::{Arc, atomic::Ordering};

use axum::{
    Extension, Json,
    extract::{Query, State},
    response::{IntoResponse, Response},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use flow::solver::{SOLVERS, Solver};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{parameters::sampler_name, request::Request};

use super::{
    app::RequestId,
    ask::{Ask, Names},
    encoded::Encoding,
    fields::Fields,
    job::{Board, Job, Source, State as JobState},
    loras,
    openai::{MAX_SCALE, seed, unfinished},
    refusal::Refusal,
    service::{Service, Ticket},
};

const NAMES: Names =
    Names { size: "width", steps: "steps", count: "batch_size", guidance: "distilled_cfg_scale" };
/// The only schedule: the model's own.
const SCHEDULER: &str = "Automatic";
/// An older name of `sampler_name`, which goes before it.
const SAMPLER_INDEX: &str = "sampler_index";
/// What may only be off.
const OFF: [&str; 12] = [
    "restore_faces",
    "tiling",
    "enable_hr",
    "subseed_strength",
    "styles",
    "script_name",
    "script_args",
    "alwayson_scripts",
    "refiner_checkpoint",
    "firstpass_image",
    "save_images",
    "infotext",
];
/// What changes nothing for a model without classifier-free guidance, or while all of [`OFF`] is; the
/// response's `info` lists those that were sent.
const WITHOUT_EFFECT: [&str; 30] = [
    "cfg_scale",
    "negative_prompt",
    "subseed",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "do_not_save_samples",
    "do_not_save_grid",
    "eta",
    "denoising_strength",
    "s_min_uncond",
    "s_churn",
    "s_tmax",
    "s_tmin",
    "s_noise",
    "override_settings_restore_afterwards",
    "refiner_switch_at",
    "disable_extra_networks",
    "comments",
    "firstphase_width",
    "firstphase_height",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
];

/// A [`Refusal`] in this API's shape.
pub struct Error(Refusal);

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self(refusal)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let error = self.0.code.unwrap_or("error");
        let body =
            json!({"error": error, "detail": self.0.message, "body": "", "errors": self.0.message});
        self.0.with_body(body)
    }
}

/// `POST /sdapi/v1/txt2img`.
pub async fn txt2img(
    State(service): State<Arc<Service>>,
    Extension(RequestId(request_id)): Extension<RequestId>,
    fields: Fields,
) -> Result<Json<Value>, Error> {
    let wish = Wish::read(&service, fields)?;
    loras::ensure(&service, wish.model, &wish.ask.image.loras).await?;
    let job = service.submit(wish.model, wish.ask, NAMES, Source::Sdapi, &request_id)?;
    let ticket = Ticket { service, job };
    let board = ticket.job.ended().await;
    match &board.state {
        // As in the web UI, an interrupted job answers with the images it has.
        JobState::Done | JobState::Cancelled => {
            Ok(Json(response(&ticket, &board, wish.send_images, &wish.ignored)))
        }
        JobState::Queued | JobState::Running | JobState::Failed(_) => {
            Err(unfinished(&board.state).into())
        }
    }
}

/// What `progress` takes.
#[derive(Debug, Deserialize)]
pub struct ProgressQuery {
    #[serde(default)]
    skip_current_image: bool,
}

/// `GET /sdapi/v1/progress`: the job of this API that has been under way longest.
pub async fn progress(
    State(service): State<Arc<Service>>,
    Query(query): Query<ProgressQuery>,
) -> Json<Value> {
    let jobs = service.store.of(Source::Sdapi);
    let Some(job) = jobs.first() else {
        let state = state(None);
        return Json(json!({"progress": 0.0, "eta_relative": 0.0, "state": state,
                           "current_image": null, "textinfo": null}));
    };
    let board = job.board();
    let image = board.previews.last().filter(|_| !query.skip_current_image);
    Json(json!({
        "progress": board.step as f64 / board.of as f64,
        "eta_relative": board.seconds_left().unwrap_or(0.0),
        "state": state(Some((job, &board))),
        "current_image": image.map(|preview| BASE64_STANDARD.encode(&preview.file)),
        "textinfo": null,
    }))
}

/// `POST /sdapi/v1/interrupt`: stops the jobs of this API and of no other.
pub async fn interrupt(State(service): State<Arc<Service>>) -> Json<Value> {
    for job in service.store.of(Source::Sdapi) {
        service.cancel(&job, "cancelled");
    }
    Json(json!({}))
}

/// `GET /sdapi/v1/samplers`.
pub async fn samplers() -> Json<Value> {
    let sampler = |(name, solver): (&str, Solver)| json!({"name": sampler_name(solver), "aliases": [name], "options": {}});
    Json(SOLVERS.map(sampler).to_vec().into())
}

/// `GET /sdapi/v1/schedulers`.
pub async fn schedulers() -> Json<Value> {
    Json(json!([{"name": "automatic", "label": SCHEDULER, "aliases": null, "default_rho": -1.0,
                 "need_inner_model": false}]))
}

/// `GET /sdapi/v1/sd-models`. Folders stay unnamed: where they lie is nobody's business.
pub async fn sd_models(State(service): State<Arc<Service>>) -> Json<Value> {
    let model = |name: &str| {
        json!({"title": name, "model_name": name, "hash": null, "sha256": null, "filename": name,
               "config": null})
    };
    Json(service.cards.iter().map(|card| model(&card.name)).collect())
}

/// `GET /sdapi/v1/loras`: what a prompt's `<lora:NAME:SCALE>` may name, of any model.
pub async fn loras(State(service): State<Arc<Service>>) -> Json<Value> {
    let mut names: Vec<String> =
        service.cards.iter().flat_map(|card| loras::known(&service, card)).collect();
    names.sort();
    names.dedup();
    let lora = |name: &String| json!({"name": name, "alias": name, "path": name, "metadata": {}});
    Json(names.iter().map(lora).collect())
}

/// `GET /sdapi/v1/options`.
pub async fn options(State(service): State<Arc<Service>>) -> Json<Value> {
    let model = service.checkpoint.load(Ordering::Relaxed);
    Json(json!({"sd_model_checkpoint": service.cards[model].name, "samples_format": "png"}))
}

/// `POST /sdapi/v1/options`: the model of this API's requests that name none.
pub async fn set_options(
    State(service): State<Arc<Service>>,
    mut fields: Fields,
) -> Result<Json<Value>, Error> {
    let model = fields.text("sd_model_checkpoint")?;
    fields.choice("samples_format", &["png"])?;
    fields.finish()?;
    if let Some(name) = model {
        service.checkpoint.store(service.model(Some(&name))?, Ordering::Relaxed);
    }
    Ok(Json(Value::Null))
}

struct Wish {
    model: usize,
    ask: Ask,
    send_images: bool,
    /// What was sent of [`WITHOUT_EFFECT`], and [`SAMPLER_INDEX`] where it is another than the name.
    ignored: Vec<&'static str>,
}

impl Wish {
    fn read(service: &Service, mut fields: Fields) -> Result<Self, Refusal> {
        let (f, limits) = (&mut fields, service.limits);
        let side = |f: &mut Fields, name| f.integer(name, 1..=1 << 20);
        let images =
            |f: &mut Fields, name| f.integer(name, limits.image_range()).map(|n| n.unwrap_or(1));
        let count = images(f, NAMES.count)? * images(f, "n_iter")?;
        let (sampler, index) = (f.text("sampler_name")?, f.text(SAMPLER_INDEX)?);
        let is_overruled = sampler.is_some() && index.is_some() && sampler != index;
        let sampler = sampler.or(index);
        let typed = f.text("prompt")?.unwrap_or_default();
        let (prompt, loras) = extra_networks(&typed).map_err(|why| f.invalid("prompt", &why))?;
        let image = Request {
            prompt,
            loras,
            width: side(f, "width")?.map(|n| n as usize),
            height: side(f, "height")?.map(|n| n as usize),
            steps: f.integer(NAMES.steps, limits.step_range())?.map(|n| n as usize),
            solver: sampler.map(|name| solver(f, &name)).transpose()?,
            seed: seed(f, "seed")?,
            guidance: f.number(NAMES.guidance, 0.0..=100.0)?.map(|scale| scale as f32),
            ..Request::default()
        };
        let ask = Ask { image, count: Some(count as usize), encoding: Encoding::Png, previews: 3 };
        f.choice("scheduler", &[SCHEDULER, "automatic"])?;
        f.text("force_task_id")?;
        let send_images = f.flag("send_images")?.unwrap_or(true);
        for name in OFF {
            if f.take(name).is_some_and(|value| !is_off(&value)) {
                return Err(f.invalid(name, "it is not served and may only be off"));
            }
        }
        let sent = WITHOUT_EFFECT.into_iter().filter(|name| fields.take(name).is_some());
        let ignored = sent.chain(is_overruled.then_some(SAMPLER_INDEX)).collect();
        let model = model(service, &mut fields)?;
        fields.finish()?;
        Ok(Self { model, ask, send_images, ignored })
    }
}

/// A prompt without the web UI's `<lora:NAME:SCALE>`, and what they ask for.
///
/// # Errors
/// When one is of another kind, or has no number for a scale.
fn extra_networks(typed: &str) -> Result<(String, Vec<(String, f64)>), String> {
    let (mut prompt, mut loras, mut rest) = (String::new(), Vec::new(), typed);
    while let Some(at) = rest.find("<lora:") {
        let (before, tag) = rest.split_at(at);
        let Some((tag, after)) = tag.split_once('>') else { break };
        let (name, scale) = match tag["<lora:".len()..].split_once(':') {
            Some((name, scale)) => (name, scale.trim().parse().ok()),
            None => (&tag["<lora:".len()..], Some(1.0)),
        };
        let scale = scale.filter(|scale: &f64| scale.abs() <= MAX_SCALE);
        let scale = scale.ok_or_else(|| format!("{tag}> is not <lora:NAME:SCALE>"))?;
        loras.push((name.to_owned(), scale));
        prompt.push_str(before);
        rest = after;
    }
    prompt.push_str(rest);
    Ok((if loras.is_empty() { prompt } else { prompt.trim().to_owned() }, loras))
}

/// The model of `override_settings`, else the option's.
fn model(service: &Service, fields: &mut Fields) -> Result<usize, Refusal> {
    let name = match fields.object("override_settings")? {
        None => None,
        Some(mut settings) => {
            let name = settings.text("sd_model_checkpoint")?;
            settings.finish()?;
            name
        }
    };
    match name {
        None => Ok(service.checkpoint.load(Ordering::Relaxed)),
        Some(name) => service.model(Some(&name)),
    }
}

/// By the web UI's name or ours.
fn solver(fields: &Fields, name: &str) -> Result<Solver, Refusal> {
    let known = |&(ours, solver): &(&str, Solver)| {
        (name == ours || name == sampler_name(solver)).then_some(solver)
    };
    SOLVERS.iter().find_map(known).ok_or_else(|| {
        let names = SOLVERS.map(|(_, solver)| sampler_name(solver)).join(", ");
        fields.invalid("sampler_name", &format!("{name:?} is not one of {names}"))
    })
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "None",
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn response(ticket: &Ticket, board: &Board, send: bool, ignored: &[&str]) -> Value {
    let (job, service) = (&ticket.job, &ticket.service);
    let (drawing, image) = (&job.drawing, &job.drawing.first);
    let files = board.images.iter().flatten();
    let images: Vec<String> = files.map(|file| BASE64_STANDARD.encode(file)).collect();
    let seeds: Vec<u64> = (image.seed..).take(images.len()).collect();
    let info = json!({
        "prompt": image.prompt,
        "all_prompts": vec![&image.prompt; images.len()],
        "seed": image.seed,
        "all_seeds": seeds,
        "width": image.width,
        "height": image.height,
        "sampler_name": sampler_name(image.solver),
        "steps": image.steps,
        "loras": image.loras.iter().map(|(lora, scale)| json!({"name": lora.name, "scale": scale}))
            .collect::<Vec<_>>(),
        "batch_size": drawing.count,
        "sd_model_name": service.cards[drawing.model].name,
        "ignored": ignored,
        "notices": image.notices,
    });
    json!({
        "images": if send { images } else { Vec::new() },
        "parameters": {
            "prompt": image.prompt,
            "seed": image.seed,
            "steps": image.steps,
            "width": image.width,
            "height": image.height,
            "batch_size": drawing.count,
            "sampler_name": sampler_name(image.solver),
            "distilled_cfg_scale": image.guidance,
        },
        "info": info.to_string(),
    })
}

fn state(current: Option<(&Arc<Job>, &Board)>) -> Value {
    let (job, step, steps, number, count) = match current {
        Some((job, board)) => {
            let calls = job.drawing.first.plan.len();
            let number = (board.step / calls).min(job.drawing.count - 1);
            (job.id.as_str(), board.step - number * calls, calls, number, job.drawing.count)
        }
        None => ("", 0, 0, 0, 0),
    };
    json!({"skipped": false, "interrupted": false, "stopping_generation": false, "job": job,
           "job_count": count, "job_timestamp": "0", "job_no": number, "sampling_step": step,
           "sampling_steps": steps})
}

#[cfg(test)]
mod tests {
    use super::extra_networks;

    #[test]
    fn loras_stand_in_the_prompt() {
        let (prompt, loras) = extra_networks("a fox <lora:ink:0.8><lora:soft> <b>").unwrap();
        assert_eq!(prompt, "a fox  <b>");
        assert_eq!(loras, [("ink".to_owned(), 0.8), ("soft".to_owned(), 1.0)]);
        for typed in ["<lora:ink:x>", "<lora:ink:0.5:0.8>", "<lora:ink:99>"] {
            let why = extra_networks(typed).unwrap_err();
            assert!(why.contains(typed), "{why}");
        }
        for typed in ["", "a <lora:b", " a  b "] {
            assert_eq!(extra_networks(typed).unwrap(), (typed.to_owned(), Vec::new()));
        }
    }
}
