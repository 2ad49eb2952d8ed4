//! A request's body: JSON, small, and here in time.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
};
use http_body_util::BodyExt;
use tokio::time::timeout;

use super::{fields::Fields, refusal::Refusal, service::Service};

/// Most bytes of a body: the longest prompt, escaped, and room for the rest.
pub const MAX_BODY: usize = 128 << 10;
/// Most bytes that are read of a body that is too large.
const MAX_DISCARDED: usize = 32 << 20;

impl FromRequest<Arc<Service>> for Fields {
    type Rejection = Refusal;

    async fn from_request(request: Request, service: &Arc<Service>) -> Result<Self, Refusal> {
        check_type(request.headers())?;
        let body = timeout(service.patience.body, read(request.into_body())).await;
        let body = body.map_err(|_| {
            let message = format!("the body did not arrive within {:?}", service.patience.body);
            Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
        })?;
        Self::parse(&body?)
    }
}

/// A body to its end. One that is too large is read as well, up to a point: a client that is cut off while
/// it sends never sees why.
async fn read(mut body: Body) -> Result<Vec<u8>, Refusal> {
    let (mut bytes, mut n_bytes) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| {
            let message = "the body broke off or is not framed as its headers say";
            Refusal::new(StatusCode::BAD_REQUEST, "broken_body", message)
        })?;
        let Ok(data) = frame.into_data() else { continue };
        n_bytes += data.len();
        if n_bytes <= MAX_BODY {
            bytes.extend_from_slice(&data);
        } else if n_bytes > MAX_DISCARDED {
            break;
        }
    }
    if n_bytes <= MAX_BODY {
        return Ok(bytes);
    }
    let message = format!("the body is larger than {MAX_BODY} bytes");
    Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message))
}

/// A form of another page cannot send this type without asking first.
fn check_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "send the body as content-type application/json";
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message))
}
