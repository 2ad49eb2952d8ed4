//! JPEG size in kB: the (in)compressibility rewards of DDPO (Black et al. 2023, section 5).
//!
//! As there, a file is baseline JPEG of quality 95 with halved chroma (4:2:0) and the standard's own
//! Huffman tables, which is what Pillow writes (sides that are no multiples of 16 cost a little more
//! here).

use anyhow::{Context, Result, bail};
use image::RgbImage;
use jpeg_encoder::{ChromaSubsamplingMethod, ColorType, Encoder, SamplingFactor};

use super::{JpegSize, Reward};
use flow::prompts::Prompt;

/// Size of the image as a JPEG of `quality` (1 to 100) in thousands of bytes; negated when small
/// files are preferred.
pub struct Jpeg {
    pub quality: u8,
    pub prefer: JpegSize,
}

impl Reward for Jpeg {
    fn score(&self, _prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        images
            .iter()
            .map(|image| {
                let kb = size_kb(image, self.quality)?;
                Ok(match self.prefer {
                    JpegSize::Small => -kb,
                    JpegSize::Large => kb,
                })
            })
            .collect()
    }
}

fn size_kb(image: &RgbImage, quality: u8) -> Result<f64> {
    let (width, height) = image.dimensions();
    let sides = [width, height].map(u16::try_from);
    let [Ok(width), Ok(height)] = sides else {
        bail!("an image of {width}x{height} pixels is too large for JPEG");
    };
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, quality);
    encoder.set_sampling_factor(SamplingFactor::F_2_2);
    encoder.set_chroma_subsampling_method(ChromaSubsamplingMethod::Average);
    encoder
        .encode(image, width, height, ColorType::Rgb)
        .context("cannot encode an image as JPEG")?;
    Ok(file.len() as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use image::Rgb;

    use super::*;

    /// Grey noise of up to `amplitude` either side of 128, 64 x 64.
    fn noise(amplitude: i32) -> RgbImage {
        let mut state = 1u32;
        RgbImage::from_fn(64, 64, |_, _| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let level = (state >> 16) as i32 % (2 * amplitude + 1) - amplitude;
            Rgb([(128 + level) as u8; 3])
        })
    }

    #[test]
    fn sizes_are_those_of_pillow() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/jpeg");
        let sizes = std::fs::read(fixtures.join("sizes.json")).unwrap();
        let sizes: BTreeMap<String, BTreeMap<u8, f64>> = serde_json::from_slice(&sizes).unwrap();
        assert_eq!(sizes.len(), 3);
        let mut off = 0.0;
        for (name, sizes) in sizes {
            let image = image::open(fixtures.join(format!("{name}.png"))).unwrap().into_rgb8();
            for (quality, expected) in sizes {
                let size = size_kb(&image, quality).unwrap();
                println!("{name} at {quality}: {size} kB, Pillow {expected}");
                off = f64::max(off, (size / expected - 1.0).abs());
            }
        }
        assert!(off < 0.002, "{off}");
    }

    #[test]
    fn detail_and_quality_cost_bytes() {
        let images = [0, 8, 30, 120].map(noise);
        let sizes = images.each_ref().map(|image| size_kb(image, 85).unwrap());
        assert!(sizes.windows(2).all(|pair| pair[0] < pair[1]), "{sizes:?}");
        assert!(size_kb(&images[3], 20).unwrap() < sizes[3]);
        let score = |prefer| {
            let reward = Jpeg { quality: 85, prefer };
            reward.score(&[], &images.each_ref()).unwrap()
        };
        assert_eq!(score(JpegSize::Large), sizes);
        assert_eq!(score(JpegSize::Small), sizes.map(|size| -size));
    }
}
