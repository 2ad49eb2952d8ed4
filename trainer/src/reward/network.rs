//! Rewards that are networks on libtorch.

use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
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
    /// The score of prepared `pixels` `[1, 3, S, S]`, on the CPU, for a prompt.
    fn score(&mut self, prompt: &str, pixels: &Tensor) -> Result<f64>;
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
    pixels: Tensor,
    answer: Sender<Result<f64>>,
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
            for Request { prompt, pixels, answer } in queue {
                // Nobody waits any more where another part of the group failed first.
                let _ = answer.send(no_grad(|| network.score(&prompt, &pixels)));
            }
        })?;
        let preparation = result.recv().context("the network's thread ended while it loaded")??;
        Ok(Self { preparation, requests: Some(requests), thread: Some(thread) })
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
        let gone = || anyhow!("the network's thread has ended");
        let ask = |(prompt, image): (&&Prompt, &&RgbImage)| {
            ensure!(image.width() > 0 && image.height() > 0, "the image is empty");
            let (answer, score) = mpsc::channel();
            let pixels = self.preparation.pixels(image);
            let request = Request { prompt: prompt.text.clone(), pixels, answer };
            self.requests.as_ref().and_then(|to| to.send(request).ok()).ok_or_else(gone)?;
            Ok(score)
        };
        let scores = prompts.iter().zip(images).map(ask).collect::<Result<Vec<_>>>()?;
        scores.into_iter().map(|score| score.recv().map_err(|_| gone())?).collect()
    }
}

#[cfg(test)]
mod tests;
