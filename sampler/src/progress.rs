//! Where a job is while its image is made, and what the image is going to be.

use anyhow::Result;
use flow::latents::LatentSize;
use onnx::Cancel;

use crate::{networks::Decoder, picture::Picture};

/// Sides in latent cells of a preview, at most: 256 pixels for FLUX.
const PREVIEW: usize = 32;

/// Where a job is.
pub struct Progress<'a> {
    /// Network calls done, from 1.
    pub step: usize,
    /// Network calls in all.
    pub of: usize,
    /// Packed, as the network expects it to end.
    pub(crate) x0: &'a [f32],
    pub(crate) size: LatentSize,
    pub(crate) decoder: &'a mut Decoder,
    pub(crate) cancel: &'a Cancel,
}

impl Progress<'_> {
    /// The image as the network expects it to end, at most 256 pixels a side: its latents are made
    /// smaller before they are decoded.
    ///
    /// # Errors
    /// When the decoder fails.
    pub fn preview(&mut self) -> Result<Picture> {
        let latents = self.size.unpack(self.x0);
        let longest = self.size.width.max(self.size.height);
        let (latents, size) = shrunk(&latents, &self.size, longest.div_ceil(PREVIEW));
        self.decoder.decode(&latents, &size, self.cancel)
    }
}

/// The mean of every `factor`×`factor` cells, as far as whole ones go.
fn shrunk(latents: &[f32], size: &LatentSize, factor: usize) -> (Vec<f32>, LatentSize) {
    if factor <= 1 {
        return (latents.to_vec(), *size);
    }
    let small = LatentSize {
        height: (size.height / factor).max(1),
        width: (size.width / factor).max(1),
        ..*size
    };
    let cells = |side: usize, at: usize| (at * factor)..((at + 1) * factor).min(side);
    let mean = |z: usize, y: usize, x: usize| {
        let (rows, columns) = (cells(size.height, y), cells(size.width, x));
        let n = (rows.len() * columns.len()) as f32;
        let row = |y: usize| &latents[(z * size.height + y) * size.width..][columns.clone()];
        rows.flat_map(row).sum::<f32>() / n
    };
    let places = (0..small.channels).flat_map(|z| {
        (0..small.height).flat_map(move |y| (0..small.width).map(move |x| (z, y, x)))
    });
    (places.map(|(z, y, x)| mean(z, y, x)).collect(), small)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preview_is_the_mean_of_its_cells() {
        let size = LatentSize { channels: 2, height: 4, width: 6 };
        let latents: Vec<f32> = (0..48u8).map(f32::from).collect();
        let (small, to) = shrunk(&latents, &size, 2);
        assert_eq!((to.height, to.width, small.len()), (2, 3, 12));
        assert_eq!(small[..3], [3.5, 5.5, 7.5]);
        assert_eq!(small[6], 27.5);
        assert_eq!(shrunk(&latents, &size, 1), (latents, size));
    }
}
