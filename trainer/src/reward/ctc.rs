//! Connectionist temporal classification (Graves et al. 2006): what frame-wise class
//! probabilities say about a text.
//!
//! A text is spelled by every frame-wise path that gives the text when runs of equal classes are
//! merged and blanks are dropped; its probability is the sum over those paths.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};

use super::text::normalised;

/// The classes of a recogniser: blank first, then the characters.
pub(super) struct Alphabet {
    /// Text of each class; empty for the blank.
    classes: Vec<String>,
    /// Classes that count as one when a text is scored, by their [`normalised`] text: the upper
    /// and lower case of a letter, and under the empty text the blank together with the spaces.
    merged: HashMap<String, Vec<usize>>,
}

/// Probabilities of every class in every frame, row-major [`n_frames`, `n_classes`].
#[derive(Clone, Copy)]
pub(super) struct Frames<'a> {
    pub(super) probabilities: &'a [f32],
    pub(super) n_classes: usize,
}

impl Frames<'_> {
    /// How many there are.
    pub(super) fn len(self) -> usize {
        self.probabilities.len() / self.n_classes
    }
}

/// A text that was read.
pub(super) struct Reading {
    pub(super) text: String,
    /// Mean probability of its characters, each in the first frame that shows it; 0 without any.
    pub(super) confidence: f64,
}

impl Alphabet {
    /// `characters` are the classes after the blank, in order.
    pub(super) fn new(characters: impl IntoIterator<Item = String>) -> Self {
        let classes: Vec<String> = std::iter::once(String::new()).chain(characters).collect();
        let mut merged: HashMap<String, Vec<usize>> = HashMap::new();
        for (class, text) in classes.iter().enumerate() {
            merged.entry(normalised(text)).or_default().push(class);
        }
        Self { classes, merged }
    }

    /// Number of classes, the blank included.
    pub(super) fn len(&self) -> usize {
        self.classes.len()
    }

    /// The classes of each character of `target`, [`normalised`].
    ///
    /// # Errors
    /// The target is empty, or has a character that the recogniser does not know.
    pub(super) fn spell(&self, target: &str) -> Result<Vec<&[usize]>> {
        let text = normalised(target);
        ensure!(!text.is_empty(), "the target text is empty");
        text.chars()
            .map(|c| {
                let classes = self.merged.get(c.encode_utf8(&mut [0; 4]) as &str);
                classes
                    .map(Vec::as_slice)
                    .with_context(|| format!("the OCR model does not know {c:?} of {target:?}"))
            })
            .collect()
    }

    /// Frames that a text takes at least: one a character and one more between two equal characters.
    ///
    /// # Errors
    /// As [`Alphabet::spell`].
    pub(super) fn frames_of(&self, target: &str) -> Result<usize> {
        let spelling = self.spell(target)?;
        let n_doubles = spelling.windows(2).filter(|pair| pair[0] == pair[1]).count();
        Ok(spelling.len() + n_doubles)
    }

    /// The most probable class of every frame, merged and without blanks.
    pub(super) fn read(&self, frames: Frames<'_>) -> Reading {
        let (mut text, mut previous) = (String::new(), 0);
        let (mut sum, mut n) = (0.0, 0.0);
        for frame in frames.probabilities.chunks_exact(frames.n_classes) {
            let best = (0..frame.len())
                .fold(0, |best, class| if frame[class] > frame[best] { class } else { best });
            if best != previous && best != 0 {
                text.push_str(&self.classes[best]);
                sum += f64::from(frame[best]);
                n += 1.0;
            }
            previous = best;
        }
        Reading { text, confidence: sum / f64::max(n, 1.0) }
    }

    /// ln p(`target`): the forward recursion of Graves et al. (2006, section 4.1) in log space,
    /// over merged classes (their probabilities added), so that neither case nor spaces matter.
    ///
    /// # Errors
    /// As [`Alphabet::spell`], or there are fewer frames than the target takes.
    pub(super) fn log_prob(&self, frames: Frames<'_>, target: &str) -> Result<f64> {
        let spelling = self.spell(target)?;
        let (n_frames, n_needed) = (frames.len(), self.frames_of(target)?);
        if n_frames < n_needed {
            bail!(
                "{target:?} takes {n_needed} OCR frames, the image gives {n_frames}: \
                 ask for a shorter text or wider images"
            );
        }
        let blank = self.merged[""].as_slice();
        // State 2k is the gap before character k, state 2k + 1 is character k. The recursion
        // starts in the first gap, before any frame.
        let n_states = 2 * spelling.len() + 1;
        let classes_of = |state: usize| if state % 2 == 1 { spelling[state / 2] } else { blank };
        let mut alpha = vec![f64::NEG_INFINITY; n_states];
        alpha[0] = 0.0;
        for frame in frames.probabilities.chunks_exact(frames.n_classes) {
            let before = alpha.clone();
            for state in 0..n_states {
                let mut paths = before[state];
                if state >= 1 {
                    paths = log_add(paths, before[state - 1]);
                }
                let after_character = state >= 3 && state % 2 == 1;
                if after_character && classes_of(state) != classes_of(state - 2) {
                    paths = log_add(paths, before[state - 2]);
                }
                let emission: f64 = classes_of(state).iter().map(|&c| f64::from(frame[c])).sum();
                alpha[state] = paths + emission.ln();
            }
        }
        Ok(log_add(alpha[n_states - 1], alpha[n_states - 2]))
    }
}

/// ln(eᵃ + eᵇ).
fn log_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use std::iter::repeat_n;

    use super::*;

    fn alphabet(characters: &[&str]) -> Alphabet {
        Alphabet::new(characters.iter().map(|&c| c.to_owned()))
    }

    /// Rows of positive numbers that sum to 1, different in every place.
    fn probabilities(n_frames: usize, n_classes: usize) -> Vec<f32> {
        let mut state = 12_345u32;
        let mut rows = Vec::new();
        for _ in 0..n_frames {
            let row: Vec<f32> = (0..n_classes)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    0.05 + (state >> 16) as f32 / 65_536.0
                })
                .collect();
            let sum: f32 = row.iter().sum();
            rows.extend(row.iter().map(|p| p / sum));
        }
        rows
    }

    /// Adds up every path that reads as `target`, folding classes first.
    fn brute_force(alphabet: &Alphabet, frames: Frames<'_>, target: &str) -> f64 {
        let n_frames = frames.probabilities.len() / frames.n_classes;
        let folded: Vec<String> = alphabet.classes.iter().map(|text| normalised(text)).collect();
        let mut sum = 0.0;
        for path in 0..frames.n_classes.pow(n_frames as u32) {
            let (mut rest, mut probability) = (path, 1.0);
            let (mut reading, mut previous) = (String::new(), "");
            for frame in frames.probabilities.chunks_exact(frames.n_classes) {
                let class = rest % frames.n_classes;
                rest /= frames.n_classes;
                probability *= f64::from(frame[class]);
                if folded[class] != previous {
                    reading.push_str(&folded[class]);
                }
                previous = &folded[class];
            }
            if reading == normalised(target) {
                sum += probability;
            }
        }
        sum
    }

    #[test]
    fn forward_recursion_equals_the_sum_over_all_paths() {
        let alphabet = alphabet(&["a", "b", "A", " "]);
        for n_frames in 1..=6 {
            let probabilities = probabilities(n_frames, alphabet.len());
            let frames = Frames { probabilities: &probabilities, n_classes: alphabet.len() };
            for target in ["a", "b", "ab", "ba", "AB", "aa", "aab", "bab", "abba", "a b"] {
                let expected = brute_force(&alphabet, frames, target);
                match alphabet.log_prob(frames, target) {
                    Ok(got) => {
                        let error = (got - expected.ln()).abs();
                        assert!(error < 1e-12, "{target} in {n_frames}: {got}, {expected}");
                    }
                    Err(_) => assert!(expected.abs() < 1e-12, "{target} in {n_frames}"),
                }
            }
        }
    }

    #[test]
    fn readings_merge_runs_and_keep_doubles_apart() {
        let alphabet = alphabet(&["o", "z", "Z", " "]);
        let read = |best: &[usize]| {
            let probabilities: Vec<f32> = best
                .iter()
                .flat_map(|&class| {
                    let mut row: Vec<f32> = repeat_n(0.1, 5).collect();
                    row[class] = 0.6;
                    row
                })
                .collect();
            let reading = alphabet.read(Frames { probabilities: &probabilities, n_classes: 5 });
            let likely = if reading.text.is_empty() { 0.0 } else { 0.6 };
            assert!((reading.confidence - likely).abs() < 1e-6);
            reading.text
        };
        assert_eq!(read(&[2, 2, 1, 0, 1, 1]), "zoo");
        assert_eq!(read(&[0, 3, 1, 1, 0, 0]), "Zo");
        assert_eq!(read(&[1, 4, 4, 2]), "o z");
        assert_eq!(read(&[0, 0]), "");
    }

    #[test]
    fn impossible_targets_are_errors_and_impossible_readings_are_not() {
        let alphabet = alphabet(&["a", "b"]);
        let sure_of_a = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0];
        let frames = Frames { probabilities: &sure_of_a, n_classes: 3 };
        assert!(alphabet.log_prob(frames, "A").unwrap().abs() < 1e-12);
        let never = alphabet.log_prob(frames, "b").unwrap();
        assert!(never.is_infinite() && never < 0.0);
        let error = |target| alphabet.log_prob(frames, target).unwrap_err().to_string();
        assert!(error("aa").contains("takes 3 OCR frames, the image gives 2"));
        assert!(error("ax").contains("does not know 'x'"));
        assert!(error(" ").contains("empty"));
    }
}
