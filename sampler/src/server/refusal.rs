//! What a client is told when it does not get what it asked for.

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde_json::json;

/// Read by the OpenAI clients, which otherwise try again after most failures.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An error in the shape of the OpenAI API: `{"error": {message, type, param, code}}`, always all four.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    /// One line that says what to do.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which another try may succeed; without it the same request cannot.
    pub retry_after: Option<u64>,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, param: None, code: Some(code), retry_after: None }
    }

    /// Field `param` is wrong: 400.
    pub fn field(param: &str, code: &'static str, message: impl Into<String>) -> Self {
        let param = Some(param.to_owned());
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// The queue holds all it may: 429.
    pub fn queue_full(capacity: usize, seconds: u64) -> Self {
        let message = format!("{capacity} images are waiting, which is the limit; try again later");
        let refusal = Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message);
        Self { retry_after: Some(seconds), ..refusal }
    }

    /// The server is going down: 503.
    pub fn closing() -> Self {
        let message = "the server is shutting down and takes no new work";
        let refusal = Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", message);
        Self { retry_after: Some(5), ..refusal }
    }

    /// The network failed: 500. What it said is in the server's log.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "generation_failed", message)
    }

    /// The `error` object.
    pub fn object(&self) -> serde_json::Value {
        let kind = match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            403 => "permission_error",
            _ => "invalid_request_error",
        };
        json!({"message": self.message, "type": kind, "param": self.param, "code": self.code})
    }

    /// A response with `body` and this refusal's status and headers.
    pub fn with_body(&self, body: serde_json::Value) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        let retry = if self.retry_after.is_some() { "true" } else { "false" };
        headers.insert(SHOULD_RETRY, HeaderValue::from_static(retry));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.with_body(json!({"error": self.object()}))
    }
}
