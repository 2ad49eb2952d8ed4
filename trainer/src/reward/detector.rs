//! Lines of text in an image, found by a detection model of PP-OCR (v4 to v6 as `rapidocr` ships them) and
//! Differentiable Binarization (Liao et al. 2020).
//!
//! Sizes and thresholds are those of `rapidocr/config.yaml` 3.10, the steps those of its `ch_ppocr_det`:
//! bilinear resizing to multiples of 32, channels blue, green, red, values (x/255 − 0.5)/0.5; then
//! [`quads`]. Lines are in reading order, from the top and from the left, each cut out upright.

mod quads;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use image::{
    Rgb, RgbImage,
    imageops::{self, FilterType},
};
use onnx::{Model, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::quads::{Map, Quad};
use super::pool::Pool;

/// The model takes multiples of this many pixels.
const GRID: f64 = 32.0;
/// Least and most of [`DetectorConfig::side`]; no side is ever enlarged beyond the most.
const SIDES: std::ops::RangeInclusive<u32> = 32..=4096;
/// A line that is this much higher than wide is written upwards.
const UPRIGHT: f64 = 1.5;

/// A model that finds the lines of text in an image, for images with several.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DetectorConfig {
    /// Detection model, `.onnx`: an image [N, 3, H, W] to how likely each pixel is text [N, 1, H, W], as
    /// PP-OCR's.
    pub model: PathBuf,
    /// Images whose shorter side has fewer pixels are enlarged to so many, 32 to 4096.
    #[serde(default = "default_side")]
    pub side: u32,
}

fn default_side() -> u32 {
    736
}

/// Finds lines.
pub(super) struct Detector {
    pool: Pool,
    side: u32,
}

impl Detector {
    /// Opens the model for up to `threads` workers.
    ///
    /// # Errors
    /// A setting is out of range, or the file is not an ONNX model with one image input [N, 3, H, W].
    pub(super) fn open(config: &DetectorConfig, threads: usize) -> Result<Self> {
        let DetectorConfig { model, side } = config;
        ensure!(
            SIDES.contains(side),
            "`detector.side` is {side}: from {} to {}",
            SIDES.start(),
            SIDES.end()
        );
        let pool = Pool::open(model, threads)?;
        pool.with(|session| check(session))
            .with_context(|| format!("{} does not find lines of text", model.display()))?;
        Ok(Self { pool, side: *side })
    }

    /// The lines of `image`, upright.
    ///
    /// # Errors
    /// The image is empty, or the model fails.
    pub(super) fn lines(&self, image: &RgbImage) -> Result<Vec<RgbImage>> {
        let quads = self.quads(image)?;
        Ok(quads.iter().map(|quad| cut(image, quad)).collect())
    }

    /// Corners of the lines, in reading order.
    fn quads(&self, image: &RgbImage) -> Result<Vec<Quad>> {
        let (width, height) = image.dimensions();
        ensure!(width > 0 && height > 0, "the image is empty");
        let [wide, high] = self.size(width, height);
        let resized = imageops::resize(image, wide, high, FilterType::Triangle);
        let channel =
            |c: usize| resized.pixels().map(move |pixel| f32::from(pixel.0[c]) / 127.5 - 1.0);
        let data = channel(2).chain(channel(1)).chain(channel(0)).collect();
        let input = Tensor::f32([1, 3, high as usize, wide as usize], data)?;
        let map = self.pool.with(|session| {
            let (name, output) =
                (session.inputs()[0].name.clone(), session.outputs()[0].name.clone());
            Ok(session.run(&[(&name, &input)], &[&output])?.swap_remove(0))
        })?;
        ensure!(
            map.shape == [1, 1, high as usize, wide as usize],
            "the detection model returned shape {:?} for an image of {wide}x{high}",
            map.shape
        );
        let map = Map { likely: map.as_f32()?, width: wide as usize };
        let scale = [f64::from(width) / f64::from(wide), f64::from(height) / f64::from(high)];
        Ok(quads::find(map, scale, [f64::from(width), f64::from(height)]))
    }

    /// Width and height that an image is resized to.
    fn size(&self, width: u32, height: u32) -> [u32; 2] {
        let (width, height) = (f64::from(width), f64::from(height));
        let most = f64::from(*SIDES.end());
        let scale = (f64::from(self.side) / width.min(height)).max(1.0);
        let scale = scale.min(most / width.max(height));
        [width, height].map(|side| ((side * scale / GRID).round() * GRID).max(GRID) as u32)
    }
}

fn check(session: &Model) -> Result<()> {
    let [port] = session.inputs() else { bail!("it should have one input [N, 3, H, W]") };
    let is_image = matches!(port.shape[..], [_, channels, height, width]
        if channels.is_none_or(|n| n == 3) && height.is_none() && width.is_none());
    ensure!(is_image, "its input {port} should be [N, 3, H, W] of any size");
    ensure!(
        matches!(session.outputs(), [map, ..] if map.shape.len() == 4),
        "its first output should be [N, 1, H, W]"
    );
    Ok(())
}

/// What lies in `quad`, with its first corner at the top left.
fn cut(image: &RgbImage, quad: &Quad) -> RgbImage {
    let [width, height] = quad.size().map(|side| (side as u32).max(1));
    let line = RgbImage::from_fn(width, height, |x, y| {
        let at = quad.at(f64::from(x) / f64::from(width), f64::from(y) / f64::from(height));
        bilinear(image, at)
    });
    if f64::from(height) >= UPRIGHT * f64::from(width) { imageops::rotate270(&line) } else { line }
}

/// The colour between pixels; beyond the edge, that of the edge.
fn bilinear(image: &RgbImage, [x, y]: [f64; 2]) -> Rgb<u8> {
    let last = [image.width() - 1, image.height() - 1];
    let [x, y] = [x.clamp(0.0, f64::from(last[0])), y.clamp(0.0, f64::from(last[1]))];
    let (left, top) = (x as u32, y as u32);
    let (right, bottom) = ((left + 1).min(last[0]), (top + 1).min(last[1]));
    let (u, v) = (x.fract(), y.fract());
    let corner = |x, y, c: usize| f64::from(image.get_pixel(x, y).0[c]);
    let mixed = |c: usize| {
        let upper = corner(left, top, c) * (1.0 - u) + corner(right, top, c) * u;
        let lower = corner(left, bottom, c) * (1.0 - u) + corner(right, bottom, c) * u;
        (upper * (1.0 - v) + lower * v).round() as u8
    };
    Rgb([mixed(0), mixed(1), mixed(2)])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::super::{LOG_PROB_FLOOR, Measure, Ocr};
    use super::*;
    use crate::reward::tests::installed;

    fn config() -> DetectorConfig {
        DetectorConfig { model: installed("ocr-detector-v6.onnx"), side: default_side() }
    }

    fn folder() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/lines")
    }

    fn picture(name: &str) -> RgbImage {
        crate::picture::open(&folder().join(format!("{name}.png")), 1000).unwrap()
    }

    /// What rapidocr's own code finds and reads: `fixtures/lines/make.py`.
    #[test]
    fn lines_are_found_and_read_as_by_rapidocr() {
        let known: Value =
            serde_json::from_slice(&std::fs::read(folder().join("lines.json")).unwrap()).unwrap();
        let detector = Detector::open(&config(), 1).unwrap();
        let recogniser = installed("ocr-v6.onnx");
        let ocr = Ocr::open(&recogniser, None, Some(&config()), Measure::Exact, 1).unwrap();
        for (name, lines) in known.as_object().unwrap() {
            let image = picture(name);
            let quads = detector.quads(&image).unwrap();
            let lines = lines.as_array().unwrap();
            assert_eq!(quads.len(), lines.len(), "{name}");
            for (quad, line) in quads.iter().zip(lines) {
                for (at, [u, v]) in
                    [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]].iter().enumerate()
                {
                    let [x, y] = quad.at(*u, *v);
                    let known = |k: usize| line["corners"][at][k].as_f64().unwrap();
                    let off = (x - known(0)).hypot(y - known(1));
                    assert!(off <= 3.0, "{name} {line}: {quad:?} is off by {off}");
                }
            }
            let texts: Vec<&str> =
                lines.iter().map(|line| line["text"].as_str().unwrap()).collect();
            assert_eq!(ocr.read(&image).unwrap(), texts.join(" "), "{name}");
        }
    }

    #[test]
    fn several_lines_are_one_text_to_every_measure() {
        let recogniser = installed("ocr-v6.onnx");
        let ocr = Ocr::open(&recogniser, None, Some(&config()), Measure::LogProb, 1).unwrap();
        let image = picture("two");
        let right = ocr.judge("open daily 9AM to 5pm", &image).unwrap();
        assert!(right.exact && right.similarity > 0.999 && right.log_prob > -0.2, "{right:?}");
        let wrong = ocr.judge("open nightly 9pm to 5am", &image).unwrap();
        assert!(!wrong.exact && wrong.log_prob < right.log_prob - 1.0, "{wrong:?}");
        let none = ocr.judge("open", &picture("none")).unwrap();
        assert_eq!((none.log_prob, none.similarity, &*none.reading), (LOG_PROB_FLOOR, 0.0, ""));
    }

    #[test]
    fn settings_out_of_range_and_other_models_are_refused() {
        let error =
            |config: DetectorConfig| format!("{:#}", Detector::open(&config, 1).err().unwrap());
        assert!(
            error(DetectorConfig { side: 16, ..config() })
                .contains("`detector.side` is 16: from 32")
        );
        let other = DetectorConfig { model: installed("ocr-v6.onnx"), ..config() };
        assert!(error(other).contains("does not find lines of text"));
    }
}
