//! The embedded fonts, and text drawn with them: no system font is ever looked for.

use ab_glyph::{Font, FontRef, Glyph, OutlinedGlyph, PxScale, point};
use image::{Rgb, RgbImage};

/// The font file `DejaVuSans.ttf`: labels.
pub const REGULAR: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fonts/DejaVuSans.ttf"));

/// The font file `DejaVuSans-Bold.ttf`: the signs themselves, and titles.
pub const BOLD: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fonts/DejaVuSans-Bold.ttf"));

/// The font [`REGULAR`], parsed.
///
/// # Panics
/// Never: the bytes are part of the program and a test parses them.
pub fn regular() -> FontRef<'static> {
    FontRef::try_from_slice(REGULAR).expect("the embedded font is a font")
}

/// The font [`BOLD`], parsed.
///
/// # Panics
/// Never: the bytes are part of the program and a test parses them.
pub fn bold() -> FontRef<'static> {
    FontRef::try_from_slice(BOLD).expect("the embedded font is a font")
}

/// A run of glyphs on one baseline, in font units: x to the right from the pen's start, y upwards.
#[derive(Clone, Debug)]
pub struct Line<'a, F> {
    font: &'a F,
    /// Each glyph with the x of its pen.
    glyphs: Vec<(ab_glyph::GlyphId, f32)>,
    /// Left, right, bottom and top edge of the ink.
    pub ink: Ink,
    /// Where the pen ends.
    pub advance: f32,
}

/// The smallest box around the drawn outlines, in font units.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ink {
    pub left: f32,
    pub right: f32,
    pub bottom: f32,
    pub top: f32,
}

impl<'a, F: Font> Line<'a, F> {
    /// Sets `text` with the font's own spacing and kerning.
    pub fn new(font: &'a F, text: &str) -> Self {
        let mut pen = 0.0;
        let mut glyphs = Vec::new();
        let mut ink: Option<Ink> = None;
        for glyph in text.chars().map(|letter| font.glyph_id(letter)) {
            if let Some(&(previous, _)) = glyphs.last() {
                pen += font.kern_unscaled(previous, glyph);
            }
            glyphs.push((glyph, pen));
            if let Some(outline) = font.outline(glyph) {
                let (a, b) = (outline.bounds.min, outline.bounds.max);
                let (bottom, top) = (a.y.min(b.y), a.y.max(b.y));
                let here = Ink { left: pen + a.x, right: pen + b.x, bottom, top };
                ink = Some(ink.map_or(here, |ink| ink.union(here)));
            }
            pen += font.h_advance_unscaled(glyph);
        }
        let empty = Ink { left: 0.0, right: 0.0, bottom: 0.0, top: 0.0 };
        Self { font, glyphs, ink: ink.unwrap_or(empty), advance: pen }
    }

    /// Draws with the pen's start at (`x`, `baseline`), in pixels from the upper left corner.
    ///
    /// `scale` is pixels per font unit, across and down. What lies outside the image is cut.
    pub fn draw(
        &self,
        image: &mut RgbImage,
        (x, baseline): (f32, f32),
        scale: (f32, f32),
        colour: Rgb<u8>,
    ) {
        let height = self.font.height_unscaled();
        let px_scale = PxScale { x: scale.0 * height, y: scale.1 * height };
        for &(id, pen) in &self.glyphs {
            let position = point(x + pen * scale.0, baseline);
            if let Some(outlined) = self.font.outline_glyph(Glyph { id, scale: px_scale, position })
            {
                blend(image, &outlined, colour);
            }
        }
    }
}

impl Ink {
    pub fn width(self) -> f32 {
        self.right - self.left
    }

    pub fn height(self) -> f32 {
        self.top - self.bottom
    }

    fn union(self, other: Self) -> Self {
        Self {
            left: self.left.min(other.left),
            right: self.right.max(other.right),
            bottom: self.bottom.min(other.bottom),
            top: self.top.max(other.top),
        }
    }
}

/// The width in pixels of `text` set at `size` pixels per em.
pub fn text_width<F: Font>(font: &F, text: &str, size: f32) -> f32 {
    Line::new(font, text).advance * px_per_unit(font, size)
}

/// Draws `text` at `size` pixels per em, its upper left corner at (`x`, `y`).
pub fn draw_text<F: Font>(
    image: &mut RgbImage,
    font: &F,
    text: &str,
    (x, y): (f32, f32),
    size: f32,
    colour: Rgb<u8>,
) {
    let scale = px_per_unit(font, size);
    let baseline = y + font.ascent_unscaled() * scale;
    Line::new(font, text).draw(image, (x, baseline.round()), (scale, scale), colour);
}

/// Pixels per font unit at `size` pixels per em.
pub fn px_per_unit<F: Font>(font: &F, size: f32) -> f32 {
    size / font.units_per_em().unwrap_or(1000.0)
}

/// Lays `colour` over the image by the glyph's coverage of each pixel.
fn blend(image: &mut RgbImage, outlined: &OutlinedGlyph, colour: Rgb<u8>) {
    let origin = outlined.px_bounds().min;
    outlined.draw(|column, row, coverage| {
        let x = origin.x as i64 + i64::from(column);
        let y = origin.y as i64 + i64::from(row);
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else { return };
        let Some(pixel) = image.get_pixel_mut_checked(x, y) else { return };
        let coverage = coverage.clamp(0.0, 1.0);
        for (under, over) in pixel.0.iter_mut().zip(colour.0) {
            *under =
                (f32::from(*under) * (1.0 - coverage) + f32::from(over) * coverage).round() as u8;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inked(image: &RgbImage) -> (u32, u32, u32, u32) {
        let dark = image.enumerate_pixels().filter(|(_, _, pixel)| pixel.0[0] < 128);
        dark.fold((u32::MAX, u32::MAX, 0, 0), |(left, top, right, bottom), (x, y, _)| {
            (left.min(x), top.min(y), right.max(x), bottom.max(y))
        })
    }

    #[test]
    fn text_fills_the_width_it_announces() {
        let font = bold();
        let mut image = RgbImage::from_pixel(200, 40, Rgb([255; 3]));
        draw_text(&mut image, &font, "HIH", (10.0, 5.0), 20.0, Rgb([0; 3]));
        let (left, top, right, bottom) = inked(&image);
        let width = text_width(&font, "HIH", 20.0);
        assert!((10..=13).contains(&left), "left {left}");
        assert!((f64::from(right) - 10.0 - f64::from(width)).abs() < 3.0, "right {right}");
        assert!(top >= 5 && bottom - top > 10 && bottom - top < 18, "{top}..{bottom}");
    }

    #[test]
    fn ink_of_a_line_is_that_of_its_outlines() {
        let font = bold();
        let ink = Line::new(&font, "H").ink;
        assert!(ink.bottom.abs() < 1.0, "a capital stands on the baseline");
        assert!((ink.height() / font.units_per_em().unwrap() - 0.729).abs() < 0.01);
        assert!(Line::new(&font, " ").ink.width().abs() < f32::EPSILON);
        assert!(text_width(&regular(), "label", 10.0) < text_width(&font, "label", 10.0));
    }

    #[test]
    fn text_outside_the_image_is_cut() {
        let mut image = RgbImage::from_pixel(8, 8, Rgb([255; 3]));
        draw_text(&mut image, &bold(), "WIDE", (-6.0, -4.0), 20.0, Rgb([0; 3]));
        assert!(image.pixels().any(|pixel| pixel.0[0] < 128));
    }
}
