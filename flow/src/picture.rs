//! Pictures of 8 bits, and how a decoder's output becomes one.

/// 8-bit RGB, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `[height, width, 3]`.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// The picture of a decoder's output `sample` `[3, height, width]`, −1 (dark) to 1; what is not a number is
    /// dark.
    ///
    /// Source of the rounding: `VaeImageProcessor.postprocess` of diffusers 0.42.
    pub fn of_sample(sample: &[f32], width: usize, height: usize) -> Self {
        let area = width * height;
        debug_assert_eq!(sample.len(), 3 * area);
        let byte = |x: f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let pixel = |at: usize| [0, 1, 2].map(|channel| byte(sample[channel * area + at]));
        Self { width, height, rgb: (0..area).flat_map(pixel).collect() }
    }

    /// The inverse of [`Picture::of_sample`]: `[3, height, width]`, values −1 to 1.
    pub fn to_sample(&self) -> Vec<f32> {
        let plane = |channel| self.rgb.iter().skip(channel).step_by(3);
        (0..3).flat_map(plane).map(|&byte| f32::from(byte) / 127.5 - 1.0).collect()
    }
}
