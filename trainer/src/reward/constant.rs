//! A reward that says nothing: with it alone, a run must not change its model.

use anyhow::Result;
use image::RgbImage;

use super::Reward;
use flow::prompts::Prompt;

/// Scores every image with the same value.
pub struct Constant {
    pub value: f64,
}

impl Reward for Constant {
    fn score(&self, _prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        Ok(vec![self.value; images.len()])
    }
}
