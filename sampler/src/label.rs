//! Words in pictures, in letters of 8 by 8 pixels.

use font8x8::{BASIC_FONTS, GREEK_FONTS, LATIN_FONTS, UnicodeFonts};

use crate::picture::Picture;

/// Pixels of a letter's side, its space included.
const LETTER: usize = 8;
/// Pixels from one line to the next.
const LINE: usize = 10;

/// Text for a column of a picture, in as many lines as it takes.
#[derive(Clone, Debug)]
pub struct Label {
    lines: Vec<String>,
    /// Whole times that a letter is enlarged.
    scale: usize,
}

impl Label {
    /// `text` for `width` pixels, letters enlarged `scale` times; broken at spaces, else where it must.
    pub fn new(text: &str, width: usize, scale: usize) -> Self {
        let n = (width / (LETTER * scale)).max(1);
        let (mut lines, mut line, mut used) = (Vec::new(), String::new(), 0);
        for word in text.split_whitespace() {
            let letters: Vec<char> = word.chars().collect();
            if used > 0 && used + 1 + letters.len() > n {
                lines.push(std::mem::take(&mut line));
                used = 0;
            }
            if used > 0 {
                line.push(' ');
                used += 1;
            }
            for letter in letters {
                if used == n {
                    lines.push(std::mem::take(&mut line));
                    used = 0;
                }
                line.push(letter);
                used += 1;
            }
        }
        lines.push(line);
        Self { lines, scale }
    }

    /// Pixels it is high.
    pub fn height(&self) -> usize {
        self.lines.len() * LINE * self.scale
    }

    /// Draws it in black with its upper left corner at `left`, `top`; what leaves `picture` is left out.
    pub fn draw(&self, picture: &mut Picture, left: usize, top: usize) {
        for (row, line) in self.lines.iter().enumerate() {
            for (column, letter) in line.chars().enumerate() {
                let (x, y) = (left + column * LETTER * self.scale, top + row * LINE * self.scale);
                self.letter(picture, glyph(letter), x, y);
            }
        }
    }

    fn letter(&self, picture: &mut Picture, glyph: [u8; 8], left: usize, top: usize) {
        let side = LETTER * self.scale;
        for (y, x) in (0..side).flat_map(|y| (0..side).map(move |x| (y, x))) {
            let is_set = (glyph[y / self.scale] >> (x / self.scale)) & 1 == 1;
            if is_set && left + x < picture.width && top + y < picture.height {
                let at = 3 * ((top + y) * picture.width + left + x);
                picture.rgb[at..at + 3].fill(0);
            }
        }
    }
}

/// Eight rows, the lowest bit on the left; a frame where the font has no such letter.
fn glyph(letter: char) -> [u8; 8] {
    let found = BASIC_FONTS.get(letter).or_else(|| LATIN_FONTS.get(letter));
    found.or_else(|| GREEK_FONTS.get(letter)).unwrap_or([0, 0x7e, 0x42, 0x42, 0x42, 0x7e, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_broken_and_nothing_is_cut() {
        let lines = |text, width| Label::new(text, width, 1).lines;
        assert_eq!(lines("one two three", 56), ["one two", "three"]);
        assert_eq!(lines("one abcdefghij", 32), ["one", "abcd", "efgh", "ij"]);
        assert_eq!(lines("", 80), [""]);
        assert_eq!(Label::new("ab cd", 48, 2).height(), 40);
    }

    #[test]
    fn a_letter_is_black_on_what_is_there() {
        let mut picture = Picture { width: 12, height: 9, rgb: vec![255; 12 * 9 * 3] };
        Label::new("I", 8, 1).draw(&mut picture, 2, 1);
        let black = |x: usize, y: usize| picture.rgb[3 * (y * 12 + x)] == 0;
        assert!(!black(0, 1) && (0..12).any(|x| black(x, 1)));
        assert!(glyph('I') != glyph('字') && glyph('é') != glyph('字'));
        // One that does not fit is no panic.
        Label::new("WW", 16, 1).draw(&mut picture, 8, 5);
    }
}
