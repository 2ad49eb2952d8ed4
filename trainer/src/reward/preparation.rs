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
        let side = self.side as u32;
        let square = match self.fit {
            Fit::Pad => self.padded(&unit(image)),
            Fit::Crop | Fit::CropDown | Fit::Squash => {
                let ([width, height], [left, top]) = self.cut(image.width(), image.height());
                let resized = bicubic::resize(image, width, height);
                unit(&imageops::crop_imm(&resized, left, top, side, side).to_image())
            }
        };
        normalised(&square)
    }

    /// The same of an image `[1, 3, height, width]` in 0 to 1, in floats throughout, so that it has a gradient: where
    /// packages round to bytes in between, it is up to half of 1/255 away.
    pub(super) fn smooth_pixels(self, image: &Tensor) -> Tensor {
        let side = self.side as i64;
        normalised(&match self.fit {
            Fit::Pad => self.padded(image),
            Fit::Crop | Fit::CropDown | Fit::Squash => {
                let [height, width] = [2, 3].map(|dim| image.size()[dim] as u32);
                let (size, [left, top]) = self.cut(width, height);
                let [width, height] = size.map(i64::from);
                resized(image, width, height).narrow(2, i64::from(top), side).narrow(
                    3,
                    i64::from(left),
                    side,
                )
            }
        })
    }

    fn padded(self, image: &Tensor) -> Tensor {
        let [height, width] = [2, 3].map(|dim| image.size()[dim]);
        let scale = self.side as f64 / width.max(height) as f64;
        let scaled = |n: i64| ((n as f64 * scale).round_ties_even() as i64).max(1);
        let (width, height) = (scaled(width), scaled(height));
        let (right, bottom) = (self.side as i64 - width, self.side as i64 - height);
        let (left, top) = (right / 2, bottom / 2);
        resized(image, width, height).constant_pad_nd([left, right - left, top, bottom - top])
    }

    /// To what size an image is brought, and where the square begins in it.
    fn cut(self, width: u32, height: u32) -> ([u32; 2], [u32; 2]) {
        let (side, short) = (self.side as u32, width.min(height));
        let scaled = |n: u32| {
            let long = f64::from(side) * f64::from(n) / f64::from(short);
            if n == short || self.fit == Fit::Squash { side } else { long as u32 }
        };
        let size = [width, height].map(scaled);
        let half = |rest: f64| match self.fit {
            Fit::CropDown => (rest / 2.0).floor(),
            _ => (rest / 2.0).round_ties_even(),
        };
        (size, size.map(|n| half(f64::from(n - side)) as u32))
    }
}

fn resized(image: &Tensor, width: i64, height: i64) -> Tensor {
    image.internal_upsample_bicubic2d_aa([height, width], false, None, None)
}

fn normalised(square: &Tensor) -> Tensor {
    let statistics = |values: &[f64]| {
        let values = Tensor::from_slice(values).to_kind(Kind::Float);
        values.reshape([1, 3, 1, 1]).to_device(square.device())
    };
    (square - statistics(&MEAN)) / statistics(&STD)
}

/// `[1, 3, height, width]` in 0 to 1.
fn unit(image: &RgbImage) -> Tensor {
    let shape = [1, i64::from(image.height()), i64::from(image.width()), 3];
    let values = Tensor::from_slice(image.as_raw()).reshape(shape).permute([0, 3, 1, 2]);
    values.contiguous().to_kind(Kind::Float) / 255.0
}
