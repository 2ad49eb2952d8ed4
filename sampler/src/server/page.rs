//! The page at `/`, which is part of the program, and what it asks first.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{
        HeaderName,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    response::IntoResponse,
};
use flow::solver::{DEFAULT_SOLVER, SOLVERS};
use serde_json::{Value, json};

use super::{loras, service::Service};

/// Nothing from elsewhere, and in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data: blob:; form-action 'none'; base-uri 'none'; \
                      frame-ancestors 'none'";

pub async fn html() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("page/page.html"))
}

pub async fn css() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("page/page.css"))
}

pub async fn js() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("page/page.js"))
}

fn file(kind: &'static str, text: &'static str) -> ([(HeaderName, &'static str); 6], &'static str) {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_FRAME_OPTIONS, "DENY"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}

/// `GET /api/capabilities`: models, solvers and limits.
pub async fn capabilities(State(service): State<Arc<Service>>) -> Json<Value> {
    let models: Vec<Value> = service
        .cards
        .iter()
        .map(|card| {
            let side = card.export.default_side();
            json!({
                "name": card.name,
                "width": side,
                "height": side,
                "multiple": card.multiple(),
                "guidance": card.guides(),
                "loras": loras::known(&service, card),
            })
        })
        .collect();
    let limits = service.limits;
    Json(json!({
        "models": models,
        "solvers": SOLVERS.map(|(name, _)| name),
        "defaults": {"steps": limits.default_steps(), "solver": DEFAULT_SOLVER.name()},
        "limits": {
            "steps": limits.steps,
            "images": limits.images,
            "pixels": limits.pixels,
            "queue": service.queue.capacity(),
        },
        "version": env!("CARGO_PKG_VERSION"),
    }))
}
