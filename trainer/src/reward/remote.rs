//! Asking another process: JSON over HTTP, bounded in time, size and number.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD};
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::{Agent, http::header::RETRY_AFTER};

use super::{Away, Lasting, address::Address, connection, secret::Key};
use crate::picture::png;

/// Where to ask.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
pub struct Endpoint {
    /// The whole address, `http://` or `https://`.
    pub url: String,
    /// Environment variable with a key to send as `Authorization: Bearer`, or in the place of `{key}` in
    /// the url.
    #[serde(default)]
    pub api_key_env: Option<String>,
    /// Certificates (PEM) of the authorities that the server's is signed by, in place of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Seconds until an answer must be there.
    #[serde(default = "default_timeout")]
    pub timeout: f64,
    /// Requests under way at once.
    #[serde(default = "default_requests")]
    pub requests: usize,
}

/// Most bytes of an answer.
const MAX_ANSWER: u64 = 4 << 20;
/// Characters of an answer that an error quotes.
const EXCERPT: usize = 160;

fn default_timeout() -> f64 {
    120.0
}

fn default_requests() -> usize {
    8
}

/// Asks one endpoint.
///
/// What was answered is kept until all of a call's requests are: after a failure, only the rest is
/// asked again.
pub(super) struct Remote {
    agent: Agent,
    address: Address,
    key: Option<Key>,
    timeout: f64,
    requests: usize,
    answered: Mutex<HashMap<[u8; 32], Vec<f64>>>,
}

impl Remote {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// A setting is out of range, or the variable that should hold the key does not.
    pub(super) fn open(endpoint: &Endpoint) -> Result<Self> {
        let Endpoint { timeout, requests, .. } = *endpoint;
        ensure!(timeout > 0.0 && timeout <= 3600.0, "`timeout` is {timeout} s: in (0, 3600]");
        ensure!((1..=256).contains(&requests), "`requests` is {requests}: from 1 to 256");
        let key = endpoint.api_key_env.as_deref().map(Key::from_variable).transpose()?;
        let address = Address::parse(&endpoint.url, key.as_ref())?;
        let agent = connection::agent(endpoint, &address)?;
        Ok(Self { agent, address, key, timeout, requests, answered: Mutex::default() })
    }

    /// Sends `request(i)` for every i below `n` and returns what `read(i, answer)` makes of the
    /// answers, in order.
    ///
    /// A worker stops at its first failure, so a server that is down costs one timeout, and one bad
    /// answer does not keep the others from being asked for.
    ///
    /// # Errors
    /// Of the first request that failed; [`Lasting`] if another attempt would fail as well.
    pub(super) fn ask(
        &self,
        n: usize,
        request: impl Fn(usize) -> Value + Sync,
        read: impl Fn(usize, &Value) -> Result<Vec<f64>> + Sync,
    ) -> Result<Vec<Vec<f64>>> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = || {
            let mut done = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= n {
                    break;
                }
                let answer = self.one(&request(i), |answer| read(i, answer));
                let failed = answer.is_err();
                if answer.as_ref().is_err_and(anyhow::Error::is::<Lasting>) {
                    stop.store(true, Ordering::Relaxed);
                }
                done.push((i, answer));
                if failed {
                    break;
                }
            }
            done
        };
        let mut done: Vec<(usize, Result<Vec<f64>>)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..self.requests.min(n)).map(|_| scope.spawn(work)).collect();
            let parts = workers.into_iter().map(|worker| match worker.join() {
                Ok(part) => part,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            parts.flatten().collect()
        });
        done.sort_by_key(|(i, _)| *i);
        let answers = done.into_iter().map(|(_, answer)| answer).collect::<Result<Vec<_>>>()?;
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(answers)
    }

    fn one(
        &self,
        request: &Value,
        read: impl FnOnce(&Value) -> Result<Vec<f64>>,
    ) -> Result<Vec<f64>> {
        let answered = || self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let body = request.to_string();
        let id: [u8; 32] = Sha256::digest(&body).into();
        if let Some(numbers) = answered().get(&id) {
            return Ok(numbers.clone());
        }
        let numbers = self.post(&body).and_then(|answer| read(&answer));
        let numbers = numbers.with_context(|| self.address.shown().to_owned())?;
        answered().insert(id, numbers.clone());
        Ok(numbers)
    }

    fn post(&self, body: &str) -> Result<Value> {
        let mut request =
            self.agent.post(self.address.uri()).header("content-type", "application/json");
        if let Some(key) = self.key.as_ref().filter(|_| !self.address.has_key()) {
            request = request.header("authorization", format!("Bearer {}", key.exposed()));
        }
        let fault = |error| connection::fault(error, self.timeout);
        let mut response = request.send(body).map_err(fault)?;
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wait = wait.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
        let answer = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        let answer = answer.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                anyhow!("the answer is longer than {MAX_ANSWER} bytes")
            }
            other => fault(other),
        })?;
        if !status.is_success() {
            let why = format!("status {status}: {}", self.excerpt(&answer));
            // Request timeout, too early, too many requests.
            let may_pass = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
            return Err(if may_pass { anyhow!(Away { why, wait }) } else { anyhow!(Lasting(why)) });
        }
        let mut value: Value = serde_json::from_slice(&answer).map_err(|error| {
            anyhow!("the answer is not JSON ({error}): {}", self.excerpt(&answer))
        })?;
        if let Some(key) = &self.key {
            key.hide_in(&mut value);
        }
        if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
            let message = error.get("message").unwrap_or(error);
            let message = message.as_str().map_or_else(|| message.to_string(), str::to_owned);
            bail!("the server says: {}", excerpt(message.as_bytes()));
        }
        Ok(value)
    }

    /// The beginning of an answer, without the key.
    fn excerpt(&self, answer: &[u8]) -> String {
        match &self.key {
            Some(key) => excerpt(key.hide(&String::from_utf8_lossy(answer)).as_bytes()),
            None => excerpt(answer),
        }
    }
}

/// Images as Base64 of PNG files.
pub(super) fn encoded(images: &[&RgbImage]) -> Result<Vec<String>> {
    images.iter().map(|image| Ok(BASE64_STANDARD.encode(png(image)?))).collect()
}

/// The beginning of a text, on one line.
pub(super) fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let line = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(EXCERPT) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.is_empty() => "(nothing)".to_owned(),
        None => line,
    }
}
