//! The normal numbers that PyTorch draws on a CPU, to the bit.
//!
//! Mersenne Twister (MT19937) gives words. From 16 numbers on, sixteen words make eight pairs for
//! Box–Muller in f32, with logarithm and sine of the Cephes library as PyTorch's AVX2 code rounds
//! them; fewer numbers come one by one from Box–Muller in f64. A PyTorch that is told to use neither
//! AVX2 nor AVX-512 rounds otherwise.
//!
//! Source: `DistributionTemplates.h`, `avx_mathfun.h` and `CPUGeneratorImpl.cpp` of PyTorch 2.11.
#![expect(clippy::excessive_precision, reason = "constants as Cephes prints them")]

use std::f64::consts::TAU;

/// What `torch.randn(n, generator=torch.Generator().manual_seed(seed))` gives in f32; like PyTorch's,
/// the generator takes the low 32 bits of the seed.
pub fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut words = MersenneTwister::new(seed as u32);
    if n < BLOCK {
        return few(&mut words, n);
    }
    let mut values: Vec<f32> = (0..n).map(|_| words.unit()).collect();
    values.chunks_exact_mut(BLOCK).for_each(box_muller);
    if !n.is_multiple_of(BLOCK) {
        // The last numbers are drawn again, with some of those before them.
        let last = &mut values[n - BLOCK..];
        last.fill_with(|| words.unit());
        box_muller(last);
    }
    values
}

/// Uniform numbers that are turned into normal ones together.
const BLOCK: usize = 16;

/// Eight pairs, the second half of each in the second half of `values`.
fn box_muller(values: &mut [f32]) {
    let (first, second) = values.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let radius = (-2.0 * log(1.0 - *a)).sqrt();
        let (sin, cos) = sin_cos(TAU as f32 * *b);
        (*a, *b) = (radius * cos, radius * sin);
    }
}

fn few(words: &mut MersenneTwister, n: usize) -> Vec<f32> {
    let pairs = (0..n.div_ceil(2)).flat_map(|_| {
        let (u1, u2) = (words.unit_f64(), words.unit_f64());
        let (radius, angle) = ((-2.0 * libm::log1p(-u2)).sqrt(), TAU * u1);
        [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
    });
    let mut values: Vec<f32> = pairs.collect();
    values.truncate(n);
    values
}

/// Natural logarithm of a positive normal number. Source: `logf` of Cephes.
fn log(x: f32) -> f32 {
    const P: [f32; 9] = [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    const LN_2: [f32; 2] = [-2.12194440e-4, 0.693359375];
    let x = x.max(f32::MIN_POSITIVE);
    let bits = x.to_bits();
    let mut exponent = ((bits >> 23) as i32 - 126) as f32;
    let mantissa = f32::from_bits((bits & 0x807f_ffff) | 0.5f32.to_bits());
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let square = x * x;
    let y = polynomial(P, x) * x;
    let y = y.mul_add(square, exponent * LN_2[0]);
    exponent.mul_add(LN_2[1], x + (-0.5f32).mul_add(square, y))
}

const FOUR_OVER_PI: f32 = 4.0 * std::f32::consts::FRAC_1_PI;

/// Sine and cosine of an angle from 0 up. Source: `sinf` and `cosf` of Cephes.
fn sin_cos(angle: f32) -> (f32, f32) {
    const MINUS_QUARTER_PI: [f32; 3] =
        [-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8];
    const SIN: [f32; 3] = [-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1];
    const COS: [f32; 3] = [2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2];
    let octant = ((angle * FOUR_OVER_PI) as i32 + 1) & !1;
    let x = MINUS_QUARTER_PI.iter().fold(angle, |x, part| (octant as f32).mul_add(*part, x));
    let z = x * x;
    let cos = (polynomial(COS, z) * z).mul_add(z, -0.5 * z) + 1.0;
    let sin = (polynomial(SIN, z) * z).mul_add(x, x);
    let (sin, cos) = if octant & 2 == 0 { (sin, cos) } else { (cos, sin) };
    let sign = |negative: bool| if negative { -1.0 } else { 1.0 };
    (sign(octant & 4 != 0) * sin, sign(!(octant - 2) & 4 != 0) * cos)
}

/// Horner's rule, highest power first.
fn polynomial<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    coefficients.into_iter().reduce(|sum, next| sum.mul_add(x, next)).unwrap_or(0.0)
}

/// MT19937 (Matsumoto and Nishimura 1998).
struct MersenneTwister {
    state: [u32; Self::N],
    next: usize,
}

impl MersenneTwister {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let before = state[i - 1];
            state[i] =
                1_812_433_253u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: Self::N }
    }

    fn word(&mut self) -> u32 {
        if self.next == Self::N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let (high, low) = (self.state[i], self.state[(i + 1) % Self::N]);
            let y = (high & 0x8000_0000) | (low & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// From 0 to below 1 in steps of 2⁻²⁴.
    fn unit(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0
    }

    /// From 0 to below 1 in steps of 2⁻⁵³.
    fn unit_f64(&mut self) -> f64 {
        let word = (u64::from(self.word()) << 32) | u64::from(self.word());
        (word & ((1 << 53) - 1)) as f64 / 9_007_199_254_740_992.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a of the bytes.
    fn fingerprint(values: &[f32]) -> u64 {
        let bytes = values.iter().flat_map(|value| value.to_bits().to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Values of torch 2.11, by tests/fixtures/torch-normal/make.py.
    #[test]
    fn the_numbers_are_those_of_torch() {
        for line in include_str!("../../../tests/fixtures/torch-normal/case.txt").lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [seed, n, expected] = words[..] else { panic!("three words in {line:?}") };
            let values = normal(seed.parse().unwrap(), n.parse().unwrap());
            assert_eq!(format!("{:016x}", fingerprint(&values)), expected, "seed {seed}, {n}");
        }
    }

    /// The ten-thousandth word of the reference implementation's default seed.
    #[test]
    fn the_twister_gives_its_published_word() {
        let mut words = MersenneTwister::new(5489);
        let last = (0..10_000).map(|_| words.word()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
