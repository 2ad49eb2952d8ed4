//! One JSON object a line on stderr for every request and every job.

use std::{
    io::{Write, stderr},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

/// Where events go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Log {
    /// Nothing is written; for tests.
    pub silent: bool,
    /// Prompts are written with their jobs.
    pub prompts: bool,
}

impl Log {
    /// Writes `event` with `fields`, an object.
    pub fn event(self, event: &str, fields: Value) {
        if self.silent {
            return;
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = Map::new();
        line.insert("time".into(), (time.as_millis() as f64 / 1e3).into());
        line.insert("event".into(), event.into());
        if let Value::Object(fields) = fields {
            line.extend(fields);
        }
        // A log that cannot be written must not stop the service.
        let _ = writeln!(stderr(), "{}", Value::Object(line));
    }
}
