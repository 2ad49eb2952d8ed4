//! Images in memory.

use anyhow::{Result, ensure};
pub use flow::picture::Picture;

/// [`Picture::of_sample`].
///
/// # Errors
/// When a value is not finite.
pub fn decoded(sample: &[f32], width: usize, height: usize) -> Result<Picture> {
    ensure!(sample.iter().all(|value| value.is_finite()), "the decoded image is not finite");
    Ok(Picture::of_sample(sample, width, height))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_bytes_channel_by_channel() -> Result<()> {
        let sample = [-1.0, 0.0, 2.0, -3.0, 1.0, 0.5];
        let picture = decoded(&sample, 1, 2)?;
        assert_eq!(picture.rgb, [0, 255, 255, 128, 0, 191]);
        assert!(decoded(&[0.0, f32::NAN, 0.0], 1, 1).is_err());
        Ok(())
    }
}
