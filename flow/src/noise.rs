//! Seeded noise that any program, machine, batch size or thread count reproduces to the bit.
//!
//! A counter-based generator: element i of stream s under a seed is a function of (seed, s, i) alone.
//! Philox 4×32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives four
//! words a counter; Box–Muller in f64 with a portable mathematics library turns them into four normals.

pub mod torch;

/// A family of independent noise streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    key: [u32; 2],
}

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Noise {
    /// The family of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// The first `n` standard normals of `stream`.
    pub fn normal(self, stream: u64, n: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(n.next_multiple_of(4));
        for block in 0..n.div_ceil(4) as u64 {
            let [a, b, c, d] = self.words(stream, block);
            values.extend(box_muller(a, b));
            values.extend(box_muller(c, d));
        }
        values.truncate(n);
        values
    }

    /// The first `n` numbers of `stream`, uniform in (0, 1).
    pub fn uniform(self, stream: u64, n: usize) -> Vec<f64> {
        let blocks = 0..n.div_ceil(4) as u64;
        let mut values: Vec<f64> =
            blocks.flat_map(|block| self.words(stream, block).map(open_unit)).collect();
        values.truncate(n);
        values
    }

    /// The first `k` entries of a random permutation of 0…n−1 drawn from `stream` (Fisher–Yates).
    pub fn choose(self, stream: u64, n: usize, k: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for (i, u) in self.uniform(stream, k.min(n)).into_iter().enumerate() {
            let j = i + (u * (n - i) as f64) as usize;
            order.swap(i, j.min(n - 1));
        }
        order.truncate(k);
        order
    }

    fn words(self, stream: u64, block: u64) -> [u32; 4] {
        let mut counter =
            [block as u32, (block >> 32) as u32, stream as u32, (stream >> 32) as u32];
        let mut key = self.key;
        for _ in 0..ROUNDS {
            let left = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
            let right = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
            counter = [
                (right >> 32) as u32 ^ counter[1] ^ key[0],
                right as u32,
                (left >> 32) as u32 ^ counter[3] ^ key[1],
                left as u32,
            ];
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        counter
    }
}

fn open_unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / 4_294_967_296.0
}

fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let radius = (-2.0 * libm::log(open_unit(a))).sqrt();
    let angle = std::f64::consts::TAU * open_unit(b);
    [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution for philox4x32-10.
    #[test]
    fn philox_gives_its_published_words() {
        let words = Noise { key: [0, 0] }.words(0, 0);
        assert_eq!(words, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let words = Noise { key: [u32::MAX; 2] }.words(u64::MAX, u64::MAX);
        assert_eq!(words, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn a_longer_draw_begins_with_the_shorter() {
        let noise = Noise::new(7);
        assert_eq!(noise.normal(3, 101)[..50], noise.normal(3, 50)[..]);
        assert_ne!(noise.normal(3, 8), noise.normal(4, 8));
        assert_ne!(noise.normal(3, 8), Noise::new(8).normal(3, 8));
    }

    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let x = Noise::new(1).normal(0, 200_000);
        let moment = |k: i32| x.iter().map(|&v| f64::from(v).powi(k)).sum::<f64>() / x.len() as f64;
        assert!(moment(1).abs() < 0.01);
        assert!((moment(2) - 1.0).abs() < 0.01);
        assert!(moment(3).abs() < 0.03);
        assert!((moment(4) - 3.0).abs() < 0.06);
    }

    #[test]
    fn choose_draws_each_index_once_and_all_alike() {
        let mut counts = [0usize; 6];
        for stream in 0..6000 {
            let mut drawn = Noise::new(5).choose(stream, 6, 3);
            for &index in &drawn {
                counts[index] += 1;
            }
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), 3);
        }
        assert!(counts.iter().all(|&n| (2800..3200).contains(&n)), "{counts:?}");
    }
}
