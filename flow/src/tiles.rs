//! Decoding a large image in overlapping tiles, so that memory does not grow with its area.
//!
//! Source: `AutoencoderKL.tiled_decode` of diffusers 0.42. Where that would append a tile shorter than
//! the overlap, the tile before it is kept to its end, which holds the same pixels.

use crate::latents::LatentSize;

/// Side in pixels of a tile, and of the largest image that is decoded whole: what FLUX is trained at.
const SIDE: usize = 1024;
/// Pixels over which neighbours change into each other.
const OVERLAP: usize = SIDE / 4;

/// Pixels `[3, f·h, f·w]` of `latents` `[Z, h, w]`, where a cell covers `factor` pixels and `decode`
/// does as much for a part: at once, or in tiles where a side is above 1024 pixels.
///
/// # Errors
/// Those of `decode`.
pub fn decode<E>(
    latents: &[f32],
    size: &LatentSize,
    factor: usize,
    decode: impl FnMut(&[f32], &LatentSize) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, E> {
    Tiling { side: SIDE / factor, overlap: OVERLAP / factor, factor }.decode(latents, size, decode)
}

/// How an image is cut; sides in latent cells.
#[derive(Clone, Copy)]
struct Tiling {
    side: usize,
    overlap: usize,
    factor: usize,
}

/// Where a tile meets the one before it.
#[derive(Clone, Copy)]
enum Edge {
    Top,
    Left,
}

/// A part of an image, `[3, height, width]`.
struct Tile {
    pixels: Vec<f32>,
    height: usize,
    width: usize,
}

const COLOURS: usize = 3;

impl Tiling {
    fn decode<E>(
        self,
        latents: &[f32],
        size: &LatentSize,
        mut decode: impl FnMut(&[f32], &LatentSize) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f32>, E> {
        if size.height.max(size.width) <= self.side {
            return decode(latents, size);
        }
        let f = self.factor;
        let [height, width] = [size.height * f, size.width * f];
        let mut image = vec![0.0; COLOURS * height * width];
        let mut above: Vec<Tile> = Vec::new();
        for (top, rows) in self.spans(size.height) {
            let mut row: Vec<Tile> = Vec::new();
            for (left, columns) in self.spans(size.width) {
                let part = LatentSize { height: rows, width: columns, ..*size };
                let pixels = decode(&cut(latents, size, top, left, &part), &part)?;
                let mut tile = Tile { pixels, height: rows * f, width: columns * f };
                if let Some(above) = above.get(row.len()) {
                    self.blend(&mut tile, above, Edge::Top);
                }
                if let Some(before) = row.last() {
                    self.blend(&mut tile, before, Edge::Left);
                }
                // A later neighbour paints over what it shares with this one.
                tile.paint(&mut image, [top * f, left * f], width);
                row.push(tile);
            }
            above = row;
        }
        Ok(image)
    }

    /// Fades from `before` into `tile` over their overlap.
    fn blend(self, tile: &mut Tile, before: &Tile, edge: Edge) {
        let (overlap, stride) =
            (self.overlap * self.factor, (self.side - self.overlap) * self.factor);
        let [rows, columns, down, right] = match edge {
            Edge::Top => [overlap, tile.width, stride, 0],
            Edge::Left => [tile.height, overlap, 0, stride],
        };
        for colour in 0..COLOURS {
            for y in 0..rows {
                for x in 0..columns {
                    let step = if matches!(edge, Edge::Top) { y } else { x };
                    let share = step as f32 / overlap as f32;
                    let old = before.pixels[before.at(colour, y + down, x + right)];
                    let at = tile.at(colour, y, x);
                    tile.pixels[at] = old * (1.0 - share) + tile.pixels[at] * share;
                }
            }
        }
    }

    /// Start and length of the tiles along a side of `n` cells.
    fn spans(self, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let starts = (0..n).step_by(self.side - self.overlap);
        starts
            .filter(move |&start| start == 0 || n - start > self.overlap)
            .map(move |start| (start, self.side.min(n - start)))
    }
}

impl Tile {
    fn at(&self, colour: usize, y: usize, x: usize) -> usize {
        (colour * self.height + y) * self.width + x
    }

    /// Copies the tile into an image `[3, H, width]` at row and column `corner`.
    fn paint(&self, image: &mut [f32], corner: [usize; 2], width: usize) {
        let area = image.len() / COLOURS;
        for colour in 0..COLOURS {
            for y in 0..self.height {
                let from = self.at(colour, y, 0);
                let to = colour * area + (corner[0] + y) * width + corner[1];
                image[to..to + self.width].copy_from_slice(&self.pixels[from..from + self.width]);
            }
        }
    }
}

/// The cells of `latents` `[Z, h, w]` in the part of size `part` at `top`, `left`.
fn cut(latents: &[f32], size: &LatentSize, top: usize, left: usize, part: &LatentSize) -> Vec<f32> {
    let row = |channel: usize, y: usize| {
        let start = (channel * size.height + top + y) * size.width + left;
        &latents[start..start + part.width]
    };
    let rows = (0..size.channels).flat_map(|z| (0..part.height).map(move |y| (z, y)));
    rows.flat_map(|(z, y)| row(z, y)).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILING: Tiling = Tiling { side: 8, overlap: 2, factor: 2 };

    /// Doubles every cell of channel 0 into all colours.
    fn enlarge(latents: &[f32], size: &LatentSize) -> Vec<f32> {
        let (height, width) = (2 * size.height, 2 * size.width);
        let pixel = |at: usize| latents[(at / width / 2) * size.width + at % width / 2];
        (0..COLOURS).flat_map(|_| (0..height * width).map(pixel)).collect()
    }

    #[test]
    fn what_each_tile_sees_alike_comes_back_whole() {
        for (height, width) in [(8, 8), (9, 8), (10, 12), (14, 15), (20, 27)] {
            let size = LatentSize { channels: 1, height, width };
            let latents: Vec<f32> = (0..size.len()).map(|i| i as f32).collect();
            let mut n = 0;
            let tiled = TILING.decode(&latents, &size, |part, size| {
                n += 1;
                assert!(size.height <= 8 && size.width <= 8 && part.len() == size.len());
                Ok::<_, ()>(enlarge(part, size))
            });
            let whole = enlarge(&latents, &size);
            for (a, b) in tiled.unwrap().iter().zip(&whole) {
                assert!((a - b).abs() <= 1e-4 * b.abs(), "{a} instead of {b}, {height}x{width}");
            }
            assert_eq!(n > 1, height.max(width) > 8);
        }
    }

    /// Tiles that are each of one colour show the weights.
    #[test]
    fn neighbours_change_into_each_other_over_the_overlap() {
        let size = LatentSize { channels: 1, height: 8, width: 14 };
        let mut n = 0.0;
        let image = TILING.decode(&vec![0.0; size.len()], &size, |part, _| {
            n += 1.0;
            Ok::<_, ()>(vec![n; COLOURS * 4 * part.len()])
        });
        let image = image.unwrap();
        let row = &image[..28];
        assert_eq!(row[..12], [1.0; 12]);
        assert_eq!(row[12..17], [1.0, 1.25, 1.5, 1.75, 2.0]);
        assert_eq!(row[17..], [2.0; 11]);
    }

    #[test]
    fn no_tile_is_shorter_than_the_overlap() {
        let spans = |n| TILING.spans(n).collect::<Vec<_>>();
        assert_eq!(spans(8), [(0, 8)]);
        assert_eq!(spans(9), [(0, 8), (6, 3)]);
        assert_eq!(spans(14), [(0, 8), (6, 8)]);
        assert_eq!(spans(15), [(0, 8), (6, 8), (12, 3)]);
    }
}
