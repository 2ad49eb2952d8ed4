//! Images as PNG, with the text chunk that image viewers of this field read.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::{Context, Result, ensure};
use flow::solver::Solver;

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
        return Ok(Some(chunk.get_text().with_context(named)?));
    }
    let narrow = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == KEYWORD);
    Ok(narrow.map(|chunk| chunk.text.clone()))
}

/// What the text chunk says of an image.
#[derive(Clone, Debug)]
pub struct Parameters<'a> {
    pub prompt: &'a str,
    pub steps: usize,
    pub solver: Solver,
    /// Of a model that embeds guidance.
    pub guidance: Option<f32>,
    /// Where the initial noise came from.
    pub origin: Origin<'a>,
    pub width: usize,
    pub height: usize,
    /// Name of the model's folder.
    pub model: &'a str,
    /// Factor s of the schedule's shift, 1 for none.
    pub shift: f64,
}

/// Where initial noise comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// Drawn from this seed.
    Seed(u64),
    /// Read from the file of this name.
    File(&'a str),
}

impl Parameters<'_> {
    /// The prompt, then one line of `Name: value, …`; a value with a comma, colon, quote or line
    /// break is written as a JSON string.
    pub fn text(&self) -> String {
        let mut fields = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", sampler_name(self.solver).to_owned()),
            ("Schedule shift", rounded(self.shift)),
        ];
        if let Some(guidance) = self.guidance {
            fields.push(("Guidance", guidance.to_string()));
        }
        fields.push(match self.origin {
            Origin::Seed(seed) => ("Seed", seed.to_string()),
            Origin::File(name) => ("Noise", quoted(name)),
        });
        fields.push(("Size", format!("{}x{}", self.width, self.height)));
        fields.push(("Model", quoted(self.model)));
        fields.push(("Version", concat!("ng-sample ", env!("CARGO_PKG_VERSION")).to_owned()));
        let fields: Vec<String> =
            fields.into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        format!("{}\n{}", self.prompt, fields.join(", "))
    }
}

/// The name that other programs of this field use.
fn sampler_name(solver: Solver) -> &'static str {
    match solver {
        Solver::Dpmpp2m => "DPM++ 2M",
        Solver::Euler => "Euler",
        Solver::Heun => "Heun",
    }
}

/// At most four decimals.
fn rounded(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn quoted(value: &str) -> String {
    if value.contains([',', ':', '"', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(prompt: &str) -> Parameters<'_> {
        Parameters {
            prompt,
            steps: 8,
            solver: Solver::Dpmpp2m,
            guidance: Some(3.5),
            origin: Origin::Seed(7),
            width: 32,
            height: 16,
            model: "signs",
            shift: 1.15f64.exp(),
        }
    }

    #[test]
    fn text_is_what_viewers_parse() {
        assert_eq!(
            parameters("red \"HAT\", bold").text(),
            "red \"HAT\", bold\nSteps: 8, Sampler: DPM++ 2M, Schedule shift: 3.1582, \
             Guidance: 3.5, Seed: 7, Size: 32x16, Model: signs, Version: ng-sample 0.0.0"
        );
        let from_file = Parameters {
            guidance: None,
            origin: Origin::File("a, b.safetensors"),
            shift: 3.0,
            ..parameters("")
        };
        let text = from_file.text();
        assert!(text.contains("Schedule shift: 3, Noise: \"a, b.safetensors\", Size"), "{text}");
    }

    #[test]
    fn text_and_pixels_come_back() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("p.png");
        let picture = Picture { width: 2, height: 2, rgb: (0..12).collect() };
        for (prompt, chunk) in
            [("plain", b"tEXt"), ("caf\u{e9}\tü\nsecond line", b"tEXt"), ("雪 🦊", b"iTXt")]
        {
            let text = parameters(prompt).text();
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

    #[test]
    fn samples_become_bytes_channel_by_channel() -> Result<()> {
        let sample = [-1.0, 0.0, 2.0, -3.0, 1.0, 0.5];
        let picture = Picture::from_sample(&sample, 1, 2)?;
        assert_eq!(picture.rgb, [0, 255, 255, 128, 0, 191]);
        assert!(Picture::from_sample(&[0.0, f32::NAN, 0.0], 1, 1).is_err());
        Ok(())
    }
}
