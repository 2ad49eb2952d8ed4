//! Curves of a run as one PNG, drawn with the embedded fonts.

use std::{ops::Range, path::Path, sync::Once};

use anyhow::{Context, Result, anyhow, ensure};
use image::{
    Rgb, RgbImage,
    imageops::{self, FilterType},
};
use plotters::{
    coord::Shift,
    coord::ranged1d::Ranged,
    coord::types::RangedCoordf64,
    prelude::{
        BitMapBackend, ChartBuilder, Circle, Color, DrawingArea, FontStyle, IntoDrawingArea,
        IntoFont, LineSeries, RGBColor, TRANSPARENT,
    },
    style::register_font,
};

use crate::{font, picture};

/// Size of the finished picture in pixels.
const SIZE: (u32, u32) = (960, 540);
/// The drawing is this many times larger and then reduced, which smooths every edge.
const OVERSAMPLING: u32 = 3;
/// Room above, below and on both sides of the axes in pixels.
const TOP: u32 = 76;
const BOTTOM: u32 = 34;
const LEFT: u32 = 64;
const RIGHT: u32 = 26;
/// At most this many ticks on an axis.
const TICKS: usize = 9;
/// The name under which the embedded fonts are known to the drawing library.
const FAMILY: &str = "embedded";

const INK: RGBColor = RGBColor(34, 38, 46);
const QUIET: RGBColor = RGBColor(100, 106, 116);
const GRID: RGBColor = RGBColor(232, 234, 238);
/// Colours of the series, distinguishable without red and green.
const PALETTE: [RGBColor; 6] = [
    RGBColor(31, 98, 184),
    RGBColor(222, 115, 20),
    RGBColor(20, 150, 130),
    RGBColor(176, 48, 120),
    RGBColor(110, 90, 180),
    RGBColor(120, 120, 40),
];

/// One curve.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    pub name: &'a str,
    /// (x, y) in order of x; points that are not finite are left out.
    pub points: &'a [(f64, f64)],
}

/// Draws the series into the PNG `path`: each as it is in a thin line, and smoothed in a thick one.
///
/// # Errors
/// When no series has a finite point, or the file cannot be written.
pub fn curve(path: &Path, title: &str, series: &[Series<'_>], x: &str, y: &str) -> Result<()> {
    let image =
        draw(title, series, x, y).with_context(|| format!("plotting {}", path.display()))?;
    picture::save(path, &image)
}

/// The picture that [`curve`] writes.
fn draw(title: &str, series: &[Series<'_>], x: &str, y: &str) -> Result<RgbImage> {
    let curves: Vec<Vec<(f64, f64)>> = series
        .iter()
        .map(|series| series.points.iter().copied())
        .map(|points| points.filter(|(x, y)| x.is_finite() && y.is_finite()).collect())
        .collect();
    let all = || curves.iter().flatten();
    ensure!(all().next().is_some(), "no series has a point to draw");
    let x_range = range(all().map(|point| point.0), 0.0);
    let y_range = range(all().map(|point| point.1), 0.06);
    register_fonts();
    let (width, height) = (SIZE.0 * OVERSAMPLING, SIZE.1 * OVERSAMPLING);
    let mut pixels = vec![255; (width * height * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        draw_curves(&area, &curves, x_range, y_range).map_err(|error| anyhow!("{error}"))?;
    }
    let large = RgbImage::from_raw(width, height, pixels)
        .context("the drawing has another size than its buffer")?;
    let mut image = imageops::resize(&large, SIZE.0, SIZE.1, FilterType::Triangle);
    write_labels(&mut image, title, series, x, y);
    Ok(image)
}

/// Axes, grid and curves, at the enlarged size.
fn draw_curves(
    area: &DrawingArea<BitMapBackend<'_>, Shift>,
    curves: &[Vec<(f64, f64)>],
    x_range: Range<f64>,
    y_range: Range<f64>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let px = |n: u32| n * OVERSAMPLING;
    let (x_format, y_format) = (tick_format(&x_range), tick_format(&y_range));
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(TOP))
        .margin_right(px(RIGHT))
        .margin_bottom(px(BOTTOM))
        .x_label_area_size(px(26))
        .y_label_area_size(px(LEFT))
        .build_cartesian_2d(x_range, y_range)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID.stroke_width(px(1)))
        .axis_style(QUIET.stroke_width(px(1)))
        .set_all_tick_mark_size(px(4))
        .x_labels(TICKS)
        .y_labels(TICKS)
        .x_label_formatter(&x_format)
        .y_label_formatter(&y_format)
        .label_style((FAMILY, px(13)).into_font().color(&QUIET))
        .draw()?;
    for (index, points) in curves.iter().enumerate() {
        let colour = colour(index);
        let thin = colour.mix(0.32).stroke_width(px(1));
        chart.draw_series(LineSeries::new(points.iter().copied(), thin))?;
        let thick = colour.stroke_width(px(5) / 2);
        chart.draw_series(LineSeries::new(smoothed(points), thick))?;
        if let [point] = points[..] {
            chart.draw_series([Circle::new(point, px(3), colour.filled())])?;
        }
    }
    area.present()?;
    Ok(())
}

/// Title, names of the axes, and the legend in the upper right, at the finished size.
fn write_labels(image: &mut RgbImage, title: &str, series: &[Series<'_>], x: &str, y: &str) {
    let (regular, bold) = (font::regular(), font::bold());
    let ink = Rgb([INK.0, INK.1, INK.2]);
    let (width, height) = (SIZE.0 as f32, SIZE.1 as f32);
    font::draw_text(image, &bold, title, (20.0, 14.0), 18.0, ink);
    font::draw_text(image, &regular, y, (20.0, 44.0), 13.0, ink);
    let middle = f32::midpoint(LEFT as f32, width - RIGHT as f32);
    let x_left = middle - font::text_width(&regular, x, 13.0) / 2.0;
    font::draw_text(image, &regular, x, (x_left, height - 26.0), 13.0, ink);
    let mut right = width - RIGHT as f32;
    for (index, series) in series.iter().enumerate().rev().filter(|(_, s)| !s.name.is_empty()) {
        right -= font::text_width(&regular, series.name, 13.0);
        font::draw_text(image, &regular, series.name, (right, 44.0), 13.0, ink);
        right -= 24.0;
        let RGBColor(r, g, b) = colour(index);
        for (dx, dy) in (0..18).flat_map(|dx| (0..3).map(move |dy| (dx, dy))) {
            if let Some(pixel) = image.get_pixel_mut_checked(right.max(0.0) as u32 + dx, 51 + dy) {
                *pixel = Rgb([r, g, b]);
            }
        }
        right -= 20.0;
    }
}

fn colour(index: usize) -> RGBColor {
    PALETTE[index % PALETTE.len()]
}

/// An average over the recent past with exponentially falling weights, without start-up bias.
///
/// The weights fall to half within a fortieth of the points, so that a curve keeps its shape
/// whatever its length.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half_life = (points.len() as f64 / 40.0).max(0.5);
    let keep = 0.5_f64.powf(1.0 / half_life);
    let (mut sum, mut weight) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            sum = keep * sum + y;
            weight = keep * weight + 1.0;
            (x, sum / weight)
        })
        .collect()
}

/// From the smallest to the largest value, widened by a share on both sides; never empty.
fn range(values: impl Iterator<Item = f64>, share: f64) -> Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let room = (high - low) * share;
    let least = low.abs().max(high.abs()).max(1.0) * 1e-6;
    if high - low < least { low - 0.5..high + 0.5 } else { low - room..high + room }
}

/// Writes the tick labels of a range with as many decimals as tell them apart.
fn tick_format(range: &Range<f64>) -> impl Fn(&f64) -> String + use<> {
    let ticks = RangedCoordf64::from(range.clone()).key_points(TICKS);
    let step = ticks.windows(2).map(|pair| pair[1] - pair[0]).next().unwrap_or(1.0);
    // A step of 0.1 that was computed as 0.0999… still has one decimal.
    let digits = (-(step.log10() + 1e-6).floor()).max(0.0) as usize;
    let largest = range.start.abs().max(range.end.abs());
    let scientific = digits > 5 || largest >= 1e6;
    move |value| if scientific { format!("{value:.1e}") } else { format!("{value:.digits$}") }
}

fn register_fonts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (style, bytes) in [(FontStyle::Normal, font::REGULAR), (FontStyle::Bold, font::BOLD)] {
            assert!(register_font(FAMILY, style, bytes).is_ok(), "the embedded font is a font");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(n: usize) -> Vec<(f64, f64)> {
        (0..n).map(|k| (k as f64, k as f64 * 0.01 + if k % 2 == 0 { 0.1 } else { -0.1 })).collect()
    }

    #[test]
    fn a_plot_is_written_with_both_colours_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.png");
        let (a, b) = (ramp(100), [(0.0, f64::NAN), (99.0, 0.5), (120.0, 0.6)]);
        let series = [Series { name: "a", points: &a }, Series { name: "b", points: &b }];
        curve(&path, "Reward", &series, "iteration", "reward").unwrap();
        curve(&path, "Reward", &series, "iteration", "reward").unwrap();
        let image = image::open(&path).unwrap().into_rgb8();
        assert_eq!(image.dimensions(), SIZE);
        for RGBColor(r, g, b) in &PALETTE[..2] {
            let drawn = image.pixels().filter(|pixel| pixel.0 == [*r, *g, *b]).count();
            assert!(drawn > 20, "{drawn} pixels in {r} {g} {b}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_point_a_flat_line_and_huge_values_can_be_drawn() {
        for points in [
            vec![(3.0, 0.25)],
            vec![(0.0, 1.0), (1.0, 1.0)],
            vec![(0.0, -1e12), (1e9, 1e12)],
            vec![(0.0, 1e-9), (1.0, 2e-9)],
        ] {
            draw("t", &[Series { name: "", points: &points }], "x", "y").unwrap();
        }
    }

    #[test]
    fn nothing_to_draw_is_an_error_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.png");
        let series = [Series { name: "a", points: &[(1.0, f64::NAN)] }];
        let error = format!("{:#}", curve(&path, "t", &series, "x", "y").unwrap_err());
        assert!(error.contains("curve.png") && error.contains("no series"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn smoothing_keeps_a_constant_and_calms_a_zigzag() {
        let flat: Vec<(f64, f64)> = (0..50).map(|k| (f64::from(k), 2.0)).collect();
        assert!(smoothed(&flat).iter().all(|(_, y)| (y - 2.0).abs() < 1e-12));
        let calm = smoothed(&ramp(400));
        let jump = calm[200..].windows(2).map(|w| (w[1].1 - w[0].1).abs()).fold(0.0, f64::max);
        assert!(jump < 0.03, "{jump}");
        assert!((calm[399].1 - 3.99).abs() < 0.2);
    }

    #[test]
    fn tick_labels_have_the_decimals_they_need() {
        assert_eq!(tick_format(&(1.0..6.0))(&2.0), "2");
        assert_eq!(tick_format(&(0.0..1.0))(&0.2), "0.2");
        assert_eq!(tick_format(&(0.50..0.54))(&0.51), "0.510");
        assert_eq!(tick_format(&(0.0..3e9))(&1e9), "1.0e9");
    }
}
