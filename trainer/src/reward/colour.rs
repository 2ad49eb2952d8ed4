//! Whether what is drawn has the colour the prompt names.
//!
//! With b the background (per channel the median of the border pixels) and c a pixel, all in
//! 0 to 1, the ink of a pixel is i = max(0, ‖c − b‖/√3 − 0.1)² (squared, so that the blended
//! pixels at an edge count little), m(c) its match with the named colour, and
//!
//! ```text
//! score = Σ i·m(c) / Σ i      in [0, 1];   0 if the mean of i is at most 5e-4 (nothing drawn)
//! ```
//!
//! m of a chromatic colour is a product of ramps in hue, saturation and value (HSV): 1 inside the
//! colour's hue band, falling to 0 over 15 degrees beside it; 0 to 1 over saturation 0.15 to 0.4
//! and value 0.15 to 0.35. Orange and brown share hues and part at value 0.65 to 0.8; magenta
//! is the bright end of purple, and what is one may be both. Black, grey
//! and white need low saturation (1 to 0 over 0.2 to 0.45) and split at value 0.3 and 0.8.

use anyhow::{Context, Result};
use image::{Rgb, RgbImage};

use super::Reward;
use flow::prompts::Prompt;

/// Share of the drawn pixels that have [`Prompt::colour_name`], 0 to 1.
pub struct ColourMatch;

impl Reward for ColourMatch {
    fn score(&self, prompts: &[&Prompt], images: &[&RgbImage]) -> Result<Vec<f64>> {
        prompts.iter().zip(images).map(|(prompt, image)| Ok(share(image, named(prompt)?))).collect()
    }

    fn check(&self, prompts: &[&Prompt], _size: Option<[usize; 2]>) -> Result<()> {
        prompts.iter().try_for_each(|prompt| named(prompt).map(|_| ()))
    }
}

/// A named colour. Hue bands are in degrees.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Colour {
    Chromatic {
        from: f64,
        to: f64,
        shade: Shade,
    },
    /// Grey level from black to white, at values `from` to `to`.
    Neutral {
        from: f64,
        to: f64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shade {
    Any,
    Bright,
    Dark,
}

const fn hues(from: f64, to: f64, shade: Shade) -> Colour {
    Colour::Chromatic { from, to, shade }
}

const COLOURS: [(&str, Colour); 14] = [
    ("red", hues(-15.0, 12.0, Shade::Any)),
    ("orange", hues(18.0, 44.0, Shade::Bright)),
    ("brown", hues(10.0, 44.0, Shade::Dark)),
    ("yellow", hues(48.0, 68.0, Shade::Any)),
    ("green", hues(75.0, 165.0, Shade::Any)),
    ("cyan", hues(170.0, 200.0, Shade::Any)),
    ("blue", hues(205.0, 258.0, Shade::Any)),
    ("purple", hues(262.0, 312.0, Shade::Any)),
    ("magenta", hues(288.0, 312.0, Shade::Bright)),
    ("pink", hues(312.0, 348.0, Shade::Any)),
    ("black", Colour::Neutral { from: 0.0, to: 0.3 }),
    ("grey", Colour::Neutral { from: 0.35, to: 0.75 }),
    ("gray", Colour::Neutral { from: 0.35, to: 0.75 }),
    ("white", Colour::Neutral { from: 0.8, to: 1.0 }),
];

const INK_FLOOR: f64 = 0.1;
const INK_MEAN_MIN: f64 = 5e-4;

fn named(prompt: &Prompt) -> Result<Colour> {
    let name = prompt
        .colour_name()
        .with_context(|| format!("prompt {:?} names no colour", prompt.text))?;
    COLOURS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, colour)| *colour)
        .with_context(|| {
            let known: Vec<_> = COLOURS.iter().map(|(known, _)| *known).collect();
            format!("colour {name:?} is not one of {}", known.join(", "))
        })
}

fn share(image: &RgbImage, colour: Colour) -> f64 {
    let background = background(image);
    let (mut ink_sum, mut matched_sum) = (0.0, 0.0);
    for pixel in image.pixels() {
        let channels = unit(*pixel);
        let square: f64 =
            channels.iter().zip(background).map(|(channel, b)| (channel - b).powi(2)).sum();
        let ink = ((square / 3.0).sqrt() - INK_FLOOR).max(0.0).powi(2);
        if ink > 0.0 {
            ink_sum += ink;
            matched_sum += ink * colour.matches(channels);
        }
    }
    let n_pixels = f64::from(image.width()) * f64::from(image.height());
    if ink_sum <= INK_MEAN_MIN * n_pixels { 0.0 } else { matched_sum / ink_sum }
}

fn unit(pixel: Rgb<u8>) -> [f64; 3] {
    pixel.0.map(|channel| f64::from(channel) / 255.0)
}

/// Median of the outermost pixels, per channel; black for an empty image.
fn background(image: &RgbImage) -> [f64; 3] {
    let (width, height) = image.dimensions();
    let border = image
        .enumerate_pixels()
        .filter(|(x, y, _)| *x == 0 || *y == 0 || *x + 1 == width || *y + 1 == height);
    let mut channels: [Vec<u8>; 3] = Default::default();
    for (_, _, pixel) in border {
        for (values, value) in channels.iter_mut().zip(pixel.0) {
            values.push(value);
        }
    }
    channels.map(|mut values| {
        let middle = values.len() / 2;
        if values.is_empty() {
            return 0.0;
        }
        f64::from(*values.select_nth_unstable(middle).1) / 255.0
    })
}

impl Colour {
    /// How well a pixel (red, green, blue in 0 to 1) fits, 0 to 1.
    fn matches(self, channels: [f64; 3]) -> f64 {
        let (hue, saturation, value) = hsv(channels);
        match self {
            Self::Chromatic { from, to, shade } => {
                let outside = if (hue - from).rem_euclid(360.0) <= to - from {
                    0.0
                } else {
                    angle(hue, from).min(angle(hue, to))
                };
                let in_hue = 1.0 - ramp(outside, 0.0, 15.0);
                let in_shade = match shade {
                    Shade::Any => 1.0,
                    Shade::Bright => ramp(value, 0.65, 0.8),
                    Shade::Dark => 1.0 - ramp(value, 0.65, 0.8),
                };
                in_hue * in_shade * ramp(saturation, 0.15, 0.4) * ramp(value, 0.15, 0.35)
            }
            Self::Neutral { from, to } => {
                let outside = (from - value).max(value - to).max(0.0);
                // In the dark a small cast is a large saturation, so chroma decides there.
                let cast = saturation.min(saturation * value / 0.3);
                (1.0 - ramp(outside, 0.0, 0.2)) * (1.0 - ramp(cast, 0.2, 0.45))
            }
        }
    }
}

/// 0 up to `low`, 1 from `high`, linear between.
fn ramp(x: f64, low: f64, high: f64) -> f64 {
    ((x - low) / (high - low)).clamp(0.0, 1.0)
}

/// Angle between two hues, 0 to 180 degrees.
fn angle(a: f64, b: f64) -> f64 {
    let turn = (a - b).rem_euclid(360.0);
    turn.min(360.0 - turn)
}

/// Hue in degrees (0 for a grey), saturation and value in 0 to 1.
fn hsv([red, green, blue]: [f64; 3]) -> (f64, f64, f64) {
    let value = red.max(green).max(blue);
    let chroma = value - red.min(green).min(blue);
    if chroma <= 0.0 {
        return (0.0, 0.0, value);
    }
    let sixth = if red >= green && red >= blue {
        (green - blue) / chroma
    } else if green >= blue {
        (blue - red) / chroma + 2.0
    } else {
        (red - green) / chroma + 4.0
    };
    ((sixth * 60.0).rem_euclid(360.0), chroma / value, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAINTS: [(&str, [u8; 3]); 16] = [
        ("red", [200, 20, 20]),
        ("red", [205, 28, 32]),
        ("orange", [255, 140, 0]),
        ("brown", [139, 69, 19]),
        ("yellow", [240, 220, 20]),
        ("green", [20, 140, 20]),
        ("cyan", [0, 190, 200]),
        ("blue", [20, 20, 200]),
        ("purple", [128, 0, 128]),
        ("purple", [120, 40, 200]),
        ("magenta", [255, 0, 255]),
        ("pink", [255, 105, 180]),
        ("black", [0, 0, 0]),
        ("black", [30, 20, 25]),
        ("grey", [128, 128, 128]),
        ("white", [255, 255, 255]),
    ];

    fn colour(name: &str) -> Colour {
        COLOURS.iter().find(|(known, _)| *known == name).unwrap().1
    }

    fn blend(ink: [u8; 3], ground: [u8; 3], share: f64) -> Rgb<u8> {
        let mix = |i: usize| f64::from(ink[i]) * share + f64::from(ground[i]) * (1.0 - share);
        Rgb([mix(0) as u8, mix(1) as u8, mix(2) as u8])
    }

    /// A bar with soft edges in the middle of 32 x 32 pixels.
    fn bar(ink: [u8; 3], ground: [u8; 3]) -> RgbImage {
        RgbImage::from_fn(32, 32, |x, y| {
            let inside = (8..24).contains(&y);
            match x {
                10 | 21 if inside => blend(ink, ground, 0.5),
                11..=20 if inside => Rgb(ink),
                _ => Rgb(ground),
            }
        })
    }

    #[test]
    fn each_paint_is_its_colour_and_no_other() {
        for (name, paint) in PAINTS {
            let ground = if name == "white" { [40, 60, 90] } else { [255; 3] };
            let image = bar(paint, ground);
            for (other, candidate) in COLOURS {
                let either = [("grey", "gray"), ("magenta", "purple")].contains(&(name, other));
                let score = share(&image, candidate);
                assert!((0.0..=1.0).contains(&score));
                if other == name || either {
                    assert!(score > 0.9, "{name} {paint:?} as {other}: {score}");
                } else {
                    assert!(score < 0.35, "{name} {paint:?} as {other}: {score}");
                }
            }
        }
    }

    #[test]
    fn half_and_half_scores_half() {
        let image = RgbImage::from_fn(32, 32, |x, y| match (x, y) {
            (4..16, 4..28) => Rgb([200, 20, 20]),
            (16..28, 4..28) => Rgb([20, 20, 200]),
            _ => Rgb([255; 3]),
        });
        for name in ["red", "blue"] {
            let score = share(&image, colour(name));
            assert!((score - 0.5).abs() < 0.02, "{name}: {score}");
        }
        assert!(share(&image, colour("green")) < 1e-9);
    }

    #[test]
    fn nothing_drawn_scores_zero() {
        let blank = RgbImage::from_pixel(32, 32, Rgb([200, 20, 20]));
        assert!(share(&blank, colour("red")).abs() < 1e-12);
        assert!(share(&RgbImage::new(0, 0), colour("red")).abs() < 1e-12);
    }

    #[test]
    fn a_slow_turn_of_hue_changes_the_score_smoothly() {
        let score = |green: u8| share(&bar([220, green, 20], [255; 3]), colour("red"));
        let scores: Vec<_> = (20..120).map(score).collect();
        assert!(scores[0] > 0.95 && scores[99] < 0.05, "{scores:?}");
        assert!(scores.windows(2).all(|pair| (pair[0] - pair[1]).abs() < 0.1), "{scores:?}");
    }

    #[test]
    fn prompts_without_a_known_colour_are_refused() {
        let prompt = |colour: Option<&str>| Prompt {
            colour: colour.map(Into::into),
            ..Prompt::new("the word \"sun\"")
        };
        let check = |prompt: &Prompt| ColourMatch.check(&[prompt], None);
        assert!(check(&prompt(Some("Red"))).is_ok());
        let unknown = check(&prompt(Some("blurple"))).unwrap_err().to_string();
        assert!(unknown.contains("blurple") && unknown.contains("purple"), "{unknown}");
        assert!(check(&prompt(None)).is_err());
    }
}
