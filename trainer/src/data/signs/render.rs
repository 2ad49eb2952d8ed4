//! One sign as pixels.

use std::{fmt, str::FromStr};

use ab_glyph::Font;
use anyhow::bail;
use image::{Rgb, RgbImage};

use crate::data::splitmix::SplitMix64;
use crate::picture::font::Line;

/// What the sign is painted on.
pub const BACKGROUND: Rgb<u8> = Rgb([250; 3]);

/// The largest height of a capital, as a share of the image's edge.
const CAP_SHARE: f32 = 0.44;
/// The largest width of a word, as a share of the image's edge.
const WIDTH_SHARE: f32 = 0.86;
/// How far a wide word may be condensed before it is made smaller as a whole.
const CONDENSED: f32 = 0.6;

/// The ink of a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Colour {
    Red,
    Green,
    Blue,
    Black,
}

impl Colour {
    pub const ALL: [Self; 4] = [Self::Red, Self::Green, Self::Blue, Self::Black];

    /// The word used in captions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Black => "black",
        }
    }

    pub fn rgb(self) -> Rgb<u8> {
        Rgb(match self {
            Self::Red => [205, 28, 32],
            Self::Green => [16, 140, 48],
            Self::Blue => [28, 64, 210],
            Self::Black => [22, 22, 24],
        })
    }
}

impl fmt::Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Colour {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        match Self::ALL.into_iter().find(|colour| colour.name() == name) {
            Some(colour) => Ok(colour),
            None => bail!("no ink `{name}`: take one of red, green, blue, black"),
        }
    }
}

/// The small differences between two signs with one caption.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Jitter {
    /// Shift to the right in pixels.
    pub dx: f32,
    /// Shift down in pixels.
    pub dy: f32,
    /// Factor on the size of the letters.
    pub scale: f32,
}

impl Jitter {
    /// Centred, full size.
    pub const NONE: Self = Self { dx: 0.0, dy: 0.0, scale: 1.0 };

    /// Uniform shifts within ±`shift` pixels, sizes within `1 - shrink ..= 1`.
    pub fn draw(rng: &mut SplitMix64, shift: f64, shrink: f64) -> Self {
        Self {
            dx: rng.range(-shift, shift) as f32,
            dy: rng.range(-shift, shift) as f32,
            scale: rng.range(1.0 - shrink, 1.0) as f32,
        }
    }
}

/// Paints `text` in the middle of a square of `size` pixels.
///
/// Capitals are as high as the square allows; a word too wide for that is condensed to fit, and
/// below a limit made smaller. The whole word is always inside the square when the jitter is small.
pub fn render<F: Font>(
    font: &F,
    text: &str,
    colour: Colour,
    size: u32,
    jitter: Jitter,
) -> RgbImage {
    let mut image = RgbImage::from_pixel(size, size, BACKGROUND);
    let line = Line::new(font, text);
    if line.ink.width() <= 0.0 {
        return image;
    }
    let edge = size as f32;
    let cap_height = Line::new(font, "H").ink.height();
    let highest = CAP_SHARE * edge / cap_height;
    let widest = WIDTH_SHARE * edge / line.ink.width();
    let down = highest.min(widest / CONDENSED) * jitter.scale;
    let across = highest.min(widest) * jitter.scale;
    let x = (edge - (line.ink.left + line.ink.right) * across) / 2.0 + jitter.dx;
    let baseline = f32::midpoint(edge, cap_height * down) + jitter.dy;
    line.draw(&mut image, (x, baseline), (across, down), colour.rgb());
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::font::bold;

    fn touches_border(image: &RgbImage) -> bool {
        let last = image.width() - 1;
        image.enumerate_pixels().any(|(x, y, pixel)| {
            (x == 0 || y == 0 || x == last || y == last) && *pixel != BACKGROUND
        })
    }

    #[test]
    fn widest_and_narrowest_words_stay_inside() {
        for text in ["WWW", "MWM", "III", "QQQ", "777", "WI"] {
            for (dx, dy) in [(-1.0, -1.0), (1.0, 1.0)] {
                let image = render(&bold(), text, Colour::Red, 32, Jitter { dx, dy, scale: 1.0 });
                assert!(!touches_border(&image), "{text} at {dx}, {dy}");
            }
        }
    }

    #[test]
    fn full_ink_appears_and_edges_are_antialiased() {
        for colour in Colour::ALL {
            let image = render(&bold(), "HAT", colour, 32, Jitter::NONE);
            let full = image.pixels().filter(|pixel| **pixel == colour.rgb()).count();
            let mixed = image.pixels().filter(|p| **p != colour.rgb() && **p != BACKGROUND).count();
            assert!(full > 30 && mixed > 30, "{colour}: {full} full, {mixed} mixed");
        }
    }

    #[test]
    fn jitter_moves_the_ink() {
        let still = render(&bold(), "CAT", Colour::Blue, 32, Jitter::NONE);
        let moved = render(&bold(), "CAT", Colour::Blue, 32, Jitter { dx: 1.0, ..Jitter::NONE });
        let mean_x = |image: &RgbImage| {
            let ink = image.enumerate_pixels().map(|(x, _, p)| (x, 250.0 - f64::from(p.0[0])));
            let (sum, weight) =
                ink.fold((0.0, 0.0), |(s, w), (x, i)| (s + f64::from(x) * i, w + i));
            sum / weight
        };
        assert!((mean_x(&moved) - mean_x(&still) - 1.0).abs() < 0.02);
    }

    #[test]
    fn unknown_ink_is_refused() {
        assert_eq!("green".parse::<Colour>().unwrap(), Colour::Green);
        let error = "mauve".parse::<Colour>().unwrap_err().to_string();
        assert!(error.contains("mauve") && error.contains("black"), "{error}");
    }
}
