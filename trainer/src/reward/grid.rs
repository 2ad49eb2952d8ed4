//! Grid artefacts: a pattern that repeats with the network's patches, which rewards can be hacked by.
//!
//! Of luminance Y in 0 to 1, along rows and along columns: p neighbouring lines at a time are added up, in which a
//! pattern stands and grain does not. With P(f) the mean over them of the power spectrum of Y's differences between
//! neighbours (which makes a natural image's spectrum nearly flat) under a Hann window:
//!
//! ```text
//! score = -10·log10( mean over both directions of  Σ_h P(h/p) / Σ_h P̃(h/p) ),   h = 1 … p/2
//! ```
//!
//! p is the period in pixels, P̃ the mean of P two and three bins to either side: beside the peak of the window and
//! before the next harmonic. Without a pattern the score is about 0; a pattern makes it negative, in dB.

use std::f64::consts::TAU;

use anyhow::{Result, ensure};
use flow::prompts::Prompt;
use image::RgbImage;

use super::Reward;

/// Bins beside a harmonic that it is held against.
const BESIDE: [i64; 4] = [-3, -2, 2, 3];
/// Fewest periods of an image, so that those bins are not the next harmonic's.
const PERIODS: usize = 8;

/// How little an image repeats itself every `period` pixels.
pub struct Grid {
    pub period: usize,
}

impl Reward for Grid {
    fn score(&self, _prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        images
            .iter()
            .map(|image| {
                let (width, height) = (image.width() as usize, image.height() as usize);
                self.fits([width, height])?;
                let rows = luminance(image);
                let along = self.excess(&rows, width, height, width, 1);
                let across = self.excess(&rows, height, width, 1, width);
                Ok(-10.0 * f64::midpoint(along, across).log10())
            })
            .collect()
    }

    fn check(&self, _prompts: &[&Prompt], size: Option<[usize; 2]>) -> Result<()> {
        size.map_or(Ok(()), |size| self.fits(size))
    }
}

impl Grid {
    fn fits(&self, [width, height]: [usize; 2]) -> Result<()> {
        let least = PERIODS * self.period + 1;
        ensure!(
            width.min(height) >= least,
            "an image of {width}x{height} pixels has not {PERIODS} periods of {} pixels: {least} pixels are the least",
            self.period
        );
        Ok(())
    }

    /// The power of the harmonics over that beside them, of `lines` lines of `length` values, which lie `next` apart,
    /// each `step` after the other.
    fn excess(&self, values: &[f64], length: usize, lines: usize, next: usize, step: usize) -> f64 {
        let periods = (length - 1) / self.period;
        let n = periods * self.period;
        let window: Vec<f64> =
            (0..n).map(|x| 0.5 - 0.5 * (TAU * (x as f64 + 0.5) / n as f64).cos()).collect();
        let turns: Vec<[f64; 2]> = (0..n)
            .map(|x| (TAU * x as f64 / n as f64).sin_cos())
            .map(|(sin, cos)| [cos, sin])
            .collect();
        let harmonics: Vec<i64> =
            (1..=self.period as i64 / 2).map(|h| h * periods as i64).collect();
        let (mut peaks, mut beside) = (0.0, 0.0);
        for first in (0..lines).step_by(self.period) {
            let together = first..(first + self.period).min(lines);
            let at = |x: usize| -> f64 {
                together.clone().map(|line| values[line * next + x * step]).sum()
            };
            let sums: Vec<f64> = (0..=n).map(at).collect();
            let d: Vec<f64> = (0..n).map(|x| window[x] * (sums[x + 1] - sums[x])).collect();
            let power = |bin: i64| {
                let bin = bin.rem_euclid(n as i64) as usize;
                let (mut re, mut im, mut turn) = (0.0, 0.0, 0);
                for d in &d {
                    let [cos, sin] = turns[turn];
                    re += d * cos;
                    im += d * sin;
                    turn += bin;
                    if turn >= n {
                        turn -= n;
                    }
                }
                re * re + im * im
            };
            for &harmonic in &harmonics {
                peaks += power(harmonic);
                let sum: f64 = BESIDE.into_iter().map(|by| power(harmonic + by)).sum();
                beside += sum / BESIDE.len() as f64;
            }
        }
        // An image of one colour has no pattern.
        if beside + peaks == 0.0 { 1.0 } else { (peaks / beside).max(f64::MIN_POSITIVE) }
    }
}

/// Rec. 601 luminance of each pixel, 0 to 1, row by row.
fn luminance(image: &RgbImage) -> Vec<f64> {
    let of = |rgb: &image::Rgb<u8>| {
        let [r, g, b] = rgb.0.map(f64::from);
        (0.299 * r + 0.587 * g + 0.114 * b) / 255.0
    };
    image.pixels().map(of).collect()
}

#[cfg(test)]
mod tests {
    use flow::noise::Noise;
    use image::Rgb;

    use super::*;

    /// A picture with large and small parts, and `depth` levels of pattern every `period` pixels.
    fn picture(width: u32, height: u32, period: u32, depth: f64) -> RgbImage {
        let noise = Noise::new(3).normal(0, (width * height) as usize);
        RgbImage::from_fn(width, height, |x, y| {
            let (fx, fy) = (f64::from(x), f64::from(y));
            let slow = 40.0 * (fx / 37.0).sin() + 30.0 * (fy / 23.0 + fx / 91.0).cos();
            let grain = 4.0 * f64::from(noise[(y * width + x) as usize]);
            let edge = if (fx - 90.0).hypot(fy - 70.0) < 50.0 { 35.0 } else { 0.0 };
            let line = if x % period == 0 || y % period == 0 { depth } else { 0.0 };
            Rgb([(128.0 + slow + grain + edge + line).clamp(0.0, 255.0) as u8; 3])
        })
    }

    fn score(image: &RgbImage) -> f64 {
        Grid { period: 16 }.score(&[], &[image]).unwrap()[0]
    }

    #[test]
    fn a_pattern_is_seen_before_eyes_see_it_and_other_pictures_have_none() {
        for (width, height) in [(256, 192), (203, 241)] {
            let clean = score(&picture(width, height, 16, 0.0));
            assert!(clean.abs() < 1.0, "{clean}");
            let [faint, plain] = [3.0, 12.0].map(|depth| score(&picture(width, height, 16, depth)));
            assert!(faint < -3.0 && plain < faint - 5.0, "{clean} {faint} {plain}");
            // Harmonics of the period, as a pattern of latents is one of patches.
            assert!(score(&picture(width, height, 8, 12.0)) < -6.0);
            let other = score(&picture(width, height, 13, 12.0));
            assert!(other > -1.0, "{other}");
        }
        assert_eq!(score(&RgbImage::new(160, 160)), 0.0);
    }

    #[test]
    fn what_is_too_small_is_refused_at_the_start() {
        let grid = Grid { period: 16 };
        let refused = grid.check(&[], Some([512, 128])).unwrap_err().to_string();
        assert!(refused.contains("129 pixels are the least"), "{refused}");
        grid.check(&[], Some([129, 512])).unwrap();
        assert!(grid.score(&[], &[&RgbImage::new(64, 64)]).is_err());
    }
}
