//! Several plots in one picture, each with axes of its own.

use std::path::Path;

use anyhow::{Context, Result};
use image::{RgbImage, imageops};

use super::{SIZE, Series, draw};
use crate::picture;

/// Curves on axes of their own.
#[derive(Clone, Debug)]
pub(crate) struct Panel<'a> {
    pub(crate) title: &'a str,
    /// Name of the y axis.
    pub(crate) y: &'a str,
    pub(crate) series: Vec<Series<'a>>,
}

/// Height of a panel in pixels.
const PANEL: u32 = 320;

/// Draws panels below each other into the PNG `path`, all of them against `x`.
///
/// # Errors
/// As [`super::curve`].
pub(crate) fn panels(path: &Path, panels: &[Panel<'_>], x: &str) -> Result<()> {
    let drawn = panels
        .iter()
        .map(|panel| draw(panel.title, &panel.series, x, panel.y, PANEL))
        .collect::<Result<Vec<RgbImage>>>()
        .with_context(|| format!("plotting {}", path.display()))?;
    let height = drawn.iter().map(RgbImage::height).sum();
    let mut all = RgbImage::new(SIZE.0, height);
    let mut top = 0;
    for panel in &drawn {
        imageops::replace(&mut all, panel, 0, top);
        top += i64::from(panel.height());
    }
    picture::save(path, &all)
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::super::{LEFT, TOP};
    use super::*;

    fn series<'a>(name: &'a str, points: &'a [(f64, f64)]) -> Series<'a> {
        Series { name, points, is_smooth: false, band: &[] }
    }

    #[test]
    fn each_panel_has_axes_of_its_own_and_shows_the_spread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.png");
        let (small, large) = ([(0.0, 0.1), (9.0, 0.2)], [(0.0, -900.0), (9.0, -100.0)]);
        let band = [(0.0, -1000.0, -800.0), (9.0, -200.0, 0.0)];
        let panel = |title, curve| Panel { title, y: "mean", series: vec![curve] };
        let wide = Series { band: &band, ..series("a", &large) };
        panels(&path, &[panel("a", wide), panel("b", series("b", &small))], "iteration").unwrap();
        let image = image::open(&path).unwrap().into_rgb8();
        assert_eq!(image.dimensions(), (SIZE.0, 2 * PANEL));
        let shaded = |top: u32| {
            let is_pale = |p: &Rgb<u8>| p.0[2] > 235 && (200..232).contains(&p.0[0]);
            let part =
                imageops::crop_imm(&image, LEFT, top + TOP, 600, PANEL - TOP - 60).to_image();
            part.pixels().filter(|pixel| is_pale(pixel)).count()
        };
        assert!(shaded(0) > 10_000 && shaded(PANEL) < 2_000, "{} {}", shaded(0), shaded(PANEL));
    }
}
