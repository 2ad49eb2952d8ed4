//! Contact sheets: many images in one.

use anyhow::{Result, ensure};

use crate::{label::Label, picture::Picture};

/// Most pixels a sheet may have, 3 bytes each.
const MAX_PIXELS: usize = 1 << 28;
/// Images narrower than this are enlarged by a whole factor to reach it.
const MIN_CELL: usize = 96;
/// Pixels around every image.
const GAP: usize = 4;
/// Pixels of an image's width for each time that its label is enlarged.
const LABEL: usize = 256;

/// Where the images of a sheet go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    columns: usize,
    rows: usize,
    /// Size of one image, before enlargement.
    width: usize,
    height: usize,
    scale: usize,
}

impl Layout {
    /// A sheet of `n_prompts`·`count` images of `width`×`height`: a row a prompt when `count` is
    /// above 1, else as square as it gets.
    ///
    /// # Errors
    /// When the sheet would be larger than 2²⁸ pixels.
    pub fn new(n_prompts: usize, count: usize, width: usize, height: usize) -> Result<Self> {
        let n_images = n_prompts * count;
        let columns = if count > 1 { count } else { n_images.isqrt().max(1) };
        let columns =
            if count == 1 && columns * columns < n_images { columns + 1 } else { columns };
        let rows = n_images.div_ceil(columns);
        let layout = Self { columns, rows, width, height, scale: MIN_CELL.div_ceil(width) };
        let (across, down) = layout.size();
        ensure!(
            across.saturating_mul(down) <= MAX_PIXELS,
            "a sheet of {n_images} images would have {across}x{down} pixels, above the limit of \
             {MAX_PIXELS}; leave --sheet out or make fewer images"
        );
        Ok(layout)
    }

    fn size(&self) -> (usize, usize) {
        let cell = |side| side * self.scale + GAP;
        (self.columns * cell(self.width) + GAP, self.rows * cell(self.height) + GAP)
    }

    /// The sheet on white; `pictures` row by row, each of the size the layout was made for.
    pub fn draw(&self, pictures: &[Picture]) -> Picture {
        let (width, height) = self.size();
        let mut sheet = blank(width, height);
        for (index, picture) in pictures.iter().enumerate() {
            let (row, column) = (index / self.columns, index % self.columns);
            self.put(picture, column, GAP + row * (self.height * self.scale + GAP), &mut sheet);
        }
        sheet
    }

    /// The same with a text over each column, and over each row.
    ///
    /// # Errors
    /// When the sheet would be larger than 2²⁸ pixels.
    pub fn draw_labelled(
        &self,
        pictures: &[Picture],
        columns: &[String],
        rows: &[String],
    ) -> Result<Picture> {
        let (cell, (width, height)) = (self.width * self.scale, self.size());
        let label = |text: &String, width| Label::new(text, width, (cell / LABEL).max(1));
        let columns: Vec<Label> = columns.iter().map(|text| label(text, cell)).collect();
        let rows: Vec<Label> = rows.iter().map(|text| label(text, width - 2 * GAP)).collect();
        let head = columns.iter().map(Label::height).max().unwrap_or(0);
        let height = height + head + rows.iter().map(Label::height).sum::<usize>();
        ensure!(
            width.saturating_mul(height) <= MAX_PIXELS,
            "the sheet would have {width}x{height} pixels, above the limit of {MAX_PIXELS}; make fewer \
             images"
        );
        let (mut sheet, mut top) = (blank(width, height), GAP);
        for (index, label) in columns.iter().enumerate() {
            label.draw(&mut sheet, GAP + index * (cell + GAP), top);
        }
        top += head;
        for (label, pictures) in rows.iter().zip(pictures.chunks(self.columns)) {
            label.draw(&mut sheet, GAP, top);
            top += label.height();
            for (column, picture) in pictures.iter().enumerate() {
                self.put(picture, column, top, &mut sheet);
            }
            top += self.height * self.scale + GAP;
        }
        Ok(sheet)
    }

    /// Draws `picture` enlarged into `sheet`.
    fn put(&self, picture: &Picture, column: usize, top: usize, sheet: &mut Picture) {
        let left = GAP + column * (self.width * self.scale + GAP);
        for y in 0..self.height * self.scale {
            for x in 0..self.width * self.scale {
                let from = 3 * (y / self.scale * self.width + x / self.scale);
                let to = 3 * ((top + y) * sheet.width + left + x);
                sheet.rgb[to..to + 3].copy_from_slice(&picture.rgb[from..from + 3]);
            }
        }
    }
}

fn blank(width: usize, height: usize) -> Picture {
    Picture { width, height, rgb: vec![255; width * height * 3] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_follow_the_prompts_or_make_a_square() -> Result<()> {
        let shape = |n_prompts, count| {
            Layout::new(n_prompts, count, 64, 64).map(|layout| (layout.columns, layout.rows))
        };
        assert_eq!(shape(3, 4)?, (4, 3));
        assert_eq!(shape(1, 1)?, (1, 1));
        assert_eq!(shape(5, 1)?, (3, 2));
        assert_eq!(shape(9, 1)?, (3, 3));
        let message = Layout::new(1000, 10, 1024, 1024).unwrap_err().to_string();
        assert!(message.contains("leave --sheet out"), "{message}");
        Ok(())
    }

    #[test]
    fn images_are_enlarged_and_kept_apart() -> Result<()> {
        let black = Picture { width: 32, height: 16, rgb: vec![0; 32 * 16 * 3] };
        let red = Picture { rgb: [200, 0, 0].repeat(32 * 16), ..black.clone() };
        let sheet = Layout::new(1, 2, 32, 16)?.draw(&[black, red]);
        assert_eq!((sheet.width, sheet.height), (2 * 96 + 12, 48 + 8));
        let at = |x: usize, y: usize| &sheet.rgb[3 * (y * sheet.width + x)..][..3];
        assert_eq!(at(3, 3), [255, 255, 255]);
        assert_eq!(at(4, 4), [0, 0, 0]);
        assert_eq!(at(99, 51), [0, 0, 0]);
        assert_eq!(at(101, 20), [255, 255, 255]);
        assert_eq!(at(104, 51), [200, 0, 0]);
        Ok(())
    }

    #[test]
    fn labels_make_room_for_themselves() -> Result<()> {
        let black = Picture { width: 32, height: 16, rgb: vec![0; 32 * 16 * 3] };
        let layout = Layout::new(2, 2, 32, 16)?;
        let plain = layout.draw(&[]);
        let texts = |texts: [&str; 2]| texts.map(str::to_owned).to_vec();
        let sheet = layout.draw_labelled(
            &vec![black; 4],
            &texts(["base", "base with a longer name"]),
            &texts(["seed 1", "seed 2"]),
        )?;
        // Two lines over the columns and one over each row.
        assert_eq!((sheet.width, sheet.height), (plain.width, plain.height + 20 + 10 + 10));
        let at = |x: usize, y: usize| sheet.rgb[3 * (y * sheet.width + x)];
        assert_eq!([at(4, 33), at(4, 34), at(4, 81), at(4, 82)], [255, 0, 0, 255]);
        Ok(())
    }
}
