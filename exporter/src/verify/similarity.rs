//! How near two pictures are to each other.

use flow::picture::Picture;

/// Peak signal-to-noise ratio in dB, 10·log10(255² / mean squared difference); infinite where nothing differs.
///
/// # Panics
/// When sizes differ.
pub fn psnr(a: &Picture, b: &Picture) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height), "sizes differ");
    let squared = |(&a, &b): (&u8, &u8)| (f64::from(a) - f64::from(b)).powi(2);
    let mean = a.rgb.iter().zip(&b.rgb).map(squared).sum::<f64>() / a.rgb.len() as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}

/// Gradient magnitude similarity deviation: how unevenly edges were lost, 0 where nothing differs, about 0.35
/// at worst.
///
/// Luminance is halved in size by the mean of four pixels; g is the length of the gradient by Prewitt's filters,
/// zeros around the picture; the deviation is that of (2·g_a·g_b + 170) / (g_a² + g_b² + 170).
///
/// Source: Xue, Zhang, Mou, Bovik, "Gradient Magnitude Similarity Deviation: A Highly Efficient Perceptual Image
/// Quality Index", IEEE Transactions on Image Processing 23 (2014), equations 1 to 6.
///
/// # Panics
/// When sizes differ.
pub fn gmsd(a: &Picture, b: &Picture) -> f64 {
    const T: f64 = 170.0;
    assert_eq!((a.width, a.height), (b.width, b.height), "sizes differ");
    let [of_a, of_b] = [a, b].map(gradients);
    let similar: Vec<f64> =
        of_a.iter().zip(&of_b).map(|(a, b)| (2.0 * a * b + T) / (a * a + b * b + T)).collect();
    let n = similar.len().max(1) as f64;
    let mean = similar.iter().sum::<f64>() / n;
    (similar.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt()
}

/// Luminance of ITU-R BT.601, 0 to 255.
fn luminance(picture: &Picture) -> Vec<f64> {
    let weigh =
        |p: &[u8]| 0.299 * f64::from(p[0]) + 0.587 * f64::from(p[1]) + 0.114 * f64::from(p[2]);
    picture.rgb.chunks_exact(3).map(weigh).collect()
}

fn gradients(picture: &Picture) -> Vec<f64> {
    let (width, full) = (picture.width / 2, luminance(picture));
    let height = picture.height / 2;
    let half = |x: usize, y: usize| {
        let at = 2 * y * picture.width + 2 * x;
        [0, 1, picture.width, picture.width + 1].map(|by| full[at + by]).iter().sum::<f64>() / 4.0
    };
    let small: Vec<f64> = (0..width * height).map(|at| half(at % width, at / width)).collect();
    let at = |x: isize, y: isize| {
        let is_inside = x >= 0 && y >= 0 && x < width as isize && y < height as isize;
        if is_inside { small[y as usize * width + x as usize] } else { 0.0 }
    };
    let length = |x: isize, y: isize| {
        let across: f64 = [-1, 0, 1].map(|d| at(x - 1, y + d) - at(x + 1, y + d)).iter().sum();
        let down: f64 = [-1, 0, 1].map(|d| at(x + d, y - 1) - at(x + d, y + 1)).iter().sum();
        (across / 3.0).hypot(down / 3.0)
    };
    (0..(width * height) as isize).map(|i| length(i % width as isize, i / width as isize)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of waves, and the same with `noise` steps of a fixed pattern added.
    fn waves(noise: i32) -> Picture {
        let (width, height) = (24, 20);
        let value = |i: i32| {
            let (x, y, channel) = (i / 3 % 24, i / 3 / 24, i % 3);
            let wave = (x * (3 + channel) + y * 7) % 97 + 60 + x * y / 4;
            (wave + noise * ((i * 7919) % 13 - 6)).clamp(0, 255) as u8
        };
        Picture { width, height, rgb: (0..(width * height * 3) as i32).map(value).collect() }
    }

    /// The right values are those of `tests/fixtures/similarity/make.py`: numpy, by the paper.
    #[test]
    fn distances_are_those_of_the_paper() {
        let values = include_str!("../../../tests/fixtures/similarity/values.json");
        let values: Vec<[f64; 3]> = serde_json::from_str(values).unwrap();
        assert_eq!(values.len(), 4);
        for [noise, expected_psnr, expected_gmsd] in values {
            let (clean, noisy) = (waves(0), waves(noise as i32));
            let found = [psnr(&clean, &noisy), gmsd(&clean, &noisy)];
            assert!((found[0] - expected_psnr).abs() < 1e-9, "{noise}: {found:?}");
            assert!((found[1] - expected_gmsd).abs() < 1e-12, "{noise}: {found:?}");
        }
    }

    #[test]
    fn what_is_the_same_is_at_no_distance() {
        assert_eq!(psnr(&waves(1), &waves(1)), f64::INFINITY);
        assert_eq!(gmsd(&waves(1), &waves(1)), 0.0);
    }
}
