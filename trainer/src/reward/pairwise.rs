//! The share of a group's other images that an image beats: the reward of Pref-GRPO (Wang et al.
//! 2025, section 4), which stays informative where scores of single images hardly differ.

use anyhow::{Result, bail};
use image::RgbImage;
use tch::Device;

use super::{Lasting, Reward, RewardKind, chat::Chat, open, score_in_parallel};
use flow::prompts::Prompt;

/// Who decides about a pair.
enum Judge {
    /// A vision-language model that sees both images.
    Chat(Box<Chat>),
    /// Another reward: the higher score wins.
    Scorer(Box<dyn Reward>),
}

/// Win rates over all G(G−1)/2 pairs of a group, 0 to 1; a tie is half a win.
pub(super) struct Pairwise {
    judge: Judge,
    threads: usize,
}

impl Pairwise {
    pub(super) fn open(judge: &RewardKind, threads: usize, device: Device) -> Result<Self> {
        let judge = match judge {
            RewardKind::Chat(config) => Judge::Chat(Box::new(Chat::open(config, true)?)),
            RewardKind::Pairwise { .. } => {
                bail!("the `judge` of a pairwise reward is another kind")
            }
            other => Judge::Scorer(open(other, threads, device)?),
        };
        Ok(Self { judge, threads })
    }

    /// Win rates of the images of one prompt.
    fn win_rates(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let prompt = prompts[0];
        if images.len() < 2 {
            bail!(Lasting(format!("there is one image of {:?}, nothing to compare", prompt.text)));
        }
        let pairs = pairs(images.len());
        let wins = match &self.judge {
            Judge::Chat(chat) => chat.compare(prompt, images, &pairs)?,
            Judge::Scorer(reward) => {
                let scores = score_in_parallel(&**reward, prompts, images, self.threads)?;
                pairs.iter().map(|&[a, b]| won(scores[a], scores[b])).collect()
            }
        };
        let mut rates = vec![0.0; images.len()];
        for ([a, b], win) in pairs.into_iter().zip(wins) {
            rates[a] += win;
            rates[b] += 1.0 - win;
        }
        let n_others = (images.len() - 1) as f64;
        Ok(rates.into_iter().map(|wins| wins / n_others).collect())
    }
}

impl Reward for Pairwise {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        let mut rates = Vec::with_capacity(images.len());
        for group in prompts.chunk_by(|a, b| a == b) {
            rates.extend(self.win_rates(group, &images[rates.len()..][..group.len()])?);
        }
        Ok(rates)
    }

    fn check(&self, prompts: &[&Prompt], size: Option<[usize; 2]>) -> Result<()> {
        match &self.judge {
            Judge::Chat(_) => Ok(()),
            Judge::Scorer(reward) => reward.check(prompts, size),
        }
    }

    fn wants_groups(&self) -> bool {
        true
    }
}

/// All pairs of `n` images, each in the order it is shown. Judges favour a side: every image is shown
/// first in about half of its pairs.
fn pairs(n: usize) -> Vec<[usize; 2]> {
    let pairs = (0..n).flat_map(|a| (a + 1..n).map(move |b| [a, b]));
    pairs.map(|[a, b]| if (a + b) % 2 == 1 { [a, b] } else { [b, a] }).collect()
}

fn won(a: f64, b: f64) -> f64 {
    if a == b { 0.5 } else { f64::from(a > b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_once_and_both_sides_alike() {
        for n in 2..=13 {
            let pairs = pairs(n);
            assert_eq!(pairs.len(), n * (n - 1) / 2);
            let mut sorted: Vec<[usize; 2]> =
                pairs.iter().map(|&[a, b]| [a.min(b), a.max(b)]).collect();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), pairs.len());
            for image in 0..n {
                let first = pairs.iter().filter(|pair| pair[0] == image).count();
                assert!(
                    first.abs_diff(n - 1 - first) <= 2,
                    "{image} of {n} is first {first} times"
                );
            }
        }
    }
}
