//! Rewards that are networks on libtorch.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Error, Result, anyhow, ensure};
use flow::prompts::Prompt;
use image::RgbImage;
use tch::{Device, Kind, Tensor, no_grad};

use super::Reward;
use super::preparation::Preparation;
use crate::tensor::device::Compute;

/// Scores are computed in f32, whatever the run computes in.
pub(super) fn compute(device: Device) -> Compute {
    Compute { device, kind: Kind::Float }
}

/// A network that scores one image at a time, so that a score does not depend on its company.
pub(super) trait Network {
    /// The score of prepared `pixels` `[1, 3, S, S]` for a prompt: one number, with its graph.
    fn score(&mut self, prompt: &str, pixels: &Tensor) -> Result<Tensor>;
}

/// A [`Network`] on a thread of its own, where its tensors stay; callers prepare images meanwhile.
pub(super) struct NetworkReward {
    preparation: Preparation,
    /// Taken when the thread is to end.
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

struct Request {
    prompt: String,
    input: Input,
    answer: Sender<Result<Answer>>,
}

enum Input {
    /// Prepared: to be scored.
    Pixels(Tensor),
    /// `[1, 3, height, width]` in 0 to 1: with the score's gradient.
    Image(Tensor),
}

struct Answer {
    score: f64,
    /// Like the image.
    gradient: Option<Tensor>,
}

impl NetworkReward {
    /// Opens what `load` returns.
    ///
    /// # Errors
    /// Those of `load`.
    pub(super) fn open<N: Network>(
        load: impl FnOnce() -> Result<(Preparation, N)> + Send + 'static,
    ) -> Result<Self> {
        let (requests, queue) = mpsc::channel::<Request>();
        let (opened, result) = mpsc::channel();
        let thread = thread::Builder::new().name("reward network".into()).spawn(move || {
            let (preparation, mut network) = match load() {
                Ok(loaded) => loaded,
                Err(error) => return drop(opened.send(Err(error))),
            };
            drop(opened.send(Ok(preparation)));
            for Request { prompt, input, answer } in queue {
                // Nobody waits any more where another part of the group failed first.
                let _ = answer.send(answered(&mut network, preparation, &prompt, &input));
            }
        })?;
        let preparation = result.recv().context("the network's thread ended while it loaded")??;
        Ok(Self { preparation, requests: Some(requests), thread: Some(thread) })
    }

    fn ask(&self, prompt: &Prompt, input: Input) -> Result<Receiver<Result<Answer>>> {
        let (answer, answered) = mpsc::channel();
        let request = Request { prompt: prompt.text.clone(), input, answer };
        self.requests.as_ref().and_then(|to| to.send(request).ok()).ok_or_else(gone)?;
        Ok(answered)
    }
}

fn gone() -> Error {
    anyhow!("the network's thread has ended")
}

fn answered<N: Network>(
    network: &mut N,
    preparation: Preparation,
    prompt: &str,
    input: &Input,
) -> Result<Answer> {
    match input {
        Input::Pixels(pixels) => {
            let score = no_grad(|| network.score(prompt, pixels))?;
            Ok(Answer { score: score.double_value(&[]), gradient: None })
        }
        Input::Image(image) => {
            let image = image.detach().set_requires_grad(true);
            let score = network.score(prompt, &preparation.smooth_pixels(&image))?;
            score.backward();
            Ok(Answer { score: score.detach().double_value(&[]), gradient: Some(image.grad()) })
        }
    }
}

impl Drop for NetworkReward {
    /// Tensors must be gone before libtorch is.
    fn drop(&mut self) {
        self.requests = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Reward for NetworkReward {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let ask = |(prompt, image): (&&Prompt, &&RgbImage)| {
            ensure!(image.width() > 0 && image.height() > 0, "the image is empty");
            self.ask(prompt, Input::Pixels(self.preparation.pixels(image)))
        };
        let answers = prompts.iter().zip(images).map(ask).collect::<Result<Vec<_>>>()?;
        let score =
            |answer: Receiver<Result<Answer>>| Ok(answer.recv().map_err(|_| gone())??.score);
        answers.into_iter().map(score).collect()
    }

    fn gradient(&self, prompt: &Prompt, image: &Tensor) -> Result<(f64, Tensor)> {
        let answer = self.ask(prompt, Input::Image(image.shallow_clone()))?;
        let Answer { score, gradient } = answer.recv().map_err(|_| gone())??;
        Ok((score, gradient.context("a score without its gradient")?))
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod tiny;
