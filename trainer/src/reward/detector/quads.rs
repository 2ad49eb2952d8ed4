//! From how likely each pixel is text to the corners of lines.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A pixel above this is text.
const PIXEL: f32 = 0.3;
/// A line's pixels are text with at least this on average.
const LINE: f64 = 0.5;
/// Most lines of an image.
const MOST: usize = 1000;
/// The model sees text thinner than it is: a line of area A and perimeter P grows by this × A/P.
const GROWTH: f64 = 1.6;
/// Least thickness of a line, before and after it grew, in the model's pixels, and at last in the image's.
const THICKNESS: [f64; 3] = [3.0, 5.0, 4.0];

type Point = [f64; 2];

/// Row-major, 0 to 1.
#[derive(Clone, Copy)]
pub(super) struct Map<'a> {
    pub(super) likely: &'a [f32],
    pub(super) width: usize,
}

/// Corners: top left, top right, bottom right, bottom left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Quad([Point; 4]);

impl Quad {
    /// Four corners in any order.
    fn of(mut corners: [Point; 4]) -> Self {
        corners.sort_by(|a, b| a[0].total_cmp(&b[0]));
        corners[..2].sort_by(|a, b| a[1].total_cmp(&b[1]));
        corners[2..].sort_by(|a, b| a[1].total_cmp(&b[1]));
        let [top_left, bottom_left, top_right, bottom_right] = corners;
        Self([top_left, top_right, bottom_right, bottom_left])
    }

    /// Width and height, each the longer of two opposite sides.
    pub(super) fn size(&self) -> [f64; 2] {
        let [a, b, c, d] = self.0;
        [distance(a, b).max(distance(d, c)), distance(a, d).max(distance(b, c))]
    }

    /// The point at shares of its width and height.
    pub(super) fn at(&self, u: f64, v: f64) -> Point {
        let [a, b, c, d] = self.0;
        [0, 1].map(|k| {
            let (upper, lower) = (a[k] + u * (b[k] - a[k]), d[k] + u * (c[k] - d[k]));
            upper + v * (lower - upper)
        })
    }

    fn middle(&self) -> Point {
        self.at(0.5, 0.5)
    }

    fn height(&self) -> f64 {
        self.size()[1]
    }

    fn holds(&self, [x, y]: Point) -> bool {
        let sides = (0..4).map(|at| (self.0[at], self.0[(at + 1) % 4]));
        // Clockwise with y downwards: inside is to the right of every side, give or take rounding.
        sides
            .into_iter()
            .all(|([ax, ay], [bx, by])| (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= -1e-6)
    }
}

/// Lines in reading order; `scale` is from the map's pixels to those of the image, whose size is `limits`.
pub(super) fn find(map: Map<'_>, scale: Point, limits: Point) -> Vec<Quad> {
    let rectangles =
        components(&map).into_iter().take(MOST).map(|pixels| Rectangle::around(&pixels));
    let text = rectangles.filter(|rectangle| {
        rectangle.thickness() >= THICKNESS[0] && map.mean(&rectangle.quad()) >= LINE
    });
    let grown = text.map(Rectangle::grown).filter(|grown| grown.thickness() >= THICKNESS[1]);
    let quads = grown.map(|rectangle| {
        Quad::of(rectangle.quad().0.map(|corner| {
            [0, 1].map(|k| (corner[k] * scale[k]).round().clamp(0.0, limits[k] - 1.0))
        }))
    });
    in_reading_order(
        quads.filter(|quad| quad.size().iter().all(|&side| side >= THICKNESS[2])).collect(),
    )
}

/// From the top; those whose middles lie within half a height of each other, from the left.
fn in_reading_order(mut quads: Vec<Quad>) -> Vec<Quad> {
    let by = |k: usize| {
        move |a: &Quad, b: &Quad| -> Ordering { a.middle()[k].total_cmp(&b.middle()[k]) }
    };
    quads.sort_by(by(1));
    let is_same_row =
        |a: &Quad, b: &Quad| b.middle()[1] - a.middle()[1] < 0.5 * a.height().min(b.height());
    quads.chunk_by_mut(is_same_row).for_each(|row| row.sort_by(by(0)));
    quads
}

impl Map<'_> {
    fn height(&self) -> usize {
        self.likely.len() / self.width
    }

    fn is_text(&self, x: usize, y: usize) -> bool {
        self.likely[y * self.width + x] > PIXEL
    }

    /// Whether the pixel is text, or one of those to its left and above it.
    fn is_near_text(&self, x: usize, y: usize) -> bool {
        let (left, top) = (x.saturating_sub(1), y.saturating_sub(1));
        (top..=y).any(|y| (left..=x).any(|x| self.is_text(x, y)))
    }

    /// Of the pixels in `quad`.
    fn mean(&self, quad: &Quad) -> f64 {
        let range = |k: usize, n: usize| {
            let all = quad.0.iter().map(|corner| corner[k]);
            let (least, most) =
                (all.clone().fold(f64::MAX, f64::min), all.fold(f64::MIN, f64::max));
            least.floor().max(0.0) as usize..(most.ceil().max(0.0) as usize + 1).min(n)
        };
        let (mut sum, mut n) = (0.0, 0.0);
        for y in range(1, self.height()) {
            for x in range(0, self.width) {
                if quad.holds([x as f64, y as f64]) {
                    sum += f64::from(self.likely[y * self.width + x]);
                    n += 1.0;
                }
            }
        }
        sum / f64::max(n, 1.0)
    }
}

/// Each connected part of the text, corners included, by the ends of its rows.
fn components(map: &Map<'_>) -> Vec<Vec<Point>> {
    let (width, height) = (map.width, map.height());
    let mut left: Vec<bool> =
        (0..width * height).map(|at| map.is_near_text(at % width, at / width)).collect();
    let mut found = Vec::new();
    for start in 0..width * height {
        if !std::mem::take(&mut left[start]) {
            continue;
        }
        let (mut rows, mut open) = (BTreeMap::new(), vec![start]);
        while let Some(at) = open.pop() {
            let (x, y) = (at % width, at / width);
            let ends: &mut [usize; 2] = rows.entry(y).or_insert([x, x]);
            *ends = [ends[0].min(x), ends[1].max(x)];
            for y in y.saturating_sub(1)..=(y + 1).min(height - 1) {
                for x in x.saturating_sub(1)..=(x + 1).min(width - 1) {
                    if std::mem::take(&mut left[y * width + x]) {
                        open.push(y * width + x);
                    }
                }
            }
        }
        let ends = |(y, ends): (usize, [usize; 2])| ends.map(|x| [x as f64, y as f64]);
        found.push(rows.into_iter().flat_map(ends).collect());
    }
    found
}

/// A rectangle of any direction.
#[derive(Clone, Copy, Debug)]
struct Rectangle {
    middle: Point,
    /// Unit vector along it.
    along: Point,
    /// Half of its length along that, and across.
    half: [f64; 2],
}

impl Rectangle {
    /// The smallest around `points`: one of its sides lies on a side of their hull.
    fn around(points: &[Point]) -> Self {
        let hull = hull(points);
        let sides = hull.iter().zip(hull.iter().cycle().skip(1));
        let all = sides.map(|(&a, &b)| Self::along(&hull, [b[0] - a[0], b[1] - a[1]]));
        all.min_by(|a, b| a.area().total_cmp(&b.area())).expect("a component has a pixel")
    }

    fn along(points: &[Point], direction: Point) -> Self {
        let length = direction[0].hypot(direction[1]);
        let along = if length > 0.0 { direction.map(|part| part / length) } else { [1.0, 0.0] };
        let across = [-along[1], along[0]];
        let spread = |axis: Point| {
            let at = points.iter().map(|point| point[0] * axis[0] + point[1] * axis[1]);
            let (least, most) = (at.clone().fold(f64::MAX, f64::min), at.fold(f64::MIN, f64::max));
            (f64::midpoint(least, most), (most - least) / 2.0)
        };
        let [(u, half_u), (v, half_v)] = [along, across].map(spread);
        let middle = [0, 1].map(|k| u * along[k] + v * across[k]);
        Self { middle, along, half: [half_u, half_v] }
    }

    fn area(&self) -> f64 {
        4.0 * self.half[0] * self.half[1]
    }

    fn thickness(&self) -> f64 {
        2.0 * self.half[0].min(self.half[1])
    }

    /// With every side moved outwards by [`GROWTH`] × area / perimeter.
    fn grown(self) -> Self {
        let by = GROWTH * self.area() / (4.0 * (self.half[0] + self.half[1]));
        Self { half: self.half.map(|half| half + by), ..self }
    }

    fn quad(&self) -> Quad {
        let ([ux, uy], [hu, hv]) = (self.along, self.half);
        Quad::of([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)].map(|(u, v)| {
            let (u, v) = (u * hu, v * hv);
            [self.middle[0] + u * ux - v * uy, self.middle[1] + u * uy + v * ux]
        }))
    }
}

/// Corners of the convex hull in order (Andrew's monotone chain).
fn hull(points: &[Point]) -> Vec<Point> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let turn = |a: Point, b: Point, c: Point| {
        (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
    };
    let chain = |points: &mut dyn Iterator<Item = Point>| {
        let mut chain: Vec<Point> = Vec::new();
        for point in points {
            while let [.., a, b] = chain[..] {
                if turn(a, b, point) > 0.0 {
                    break;
                }
                chain.pop();
            }
            chain.push(point);
        }
        chain.pop();
        chain
    };
    let mut hull = chain(&mut points.iter().copied());
    hull.extend(chain(&mut points.iter().rev().copied()));
    if hull.is_empty() { points[..1].to_vec() } else { hull }
}

fn distance(a: Point, b: Point) -> f64 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map with filled rectangles `[x, y, width, height]`.
    fn drawn(width: usize, height: usize, boxes: &[[usize; 4]]) -> Vec<f32> {
        let mut likely = vec![0.05; width * height];
        for &[x, y, wide, high] in boxes {
            for row in y..y + high {
                likely[row * width + x..][..wide].fill(0.9);
            }
        }
        likely
    }

    /// By hand: a box of pixels 10 to 49 by 20 to 29 becomes, one wider to the right and below, 40 by 10
    /// between pixels' middles; it grows by 1.6 · 400 / 100 = 6.4.
    #[test]
    fn a_box_grows_by_its_area_over_its_perimeter() {
        let likely = drawn(96, 64, &[[10, 20, 40, 10]]);
        let quads = find(Map { likely: &likely, width: 96 }, [1.0, 1.0], [96.0, 64.0]);
        assert_eq!(quads, [Quad([[4.0, 14.0], [56.0, 14.0], [56.0, 36.0], [4.0, 36.0]])]);
        let quads = find(Map { likely: &likely, width: 96 }, [0.5, 0.25], [48.0, 16.0]);
        assert_eq!(quads, [Quad([[2.0, 3.0], [28.0, 3.0], [28.0, 9.0], [2.0, 9.0]])]);
    }

    #[test]
    fn lines_are_read_from_the_top_and_from_the_left() {
        let boxes = [[60, 12, 30, 10], [8, 10, 30, 10], [20, 50, 60, 8], [5, 80, 40, 8]];
        let likely = drawn(96, 96, &boxes);
        let quads = find(Map { likely: &likely, width: 96 }, [1.0, 1.0], [96.0, 96.0]);
        let lefts: Vec<f64> = quads.iter().map(|quad| quad.middle()[0].round()).collect();
        assert_eq!(lefts, [23.0, 75.0, 50.0, 25.0]);
    }

    #[test]
    fn specks_and_haze_are_no_lines() {
        let mut likely = drawn(64, 64, &[[5, 5, 2, 2]]);
        for row in 20..40 {
            likely[row * 64 + 10..][..40].fill(0.4);
        }
        assert_eq!(find(Map { likely: &likely, width: 64 }, [1.0, 1.0], [64.0, 64.0]), []);
        assert_eq!(find(Map { likely: &[0.0; 64], width: 8 }, [1.0, 1.0], [8.0, 8.0]), []);
    }

    #[test]
    fn a_tilted_line_is_cut_along_itself() {
        let points: Vec<Point> = (0..400).map(|i| [f64::from(i % 40), f64::from(i / 40)]).collect();
        let (sin, cos) = 0.3_f64.sin_cos();
        let tilted: Vec<Point> =
            points.iter().map(|[x, y]| [x * cos - y * sin + 20.0, x * sin + y * cos]).collect();
        let rectangle = Rectangle::around(&tilted);
        assert!((rectangle.area() - 39.0 * 9.0).abs() < 1e-9, "{rectangle:?}");
        let quad = rectangle.quad();
        assert!(tilted.iter().all(|&point| quad.holds(point)));
        let [width, height] = quad.size();
        assert!((width - 39.0).abs() < 1e-9 && (height - 9.0).abs() < 1e-9);
        assert!(distance(quad.at(0.0, 0.0), tilted[0]) < 1e-9);
        let single = Rectangle::around(&[[3.0, 4.0]]);
        assert_eq!((single.middle, single.thickness()), ([3.0, 4.0], 0.0));
    }
}
