//! The data set "signs": captioned pictures of short words and numbers, drawn from a free font.
//!
//! A picture shows one word in capitals in one ink on a near-white square; its caption names both,
//! as in `red "HAT"`. Written in the layout that Hugging Face calls an image folder: PNG files, and
//! `metadata.jsonl` with `file_name` and `text` beside them. Read back by [`crate::data::captioned`].

pub mod render;
pub mod words;

use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use flow::staged::Staged;
use serde::{Deserialize, Serialize};

use self::{
    render::{Jitter, render},
    words::Sign,
};
use super::{captioned::METADATA, splitmix::SplitMix64};
use crate::picture::font;

/// The share of numbers of two or three digits among the signs.
pub const SHARE_NUMBERS: f64 = 0.2;
/// The share of strings of two letters among the signs.
pub const SHARE_SHORT: f64 = 0.1;

/// Pictures per sub-folder.
const PER_FOLDER: usize = 1000;
/// More pictures than this are surely a mistyped number.
const MAX_IMAGES: usize = 10_000_000;

/// What to draw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SignsConfig {
    /// How many pictures.
    pub n_images: usize,
    /// Edge of a picture in pixels, 16 to 1024.
    pub size: u32,
    /// Picture k depends on the seed and k only, so a longer set begins with the shorter one.
    pub seed: u64,
    /// Largest shift in each direction, in pixels of a 32-pixel picture.
    pub shift: f64,
    /// Largest relative loss of letter size, 0 to 0.5.
    pub shrink: f64,
}

impl Default for SignsConfig {
    fn default() -> Self {
        Self { n_images: 16_000, size: 32, seed: 1, shift: 1.0, shrink: 0.06 }
    }
}

/// Draws the data set into the new folder `dir`, which appears only when it is complete.
///
/// # Errors
/// When a setting is out of range, `dir` exists already, or a file cannot be written.
pub fn write(dir: &Path, config: &SignsConfig) -> Result<()> {
    check(config)?;
    ensure!(!dir.exists(), "{} exists already: name a new folder or remove it", dir.display());
    let staged = Staged::begin(dir)?;
    write_files(staged.path(), config)?;
    Ok(staged.publish(false)?)
}

/// The `index`-th sign of a data set and how it is placed.
pub fn nth(config: &SignsConfig, index: usize) -> (Sign, Jitter) {
    let mut rng = SplitMix64::stream(config.seed, index as u64);
    let sign = Sign::draw(&mut rng, SHARE_NUMBERS, SHARE_SHORT);
    let shift = config.shift * f64::from(config.size) / 32.0;
    (sign, Jitter::draw(&mut rng, shift, config.shrink))
}

fn check(config: &SignsConfig) -> Result<()> {
    let SignsConfig { n_images, size, shift, shrink, .. } = *config;
    ensure!((1..=MAX_IMAGES).contains(&n_images), "n_images is {n_images}, not 1 to {MAX_IMAGES}");
    ensure!((16..=1024).contains(&size), "size is {size} pixels, not 16 to 1024");
    ensure!((0.0..=4.0).contains(&shift), "shift is {shift} pixels, not 0 to 4");
    ensure!((0.0..=0.5).contains(&shrink), "shrink is {shrink}, not 0 to 0.5");
    Ok(())
}

fn write_files(dir: &Path, config: &SignsConfig) -> Result<()> {
    let font = font::bold();
    let path = dir.join(METADATA);
    let file = fs::File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    let mut metadata = BufWriter::new(file);
    for index in 0..config.n_images {
        let folder = format!("{:03}", index / PER_FOLDER);
        if index % PER_FOLDER == 0 {
            let folder = dir.join(&folder);
            fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        let (sign, jitter) = nth(config, index);
        let file_name = format!("{folder}/{index:06}.png");
        let image = dir.join(&file_name);
        render(&font, &sign.text, sign.colour, config.size, jitter)
            .save(&image)
            .with_context(|| format!("writing {}", image.display()))?;
        let line = serde_json::json!({ "file_name": file_name, "text": sign.caption() });
        writeln!(metadata, "{line}").with_context(|| format!("writing {}", path.display()))?;
    }
    metadata.flush().with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::captioned::read_captioned;

    fn small() -> SignsConfig {
        SignsConfig { n_images: 40, ..SignsConfig::default() }
    }

    #[test]
    fn written_pictures_come_back_with_their_captions() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("nested/signs");
        write(&dir, &small()).unwrap();
        let pairs = read_captioned(&dir).unwrap();
        assert_eq!(pairs.len(), 40);
        for (index, (image, caption)) in pairs.iter().enumerate() {
            let (sign, jitter) = nth(&small(), index);
            assert_eq!(*caption, sign.caption());
            assert_eq!(*image, render(&font::bold(), &sign.text, sign.colour, 32, jitter));
        }
        let left: Vec<_> = fs::read_dir(folder.path().join("nested")).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing but the finished folder remains");
    }

    #[test]
    fn a_longer_set_begins_with_the_shorter_one_and_another_seed_differs() {
        let other = SignsConfig { seed: 2, ..small() };
        let longer = SignsConfig { n_images: 80, ..small() };
        assert!((0..40).all(|k| nth(&small(), k) == nth(&longer, k)));
        assert!((0..40).any(|k| nth(&small(), k).0 != nth(&other, k).0));
    }

    #[test]
    fn an_existing_folder_and_bad_settings_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(folder.path(), &small()).unwrap_err().to_string();
        assert!(error.contains("exists already"), "{error}");
        let dir = folder.path().join("signs");
        let error = write(&dir, &SignsConfig { size: 8, ..small() }).unwrap_err().to_string();
        assert!(error.contains("size is 8"), "{error}");
        assert!(!dir.exists());
    }
}
