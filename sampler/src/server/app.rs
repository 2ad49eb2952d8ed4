//! The routes, and what every request passes on its way to them.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header::CONTENT_TYPE},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde_json::json;

use super::{
    identity::new_id, jobs, loras, metrics::Answer, openai, page, refusal::Refusal, sdapi,
    service::Service,
};

/// Repeated from the request, or made; in the response and the log.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const MAX_REQUEST_ID: usize = 128;

/// Id of the request that a handler serves.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// The server as a function of requests.
pub fn app(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/images/generations", post(openai::generate))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{name}", get(openai::model))
        .route("/api/jobs", get(jobs::list).post(jobs::create))
        .route("/api/jobs/{id}", get(jobs::get).delete(jobs::cancel))
        .route("/api/jobs/{id}/cancel", post(jobs::cancel))
        .route("/api/jobs/{id}/events", get(jobs::progress))
        .route("/api/jobs/{id}/images/{index}", get(jobs::image))
        .route("/api/loras", get(loras::list).post(loras::load))
        .route("/api/loras/{name}", delete(loras::unload))
        .route("/api/capabilities", get(page::capabilities))
        .route("/sdapi/v1/txt2img", post(sdapi::txt2img))
        .route("/sdapi/v1/progress", get(sdapi::progress))
        .route("/sdapi/v1/interrupt", post(sdapi::interrupt))
        .route("/sdapi/v1/samplers", get(sdapi::samplers))
        .route("/sdapi/v1/schedulers", get(sdapi::schedulers))
        .route("/sdapi/v1/sd-models", get(sdapi::sd_models))
        .route("/sdapi/v1/loras", get(sdapi::loras))
        .route("/sdapi/v1/options", get(sdapi::options).post(sdapi::set_options))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/", get(page::html))
        .route("/page.css", get(page::css))
        .route("/page.js", get(page::js))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(from_fn_with_state(service.clone(), pass))
        .with_state(service)
}

/// Guards, names, counts and logs every request.
async fn pass(State(service): State<Arc<Service>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = request_id(&request);
    request.extensions_mut().insert(RequestId(id.clone()));
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let path = route.unwrap_or_else(|| "other".to_owned());
    let mut response = match service.guard.check(&method, request.uri().path(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    };
    let status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let answer = Answer { path: path.clone(), status };
    service.metrics.requests.get_or_create(&answer).inc();
    let ms = (start.elapsed().as_secs_f64() * 1e6).round() / 1e3;
    service.log.event(
        "request",
        json!({"request_id": id, "method": method.as_str(), "path": path, "status": status,
               "ms": ms}),
    );
    response
}

/// The client's, if it is plain and short.
fn request_id(request: &Request) -> String {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let plain = |id: &&str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(known)
    };
    given.filter(plain).map_or_else(|| new_id("req"), ToOwned::to_owned)
}

/// The process lives and its worker does.
async fn health(State(service): State<Arc<Service>>) -> Response {
    let (status, word) = if service.is_alive() {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the worker has ended")
    };
    (status, axum::Json(json!({"status": word}))).into_response()
}

/// Work is taken.
async fn ready(State(service): State<Arc<Service>>) -> Response {
    let (status, word) = if service.is_ready() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready")
    };
    (status, axum::Json(json!({"status": word}))).into_response()
}

async fn metrics(State(service): State<Arc<Service>>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], service.metrics_text())
}

async fn not_found() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "unknown_url", "there is nothing at this address")
}

async fn not_allowed() -> Refusal {
    let message = "this address does not take this method";
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}
