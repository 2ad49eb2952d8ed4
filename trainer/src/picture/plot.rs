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
        BitMapBackend, ChartBuilder, Circle, Color, DashedLineSeries, DrawingArea, FontStyle,
        IntoDrawingArea, IntoFont, LineSeries, Polygon, RGBColor, TRANSPARENT,
    },
    style::register_font,
};

pub(crate) use self::panels::{Panel, panels};
use super::font;
use crate::picture;

mod panels;

/// Size in pixels of the finished picture with one row of names.
const SIZE: (u32, u32) = (960, 540);
/// The drawing is this many times larger and then reduced, which smooths every edge.
const OVERSAMPLING: u32 = 3;
/// Room above, below and on both sides of the axes in pixels.
const TOP: u32 = 76;
const BOTTOM: u32 = 34;
const LEFT: u32 = 64;
const RIGHT: u32 = 26;
/// Upper edge of the first row of names, and from each row to the next; the picture grows by it.
const NAMES: u32 = 44;
const ROW: u32 = 20;
/// A series' stroke beside its name, with the room up to the name, and that between two of them.
const MARK: f32 = 24.0;
const APART: f32 = 20.0;
/// Strokes and gaps of a dashed line.
const DASH: [u32; 2] = [7, 4];
/// At most this many ticks on an axis.
const TICKS: usize = 9;
/// Left edge of title and name of the y axis; size of all letters but the title's.
const MARGIN: f32 = 20.0;
const SMALL: f32 = 13.0;
/// The name under which the embedded fonts are known to the drawing library.
const FAMILY: &str = "embedded";

const INK: RGBColor = RGBColor(34, 38, 46);
const QUIET: RGBColor = RGBColor(100, 106, 116);
const GRID: RGBColor = RGBColor(232, 234, 238);
/// Colours of the series, apart also for people who do not tell red from green. More series start again
/// from the first, dashed.
const PALETTE: [RGBColor; 10] = [
    RGBColor(31, 98, 184),
    RGBColor(222, 115, 20),
    RGBColor(20, 150, 130),
    RGBColor(124, 32, 0),
    RGBColor(104, 176, 250),
    RGBColor(20, 20, 26),
    RGBColor(240, 150, 205),
    RGBColor(76, 0, 240),
    RGBColor(222, 196, 100),
    RGBColor(116, 162, 90),
];

/// One curve.
#[derive(Clone, Copy, Debug)]
pub struct Series<'a> {
    pub name: &'a str,
    /// (x, y) in order of x; points that are not finite are left out.
    pub points: &'a [(f64, f64)],
    /// Whether the points are averages already.
    pub is_smooth: bool,
    /// How far values spread: (x, low, high) in order of x, all of them finite; nothing where there is none.
    pub band: &'a [(f64, f64, f64)],
}

/// Draws the series into the PNG `path`: each as it is in a thin line, and smoothed in a thick one; one
/// that is smooth already in a thick one alone.
///
/// # Errors
/// When no series has a finite point, or the file cannot be written.
pub fn curve(path: &Path, title: &str, series: &[Series<'_>], x: &str, y: &str) -> Result<()> {
    let image = draw(title, series, x, y, SIZE.1)
        .with_context(|| format!("plotting {}", path.display()))?;
    picture::save(path, &image)
}

/// The picture that [`curve`] writes, `height` pixels high with one row of names.
fn draw(title: &str, series: &[Series<'_>], x: &str, y: &str, height: u32) -> Result<RgbImage> {
    let curves: Vec<Vec<(f64, f64)>> = series
        .iter()
        .map(|series| series.points.iter().copied())
        .map(|points| points.filter(|(x, y)| x.is_finite() && y.is_finite()).collect())
        .collect();
    let all = || curves.iter().flatten();
    ensure!(all().next().is_some(), "no series has a point to draw");
    let finite: Vec<Series<'_>> =
        series.iter().zip(&curves).map(|(series, points)| Series { points, ..*series }).collect();
    let x_range = range(all().map(|point| point.0), 0.0);
    let bands = series.iter().flat_map(|series| series.band).flat_map(|band| [band.1, band.2]);
    let y_range = range(all().map(|point| point.1).chain(bands), 0.06);
    register_fonts();
    let legend = legend(series, y);
    let more = ROW * legend.len().saturating_sub(1) as u32;
    let size = (SIZE.0, height + more);
    let (width, height) = (size.0 * OVERSAMPLING, size.1 * OVERSAMPLING);
    let mut pixels = vec![255; (width * height * 3) as usize];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        draw_curves(&area, &finite, TOP + more, x_range, y_range)
            .map_err(|error| anyhow!("{error}"))?;
    }
    let large = RgbImage::from_raw(width, height, pixels)
        .context("the drawing has another size than its buffer")?;
    let mut image = imageops::resize(&large, size.0, size.1, FilterType::Triangle);
    write_labels(&mut image, title, series, &legend, x, y);
    Ok(image)
}

/// Axes, grid and curves, below `top` pixels, at the enlarged size.
fn draw_curves(
    area: &DrawingArea<BitMapBackend<'_>, Shift>,
    series: &[Series<'_>],
    top: u32,
    x_range: Range<f64>,
    y_range: Range<f64>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let px = |n: u32| n * OVERSAMPLING;
    let (x_format, y_format) = (tick_format(&x_range), tick_format(&y_range));
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(top))
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
    for (index, &Series { points, is_smooth, band, .. }) in series.iter().enumerate() {
        let colour = colour(index);
        if !band.is_empty() {
            let lower = band.iter().map(|&(x, low, _)| (x, low));
            let upper = band.iter().rev().map(|&(x, _, high)| (x, high));
            let outline: Vec<(f64, f64)> = lower.chain(upper).collect();
            chart.draw_series([Polygon::new(outline, colour.mix(0.14).filled())])?;
        }
        if !is_smooth {
            let thin = colour.mix(0.32).stroke_width(px(1));
            chart.draw_series(LineSeries::new(points.iter().copied(), thin))?;
        }
        let thick = colour.stroke_width(px(5) / 2);
        let curve = if is_smooth { points.to_vec() } else { smoothed(points) };
        if is_dashed(index) {
            let [stroke, gap] = DASH.map(px);
            chart.draw_series(DashedLineSeries::new(curve, stroke, gap, thick))?;
        } else {
            chart.draw_series(LineSeries::new(curve, thick))?;
        }
        if let [point] = points[..] {
            chart.draw_series([Circle::new(point, px(3), colour.filled())])?;
        }
    }
    area.present()?;
    Ok(())
}

/// Rows of names, in order: series and where its stroke starts. Rows end at the right; the name of the y
/// axis stands beside the last.
fn legend(series: &[Series<'_>], y: &str) -> Vec<Vec<(usize, f32)>> {
    let font = font::regular();
    let left = (MARGIN + font::text_width(&font, y, SMALL) + APART).max(LEFT as f32);
    let right = (SIZE.0 - RIGHT) as f32;
    let mut rows: Vec<(f32, Vec<(usize, f32)>)> = Vec::new();
    for (index, series) in series.iter().enumerate().filter(|(_, s)| !s.name.is_empty()) {
        let width = MARK + font::text_width(&font, series.name, SMALL);
        match rows.last_mut() {
            Some((end, row)) if *end + APART + width <= right => {
                row.push((index, *end + APART));
                *end += APART + width;
            }
            _ => rows.push((left + width, vec![(index, left)])),
        }
    }
    let aligned = rows.into_iter().map(|(end, row)| {
        let shift = (right - end).max(0.0);
        row.into_iter().map(|(index, x)| (index, x + shift)).collect()
    });
    aligned.collect()
}

/// Title, names of the axes, and the legend, at the finished size.
fn write_labels(
    image: &mut RgbImage,
    title: &str,
    series: &[Series<'_>],
    legend: &[Vec<(usize, f32)>],
    x: &str,
    y: &str,
) {
    let (regular, bold) = (font::regular(), font::bold());
    let ink = Rgb([INK.0, INK.1, INK.2]);
    let (width, height) = (image.width() as f32, image.height() as f32);
    let row_top = |row: usize| NAMES + ROW * row as u32;
    font::draw_text(image, &bold, title, (MARGIN, 14.0), 18.0, ink);
    let last = row_top(legend.len().saturating_sub(1)) as f32;
    font::draw_text(image, &regular, y, (MARGIN, last), SMALL, ink);
    let middle = f32::midpoint(LEFT as f32, width - RIGHT as f32);
    let x_left = middle - font::text_width(&regular, x, SMALL) / 2.0;
    font::draw_text(image, &regular, x, (x_left, height - 26.0), SMALL, ink);
    for (row, entries) in legend.iter().enumerate() {
        for &(index, left) in entries {
            let at = (left + MARK, row_top(row) as f32);
            font::draw_text(image, &regular, series[index].name, at, SMALL, ink);
            draw_mark(image, (left as u32, row_top(row) + 7), index);
        }
    }
}

/// The stroke beside a name.
fn draw_mark(image: &mut RgbImage, (left, top): (u32, u32), index: usize) {
    let RGBColor(r, g, b) = colour(index);
    let [stroke, gap] = DASH;
    for (dx, dy) in (0..18).flat_map(|dx| (0..3).map(move |dy| (dx, dy))) {
        let is_gap = is_dashed(index) && dx % (stroke + gap) >= stroke;
        if let (false, Some(pixel)) = (is_gap, image.get_pixel_mut_checked(left + dx, top + dy)) {
            *pixel = Rgb([r, g, b]);
        }
    }
}

fn colour(index: usize) -> RGBColor {
    PALETTE[index % PALETTE.len()]
}

fn is_dashed(index: usize) -> bool {
    index / PALETTE.len() % 2 == 1
}

/// An average over the recent past with exponentially falling weights, without start-up bias.
///
/// The weights fall to half within a fortieth of the points, so that a curve keeps its shape
/// whatever its length.
pub(crate) fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
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

    fn named<'a>(name: &'a str, points: &'a [(f64, f64)]) -> Series<'a> {
        Series { name, points, is_smooth: false, band: &[] }
    }

    /// Pixels of exactly this colour.
    fn n_pixels(image: &RgbImage, RGBColor(r, g, b): RGBColor) -> usize {
        image.pixels().filter(|pixel| pixel.0 == [r, g, b]).count()
    }

    #[test]
    fn a_plot_is_written_with_both_colours_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.png");
        let (a, b) = (ramp(100), [(0.0, f64::NAN), (99.0, 0.5), (120.0, 0.6)]);
        let series = [named("a", &a), named("b", &b)];
        curve(&path, "Reward", &series, "iteration", "reward").unwrap();
        curve(&path, "Reward", &series, "iteration", "reward").unwrap();
        let image = image::open(&path).unwrap().into_rgb8();
        assert_eq!(image.dimensions(), SIZE);
        for colour in &PALETTE[..2] {
            let drawn = n_pixels(&image, *colour);
            assert!(drawn > 20, "{drawn} pixels in {colour:?}");
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
            draw("t", &[named("", &points)], "x", "y", SIZE.1).unwrap();
        }
    }

    #[test]
    fn names_wrap_into_rows_above_the_axes() {
        let names: Vec<String> = (0..12).map(|i| format!("Neighbor, DPM++ {i}")).collect();
        let curves: Vec<[(f64, f64); 2]> =
            (0..12).map(|i| [(0.0, 0.0), (9.0, f64::from(i))]).collect();
        let series: Vec<Series<'_>> = names
            .iter()
            .zip(&curves)
            .map(|(name, points)| Series { is_smooth: true, ..named(name, points) })
            .collect();
        let label = "mean reward of the colour";
        let rows = legend(&series, label);
        assert!(rows.len() > 1, "{rows:?}");
        assert!(rows.concat().iter().map(|entry| entry.0).eq(0..12), "{rows:?}");
        let font = font::regular();
        let label_end = MARGIN + font::text_width(&font, label, SMALL);
        for row in &rows {
            let mut end = label_end.max(LEFT as f32);
            for &(index, left) in row {
                assert!(left >= end, "{} at {left}, taken up to {end}", names[index]);
                end = left + MARK + font::text_width(&font, &names[index], SMALL);
            }
            assert!((end - (SIZE.0 - RIGHT) as f32).abs() < 0.01, "a row ends at {end}");
        }

        let image = draw("Methods", &series, "seconds", label, SIZE.1).unwrap();
        let last = NAMES + ROW * (rows.len() as u32 - 1);
        // The y axis is the first line in its column that goes on for long.
        let is_ink = |y: u32| image.get_pixel(LEFT, y).0 != [255; 3];
        let axis = (0..image.height() - 99).find(|&y| (y..y + 99).all(is_ink)).unwrap();
        assert!(axis >= last + ROW, "the axes start at {axis}, the last row of names at {last}");
        assert_eq!(image.dimensions(), (SIZE.0, SIZE.1 + last - NAMES));
    }

    #[test]
    fn a_smooth_series_is_one_line_and_one_without_a_colour_of_its_own_is_dashed() {
        let (points, n) = (ramp(200), PALETTE.len());
        let only = |series: Series<'_>| {
            n_pixels(&draw("t", &[series], "x", "y", SIZE.1).unwrap(), PALETTE[0])
        };
        let zigzag = only(Series { is_smooth: true, ..named("", &points) });
        let calm = only(named("", &points));
        assert!(zigzag > 3 * calm, "{zigzag} pixels of the points, {calm} of their average");

        let line = [(0.0, 0.0), (1.0, 1.0)];
        let mut all = vec![named("", &[]); n + 1];
        all[0].points = &line;
        let solid = n_pixels(&draw("t", &all, "x", "y", SIZE.1).unwrap(), PALETTE[0]);
        all.swap(0, n);
        let dashed = n_pixels(&draw("t", &all, "x", "y", SIZE.1).unwrap(), PALETTE[0]);
        assert!((solid / 3..solid * 3 / 4).contains(&dashed), "{dashed} of {solid} pixels");
    }

    /// CIELAB of a colour as it is seen through `matrix`, which acts on linear RGB.
    fn lab(RGBColor(r, g, b): RGBColor, matrix: [[f64; 3]; 3]) -> [f64; 3] {
        let linear = [r, g, b].map(|c| (f64::from(c) / 255.0).powf(2.2));
        let times = |matrix: [[f64; 3]; 3], v: [f64; 3]| {
            matrix.map(|row| row.iter().zip(v).map(|(a, b)| a * b).sum::<f64>().max(0.0))
        };
        let to_xyz = [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]];
        let [x, y, z] = times(to_xyz, times(matrix, linear)).map(f64::cbrt);
        [116.0 * y, 500.0 * (x - y), 200.0 * (y - z)]
    }

    /// By the matrices of Machado, Oliveira & Fernandes (2009) for protanopia and deuteranopia.
    #[test]
    fn colours_are_apart_whoever_looks() {
        let eyes = [
            [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
            [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        ];
        for (i, a) in PALETTE.iter().enumerate() {
            for (b, eye) in PALETTE[..i].iter().flat_map(|b| eyes.map(|eye| (b, eye))) {
                let (p, q) = (lab(*a, eye), lab(*b, eye));
                let squares = p.iter().zip(q).map(|(p, q)| (p - q).powi(2));
                let distance = squares.sum::<f64>().sqrt();
                assert!(distance > 18.0, "{a:?} and {b:?} are {distance:.1} apart");
            }
        }
    }

    #[test]
    fn nothing_to_draw_is_an_error_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.png");
        let series = [named("a", &[(1.0, f64::NAN)])];
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
