//! Comparing a reading with the text that was asked for.

/// Lower-case, without white space: the form in which readings and targets are compared.
pub(super) fn normalised(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace()).flat_map(char::to_lowercase).collect()
}

/// Whether `reading` is `target`, both [`normalised`].
pub fn exact(reading: &str, target: &str) -> bool {
    normalised(reading) == normalised(target)
}

/// 1 − min(d, n)/n with the edit distance d between the [`normalised`] texts and the target's
/// length n; 1 if the reading contains the target. The text reward of Flow-GRPO, `ocr.py`.
///
/// In 0 to 1. An empty target is contained in everything.
pub fn similarity(reading: &str, target: &str) -> f64 {
    let (reading, target) = (normalised(reading), normalised(target));
    if reading.contains(&target) {
        return 1.0;
    }
    let len = target.chars().count();
    1.0 - levenshtein(&reading, &target).min(len) as f64 / len as f64
}

/// Fewest insertions, deletions and substitutions of characters that turn `a` into `b`.
fn levenshtein(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        let cases = [
            ("", "", 0),
            ("abc", "abc", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("flaw", "lawn", 2),
            ("sunday", "saturday", 3),
            ("ab", "ba", 2),
            ("über", "uber", 1),
        ];
        for (a, b, distance) in cases {
            assert_eq!(levenshtein(a, b), distance, "{a} to {b}");
            assert_eq!(levenshtein(b, a), distance, "{b} to {a}");
        }
    }

    #[test]
    fn similarities() {
        let cases = [
            ("SUN", "sun", 1.0),
            ("s u n", "sun", 1.0),
            ("the sun!", "sun", 1.0),
            ("sin", "sun", 2.0 / 3.0),
            ("", "sun", 0.0),
            ("a long wrong reading", "sun", 0.0),
        ];
        for (reading, target, expected) in cases {
            let got = similarity(reading, target);
            assert!((got - expected).abs() < 1e-12, "{reading} for {target}: {got}");
        }
    }

    #[test]
    fn exactness_ignores_case_and_spaces_only() {
        assert!(exact(" Ca t", "cAT"));
        assert!(!exact("cat.", "cat"));
        assert!(!exact("ca", "cat"));
    }
}
