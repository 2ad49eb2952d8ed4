//! RGB images as PNG.

use std::{io::Cursor, path::Path};

use anyhow::{Context, Result};
use image::{ImageFormat, RgbImage};

use flow::checkpoint::write_atomically;

/// The bytes of a PNG file.
pub fn png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).context("encoding a PNG")?;
    Ok(bytes.into_inner())
}

/// Writes or replaces the PNG file `path`, whole or not at all.
pub fn save(path: &Path, image: &RgbImage) -> Result<()> {
    Ok(write_atomically(path, &png(image)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_picture_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out/a.png");
        let image = RgbImage::from_fn(3, 2, |x, y| image::Rgb([x as u8, y as u8, 9]));
        save(&path, &image).unwrap();
        assert_eq!(image::open(&path).unwrap().into_rgb8(), image);
    }
}
