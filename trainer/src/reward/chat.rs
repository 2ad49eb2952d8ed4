//! A vision-language model as the judge, behind an OpenAI-compatible `chat/completions` endpoint
//! (vLLM, SGLang, and services that speak the same).
//!
//! The judge sees one image, or two when [`super::pairwise`] asks, then the question; it answers at
//! temperature 0, and a pattern finds the verdict in what it says.

use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;
use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Reward,
    remote::{Endpoint, Remote, encoded, excerpt},
};
use flow::prompts::Prompt;

/// Questions that ship, by name.
const JUDGES: [(&str, &str); 3] = [
    ("unified-reward", include_str!("../../judges/unified-reward.toml")),
    ("unified-reward-alignment", include_str!("../../judges/unified-reward-alignment.toml")),
    ("better-image", include_str!("../../judges/better-image.toml")),
];

/// Which model, what it is asked, and where in the answer the verdict stands.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ChatConfig {
    #[serde(flatten)]
    pub endpoint: Endpoint,
    /// Name of the model at the endpoint.
    pub model: String,
    /// Question and pattern that ship: `unified-reward`, `unified-reward-alignment` or, for pairs,
    /// `better-image`.
    #[serde(default)]
    pub judge: Option<String>,
    /// The question, in place of the judge's; `{prompt}` stands for the image's prompt.
    #[serde(default)]
    pub prompt: Option<String>,
    /// Regular expression, in place of the judge's. Its one group is the score; for a pair it is
    /// `1` or `2`, the better image, or `tie`.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Most tokens of an answer.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: u32,
}

fn default_max_tokens() -> u32 {
    4096
}

/// A file of `trainer/judges`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Judge {
    prompt: String,
    pattern: String,
    /// Whether it is asked of two images, not of one.
    #[serde(default)]
    is_for_pairs: bool,
}

/// Asks the judge about images.
pub(super) struct Chat {
    remote: Remote,
    model: String,
    prompt: String,
    pattern: Regex,
    max_tokens: u32,
}

impl Chat {
    /// One that is asked of single images, or of pairs.
    ///
    /// # Errors
    /// When it has no question, or one of the other kind.
    pub(super) fn open(config: &ChatConfig, is_for_pairs: bool) -> Result<Self> {
        let judge = config.judge.as_deref().map(shipped).transpose()?;
        if let Some(judge) = judge.as_ref().filter(|judge| judge.is_for_pairs != is_for_pairs) {
            let name = config.judge.as_deref().unwrap_or_default();
            bail!(if judge.is_for_pairs {
                format!(
                    "`judge` {name:?} is asked which of two images is better: kind = \"pairwise\" asks so"
                )
            } else {
                format!(
                    "`judge` {name:?} is asked for one image's score, and a pairwise reward for the better of two"
                )
            });
        }
        let (prompt, pattern) = judge.map(|judge| (judge.prompt, judge.pattern)).unzip();
        let known = JUDGES.map(|(name, _)| name).join(", ");
        let prompt = config.prompt.clone().or(prompt);
        let prompt =
            prompt.with_context(|| format!("give `prompt`, or one of `judge`: {known}"))?;
        let pattern = config.pattern.clone().or(pattern);
        let pattern =
            pattern.with_context(|| format!("give `pattern`, or one of `judge`: {known}"))?;
        let pattern = Regex::new(&pattern).map_err(|error| {
            let error = error.to_string();
            let why = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
            anyhow::anyhow!("`pattern` {pattern:?}: {why}")
        })?;
        let n_groups = pattern.captures_len() - 1;
        ensure!(n_groups == 1, "`pattern` {:?} has {n_groups} groups: one", pattern.as_str());
        ensure!(config.max_tokens > 0, "`max_tokens` is 0: at least 1");
        Ok(Self {
            remote: Remote::open(&config.endpoint)?,
            model: config.model.clone(),
            prompt,
            pattern,
            max_tokens: config.max_tokens,
        })
    }

    /// For each of `pairs` of one prompt's images: what the first of the two won, 1, 0 or ½.
    pub(super) fn compare(
        &self,
        prompt: &Prompt,
        images: &[&RgbImage],
        pairs: &[[usize; 2]],
    ) -> Result<Vec<f64>> {
        let images = encoded(images)?;
        let request = |i: usize| self.request(prompt, &pairs[i].map(|image| &*images[image]));
        let wins =
            self.remote.ask(pairs.len(), request, |_, answer| match self.verdict(answer)? {
                "1" => Ok(vec![1.0]),
                "2" => Ok(vec![0.0]),
                "tie" => Ok(vec![0.5]),
                other => {
                    anyhow::bail!("of two images the judge prefers {other:?}: not 1, 2 or tie")
                }
            })?;
        Ok(wins.concat())
    }

    fn request(&self, prompt: &Prompt, images: &[&str]) -> Value {
        let images = images.iter().map(|image| {
            let url = format!("data:image/png;base64,{image}");
            json!({ "type": "image_url", "image_url": { "url": url } })
        });
        let question = json!({
            "type": "text", "text": self.prompt.replace("{prompt}", &prompt.text)
        });
        let content: Vec<Value> = images.chain([question]).collect();
        json!({
            "model": self.model,
            "messages": [{ "role": "user", "content": content }],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        })
    }

    fn verdict<'a>(&self, answer: &'a Value) -> Result<&'a str> {
        let text = answer.pointer("/choices/0/message/content").and_then(Value::as_str);
        let text = text.context("the answer has no choices[0].message.content")?;
        let found = self.pattern.captures(text).and_then(|groups| groups.get(1));
        let found = found.with_context(|| {
            let (said, pattern) = (excerpt(text.as_bytes()), self.pattern.as_str());
            format!("the judge's answer does not match {pattern:?}: {said}")
        })?;
        Ok(found.as_str())
    }
}

impl Reward for Chat {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let images = encoded(images)?;
        let request = |i: usize| self.request(prompts[i], &[&images[i]]);
        let scores = self.remote.ask(images.len(), request, |_, answer| {
            let score = self.verdict(answer)?;
            let number: f64 = score.parse().with_context(|| format!("{score:?} is no number"))?;
            ensure!(number.is_finite(), "{score:?} is not finite");
            Ok(vec![number])
        })?;
        Ok(scores.concat())
    }

    fn wants_groups(&self) -> bool {
        true
    }
}

fn shipped(name: &str) -> Result<Judge> {
    let found = JUDGES.iter().find(|(known, _)| *known == name);
    let (_, text) = found.with_context(|| {
        let known = JUDGES.map(|(name, _)| name).join(", ");
        format!("unknown `judge` {name:?}: there is {known}")
    })?;
    Ok(toml::from_str(text)?)
}

#[cfg(test)]
mod tests;
