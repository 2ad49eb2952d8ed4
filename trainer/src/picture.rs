//! RGB images: written as PNG, read from PNG and JPEG, and what is drawn on them.

pub mod font;
pub mod plot;
pub mod sheet;

use std::{io::Cursor, path::Path};

use anyhow::{Context, Result};
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};

use flow::checkpoint::{read_bounded, write_atomically};

/// The bytes of a PNG file.
pub fn png(image: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).context("encoding a PNG")?;
    Ok(bytes.into_inner())
}

/// Reads a PNG or JPEG file of at most `max_edge` pixels a side, turned as its EXIF orientation says.
///
/// # Errors
/// When it is missing, none of both, damaged or larger.
pub fn open(path: &Path, max_edge: u32) -> Result<RgbImage> {
    let decode = || -> Result<RgbImage> {
        let bytes = read_bounded(path)?;
        let mut limits = Limits::default();
        (limits.max_image_width, limits.max_image_height) = (Some(max_edge), Some(max_edge));
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
        reader.limits(limits);
        let mut decoder = reader.into_decoder()?;
        let orientation = decoder.orientation()?;
        let mut image = DynamicImage::from_decoder(decoder)?;
        image.apply_orientation(orientation);
        Ok(image.into_rgb8())
    };
    decode().with_context(|| format!("cannot read {}", path.display()))
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
        assert_eq!(open(&path, 3).unwrap(), image);
        let said = format!("{:#}", open(&path, 2).unwrap_err());
        assert!(said.contains("a.png"), "{said}");
    }

    /// A JPEG file is turned as its EXIF says: 6 is a quarter turn to the right.
    #[test]
    fn a_jpeg_is_turned_as_it_was_taken() {
        let image = RgbImage::from_fn(32, 16, |x, _| image::Rgb([if x < 16 { 250 } else { 5 }; 3]));
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 95);
        let tag = [0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0];
        let exif = [&b"Exif\0\0II*\0\x08\0\0\0\x01\0"[..], &tag, &[0; 4]].concat();
        encoder.add_app_segment(1, exif).unwrap();
        encoder.encode(&image, 32, 16, jpeg_encoder::ColorType::Rgb).unwrap();
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a.jpg");
        std::fs::write(&path, bytes).unwrap();
        let turned = open(&path, 100).unwrap();
        assert_eq!(turned.dimensions(), (16, 32));
        assert!(turned.get_pixel(8, 2).0[0] > 200 && turned.get_pixel(8, 30).0[0] < 50);
    }
}
