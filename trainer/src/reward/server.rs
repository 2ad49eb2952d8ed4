//! A reward server of one's own, over a protocol of one request.
//!
//! `POST` of `{"prompts": [text, …], "images": [Base64 of a PNG file, …], "metadata": [{…}, …]}` is
//! answered by `{"scores": [number, …]}`, one an image, higher is better; or by `{"error": "why"}`.
//! `metadata[i]` holds the fields that the prompt's object has in its file, if it has any.

use anyhow::{Context, Result, ensure};
use image::RgbImage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Reward,
    remote::{Endpoint, Remote, encoded},
};
use flow::prompts::Prompt;

/// Which server, and how much at once.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// Most images of a request.
    #[serde(default = "default_batch")]
    pub batch: usize,
}

fn default_batch() -> usize {
    16
}

/// Scores that a server computes.
pub(super) struct Server {
    remote: Remote,
    batch: usize,
}

impl Server {
    pub(super) fn open(config: &ServerConfig) -> Result<Self> {
        ensure!(config.batch > 0, "`batch` is 0: at least 1");
        Ok(Self { remote: Remote::open(&config.endpoint)?, batch: config.batch })
    }
}

impl Reward for Server {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let encoded = encoded(images)?;
        let images: Vec<&[String]> = encoded.chunks(self.batch).collect();
        let prompts: Vec<&[&Prompt]> = prompts.chunks(self.batch).collect();
        let request = |i: usize| {
            let texts: Vec<&str> = prompts[i].iter().map(|prompt| prompt.text.as_str()).collect();
            let metadata: Vec<_> = prompts[i].iter().map(|prompt| &prompt.fields).collect();
            json!({ "prompts": texts, "images": images[i], "metadata": metadata })
        };
        let scores =
            self.remote.ask(images.len(), request, |i, answer| scores(answer, images[i].len()))?;
        Ok(scores.concat())
    }

    fn wants_groups(&self) -> bool {
        true
    }
}

fn scores(answer: &Value, n: usize) -> Result<Vec<f64>> {
    let list = answer.get("scores").and_then(Value::as_array);
    let list = list.context("the answer has no list `scores`")?;
    ensure!(list.len() == n, "it gave {} scores for {n} images", list.len());
    let number = |(i, value): (usize, &Value)| {
        value.as_f64().with_context(|| format!("scores[{i}] is {value}, which is no number"))
    };
    list.iter().enumerate().map(number).collect()
}

#[cfg(test)]
mod tests;
