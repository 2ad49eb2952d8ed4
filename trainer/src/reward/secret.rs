//! A key that must not be seen: it goes to its server and nowhere else.

use std::fmt;

use anyhow::{Result, ensure};
use serde_json::Value;

/// What stands in its place.
const HIDDEN: &str = "[key]";

/// The key of an endpoint.
pub(super) struct Key(String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HIDDEN)
    }
}

impl Key {
    /// The key that the environment's `variable` holds.
    ///
    /// # Errors
    /// When it holds none, or one that no header can carry.
    pub(super) fn from_variable(variable: &str) -> Result<Self> {
        let key = std::env::var(variable).unwrap_or_default();
        ensure!(!key.is_empty(), "`api_key_env` names {variable}, which is not set");
        let is_plain = key.bytes().all(|byte| byte.is_ascii_graphic());
        ensure!(is_plain, "the key in {variable} holds spaces or other than ASCII characters");
        Ok(Self(key))
    }

    /// The key itself, for a request.
    pub(super) fn exposed(&self) -> &str {
        &self.0
    }

    /// `text` with the key hidden wherever it stands.
    pub(super) fn hide(&self, text: &str) -> String {
        text.replace(&self.0, HIDDEN)
    }

    /// Hides the key in every text of `value`.
    pub(super) fn hide_in(&self, value: &mut Value) {
        match value {
            Value::String(text) if text.contains(&self.0) => *text = self.hide(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.hide_in(value)),
            Value::Object(fields) => fields.values_mut().for_each(|value| self.hide_in(value)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_is_hidden_wherever_it_stands() {
        let key = Key("sk-1/2".into());
        assert_eq!(key.hide("no sk-1/2, no sk-1/2!"), "no [key], no [key]!");
        assert_eq!(format!("{key:?}"), "[key]");
        // A slash may be escaped, so that the text of the answer does not hold the key as it is.
        let mut value = serde_json::from_str(r#"{"error": [{"message": "bad sk-1\/2"}]}"#).unwrap();
        key.hide_in(&mut value);
        assert_eq!(value, json!({"error": [{"message": "bad [key]"}]}));
    }
}
