//! Contact sheets: many small pictures, enlarged without smoothing, with captions and verdicts.

use image::{
    Rgb, RgbImage,
    imageops::{self, FilterType},
};

use crate::picture::font;

const PAPER: Rgb<u8> = Rgb([255; 3]);
const TEXT: Rgb<u8> = Rgb([34, 38, 46]);
const QUIET: Rgb<u8> = Rgb([112, 118, 128]);
const FRAME: Rgb<u8> = Rgb([205, 209, 215]);
const RIGHT: Rgb<u8> = Rgb([24, 138, 72]);
const WRONG: Rgb<u8> = Rgb([205, 62, 38]);

/// Pixels between neighbouring cells, and around the sheet.
const GAP: u32 = 10;
/// Text size in pixels per em.
const TEXT_SIZE: f32 = 14.0;
/// Height of a line of text in pixels.
const TEXT_HEIGHT: u32 = 19;
/// Width of the frame around a picture in pixels.
const BORDER: u32 = 2;

/// One picture with what is said under it.
#[derive(Clone, Debug)]
pub struct Cell<'a> {
    pub image: &'a RgbImage,
    /// A line under the picture, for example what was read in it; cut to the picture's width.
    pub note: Option<String>,
    /// Colours the frame and marks the note: right or wrong.
    pub verdict: Option<bool>,
}

impl<'a> Cell<'a> {
    /// A picture alone.
    pub fn new(image: &'a RgbImage) -> Self {
        Self { image, note: None, verdict: None }
    }

    /// A picture, what was read in it, and whether that is right.
    pub fn read(image: &'a RgbImage, note: impl Into<String>, right: bool) -> Self {
        Self { image, note: Some(note.into()), verdict: Some(right) }
    }
}

/// One prompt and its pictures, one for each column of a comparison.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    pub label: String,
    pub cells: Vec<Cell<'a>>,
}

/// Cells in reading order, `columns` in a row.
///
/// # Panics
/// If there are no cells, no columns, a scale of zero, or pictures of different sizes.
pub fn grid(cells: &[Cell<'_>], columns: usize, scale: u32) -> RgbImage {
    assert!(columns > 0, "a grid needs columns");
    let layout = Layout::new(&cells.iter().collect::<Vec<_>>(), scale);
    let (across, down) = (columns.min(cells.len()) as u32, cells.len().div_ceil(columns) as u32);
    let width = GAP + across * (layout.width + GAP);
    let mut sheet = RgbImage::from_pixel(width, GAP + down * (layout.height + GAP), PAPER);
    for (index, cell) in cells.iter().enumerate() {
        let (column, row) = ((index % columns) as u32, (index / columns) as u32);
        let x = GAP + column * (layout.width + GAP);
        layout.draw(&mut sheet, cell, x, GAP + row * (layout.height + GAP));
    }
    sheet
}

/// Prompts with their pictures side by side, for example before and after.
///
/// `headers` name the columns of pictures. The rows fill `panels` panels, first to last, that stand
/// beside each other: one panel is a tall sheet, more panels a wide one.
///
/// # Panics
/// If there are no rows or panels, a row has not one cell for each header, the scale is zero, or the
/// pictures have different sizes.
pub fn side_by_side(headers: &[&str], rows: &[Row<'_>], scale: u32, panels: usize) -> RgbImage {
    assert!(rows.iter().all(|row| row.cells.len() == headers.len()), "one cell for each header");
    assert!(panels > 0, "a sheet needs panels");
    let cells: Vec<&Cell<'_>> = rows.iter().flat_map(|row| &row.cells).collect();
    let layout = Layout::new(&cells, scale);
    let regular = font::regular();
    let label_width = rows
        .iter()
        .map(|row| font::text_width(&regular, &row.label, TEXT_SIZE).ceil() as u32)
        .max()
        .unwrap_or(0);
    let step = layout.width + GAP;
    let panel_width = GAP + label_width + GAP + headers.len() as u32 * step;
    let per_panel = rows.len().div_ceil(panels);
    let panels = rows.len().div_ceil(per_panel) as u32;
    let heads: Vec<Vec<String>> =
        headers.iter().map(|header| wrapped(&font::bold(), header, layout.width as f32)).collect();
    let head_height = TEXT_HEIGHT * heads.iter().map(Vec::len).max().unwrap_or(1) as u32;
    let top = GAP + head_height + GAP / 2;
    let width = panels * panel_width + (panels - 1) * 2 * GAP;
    let height = top + per_panel as u32 * (layout.height + GAP);
    let mut sheet = RgbImage::from_pixel(width, height, PAPER);
    for panel in 0..panels {
        let left = panel * (panel_width + 2 * GAP);
        let pictures = left + GAP + label_width + GAP;
        for (column, lines) in heads.iter().enumerate() {
            let middle = (pictures + column as u32 * step) as f32 + layout.width as f32 / 2.0;
            for (line, text) in lines.iter().rev().enumerate() {
                let x = middle - font::text_width(&font::bold(), text, TEXT_SIZE) / 2.0;
                let y = GAP + head_height - (line as u32 + 1) * TEXT_HEIGHT;
                font::draw_text(&mut sheet, &font::bold(), text, (x, y as f32), TEXT_SIZE, TEXT);
            }
        }
        for (slot, row) in rows.iter().skip(panel as usize * per_panel).take(per_panel).enumerate()
        {
            let y = top + slot as u32 * (layout.height + GAP);
            let text_width = font::text_width(&regular, &row.label, TEXT_SIZE);
            let at = (
                (left + GAP + label_width) as f32 - text_width,
                y as f32 + (layout.picture_height - TEXT_SIZE * 1.2) / 2.0,
            );
            font::draw_text(&mut sheet, &regular, &row.label, at, TEXT_SIZE, TEXT);
            for (column, cell) in row.cells.iter().enumerate() {
                layout.draw(&mut sheet, cell, pictures + column as u32 * step, y);
            }
        }
    }
    sheet
}

/// The size of every cell of a sheet, frame and note included.
struct Layout {
    scale: u32,
    width: u32,
    height: u32,
    picture_height: f32,
}

impl Layout {
    fn new(cells: &[&Cell<'_>], scale: u32) -> Self {
        assert!(scale > 0, "a picture cannot be enlarged zero times");
        let mut sizes = cells.iter().map(|cell| cell.image.dimensions());
        let (width, height) = sizes.next().expect("a sheet needs pictures");
        assert!(sizes.all(|size| size == (width, height)), "pictures of a sheet have one size");
        let noted = cells.iter().any(|cell| cell.note.is_some());
        let framed = height * scale + 2 * BORDER;
        Self {
            scale,
            width: width * scale + 2 * BORDER,
            height: framed + if noted { TEXT_HEIGHT } else { 0 },
            picture_height: framed as f32,
        }
    }

    fn draw(&self, sheet: &mut RgbImage, cell: &Cell<'_>, x: u32, y: u32) {
        let (width, height) = cell.image.dimensions();
        let (width, height) = (width * self.scale, height * self.scale);
        let frame = match cell.verdict {
            Some(true) => RIGHT,
            Some(false) => WRONG,
            None => FRAME,
        };
        let border = RgbImage::from_pixel(width + 2 * BORDER, height + 2 * BORDER, frame);
        imageops::replace(sheet, &border, i64::from(x), i64::from(y));
        let picture = imageops::resize(cell.image, width, height, FilterType::Nearest);
        imageops::replace(sheet, &picture, i64::from(x + BORDER), i64::from(y + BORDER));
        let Some(note) = &cell.note else { return };
        let (mark, colour) = match cell.verdict {
            Some(true) => ("✓ ", RIGHT),
            Some(false) => ("✗ ", WRONG),
            None => ("", QUIET),
        };
        let regular = font::regular();
        let note = fitted(&regular, &format!("{mark}{note}"), self.width as f32);
        let left =
            x as f32 + (self.width as f32 - font::text_width(&regular, &note, TEXT_SIZE)) / 2.0;
        let at = (left, y as f32 + self.picture_height + 2.0);
        font::draw_text(sheet, &regular, &note, at, TEXT_SIZE, colour);
    }
}

/// The text, or as much of its beginning as fits, with an ellipsis.
fn fitted<F: ab_glyph::Font>(font: &F, text: &str, width: f32) -> String {
    if font::text_width(font, text, TEXT_SIZE) <= width {
        return text.to_owned();
    }
    let mut kept = text.to_owned();
    while kept.pop().is_some() {
        let shortened = format!("{}…", kept.trim_end());
        if font::text_width(font, &shortened, TEXT_SIZE) <= width {
            return shortened;
        }
    }
    kept
}

/// The text in lines that fit, broken after what is neither a letter nor a digit where there is such, and else
/// anywhere.
fn wrapped<F: ab_glyph::Font>(font: &F, text: &str, width: f32) -> Vec<String> {
    let fits = |line: &str| font::text_width(font, line.trim_end(), TEXT_SIZE) <= width;
    let mut lines = vec![String::new()];
    for part in text.split_inclusive(|c: char| !c.is_alphanumeric()) {
        let last = lines.last_mut().expect("one at least");
        if fits(&format!("{last}{part}")) {
            last.push_str(part);
            continue;
        }
        let mut line = String::new();
        for c in part.chars() {
            if !line.is_empty() && !fits(&format!("{line}{c}")) {
                lines.push(std::mem::take(&mut line));
            }
            line.push(c);
        }
        lines.push(line);
    }
    lines.retain(|line| !line.is_empty());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const PINK: Rgb<u8> = Rgb([250, 100, 200]);

    fn count(image: &RgbImage, colour: Rgb<u8>) -> u32 {
        image.pixels().filter(|pixel| **pixel == colour).count() as u32
    }

    #[test]
    fn every_picture_is_on_the_grid_enlarged_and_framed() {
        let image = RgbImage::from_pixel(4, 4, PINK);
        let cells = vec![Cell::new(&image); 5];
        let sheet = grid(&cells, 3, 6);
        assert_eq!(sheet.dimensions(), (GAP + 3 * (28 + GAP), GAP + 2 * (28 + GAP)));
        assert_eq!(count(&sheet, PINK), 5 * 24 * 24);
        assert_eq!(count(&sheet, FRAME), 5 * (28 * 28 - 24 * 24));
        assert_eq!(*sheet.get_pixel(GAP, GAP), FRAME);
        assert_eq!(*sheet.get_pixel(GAP + BORDER, GAP + BORDER), PINK);
        assert_eq!(grid(&cells[..2], 8, 1).width(), GAP + 2 * (8 + GAP));
    }

    #[test]
    fn verdicts_colour_the_frame_and_write_a_note() {
        let image = RgbImage::from_pixel(32, 32, PINK);
        let right = grid(&[Cell::read(&image, "HAT", true)], 1, 3);
        let wrong = grid(&[Cell::read(&image, "HRT", false)], 1, 3);
        assert!(count(&right, RIGHT) > 800 && count(&right, WRONG) == 0);
        assert!(count(&wrong, WRONG) > 800 && count(&wrong, RIGHT) == 0);
        let under = GAP + 3 * 32 + 2 * BORDER + 1;
        assert!(
            (under..right.height())
                .any(|y| (0..right.width()).any(|x| { *right.get_pixel(x, y) != PAPER }))
        );
    }

    #[test]
    fn panels_turn_a_tall_sheet_into_a_wide_one_without_losing_a_row() {
        let image = RgbImage::from_pixel(8, 8, PINK);
        let row = Row { label: "red \"HAT\"".into(), cells: vec![Cell::new(&image); 2] };
        let rows = vec![row; 5];
        let tall = side_by_side(&["before", "after"], &rows, 4, 1);
        let wide = side_by_side(&["before", "after"], &rows, 4, 2);
        assert_eq!(count(&tall, PINK), 10 * 32 * 32);
        assert_eq!(count(&wide, PINK), 10 * 32 * 32);
        assert!(wide.width() > 2 * tall.width() && wide.height() < tall.height());
    }

    #[test]
    fn long_heads_are_told_whole() {
        let bold = font::bold();
        for head in ["neighbor-grpo-seed4", "unbreakableunbreakable"] {
            let lines = wrapped(&bold, head, 80.0);
            assert!(lines.len() > 1 && lines.concat() == head, "{lines:?}");
            assert!(lines.iter().all(|line| font::text_width(&bold, line, TEXT_SIZE) <= 80.0));
        }
        assert_eq!(wrapped(&bold, "neighbor-grpo-seed4", 80.0)[0], "neighbor-");
        assert_eq!(wrapped(&bold, "before", 75.0), ["before"]);
    }

    #[test]
    fn long_notes_are_cut_with_an_ellipsis() {
        let regular = font::regular();
        let cut = fitted(&regular, "what was read is much too long", 90.0);
        assert!(cut.ends_with('…') && cut.starts_with("what"), "{cut}");
        assert!(font::text_width(&regular, &cut, TEXT_SIZE) <= 90.0);
        assert_eq!(fitted(&regular, "HAT", 90.0), "HAT");
    }
}
