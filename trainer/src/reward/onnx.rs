//! Any ONNX model that turns an image into a number, as a reward.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use image::{
    RgbImage,
    imageops::{self, FilterType},
};
use onnx::{ElementType, Tensor};

use super::{Reward, pool::Pool};
use flow::prompts::Prompt;

/// How an image becomes the input of an [`ImageModel`] and its output a score.
#[derive(Clone, Debug)]
pub struct ImageModelConfig {
    pub model: PathBuf,
    /// Width and height in pixels; the aspect ratio is not kept.
    pub size: [u32; 2],
    /// Per channel (red, green, blue): the input is (x/255 − mean)/std.
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// Which number of the first output, in row-major order, is the score.
    pub index: usize,
}

/// Scores images by a model with one f32 input [1, 3, height, width], red first. Images are
/// resized bilinearly, averaging when they shrink. The prompt is not looked at.
pub struct ImageModel {
    pool: Pool,
    config: ImageModelConfig,
}

impl ImageModel {
    /// # Errors
    /// The file is not an ONNX model with one f32 input of that shape, or a size or divisor is 0.
    pub fn open(config: ImageModelConfig, threads: usize) -> Result<Self> {
        ensure!(config.size.iter().all(|&side| side > 0), "`size` must be positive");
        ensure!(
            config.std.iter().all(|std| std.is_normal())
                && config.mean.iter().all(|m| m.is_finite()),
            "`mean` must be finite and `std` finite and not 0"
        );
        let pool = Pool::open(&config.model, threads)?;
        let [width, height] = config.size.map(|side| side as usize);
        pool.with(|session| {
            let wanted = [1, 3, height, width];
            let fits = matches!(session.inputs(), [port]
                if matches!(port.element, ElementType::F32 | ElementType::F16)
                    && port.shape.len() == 4
                    && port.shape.iter().zip(wanted).all(|(dim, w)| dim.is_none_or(|d| d == w)));
            let inputs: Vec<_> = session.inputs().iter().map(ToString::to_string).collect();
            ensure!(
                fits,
                "{} should have one f32 input that takes {wanted:?}, it has {}",
                config.model.display(),
                inputs.join(", ")
            );
            Ok(())
        })?;
        Ok(Self { pool, config })
    }

    fn input(&self, image: &RgbImage) -> Result<Tensor> {
        let [width, height] = self.config.size;
        ensure!(image.width() > 0 && image.height() > 0, "the image is empty");
        let resized = imageops::resize(image, width, height, FilterType::Triangle);
        let data = (0..3)
            .flat_map(|c| resized.pixels().map(move |pixel| (c, pixel.0[c])))
            .map(|(c, value)| (f32::from(value) / 255.0 - self.config.mean[c]) / self.config.std[c])
            .collect();
        Tensor::f32([1, 3, height as usize, width as usize], data)
    }

    fn score_one(&self, image: &RgbImage) -> Result<f64> {
        let input = self.input(image)?;
        let output = self.pool.with(|session| {
            let name = session.inputs()[0].name.clone();
            let output = session.outputs().first().context("the model has no output")?.name.clone();
            Ok(session.run(&[(&name, &input)], &[&output])?.swap_remove(0))
        })?;
        let values = output.as_f32()?;
        let value = values.get(self.config.index).with_context(|| {
            format!("`index` is {}, but the output has {} values", self.config.index, values.len())
        })?;
        Ok(f64::from(*value))
    }
}

impl Reward for ImageModel {
    fn score(&self, _prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        images.iter().map(|image| self.score_one(image)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use image::Rgb;

    use super::*;

    /// `channel_means.onnx`, [N, 3, 4, 4] to [N, 2]: the mean of the first channel, and of the second.
    fn config() -> ImageModelConfig {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures");
        ImageModelConfig {
            model: fixtures.join("channel_means.onnx"),
            size: [4, 4],
            mean: [0.5, 0.0, 0.0],
            std: [0.25, 1.0, 1.0],
            index: 0,
        }
    }

    #[test]
    fn channels_are_normalised_and_in_order() -> Result<()> {
        let image = RgbImage::from_pixel(9, 5, Rgb([255, 51, 0]));
        for (index, expected) in [(0, 2.0), (1, 0.2)] {
            let reward = ImageModel::open(ImageModelConfig { index, ..config() }, 1)?;
            let scores = reward.score(&[], &[&image])?;
            assert!((scores[0] - expected).abs() < 1e-6, "{scores:?}");
        }
        Ok(())
    }

    #[test]
    fn misfits_are_refused() {
        let wide = ImageModelConfig { size: [8, 4], ..config() };
        let error = ImageModel::open(wide, 1).err().unwrap().to_string();
        assert!(error.contains("[1, 3, 4, 8]") && error.contains("[?, 3, 4, 4]"), "{error}");
        assert!(ImageModel::open(ImageModelConfig { std: [0.0; 3], ..config() }, 1).is_err());
        let reward = ImageModel::open(ImageModelConfig { index: 2, ..config() }, 1).unwrap();
        let error = reward.score(&[], &[&RgbImage::new(4, 4)]).unwrap_err().to_string();
        assert!(error.contains("`index` is 2, but the output has 2 values"), "{error}");
    }
}
