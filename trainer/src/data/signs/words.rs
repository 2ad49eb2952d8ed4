//! What signs say: random strings, numbers, and real words, some of which are kept for tests.

use super::render::Colour;
use crate::data::splitmix::SplitMix64;

/// Real words that no training image and no training prompt shows.
pub const HELD_OUT: [&str; 30] = [
    "ANT", "BAG", "BOX", "BUS", "CAP", "CUP", "DOG", "EAR", "EGG", "FOX", "GYM", "HAT", "ICE",
    "JAM", "KEY", "LIP", "MAP", "NET", "OWL", "PIG", "RUN", "SKY", "TEN", "URN", "VAN", "WAX",
    "YES", "ZIP", "SEA", "FLY",
];

/// Real words that may be asked for while training.
pub const TRAINING: [&str; 100] = [
    "ACE", "AGE", "AIM", "AIR", "APE", "ARM", "ART", "ASH", "AXE", "BAR", "BAT", "BED", "BEE",
    "BIG", "BOW", "BOY", "BUG", "CAB", "CAR", "CAT", "COW", "CRY", "CUT", "DAY", "DEN", "DIG",
    "DRY", "EEL", "ELF", "ELM", "END", "EYE", "FAN", "FAR", "FIG", "FIN", "FIT", "FUN", "FUR",
    "GAP", "GAS", "GEM", "GUM", "HAM", "HEN", "HOP", "HOT", "HUT", "INK", "JAR", "JET", "JOB",
    "JOY", "KID", "KIT", "LAB", "LEG", "LID", "LOG", "LOW", "MAN", "MIX", "MUD", "MUG", "NEW",
    "NUT", "OAK", "OAR", "OIL", "OLD", "PAN", "PEA", "PEN", "PIE", "POT", "RAM", "RAT", "RED",
    "ROW", "RUG", "SAW", "SIX", "SUN", "TAX", "TEA", "TIE", "TOP", "TOY", "TUB", "USE", "VET",
    "WEB", "WET", "WIG", "WIN", "YAK", "YAM", "ZAP", "ZEN", "ZOO",
];

/// No zero: it looks like the letter O.
const DIGITS: &[u8] = b"123456789";
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// What is written on a sign, and in which ink.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sign {
    pub text: String,
    pub colour: Colour,
}

impl Sign {
    /// The sign's caption: the colour, then the text in double quotes.
    pub fn caption(&self) -> String {
        format!("{} \"{}\"", self.colour, self.text)
    }

    /// A random sign, never one of [`HELD_OUT`].
    ///
    /// `share_numbers` of the signs are numbers of two or three digits, `share_short` are strings
    /// of two letters, all others strings of three letters; every colour is equally likely.
    pub fn draw(rng: &mut SplitMix64, share_numbers: f64, share_short: f64) -> Self {
        let kind = rng.unit();
        let text = loop {
            let text = if kind < share_numbers {
                let digits = 2 + rng.below(2);
                string(rng, DIGITS, digits)
            } else if kind < share_numbers + share_short {
                string(rng, LETTERS, 2)
            } else {
                string(rng, LETTERS, 3)
            };
            if !HELD_OUT.contains(&text.as_str()) {
                break text;
            }
        };
        Self { text, colour: Colour::ALL[rng.below(Colour::ALL.len())] }
    }
}

/// The prompts kept for evaluation: every word of [`HELD_OUT`] in every colour, one a line.
pub fn held_out_prompts() -> String {
    let signs = HELD_OUT.iter().flat_map(|text| {
        Colour::ALL.map(|colour| Sign { text: (*text).to_owned(), colour }.caption())
    });
    lines(signs)
}

/// The prompts to align on, one a line: [`TRAINING`] once in a random colour each, and 500 different
/// signs drawn as the images are, in random order.
pub fn training_prompts() -> String {
    let mut rng = SplitMix64::new(2026);
    let mut signs: Vec<Sign> = TRAINING
        .iter()
        .map(|text| Sign { text: (*text).to_owned(), colour: Colour::ALL[rng.below(4)] })
        .collect();
    while signs.len() < TRAINING.len() + 500 {
        let sign = Sign::draw(&mut rng, super::SHARE_NUMBERS, super::SHARE_SHORT);
        if !signs.contains(&sign) {
            signs.push(sign);
        }
    }
    rng.shuffle(&mut signs);
    lines(signs.iter().map(Sign::caption))
}

fn string(rng: &mut SplitMix64, alphabet: &[u8], length: usize) -> String {
    (0..length).map(|_| char::from(alphabet[rng.below(alphabet.len())])).collect()
}

fn lines(captions: impl Iterator<Item = String>) -> String {
    captions.fold(String::new(), |text, caption| text + &caption + "\n")
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs, path::PathBuf};

    use super::*;
    use flow::prompts;

    fn shipped(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../assets/prompts").join(name)
    }

    /// Run with `UPDATE_PROMPTS=1` to write the files anew.
    #[test]
    fn shipped_prompt_files_are_what_the_lists_give() {
        for (name, expected) in
            [("signs-train.txt", training_prompts()), ("signs-held-out.txt", held_out_prompts())]
        {
            if std::env::var_os("UPDATE_PROMPTS").is_some() {
                fs::write(shipped(name), &expected).unwrap();
            }
            assert_eq!(fs::read_to_string(shipped(name)).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn held_out_words_appear_in_no_training_prompt() {
        let train = prompts::read(&shipped("signs-train.txt")).unwrap().prompts;
        let held_out = prompts::read(&shipped("signs-held-out.txt")).unwrap().prompts;
        assert_eq!((train.len(), held_out.len()), (600, 120));
        let kept: HashSet<&str> = held_out.iter().map(|p| p.target_text().unwrap()).collect();
        assert_eq!(kept, HELD_OUT.into_iter().collect());
        for prompt in &train {
            let text = prompt.target_text().unwrap();
            assert!(!kept.contains(text), "{text} is held out");
            assert!(prompt.colour_name().is_some());
        }
    }

    #[test]
    fn lists_hold_different_three_letter_words() {
        let all: HashSet<&str> = HELD_OUT.into_iter().chain(TRAINING).collect();
        assert_eq!(all.len(), HELD_OUT.len() + TRAINING.len());
        assert!(all.iter().all(|w| w.len() == 3 && w.bytes().all(|c| c.is_ascii_uppercase())));
    }

    #[test]
    fn drawn_signs_have_the_stated_shares_and_no_held_out_word() {
        let mut rng = SplitMix64::new(11);
        let signs: Vec<Sign> = (0..40_000).map(|_| Sign::draw(&mut rng, 0.2, 0.1)).collect();
        let share = |test: &dyn Fn(&Sign) -> bool| {
            signs.iter().filter(|sign| test(sign)).count() as f64 / signs.len() as f64
        };
        let number = |sign: &Sign| sign.text.bytes().all(|c| c.is_ascii_digit());
        assert!((share(&number) - 0.2).abs() < 0.01);
        assert!((share(&|sign| !number(sign) && sign.text.len() == 2) - 0.1).abs() < 0.01);
        assert!((share(&|sign| sign.colour == Colour::Black) - 0.25).abs() < 0.01);
        assert!(signs.iter().all(|sign| !HELD_OUT.contains(&sign.text.as_str())));
        assert!(signs.iter().all(|sign| !sign.text.contains('0')));
    }
}
