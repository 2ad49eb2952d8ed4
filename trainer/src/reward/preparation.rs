//! From an image to the input of a network, as the package that defines the score does it.

use image::{RgbImage, imageops};
use tch::{Kind, Tensor};

use super::bicubic;

/// How an image is made square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// The longer side fills the square, black bars the rest: hpsv2. In floats, not rounded in between.
    Pad,
    /// The shorter side fills the square, the middle of the longer stays: torchvision's `CenterCrop`,
    /// in open_clip, ImageReward and the aesthetic predictor. An odd rest is halved to even.
    Crop,
    /// The same in transformers, where an odd rest is halved downwards.
    CropDown,
    /// The aspect ratio is given up: some models of open_clip.
    Squash,
}

/// What is done to an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Preparation {
    pub(super) fit: Fit,
    /// Side of the square in pixels.
    pub(super) side: usize,
}

/// OpenAI's statistics of images in 0 to 1: red, green, blue.
const MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

impl Preparation {
    /// `[1, 3, side, side]`, f32, normalised.
    pub(super) fn pixels(self, image: &RgbImage) -> Tensor {
        let square = match self.fit {
            Fit::Pad => self.padded(image),
            Fit::Squash => unit(&bicubic::resize(image, self.side as u32, self.side as u32)),
            Fit::Crop => unit(&self.cropped(image, |rest| (rest / 2.0).round_ties_even())),
            Fit::CropDown => unit(&self.cropped(image, |rest| (rest / 2.0).floor())),
        };
        let statistics =
            |values: &[f64]| Tensor::from_slice(values).to_kind(Kind::Float).reshape([1, 3, 1, 1]);
        (square - statistics(&MEAN)) / statistics(&STD)
    }

    fn padded(self, image: &RgbImage) -> Tensor {
        let side = self.side as f64;
        let scale = side / f64::from(image.width().max(image.height()));
        let scaled = |n: u32| ((f64::from(n) * scale).round_ties_even() as i64).max(1);
        let (width, height) = (scaled(image.width()), scaled(image.height()));
        let small = unit(image).internal_upsample_bicubic2d_aa([height, width], false, None, None);
        let (right, bottom) = (self.side as i64 - width, self.side as i64 - height);
        let (left, top) = (right / 2, bottom / 2);
        small.constant_pad_nd([left, right - left, top, bottom - top])
    }

    fn cropped(self, image: &RgbImage, half: impl Fn(f64) -> f64) -> RgbImage {
        let (width, height) = image.dimensions();
        let (side, short) = (self.side as u32, width.min(height));
        let scaled = |n: u32| {
            let long = f64::from(side) * f64::from(n) / f64::from(short);
            if n == short { side } else { long as u32 }
        };
        let (width, height) = (scaled(width), scaled(height));
        let resized = bicubic::resize(image, width, height);
        let offset = |n: u32| half(f64::from(n - side)) as u32;
        imageops::crop_imm(&resized, offset(width), offset(height), side, side).to_image()
    }
}

/// `[1, 3, height, width]` in 0 to 1.
fn unit(image: &RgbImage) -> Tensor {
    let shape = [1, i64::from(image.height()), i64::from(image.width()), 3];
    let values = Tensor::from_slice(image.as_raw()).reshape(shape).permute([0, 3, 1, 2]);
    values.contiguous().to_kind(Kind::Float) / 255.0
}
