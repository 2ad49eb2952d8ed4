//! Parameters in the text form of AUTOMATIC1111's web UI, which most programs of this field write.

/// A text taken apart: the prompt, what was not wanted, and the last line's `Name: value` fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Infotext {
    pub prompt: String,
    pub negative: String,
    /// In the text's order; a value in quotes is read as the JSON string it is.
    pub fields: Vec<(String, String)>,
}

const NEGATIVE: &str = "Negative prompt:";
/// A last line with fewer fields belongs to the prompt.
const MIN_FIELDS: usize = 3;

impl Infotext {
    /// Takes `text` apart. Any text is a prompt at least.
    pub fn parse(text: &str) -> Self {
        let text = text.trim();
        let (head, last) = text.rsplit_once('\n').unwrap_or(("", text));
        let fields = fields(last);
        let (head, fields) =
            if fields.len() < MIN_FIELDS { (text, Vec::new()) } else { (head, fields) };
        let (prompt, negative) = match head.find(NEGATIVE) {
            Some(at) if at == 0 || head[..at].ends_with('\n') => {
                (&head[..at], &head[at + NEGATIVE.len()..])
            }
            _ => (head, ""),
        };
        Self { prompt: prompt.trim().into(), negative: negative.trim().into(), fields }
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// `Name: value, Name: "quoted, value", …`.
fn fields(line: &str) -> Vec<(String, String)> {
    let (mut found, mut rest) = (Vec::new(), line);
    while let Some((name, after)) = rest.split_once(':') {
        let name = name.trim_start_matches(',').trim();
        let after = after.trim_start();
        let (value, after) = match quoted(after) {
            Some((value, after)) => (value, after),
            None => after.split_once(',').map_or_else(
                || (after.trim().to_owned(), ""),
                |(value, after)| (value.trim().to_owned(), after),
            ),
        };
        found.push((name.to_owned(), value));
        rest = after.trim_start_matches([',', ' ']);
    }
    found
}

/// A JSON string at the start of `text`, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    text.starts_with('"').then_some(())?;
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let value = values.next()?.ok()?;
    Some((value, &text[values.byte_offset()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_comes_apart() {
        let text = "a fox, red: yes\nsecond\nNegative prompt: blur\nSteps: 20, Sampler: DPM++ 2M, \
                    Model: \"flux, mine: v2\", Seed: 9";
        let found = Infotext::parse(text);
        assert_eq!((&*found.prompt, &*found.negative), ("a fox, red: yes\nsecond", "blur"));
        assert_eq!(found.get("Model"), Some("flux, mine: v2"));
        assert_eq!((found.get("Seed"), found.fields.len()), (Some("9"), 4));
    }

    #[test]
    fn a_line_with_few_fields_is_prompt() {
        let found = Infotext::parse("a sign: open, door: shut");
        assert_eq!(found.prompt, "a sign: open, door: shut");
        assert!(found.fields.is_empty());
        assert_eq!(Infotext::parse(""), Infotext::default());
    }
}
