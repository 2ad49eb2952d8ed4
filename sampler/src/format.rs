//! Pictures as files: PNG, JPEG and WebP, with the text that viewers of this field read.

use std::{io::BufReader, path::Path};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::open_for_reading;
use image::{
    DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageReader, Limits,
    codecs::{jpeg::JpegEncoder, webp::WebPEncoder},
};

use crate::{exif, picture::Picture};

/// Quality of a JPEG unless something else is asked for, of 100.
pub const JPEG_QUALITY: u8 = 95;
/// Most bytes a picture that is read may take in memory.
const MAX_BYTES: u64 = 1 << 30;
/// Most bytes of a text chunk once it is decompressed.
const MAX_TEXT: usize = 1 << 20;
/// Keyword of the text chunk of a PNG.
const KEYWORD: &str = "parameters";

/// How a picture is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Png,
    /// Its quality, 1 to 100.
    Jpeg(u8),
    /// Without loss.
    WebP,
}

impl Format {
    /// The format that a file name asks for.
    pub fn of(path: &Path) -> Option<Self> {
        let extension = path.extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "png" => Some(Self::Png),
            "jpg" | "jpeg" => Some(Self::Jpeg(JPEG_QUALITY)),
            "webp" => Some(Self::WebP),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg(_) => "jpeg",
            Self::WebP => "webp",
        }
    }

    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg(_) => "image/jpeg",
            Self::WebP => "image/webp",
        }
    }

    /// `picture` as a file; `parameters` goes into a `tEXt` chunk of a PNG, or `iTXt` where Latin-1
    /// does not hold it, and into the EXIF user comment of the others.
    ///
    /// # Errors
    /// When the format cannot hold a picture of that size.
    pub fn encode(self, picture: &Picture, parameters: Option<&str>) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        match self {
            Self::Png => return png(picture, parameters),
            Self::Jpeg(quality) => {
                write(JpegEncoder::new_with_quality(&mut file, quality), picture, parameters)?;
            }
            Self::WebP => write(WebPEncoder::new_lossless(&mut file), picture, parameters)?,
        }
        Ok(file)
    }
}

/// Reads a PNG, JPEG or WebP, turned as its EXIF says; transparency is dropped.
///
/// # Errors
/// When it is none, or too large.
pub fn open(path: &Path) -> Result<Picture> {
    let named = || format!("cannot read {} as a picture", path.display());
    let file = open_for_reading(path).with_context(named)?;
    let mut reader =
        ImageReader::new(BufReader::new(file)).with_guessed_format().with_context(named)?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().with_context(named)?;
    let turned = decoder.orientation().with_context(named)?;
    let mut image = DynamicImage::from_decoder(decoder).with_context(named)?;
    image.apply_orientation(turned);
    let rgb = image.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    ensure!(width > 0 && height > 0, "{} is empty", path.display());
    Ok(Picture { width, height, rgb: rgb.into_raw() })
}

/// Everything written in a picture: keyword and text, in the file's order; a user comment of EXIF
/// counts as `parameters`.
///
/// # Errors
/// When it is no PNG, JPEG or WebP.
pub fn texts(path: &Path) -> Result<Vec<(String, String)>> {
    let named = || format!("cannot read {} as a picture", path.display());
    let file = open_for_reading(path).with_context(named)?;
    let reader =
        ImageReader::new(BufReader::new(file)).with_guessed_format().with_context(named)?;
    match reader.format() {
        Some(image::ImageFormat::Png) => png_texts(path).with_context(named),
        Some(_) => {
            let mut decoder = reader.into_decoder().with_context(named)?;
            let exif = decoder.exif_metadata().with_context(named)?.unwrap_or_default();
            Ok(exif::user_comment(&exif)
                .map(|text| (KEYWORD.to_owned(), text))
                .into_iter()
                .collect())
        }
        None => bail!("cannot read {} as a picture: neither PNG, JPEG nor WebP", path.display()),
    }
}

fn write(mut encoder: impl ImageEncoder, picture: &Picture, text: Option<&str>) -> Result<()> {
    if let Some(text) = text {
        encoder.set_exif_metadata(exif::with_user_comment(text))?;
    }
    let (width, height) = (picture.width as u32, picture.height as u32);
    Ok(encoder.write_image(&picture.rgb, width, height, ExtendedColorType::Rgb8)?)
}

fn png(picture: &Picture, parameters: Option<&str>) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, picture.width as u32, picture.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // A photograph of a megapixel takes 7 ms and not 211, and is no larger.
    encoder.set_compression(png::Compression::Fast);
    if let Some(text) = parameters {
        let (keyword, text) = (KEYWORD.to_owned(), text.to_owned());
        if text.chars().all(|c| u32::from(c) < 256) {
            encoder.add_text_chunk(keyword, text)?;
        } else {
            encoder.add_itxt_chunk(keyword, text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(file)
}

fn png_texts(path: &Path) -> Result<Vec<(String, String)>> {
    let mut reader = png::Decoder::new(BufReader::new(open_for_reading(path)?)).read_info()?;
    reader.finish()?;
    let info = reader.info();
    let mut found = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        found.push((chunk.keyword.clone(), utf8_or_latin1(&chunk.text)));
    }
    // A megabyte of zeros is a kilobyte once compressed.
    for chunk in &info.compressed_latin1_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(MAX_TEXT)?;
        found.push((chunk.keyword.clone(), utf8_or_latin1(&chunk.get_text()?)));
    }
    for chunk in &info.utf8_text {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(MAX_TEXT)?;
        found.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(found)
}

/// Some programs write UTF-8 where the format says Latin-1.
fn utf8_or_latin1(text: &str) -> String {
    let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
    bytes.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Steps: 8, Sampler: Euler, Seed: 7";

    fn picture() -> Picture {
        Picture { width: 16, height: 8, rgb: (0..384u16).map(|i| (i % 200) as u8).collect() }
    }

    #[test]
    fn text_and_pixels_come_back() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("picture");
        for format in [Format::Png, Format::Jpeg(100), Format::WebP] {
            for prompt in ["plain", "caf\u{e9}\tü\nsecond line", "雪 🦊"] {
                let text = format!("{prompt}\n{TEXT}");
                std::fs::write(&path, format.encode(&picture(), Some(&text))?)?;
                assert_eq!(texts(&path)?, [(KEYWORD.to_owned(), text)], "{format:?}");
                let back = open(&path)?;
                assert_eq!((back.width, back.height), (16, 8));
                if !matches!(format, Format::Jpeg(_)) {
                    assert_eq!(back, picture(), "{format:?}");
                }
            }
            std::fs::write(&path, format.encode(&picture(), None)?)?;
            assert!(texts(&path)?.is_empty(), "{format:?}");
        }
        Ok(())
    }

    #[test]
    fn latin_1_goes_into_a_plain_chunk() -> Result<()> {
        for (prompt, chunk) in [("caf\u{e9}", b"tEXt"), ("雪", b"iTXt")] {
            let file = Format::Png.encode(&picture(), Some(prompt))?;
            assert!(file.windows(4).any(|bytes| bytes == chunk), "{prompt}");
        }
        assert_eq!(utf8_or_latin1("caf\u{c3}\u{a9}"), "caf\u{e9}");
        assert_eq!(utf8_or_latin1("caf\u{e9}"), "caf\u{e9}");
        Ok(())
    }

    #[test]
    fn a_file_that_is_no_picture_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("p.png");
        let whole = Format::Png.encode(&picture(), None)?;
        for content in [b"fox".as_slice(), &whole[..whole.len() - 20]] {
            std::fs::write(&path, content)?;
            for message in [texts(&path).unwrap_err(), open(&path).unwrap_err()] {
                assert!(format!("{message:#}").contains("p.png as a picture"), "{message:#}");
            }
        }
        Ok(())
    }

    /// Four megabytes of text that take four kilobytes in the file.
    #[test]
    fn text_that_grows_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("p.png");
        let mut file = Vec::new();
        let mut writer = png::Encoder::new(&mut file, 1, 1).write_header()?;
        let mut chunk = png::text_metadata::ITXtChunk::new(KEYWORD, "a".repeat(4 << 20));
        chunk.compressed = true;
        writer.write_text_chunk(&chunk)?;
        writer.write_image_data(&[0])?;
        writer.finish()?;
        assert!(file.len() < 1 << 16);
        std::fs::write(&path, file)?;
        let message = format!("{:#}", texts(&path).unwrap_err());
        assert!(message.contains("p.png as a picture"), "{message}");
        Ok(())
    }

    #[test]
    fn names_say_the_format() {
        let of = |name: &str| Format::of(Path::new(name));
        assert_eq!(of("a.PNG"), Some(Format::Png));
        assert_eq!(of("b/a.jpeg"), Some(Format::Jpeg(JPEG_QUALITY)));
        assert_eq!(of("a.webp"), Some(Format::WebP));
        assert_eq!(of("v1.2"), None);
    }
}
