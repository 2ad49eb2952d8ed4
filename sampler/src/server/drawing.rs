//! What is to be drawn.

use crate::request::Job as Image;

use super::encoded::Encoding;

/// Images to draw. A value: their bits depend on it and the model alone.
#[derive(Clone, Debug)]
pub struct Drawing {
    /// Number of the model.
    pub model: usize,
    /// The first image; the others differ in their seeds.
    pub first: Image,
    pub count: usize,
    pub encoding: Encoding,
    /// Previews of each image, spread evenly over the steps.
    pub previews: usize,
}

impl Drawing {
    /// Image `index`, which has the first seed + `index`.
    pub fn image(&self, index: usize) -> Image {
        Image { seed: self.first.seed + index as u64, ..self.first.clone() }
    }

    /// Network calls of all images.
    pub fn calls(&self) -> usize {
        self.first.plan.len() * self.count
    }

    /// Whether images of both may share a run of the networks.
    pub fn fits(&self, other: &Self) -> bool {
        self.model == other.model && self.first.goes_with(&other.first)
    }

    /// Whether a preview is due after the `call`-th of `calls` network calls of an image.
    pub fn preview_is_due(&self, call: usize, calls: usize) -> bool {
        let parts = self.previews + 1;
        call < calls && (1..parts).any(|part| (part * calls).div_ceil(parts) == call)
    }

    /// `WIDTHxHEIGHT`.
    pub fn size_name(&self) -> String {
        format!("{}x{}", self.first.width, self.first.height)
    }
}
