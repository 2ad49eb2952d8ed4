//! What a run reports: one line of JSON a step, and the same for `TensorBoard`.

mod events;

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use image::RgbImage;
use serde::{Deserialize, Serializer};
use serde_json::Value;

use self::events::Events;
use flow::checkpoint::{read_bounded, write_atomically};
use flow::log;

/// The file of JSON lines in a run's folder.
pub const FILE: &str = "metrics.jsonl";
/// The same of its validations.
pub const VALIDATION: &str = "validation.jsonl";

/// Writes a run's metrics; every step is on disk when [`Metrics::write`] returns.
#[derive(Debug)]
pub struct Metrics {
    lines: Lines,
    validations: Lines,
    events: Events,
    start: Instant,
    /// Seconds that earlier parts of a resumed run took.
    wall_before: f64,
}

/// A file that grows by lines; it is there from the first on.
#[derive(Debug)]
struct Lines {
    file: Option<File>,
    path: PathBuf,
}

impl Lines {
    fn append(&mut self, line: &[u8]) -> Result<()> {
        if self.file.is_some() && !self.path.exists() {
            log::warn(&format!("{} is gone: it begins anew", self.path.display()));
            self.file = None;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(opened(&self.path)?),
        };
        file.write_all(line).with_context(|| format!("writing {}", self.path.display()))
    }

    fn sync(&self) -> Result<()> {
        let synced = self.file.iter().try_for_each(File::sync_data);
        synced.with_context(|| format!("writing {}", self.path.display()))
    }
}

/// One line of the metrics file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Record {
    pub step: u64,
    /// Seconds since the run began, to the millisecond, without the pauses between its parts.
    pub wall: f64,
    /// By name; `None` is a value that was not finite.
    #[serde(flatten)]
    pub values: BTreeMap<String, Option<f64>>,
}

impl Metrics {
    /// Starts the metrics of a new run in `dir`, replacing those of an earlier run there.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        write_atomically(&dir.join(FILE), b"")?;
        if dir.join(VALIDATION).exists() {
            write_atomically(&dir.join(VALIDATION), b"")?;
        }
        Self::open(dir, 0, 0.0)
    }

    /// Continues the metrics of a run whose last kept step is `step`.
    ///
    /// What later steps had written is dropped, also a line that a crash cut short. Lines that are damaged
    /// or missing are said and gone: a run never depends on what it only shows.
    pub fn resume(dir: &Path, step: u64) -> Result<Self> {
        let path = dir.join(FILE);
        let (kept, n_kept, wall_before) = up_to(&path, step);
        if n_kept < step {
            log::warn(&format!(
                "{}: {} of the first {step} iterations are missing; it goes on without them",
                path.display(),
                step - n_kept
            ));
        }
        write_atomically(&path, kept.as_bytes())?;
        let validations = dir.join(VALIDATION);
        if validations.exists() {
            write_atomically(&validations, up_to(&validations, step).0.as_bytes())?;
        }
        Self::open(dir, step + 1, wall_before)
    }

    /// Lets so much of the time that has passed count for nothing.
    pub(crate) fn leave_out(&mut self, seconds: f64) {
        self.start += Duration::try_from_secs_f64(seconds).unwrap_or_default();
    }

    /// Seconds of the run so far.
    pub fn wall(&self) -> f64 {
        self.wall_before + self.start.elapsed().as_secs_f64()
    }

    /// Appends the values of one step under their names.
    ///
    /// # Errors
    /// When a name is taken (`step`, `wall`) or given twice, or a file cannot be written.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let line = self.line(step, values)?;
        self.lines.append(&line)?;
        self.events.scalars(step, values)
    }

    /// The same of a validation after `step` steps. One that a part of the run made before its end, and that comes
    /// again since no checkpoint knows of it, takes the place of the first.
    ///
    /// # Errors
    /// As [`Metrics::write`].
    pub fn write_validation(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let line = self.line(step, values)?;
        let path = &self.validations.path;
        if let Some(before) = step.checked_sub(1).filter(|_| self.validations.file.is_none())
            && path.exists()
        {
            write_atomically(path, up_to(path, before).0.as_bytes())?;
        }
        self.validations.append(&line)?;
        self.events.scalars(step, values)
    }

    fn line(&self, step: u64, values: &[(&str, f64)]) -> Result<Vec<u8>> {
        for (index, (name, _)) in values.iter().enumerate() {
            ensure!(!matches!(*name, "step" | "wall"), "`{name}` cannot name a metric");
            let twice = values[..index].iter().any(|(earlier, _)| earlier == name);
            ensure!(!twice, "metric `{name}` was given twice for step {step}");
        }
        let wall = (self.wall() * 1000.0).round() / 1000.0;
        let head = [("step", Value::from(step)), ("wall", Value::from(wall))];
        // JSON has no NaN and no infinity: such a value becomes null.
        let fields = values.iter().map(|&(name, value)| (name, Value::from(value)));
        let mut line = Vec::new();
        serde_json::Serializer::new(&mut line).collect_map(head.into_iter().chain(fields))?;
        line.push(b'\n');
        Ok(line)
    }

    /// Brings what was written to disk.
    pub fn sync(&self) -> Result<()> {
        self.lines.sync()?;
        self.validations.sync()
    }

    /// Shows a text in `TensorBoard`, as Markdown.
    pub fn text(&mut self, step: u64, name: &str, text: &str) -> Result<()> {
        self.events.text(step, name, text)
    }

    /// Shows a picture in `TensorBoard`.
    pub fn image(&mut self, step: u64, name: &str, image: &RgbImage) -> Result<()> {
        self.events.image(step, name, image)
    }

    fn open(dir: &Path, first_step: u64, wall_before: f64) -> Result<Self> {
        let path = dir.join(FILE);
        let lines = Lines { file: Some(opened(&path)?), path };
        let validations = Lines { file: None, path: dir.join(VALIDATION) };
        let events = Events::create(dir, first_step)?;
        Ok(Self { lines, validations, events, start: Instant::now(), wall_before })
    }
}

/// Whole lines of the file at `path` up to `step`, how many, and the seconds up to the last; damaged ones are left
/// out.
fn up_to(path: &Path, step: u64) -> (String, u64, f64) {
    let bytes = read_bounded(path).unwrap_or_default();
    let content = String::from_utf8_lossy(&bytes);
    let whole = content.rfind('\n').map_or("", |end| &content[..=end]);
    let (mut kept, mut n_kept, mut wall) = (String::new(), 0, 0.0);
    for line in whole.lines() {
        let Ok(record) = serde_json::from_str::<Record>(line) else { continue };
        if record.step <= step {
            kept += line;
            kept.push('\n');
            (n_kept, wall) = (n_kept + 1, record.wall);
        }
    }
    (kept, n_kept, wall)
}

fn opened(path: &Path) -> Result<File> {
    let file = OpenOptions::new().append(true).create(true).open(path);
    file.with_context(|| format!("opening {}", path.display()))
}

/// The records of a metrics file, in order.
///
/// # Errors
/// When the file cannot be read or a line is not a record; names the file and the line.
pub fn read_jsonl(path: &Path) -> Result<Vec<Record>> {
    let content = read_text(path)?;
    Ok(records(path, &content)?.into_iter().map(|(_, record)| record).collect())
}

/// The finite values of one metric as (step, value), for a plot.
pub fn series(records: &[Record], name: &str) -> Vec<(f64, f64)> {
    let values = records.iter().filter_map(|r| Some((r.step, r.values.get(name).copied()??)));
    values.map(|(step, value)| (step as f64, value)).collect()
}

fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_bounded(path)?);
    text.with_context(|| format!("reading {}", path.display()))
}

fn records<'a>(path: &Path, content: &'a str) -> Result<Vec<(&'a str, Record)>> {
    let lines = content.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| match serde_json::from_str(line) {
            Ok(record) => Ok((line, record)),
            Err(error) => bail!("{}, line {}: not a metric: {error}", path.display(), index + 1),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_is_one_line_with_step_and_seconds_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        metrics.write(1, &[("reward", 0.5), ("loss", f64::NAN)]).unwrap();
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(text.starts_with("{\"step\":1,\"wall\":0.") && text.ends_with("\"loss\":null}\n"));
        metrics.write(2, &[("reward", 0.1 + 0.2), ("loss", -1e-300)]).unwrap();
        let records = read_jsonl(&dir.path().join(FILE)).unwrap();
        assert_eq!(series(&records, "reward"), [(1.0, 0.5), (2.0, 0.1 + 0.2)]);
        assert_eq!(series(&records, "loss"), [(2.0, -1e-300)]);
        assert!(records[1].wall >= records[0].wall);
        assert!(series(&records, "absent").is_empty());
    }

    #[test]
    fn resuming_drops_later_steps_and_a_torn_line_and_goes_on_counting_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        drop(Metrics::create(dir.path()).unwrap());
        let kept = "{\"step\":1,\"wall\":10.5,\"a\":1.0}\n{\"step\":2,\"wall\":20.5,\"a\":2.0}\n";
        fs::write(&path, format!("{kept}{{\"step\":3,\"wall\":30.5}}\n{{\"step\":4,\"wa")).unwrap();
        let mut metrics = Metrics::resume(dir.path(), 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), kept);
        assert!((20.5..21.5).contains(&metrics.wall()));
        metrics.write(3, &[("a", 3.5)]).unwrap();
        let records = read_jsonl(&path).unwrap();
        assert_eq!(series(&records, "a"), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.5)]);
        let event_files = fs::read_dir(dir.path()).unwrap().count() - 1;
        assert_eq!(event_files, 2, "a resumed run continues in an event file of its own");
    }

    #[test]
    fn a_validation_that_comes_again_takes_the_place_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::create(dir.path()).unwrap();
        metrics.write_validation(0, &[("a", 0.0)]).unwrap();
        metrics.write_validation(5, &[("a", 5.0)]).unwrap();
        for (step, value) in [(5, 5.5), (10, 10.0)] {
            let mut again = Metrics::resume(dir.path(), 7).unwrap();
            again.write_validation(step, &[("a", value)]).unwrap();
        }
        let records = read_jsonl(&dir.path().join(VALIDATION)).unwrap();
        assert_eq!(series(&records, "a"), [(0.0, 0.0), (5.0, 5.5), (10.0, 10.0)]);
    }

    #[test]
    fn a_run_goes_on_without_metrics_that_are_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let damaged =
            b"{\"step\":1,\"wall\":1.0,\"a\":1.0}\n{\"step\":2,\xff\n{\"step\":3,\"wall\":3.0}\n";
        fs::write(&path, damaged).unwrap();
        let mut metrics = Metrics::resume(dir.path(), 3).unwrap();
        assert_eq!(read_jsonl(&path).unwrap().len(), 2);
        fs::remove_file(&path).unwrap();
        metrics.write(4, &[("a", 4.0)]).unwrap();
        assert_eq!(series(&read_jsonl(&path).unwrap(), "a"), [(4.0, 4.0)]);
        fs::remove_file(&path).unwrap();
        Metrics::resume(dir.path(), 4).unwrap().write(5, &[("a", 5.0)]).unwrap();
        assert_eq!(series(&read_jsonl(&path).unwrap(), "a"), [(5.0, 5.0)]);
    }

    #[test]
    fn a_damaged_line_and_bad_names_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        fs::write(&path, "{\"step\":1,\"wall\":1}\n{\"step\":\n{\"step\":2,\"wall\":1}\n").unwrap();
        let error = read_jsonl(&path).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        let mut metrics = Metrics::create(dir.path()).unwrap();
        assert!(metrics.write(1, &[("step", 1.0)]).is_err());
        assert!(metrics.write(1, &[("a", 1.0), ("a", 2.0)]).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }
}
