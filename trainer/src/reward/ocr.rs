//! Text accuracy under a recognition model in the form of PP-OCR's (v4 to v6 as `rapidocr` ships them,
//! with their characters in the metadata, or any other with a file of characters).
//!
//! The whole image is one line of text, or with a [`Detector`] as many lines as that finds, read one after
//! the other as PaddleOCR does for Flow-GRPO's reward. Preprocessing is that of
//! `rapidocr/ch_ppocr_rec/main.py`, without its padding to 320 pixels (padding changes no reading
//! of short words and costs three times the time): the height H that the model is made for (48 where
//! it leaves it open), width ⌈H·w/h⌉, bilinear, channels
//! blue, green, red, values (x/255 − 0.5)/0.5. The model returns one softmax row for every 8
//! pixels of width, so a square line spells at most 6 characters.
//!
//! Images go through the model one by one: batches are no faster on one thread, and change the
//! last bits.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::read_bounded;
use flow::log;
use image::{
    RgbImage,
    imageops::{self, FilterType},
};
use onnx::{Model, Tensor};

use super::{
    Measure, Reward,
    ctc::{Alphabet, Frames},
    detector::{Detector, DetectorConfig},
    pool::Pool,
    text,
};
use flow::prompts::Prompt;

/// Least log-probability a character that [`Measure::LogProb`] gives: a softmax in f32 underflows
/// to 0 for a hopeless image, and the reward must stay finite.
pub const LOG_PROB_FLOOR: f64 = -20.0;

/// Targets that a message names.
const SHOWN: usize = 3;
const DEFAULT_HEIGHT: u32 = 48;
/// Largest accepted file of characters, in bytes.
const MAX_CHARACTERS: u64 = 4 << 20;
/// Wider images (in pixels at the model's height) are refused rather than allocated for.
const MAX_WIDTH: u32 = 8192;
/// Found lines whose characters are less likely on average are no text (`drop_score` of PaddleOCR,
/// `text_score` of rapidocr).
const LEAST_CONFIDENCE: f64 = 0.5;

/// Reads images, and scores the readings against [`Prompt::target_text`].
pub struct Ocr {
    pool: Pool,
    alphabet: Alphabet,
    height: u32,
    measure: Measure,
    detector: Option<Detector>,
}

/// What the model says of one image.
struct Seen {
    /// Of all lines one after the other, with a frame of nothing but blank between two, row-major
    /// [frames, classes].
    probabilities: Vec<f32>,
    reading: String,
}

/// One image judged in every way, from one run of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub reading: String,
    pub exact: bool,
    /// 0 to 1: [`text::similarity`].
    pub similarity: f64,
    /// Log-probability of the target a character, from [`LOG_PROB_FLOOR`] to 0. Case and spaces
    /// do not count.
    pub log_prob: f64,
}

impl Ocr {
    /// Opens a recognition model for up to `threads` workers. The classes after the blank are the
    /// lines of the file `characters` or else of `character` in the model's metadata; a space may
    /// follow them. With a `detector`, images may hold several lines.
    ///
    /// # Errors
    /// The file is not an ONNX model, or not one with an image input [N, 3, H, W] and as many classes
    /// as characters; or the detector does not open.
    pub fn open(
        model: &Path,
        characters: Option<&Path>,
        detector: Option<&DetectorConfig>,
        measure: Measure,
        threads: usize,
    ) -> Result<Self> {
        let pool = Pool::open(model, threads)?;
        let characters = characters.map(read_characters).transpose()?;
        let (alphabet, height) = pool
            .with(|session| Ok((alphabet(session, characters)?, height(session)?)))
            .with_context(|| format!("{} does not recognise text", model.display()))?;
        let detector = detector.map(|config| Detector::open(config, threads)).transpose()?;
        Ok(Self { pool, alphabet, height, measure, detector })
    }

    /// What the image reads as, with the model's own case and spaces, and a space between two lines.
    pub fn read(&self, image: &RgbImage) -> Result<String> {
        Ok(self.see(image)?.reading)
    }

    /// Judges one image against the text it should show.
    ///
    /// # Errors
    /// The model fails, or the target is empty, has a character the model does not know, or is
    /// longer than the image is wide where that is one line.
    pub fn judge(&self, target: &str, image: &RgbImage) -> Result<Verdict> {
        let Seen { probabilities, reading } = self.see(image)?;
        let frames = Frames { probabilities: &probabilities, n_classes: self.alphabet.len() };
        let len = text::normalised(target).chars().count() as f64;
        let is_short = frames.len() < self.alphabet.frames_of(target)?;
        // What a detector finds is the image's doing, not its size's.
        let log_prob = if is_short && self.detector.is_some() {
            LOG_PROB_FLOOR
        } else {
            self.alphabet.log_prob(frames, target)? / len
        };
        Ok(Verdict {
            exact: text::exact(&reading, target),
            similarity: text::similarity(&reading, target),
            log_prob: log_prob.clamp(LOG_PROB_FLOOR, 0.0),
            reading,
        })
    }

    fn see(&self, image: &RgbImage) -> Result<Seen> {
        let Some(detector) = &self.detector else {
            let probabilities = self.run(image)?.into_f32()?;
            let frames = Frames { probabilities: &probabilities, n_classes: self.alphabet.len() };
            let reading = self.alphabet.read(frames).text;
            return Ok(Seen { probabilities, reading });
        };
        let (mut probabilities, mut readings) = (Vec::new(), Vec::new());
        for line in detector.lines(image)? {
            if !probabilities.is_empty() {
                let blank = (0..self.alphabet.len()).map(|class| f32::from(class == 0));
                probabilities.extend(blank);
            }
            let of_line = self.run(&line)?.into_f32()?;
            let frames = Frames { probabilities: &of_line, n_classes: self.alphabet.len() };
            let read = self.alphabet.read(frames);
            if read.confidence >= LEAST_CONFIDENCE {
                readings.push(read.text);
            }
            probabilities.extend(of_line);
        }
        Ok(Seen { probabilities, reading: readings.join(" ") })
    }

    /// Refuses targets that no image of `size` can be scored for.
    fn check_length(&self, targets: &[&str], [width, height]: [usize; 2]) -> Result<()> {
        let blank = RgbImage::new(width as u32, height as u32);
        let n_frames = self.run(&blank)?.shape[1];
        let mut long = Vec::new();
        for target in targets {
            let n_needed = self.alphabet.frames_of(target)?;
            if n_needed > n_frames {
                long.push(format!("{target:?} takes {n_needed}"));
            }
        }
        ensure!(
            long.is_empty(),
            "{} of {} targets are too long for an image of {width}x{height}, whose one line has {n_frames} \
             OCR frames: {}{}; give it a `detector`, wider images, or `measure = \"similarity\"`",
            long.len(),
            targets.len(),
            long.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "),
            if long.len() > SHOWN { ", …" } else { "" }
        );
        Ok(())
    }

    /// Class probabilities of every frame of a line, f32 [1, `n_frames`, `n_classes`].
    fn run(&self, image: &RgbImage) -> Result<Tensor> {
        let line = line(image, self.height)?;
        self.pool.with(|session| {
            let (input, output) =
                (session.inputs()[0].name.clone(), session.outputs()[0].name.clone());
            let rows = session.run(&[(&input, &line)], &[&output])?.swap_remove(0);
            let fits = matches!(rows.shape[..], [1, _, classes] if classes == self.alphabet.len());
            ensure!(fits && rows.as_f32().is_ok(), "the OCR model returned shape {:?}", rows.shape);
            let first: f32 = rows.as_f32()?.iter().take(self.alphabet.len()).sum();
            ensure!(
                (first - 1.0).abs() < 0.01,
                "the OCR model returned no probabilities: a frame adds up to {first}"
            );
            Ok(rows)
        })
    }
}

impl Reward for Ocr {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        prompts
            .iter()
            .zip(images)
            .map(|(prompt, image)| {
                let target = target(prompt)?;
                Ok(match self.measure {
                    Measure::LogProb => self.judge(target, image)?.log_prob,
                    Measure::Exact => f64::from(text::exact(&self.read(image)?, target)),
                    Measure::Similarity => text::similarity(&self.read(image)?, target),
                })
            })
            .collect()
    }

    fn check(&self, prompts: &[&Prompt], size: Option<[usize; 2]>) -> Result<()> {
        let targets = prompts.iter().map(|prompt| target(prompt)).collect::<Result<Vec<_>>>()?;
        let mut unknown = targets.iter().filter_map(|target| self.alphabet.spell(target).err());
        let Some(first) = unknown.next() else {
            let is_bounded = self.measure == Measure::LogProb && self.detector.is_none();
            let size = size.filter(|_| is_bounded);
            return size.map_or(Ok(()), |size| self.check_length(&targets, size));
        };
        let n = 1 + unknown.count();
        let told = format!("{n} of {} targets cannot be read: {first:#}", targets.len());
        ensure!(self.measure != Measure::LogProb, told);
        log::note(&format!("note: {told}; what else is in them counts"));
        Ok(())
    }
}

fn target(prompt: &Prompt) -> Result<&str> {
    prompt.target_text().with_context(|| {
        format!("prompt {:?} has no text in double quotes to be read", prompt.text)
    })
}

fn read_characters(path: &Path) -> Result<String> {
    let name = || path.display().to_string();
    let size = std::fs::metadata(path).with_context(name)?.len();
    ensure!(size <= MAX_CHARACTERS, "{}: {size} bytes, at most {MAX_CHARACTERS}", name());
    let text = String::from_utf8(read_bounded(path)?).with_context(name)?;
    Ok(text.strip_suffix('\n').unwrap_or(&text).replace('\r', ""))
}

/// The height an image is scaled to.
fn height(session: &Model) -> Result<u32> {
    let inputs = session.inputs();
    let [_, channels, height, _] = inputs.first().map_or(&[][..], |port| &port.shape) else {
        bail!("it should have one input [N, 3, H, W]");
    };
    ensure!(
        inputs.len() == 1 && channels.is_none_or(|n| n == 3),
        "it should have one input [N, 3, H, W]"
    );
    let height = height.unwrap_or(DEFAULT_HEIGHT as usize);
    ensure!((8..=512).contains(&height), "its images are {height} pixels high: 8 to 512");
    Ok(height as u32)
}

/// The classes: blank, then the characters, then a space if there is a class for it.
fn alphabet(session: &Model, characters: Option<String>) -> Result<Alphabet> {
    let characters = characters
        .or_else(|| session.metadata("character"))
        .context("no `character` in its metadata: give `characters`, a file with one a line")?;
    let mut characters: Vec<&str> = characters.split('\n').collect();
    let n_classes = session.outputs().first().and_then(|port| *port.shape.last()?);
    if n_classes != Some(characters.len() + 1) {
        characters.push(" ");
    }
    let alphabet = Alphabet::new(characters.into_iter().map(str::to_owned));
    if let Some(n_classes) = n_classes {
        ensure!(
            n_classes == alphabet.len(),
            "it has {n_classes} classes for {} characters, blank and space included",
            alphabet.len()
        );
    }
    Ok(alphabet)
}

/// The image as the model takes it: f32 [1, 3, H, W], blue first, in -1 to 1.
fn line(image: &RgbImage, line_height: u32) -> Result<Tensor> {
    let (width, height) = image.dimensions();
    ensure!(width > 0 && height > 0, "the image is empty");
    let width = (u64::from(width) * u64::from(line_height)).div_ceil(u64::from(height));
    let width = u32::try_from(width).ok().filter(|width| *width <= MAX_WIDTH);
    let width = width.with_context(|| {
        format!("the image is more than {MAX_WIDTH} pixels wide at a height of {line_height}")
    })?;
    let resized = imageops::resize(image, width, line_height, FilterType::Triangle);
    let channel = |c: usize| resized.pixels().map(move |pixel| f32::from(pixel.0[c]) / 127.5 - 1.0);
    let data = channel(2).chain(channel(1)).chain(channel(0)).collect();
    Tensor::f32([1, 3, line_height as usize, width as usize], data)
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;
    use crate::picture::font;
    use crate::reward::tests::installed;

    fn open(name: &str) -> Ocr {
        Ocr::open(&installed(name), None, None, Measure::LogProb, 2).unwrap()
    }

    #[test]
    fn characters_come_from_a_file_where_one_is_given() {
        let model = installed("ocr-v6.onnx");
        let characters =
            Pool::open(&model, 1).unwrap().with(|model| Ok(model.metadata("character"))).unwrap();
        let characters = characters.unwrap();
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("dictionary.txt");
        let open = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Ocr::open(&model, Some(&file), None, Measure::LogProb, 1)
        };
        // The letters a and A exchanged: what was read as one is now read as the other.
        let exchanged: Vec<&str> = characters
            .split('\n')
            .map(|c| match c {
                "A" => "a",
                "a" => "A",
                other => other,
            })
            .collect();
        let image = sign("CAT", 14.0, Rgb([22, 22, 24]));
        let ocr = open(&(exchanged.join("\r\n") + "\n")).unwrap();
        assert_eq!(ocr.read(&image).unwrap(), "CaT");
        let error = format!("{:#}", open("A\nB\n").err().unwrap());
        assert!(error.contains("classes for 4 characters"), "{error}");
        let other =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/channel_means.onnx");
        let error = Ocr::open(&other, None, None, Measure::LogProb, 1).err().unwrap();
        assert!(format!("{error:#}").contains("give `characters`"), "{error:#}");
    }

    fn sign(text: &str, size: f32, ink: Rgb<u8>) -> RgbImage {
        let mut image = RgbImage::from_pixel(32, 32, Rgb([250; 3]));
        let font = font::bold();
        let left = (32.0 - font::text_width(&font, text, size)) / 2.0;
        font::draw_text(&mut image, &font, text, (left, 9.0), size, ink);
        image
    }

    const WORDS: [&str; 8] = ["CAT", "SUN", "BUS", "KEY", "365", "WIN", "MAP", "EGG"];

    #[test]
    fn rendered_words_are_read_by_both_models() {
        for name in ["ocr-v6.onnx", "ocr-v4.onnx"] {
            let ocr = open(name);
            for (i, word) in WORDS.into_iter().enumerate() {
                let ink = [[205, 28, 32], [16, 140, 48], [28, 64, 210], [22, 22, 24]][i % 4];
                let image = sign(word, 14.0, Rgb(ink));
                let verdict = ocr.judge(word, &image).unwrap();
                assert!(verdict.exact, "{name} reads {word} as {:?}", verdict.reading);
                assert!(verdict.similarity > 1.0 - 1e-12);
                assert!(verdict.log_prob > -0.35, "{name} {word}: {verdict:?}");
                let other = WORDS[(i + 1) % WORDS.len()];
                let wrong = ocr.judge(other, &image).unwrap();
                assert!(!wrong.exact && wrong.log_prob < -2.0, "{name} {word}: {wrong:?}");
                assert!(wrong.log_prob >= LOG_PROB_FLOOR);
            }
        }
    }

    #[test]
    fn scores_do_not_depend_on_company() {
        let ocr = open("ocr-v6.onnx");
        let prompts = WORDS.map(|word| Prompt::new(format!("red \"{word}\"")));
        let images = WORDS.map(|word| sign(word, 14.0, Rgb([205, 28, 32])));
        let together = ocr.score(&prompts.each_ref(), &images.each_ref()).unwrap();
        for i in (0..WORDS.len()).rev() {
            let alone = ocr.score(&[&prompts[i]], &[&images[i]]).unwrap();
            assert_eq!(alone[0].to_bits(), together[i].to_bits());
        }
    }

    #[test]
    fn prompts_that_cannot_be_judged_are_refused() {
        let ocr = open("ocr-v6.onnx");
        let check = |text: &str| ocr.check(&[&Prompt::new(text)], Some([32, 32]));
        assert!(check("red \"SUN\"").is_ok());
        let error = |text: &str| check(text).unwrap_err().to_string();
        assert!(error("a red sun").contains("no text in double quotes"));
        assert!(error("red \"a\u{1}b\"").contains("does not know"));
        let long = Prompt::new("red \"SUNFLOWER\"");
        let error = error(&long.text);
        assert!(error.contains("1 of 1 targets are too long for an image of 32x32"), "{error}");
        assert!(error.contains("6 OCR frames: \"SUNFLOWER\" takes 9"), "{error}");
        assert!(ocr.check(&[&long], Some([64, 32])).is_ok());
        let image = sign("SUN", 14.0, Rgb([0; 3]));
        let error = ocr.score(&[&long], &[&image]).unwrap_err().to_string();
        assert!(error.contains("takes 9 OCR frames, the image gives 6"), "{error}");
    }
}
