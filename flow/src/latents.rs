//! Latents as the autoencoder sees them, `[Z, h, w]`, and as the transformer sees them: packed tokens
//! `[h/2·w/2, 4·Z]`, each a 2×2 patch of all channels.
//!
//! Source: `FluxPipeline._pack_latents` of diffusers 0.42: channels outermost within a token.

use crate::noise::Noise;

/// Side of the patch that makes a token.
pub const PATCH: usize = 2;

/// Most pixels of an image.
pub const MAX_PIXELS: usize = 1 << 26;

/// The size of one image in latent cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentSize {
    /// Latent channels Z.
    pub channels: usize,
    /// Rows h of cells, even.
    pub height: usize,
    /// Columns w of cells, even.
    pub width: usize,
}

/// An image size that has no latents.
#[derive(Debug, thiserror::Error)]
#[error("invalid image size {width}x{height}: both must be positive multiples of {multiple}")]
pub struct SizeError {
    width: usize,
    height: usize,
    multiple: usize,
}

/// An image of more than [`MAX_PIXELS`].
#[derive(Debug, thiserror::Error)]
#[error("{width}x{height} is above the limit of {MAX_PIXELS} pixels")]
pub struct PixelError {
    width: usize,
    height: usize,
}

/// Refuses images of more than [`MAX_PIXELS`].
///
/// # Errors
/// When it is one.
pub fn check_pixels(width: usize, height: usize) -> Result<(), PixelError> {
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(PixelError { width, height });
    }
    Ok(())
}

impl LatentSize {
    /// The latents of an image of `width`×`height` pixels, where a cell covers `factor` pixels.
    ///
    /// # Errors
    /// When a side is not a positive multiple of 2·`factor`.
    pub fn of_image(
        channels: usize,
        factor: usize,
        width: usize,
        height: usize,
    ) -> Result<Self, SizeError> {
        let multiple = PATCH * factor;
        if width == 0
            || height == 0
            || !width.is_multiple_of(multiple)
            || !height.is_multiple_of(multiple)
        {
            return Err(SizeError { width, height, multiple });
        }
        Ok(Self { channels, height: height / factor, width: width / factor })
    }

    /// Numbers in one image's latents.
    pub fn len(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rows of tokens.
    pub fn rows(&self) -> usize {
        self.height / PATCH
    }

    /// Columns of tokens.
    pub fn columns(&self) -> usize {
        self.width / PATCH
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.rows() * self.columns()
    }

    /// Numbers a token holds.
    pub fn token_width(&self) -> usize {
        PATCH * PATCH * self.channels
    }

    /// The noise `[Z, h, w]` that image `seed` starts from, in every program.
    pub fn noise(&self, seed: u64) -> Vec<f32> {
        Noise::new(seed).normal(0, self.len())
    }

    /// `[Z, h, w]` → `[tokens, 4·Z]`, one image.
    pub fn pack(&self, latents: &[f32]) -> Vec<f32> {
        let mut packed = vec![0.0; self.len()];
        self.visit(|at_packed, at_latent| packed[at_packed] = latents[at_latent]);
        packed
    }

    /// `[tokens, 4·Z]` → `[Z, h, w]`, one image.
    pub fn unpack(&self, packed: &[f32]) -> Vec<f32> {
        let mut latents = vec![0.0; self.len()];
        self.visit(|at_packed, at_latent| latents[at_latent] = packed[at_packed]);
        latents
    }

    fn visit(&self, mut pair: impl FnMut(usize, usize)) {
        let mut at_packed = 0;
        for row in 0..self.rows() {
            for column in 0..self.columns() {
                for channel in 0..self.channels {
                    for y in 0..PATCH {
                        for x in 0..PATCH {
                            let (line, cell) = (PATCH * row + y, PATCH * column + x);
                            pair(at_packed, (channel * self.height + line) * self.width + cell);
                            at_packed += 1;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_patch_of_all_channels() {
        let size = LatentSize { channels: 2, height: 2, width: 4 };
        let latents: Vec<f32> = (0..16u8).map(f32::from).collect();
        let packed = size.pack(&latents);
        assert_eq!(packed[..8], [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0]);
        assert_eq!(size.unpack(&packed), latents);
        assert_eq!((size.tokens(), size.token_width()), (2, 8));
    }

    #[test]
    fn odd_sizes_are_refused() {
        assert!(LatentSize::of_image(16, 8, 1024, 1000).is_err());
        assert!(LatentSize::of_image(16, 8, 0, 64).is_err());
        let size = LatentSize::of_image(16, 8, 1024, 768).unwrap();
        assert_eq!((size.height, size.width, size.tokens()), (96, 128, 3072));
    }
}
