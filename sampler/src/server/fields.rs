//! A JSON object taken apart field by field, so that every refusal names its field and nothing is
//! left unread.

use std::ops::RangeInclusive;

use axum::http::StatusCode;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use super::refusal::Refusal;

type Result<T> = std::result::Result<T, Refusal>;

const INVALID_TYPE: &str = "invalid_type";
const INVALID_VALUE: &str = "invalid_value";

/// The fields not yet taken; a `null` counts as absent.
#[derive(Debug)]
pub struct Fields {
    /// Path of the object in the body, as `lora.`.
    place: String,
    values: Vec<(String, Value)>,
}

impl Fields {
    /// Of a body that is one JSON object.
    ///
    /// # Errors
    /// When it is anything else, is nested too deep, names a field twice or holds a number beyond f64.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let object: Object = serde_json::from_slice(body).map_err(|error| {
            let message = format!("the body is not one JSON object: {error}");
            Refusal::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })?;
        Ok(Self { place: String::new(), values: object.0 })
    }

    /// The value of `name`, out of the fields.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        let index = self.values.iter().position(|(known, _)| known == name)?;
        Some(self.values.swap_remove(index).1).filter(|value| !value.is_null())
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(name, "a string", &other)),
        }
    }

    pub fn flag(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong_type(name, "true or false", &other)),
        }
    }

    pub fn integer(&mut self, name: &str, range: RangeInclusive<i128>) -> Result<Option<i128>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        let number = value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from));
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(number) => {
                Err(self.invalid(name, &format!("{number} is not from {low} to {high}")))
            }
            None => Err(self.wrong_type(name, &format!("an integer from {low} to {high}"), &value)),
        }
    }

    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(number) => {
                Err(self.invalid(name, &format!("{number} is not from {low} to {high}")))
            }
            None => Err(self.wrong_type(name, &format!("a number from {low} to {high}"), &value)),
        }
    }

    /// One of `names`.
    pub fn choice(
        &mut self,
        name: &str,
        names: &'static [&'static str],
    ) -> Result<Option<&'static str>> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        match names.iter().find(|known| **known == text) {
            Some(known) => Ok(Some(known)),
            None => {
                Err(self.invalid(name, &format!("{text:?} is not one of {}", names.join(", "))))
            }
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Self>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                place: format!("{}{name}.", self.place),
                values: map.into_iter().collect(),
            })),
            Some(other) => Err(self.wrong_type(name, "an object", &other)),
        }
    }

    /// A refusal of field `name` for its value.
    pub fn invalid(&self, name: &str, why: &str) -> Refusal {
        let path = format!("{}{name}", self.place);
        Refusal::field(&path, INVALID_VALUE, format!("{path}: {why}"))
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// Names the first field that is.
    pub fn finish(self) -> Result<()> {
        match self.values.first() {
            None => Ok(()),
            Some((name, _)) => {
                let path = format!("{}{name}", self.place);
                let message = format!("unknown parameter {path:?}; leave it out");
                Err(Refusal::field(&path, "unknown_parameter", message))
            }
        }
    }

    fn wrong_type(&self, name: &str, wanted: &str, found: &Value) -> Refusal {
        let path = format!("{}{name}", self.place);
        let found = match found {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "another number",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        let message = format!("{path} takes {wanted}, not {found}");
        Refusal::field(&path, INVALID_TYPE, message)
    }
}

/// An object whose names are all different.
struct Object(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Unique;
        impl<'de> Visitor<'de> for Unique {
            type Value = Object;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Object, A::Error> {
                let mut values: Vec<(String, Value)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if values.len() == MAX_FIELDS {
                        let message = format!("more than {MAX_FIELDS} fields");
                        return Err(serde::de::Error::custom(message));
                    }
                    if values.iter().any(|(known, _)| *known == name) {
                        return Err(serde::de::Error::custom(format!("field {name:?} twice")));
                    }
                    values.push((name, value));
                }
                Ok(Object(values))
            }
        }
        deserializer.deserialize_map(Unique)
    }
}

/// More than any API here has.
const MAX_FIELDS: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> Refusal {
        Fields::parse(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_body_is_one_plain_object() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
        for (body, part) in [
            ("", "EOF"),
            ("[]", "expected an object"),
            ("{\"a\":1,\"a\":2}", "field \"a\" twice"),
            ("{\"a\":NaN}", "expected"),
            ("{\"a\":1e999}", "number out of range"),
            ("{\"a\":1} x", "trailing"),
            (&deep, "recursion limit"),
        ] {
            let refusal = refused(body);
            assert!(refusal.message.contains(part), "{body:.40}: {}", refusal.message);
            assert_eq!(refusal.code, Some("invalid_json"));
        }
        let many: Vec<String> = (0..=MAX_FIELDS).map(|i| format!("\"f{i}\":0")).collect();
        assert!(refused(&format!("{{{}}}", many.join(","))).message.contains("more than 200"));
    }

    #[test]
    fn every_refusal_names_its_field() {
        let mut fields = Fields::parse(
            br#"{"n": 11, "s": 4, "g": "x", "lora": {"scale": true, "z": 1}, "u": null}"#,
        )
        .unwrap();
        let refusal = fields.integer("n", 1..=10).unwrap_err();
        assert_eq!(refusal.message, "n: 11 is not from 1 to 10");
        assert_eq!(refusal.param.as_deref(), Some("n"));
        assert!(fields.text("s").unwrap_err().message.contains("s takes a string"));
        assert!(fields.choice("g", &["a", "b"]).unwrap_err().message.contains("one of a, b"));
        let mut lora = fields.object("lora").unwrap().unwrap();
        let refusal = lora.number("scale", 0.0..=1.0).unwrap_err();
        assert_eq!(refusal.param.as_deref(), Some("lora.scale"));
        assert_eq!(lora.finish().unwrap_err().param.as_deref(), Some("lora.z"));
        assert_eq!(fields.text("u").unwrap(), None);
        fields.finish().unwrap();
    }
}
