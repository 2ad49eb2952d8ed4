//! What arguments may be: each parser refuses what is out of range and says what fits.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::builder::RangedI64ValueParser;
use flow::latents::check_pixels;
use flow::lora::scaled_path;

use crate::group::rollout::MAX_GUIDANCE;
use crate::network::lora::LoraConfig;

/// Largest scale of a LoRA, either way.
const MAX_SCALE: f64 = 100.0;

/// A whole number in `range`.
pub(super) fn whole(range: RangeInclusive<i64>) -> RangedI64ValueParser<usize> {
    RangedI64ValueParser::new().range(range)
}

/// A seed.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("a whole number from 0 to {}", u64::MAX))
}

/// A share, above 0 and at most 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    number(text, |share| share > 0.0 && share <= 1.0, "above 0 and at most 1")
}

/// GB of a file.
pub(super) fn gb(text: &str) -> Result<f64, String> {
    number(text, |gb| (1e-6..=1e6).contains(&gb), "from 0.000001 to 1000000")
}

/// The shift of a time grid.
pub(super) fn shift(text: &str) -> Result<f64, String> {
    number(text, |shift| shift > 0.0 && shift.is_finite(), "above 0 (1 is no shift)")
}

/// A guidance scale.
pub(super) fn guidance(text: &str) -> Result<f64, String> {
    let says = format!("from 0 to {MAX_GUIDANCE}");
    number(text, |scale| (0.0..=MAX_GUIDANCE).contains(&scale), &says)
}

/// The rank of adapters.
pub(super) fn rank(text: &str) -> Result<usize, String> {
    let rank = text.parse().map_err(|_| "a whole number above 0".to_owned())?;
    let config = LoraConfig { rank, ..LoraConfig::default() };
    config.validate().map_err(|error| error.to_string())?;
    Ok(rank)
}

/// Width and height from `720x1280`.
pub(super) fn size(text: &str) -> Result<[usize; 2], String> {
    let sides = text.split_once('x').map(|(width, height)| [width.parse(), height.parse()]);
    match sides {
        Some([Ok(width), Ok(height)]) => {
            check_pixels(width, height).map_err(|error| error.to_string())?;
            Ok([width, height])
        }
        _ => Err("width and height in pixels, as in 1024x768".to_owned()),
    }
}

/// A LoRA and its scale from `FILE:0.8`.
pub(super) fn lora(text: &str) -> Result<(PathBuf, f64), String> {
    let (path, scale) = scaled_path(text)?;
    if scale.abs() > MAX_SCALE {
        return Err(format!("the scale {scale:?} is not from -{MAX_SCALE} to {MAX_SCALE}"));
    }
    Ok((path, scale))
}

/// A pipeline folder, or a LoRA and its scale, as it was typed.
pub(super) fn model(text: &str) -> Result<String, String> {
    // A folder may be called what is no scale.
    if scaled_path(text).is_ok() {
        lora(text)?;
    }
    Ok(text.to_owned())
}

fn number(text: &str, fits: impl Fn(f64) -> bool, says: &str) -> Result<f64, String> {
    text.parse().ok().filter(|n| fits(*n)).ok_or_else(|| format!("a number {says}"))
}
