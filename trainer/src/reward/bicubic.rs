//! Bicubic resizing to the byte as Pillow does it, which CLIP's preparation of images means by "bicubic".
//!
//! Source: `Resample.c` of Pillow: the kernel with a = −1/2, stretched where the image shrinks, weights
//! in fixed point, rows first, each pass rounded to 8 bits. Pillow 13 begins with the columns where
//! that is cheaper, for some tall images; published scores are older.

use image::{Rgb, RgbImage};

/// Fractional bits of a weight.
const BITS: u32 = 22;
/// Reach of the kernel in pixels of the larger image.
const REACH: f64 = 2.0;

/// The image at another size.
pub(super) fn resize(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let rows = if width == image.width() {
        image.clone()
    } else {
        let taps = taps(image.width(), width);
        RgbImage::from_fn(width, image.height(), |x, y| {
            taps[x as usize].sum(|at| image.get_pixel(at, y))
        })
    };
    if height == image.height() {
        return rows;
    }
    let taps = taps(image.height(), height);
    RgbImage::from_fn(width, height, |x, y| taps[y as usize].sum(|at| rows.get_pixel(x, at)))
}

/// Weights of one output pixel: those of input pixels `first`, `first + 1`, ….
struct Taps {
    first: u32,
    weights: Vec<i64>,
}

impl Taps {
    fn sum<'a>(&self, pixel: impl Fn(u32) -> &'a Rgb<u8>) -> Rgb<u8> {
        let mut sum = [1 << (BITS - 1); 3];
        for (at, weight) in (self.first..).zip(&self.weights) {
            for (sum, value) in sum.iter_mut().zip(pixel(at).0) {
                *sum += weight * i64::from(value);
            }
        }
        Rgb(sum.map(|sum: i64| (sum >> BITS).clamp(0, 255) as u8))
    }
}

fn taps(n_in: u32, n_out: u32) -> Vec<Taps> {
    let scale = f64::from(n_in) / f64::from(n_out);
    let stretch = scale.max(1.0);
    let reach = REACH * stretch;
    let of_pixel = |i: u32| {
        let centre = (f64::from(i) + 0.5) * scale;
        // Casts cut towards 0 and at 0, as the source does.
        let first = (centre - reach + 0.5) as u32;
        let end = ((centre + reach + 0.5) as u32).min(n_in);
        let weights: Vec<f64> =
            (first..end).map(|j| kernel((f64::from(j) - centre + 0.5) / stretch)).collect();
        let total: f64 = weights.iter().sum();
        let fixed = |weight: &f64| (weight / total * f64::from(1 << BITS)).round() as i64;
        Taps { first, weights: weights.iter().map(fixed).collect() }
    };
    (0..n_out).map(of_pixel).collect()
}

fn kernel(x: f64) -> f64 {
    let (x, a) = (x.abs(), -0.5);
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use flow::checkpoint::Weights;

    use super::*;

    #[test]
    fn bytes_are_those_of_pillow() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/networks");
        let expected = Weights::open_file(&fixtures.join("pillow.safetensors")).unwrap();
        assert_eq!(expected.names().count(), 5);
        for name in expected.names() {
            let [image, width, height] = name.split(' ').collect::<Vec<_>>()[..] else { panic!() };
            let image = image::open(fixtures.join(format!("{image}.png"))).unwrap().to_rgb8();
            let resized = resize(&image, width.parse().unwrap(), height.parse().unwrap());
            assert!(resized.as_raw()[..] == expected.get(name).unwrap().bytes[..], "{name}");
        }
    }
}
