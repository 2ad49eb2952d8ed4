//! Images in memory.

use anyhow::{Result, ensure};

/// 8-bit RGB, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// `[height, width, 3]`.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// The image of a decoder's output `sample` `[3, height, width]`, values −1 (dark) to 1.
    ///
    /// Source of the rounding: `VaeImageProcessor.postprocess` of diffusers 0.42.
    ///
    /// # Errors
    /// When a value is not finite.
    pub fn from_sample(sample: &[f32], width: usize, height: usize) -> Result<Self> {
        let area = width * height;
        debug_assert_eq!(sample.len(), 3 * area);
        ensure!(sample.iter().all(|value| value.is_finite()), "the decoded image is not finite");
        let byte =
            |value: f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let rgb = (0..area)
            .flat_map(|pixel| [0, 1, 2].map(|channel| byte(sample[channel * area + pixel])))
            .collect();
        Ok(Self { width, height, rgb })
    }

    /// The inverse of [`Picture::from_sample`]: `[3, height, width]`, values −1 to 1.
    pub fn to_sample(&self) -> Vec<f32> {
        let plane = |channel| self.rgb.iter().skip(channel).step_by(3);
        (0..3).flat_map(plane).map(|&byte| f32::from(byte) / 127.5 - 1.0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_bytes_channel_by_channel() -> Result<()> {
        let sample = [-1.0, 0.0, 2.0, -3.0, 1.0, 0.5];
        let picture = Picture::from_sample(&sample, 1, 2)?;
        assert_eq!(picture.rgb, [0, 255, 255, 128, 0, 191]);
        assert!(Picture::from_sample(&[0.0, f32::NAN, 0.0], 1, 1).is_err());
        Ok(())
    }
}
