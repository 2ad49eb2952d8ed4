//! Images as PNG, with the text chunk that image viewers of this field read.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::{Context, Result, ensure};

/// Most bytes of a text chunk once it is decompressed.
const MAX_TEXT: usize = 1 << 20;
/// Keyword of the text chunk.
const KEYWORD: &str = "parameters";

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

    /// Reads a PNG of 8 or 16 bits, grey or coloured; transparency is dropped.
    ///
    /// # Errors
    /// When it is no PNG.
    pub fn open(path: &Path) -> Result<Self> {
        let named = || format!("cannot read {} as PNG", path.display());
        let file = File::open(path).with_context(named)?;
        let mut decoder = png::Decoder::new(BufReader::new(file));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().with_context(named)?;
        let size = reader.output_buffer_size().with_context(named)?;
        let mut pixels = vec![0; size];
        let frame = reader.next_frame(&mut pixels).with_context(named)?;
        let channels = frame.color_type.samples();
        let colour = |pixel: &[u8]| {
            if channels < 3 { [pixel[0]; 3] } else { [pixel[0], pixel[1], pixel[2]] }
        };
        let rgb = pixels[..frame.buffer_size()].chunks_exact(channels).flat_map(colour).collect();
        Ok(Self { width: frame.width as usize, height: frame.height as usize, rgb })
    }

    /// The inverse of [`Picture::from_sample`]: `[3, height, width]`, values −1 to 1.
    pub fn to_sample(&self) -> Vec<f32> {
        let plane = |channel| self.rgb.iter().skip(channel).step_by(3);
        (0..3).flat_map(plane).map(|&byte| f32::from(byte) / 127.5 - 1.0).collect()
    }

    /// A PNG file; `parameters` goes into a `tEXt` chunk, or `iTXt` where Latin-1 does not hold it.
    pub fn png(&self, parameters: Option<&str>) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        if let Some(text) = parameters {
            let (keyword, text) = (KEYWORD.to_owned(), text.to_owned());
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk(keyword, text)?;
            } else {
                encoder.add_itxt_chunk(keyword, text)?;
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(file)
    }
}

/// The text that [`Picture::png`] stored in the PNG at `path`, if any.
pub fn read_parameters(path: &Path) -> Result<Option<String>> {
    let named = || format!("cannot read {} as PNG", path.display());
    let file = File::open(path).with_context(named)?;
    let mut reader = png::Decoder::new(BufReader::new(file)).read_info().with_context(named)?;
    reader.finish().with_context(named)?;
    let info = reader.info();
    let wide = info.utf8_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    if let Some(chunk) = wide {
        // A megabyte of zeros is a kilobyte once compressed.
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(MAX_TEXT).with_context(named)?;
        return Ok(Some(chunk.get_text().with_context(named)?));
    }
    let narrow = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    Ok(narrow.map(|chunk| chunk.text.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_pixels_come_back() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("p.png");
        let picture = Picture { width: 2, height: 2, rgb: (0..12).collect() };
        for (prompt, chunk) in
            [("plain", b"tEXt"), ("caf\u{e9}\tü\nsecond line", b"tEXt"), ("雪 🦊", b"iTXt")]
        {
            let text = format!("{prompt}\nSteps: 8, Sampler: Euler, Seed: 7");
            let file = picture.png(Some(&text))?;
            assert!(file.windows(4).any(|bytes| bytes == chunk), "{prompt}");
            std::fs::write(&path, &file)?;
            assert_eq!(read_parameters(&path)?.as_deref(), Some(text.as_str()));
            let mut reader = png::Decoder::new(BufReader::new(File::open(&path)?)).read_info()?;
            let mut pixels = vec![0; 12];
            reader.next_frame(&mut pixels)?;
            assert_eq!(pixels, picture.rgb);
        }
        std::fs::write(&path, picture.png(None)?)?;
        assert_eq!(read_parameters(&path)?, None);
        Ok(())
    }

    #[test]
    fn a_file_that_is_no_png_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("p.png");
        let whole = Picture { width: 9, height: 9, rgb: vec![7; 243] }.png(None)?;
        for content in [b"GIF89a".as_slice(), &whole[..whole.len() - 20]] {
            std::fs::write(&path, content)?;
            let message = read_parameters(&path).unwrap_err().to_string();
            assert!(message.contains("p.png as PNG"), "{message}");
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
        let message = format!("{:#}", read_parameters(&path).unwrap_err());
        assert!(message.contains("p.png as PNG"), "{message}");
        Ok(())
    }

    #[test]
    fn samples_become_bytes_channel_by_channel() -> Result<()> {
        let sample = [-1.0, 0.0, 2.0, -3.0, 1.0, 0.5];
        let picture = Picture::from_sample(&sample, 1, 2)?;
        assert_eq!(picture.rgb, [0, 255, 255, 128, 0, 191]);
        assert!(Picture::from_sample(&[0.0, f32::NAN, 0.0], 1, 1).is_err());
        Ok(())
    }
}
