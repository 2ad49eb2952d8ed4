//! What a person or a program is told while images are made.

use std::{
    borrow::Cow,
    io::{ErrorKind, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;
use flow::log::{self, Level};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde::Serialize;

/// Wall time of each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stages {
    /// Opening the networks, once a run.
    pub load: Duration,
    /// Tokenizers and text encoders.
    pub text: Duration,
    /// The denoising loop.
    pub sample: Duration,
    /// The autoencoder's decoder.
    pub decode: Duration,
    /// Encoding and writing the file.
    pub png: Duration,
    /// What of the others was spent in networks; not loading.
    pub networks: Duration,
}

impl Stages {
    /// Everything but loading.
    pub fn image(&self) -> Duration {
        self.text + self.sample + self.decode + self.png
    }
}

/// What is said of a finished image.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    pub file: &'a Path,
    pub prompt: &'a str,
    /// `None` when the noise came from a file.
    pub seed: Option<u64>,
    pub width: usize,
    pub height: usize,
    /// `load` is the run's, the rest this image's; `text` is its prompt's.
    pub stages: Stages,
}

/// Runs `work` and adds the time it takes to `total`.
pub fn timed<T>(total: &mut Duration, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed();
    result
}

/// Writes a line an image to `lines`, and a progress bar to stderr when that is a terminal. A reader
/// that closes `lines` early does not stop the run.
pub struct Report<W> {
    lines: W,
    json: bool,
    bar: ProgressBar,
    device: Device,
}

/// What computes.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// Of the processor or GPU.
    pub name: String,
    pub provider: String,
    /// How weights are stored, once it is known.
    pub precision: String,
    pub threads: usize,
}

impl<W: Write> Report<W> {
    /// For a run of `n_calls` network calls in all.
    pub fn new(lines: W, json: bool, n_calls: u64, device: Device) -> Self {
        let style = ProgressStyle::with_template("{bar:32} {pos}/{len} steps, {eta} left {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = match log::level() {
            Level::Quiet => ProgressBar::hidden(),
            _ => ProgressBar::new(n_calls),
        };
        let bar = bar.with_style(style).with_finish(ProgressFinish::AndClear);
        Self { lines, json, bar, device }
    }

    /// Something a person should know, on stderr.
    pub fn notice(&self, text: &str) {
        self.bar.suspend(|| log::note(&format!("note: {text}")));
    }

    /// What is being worked on.
    pub fn stage(&self, name: &str) {
        if !name.is_empty() {
            self.bar.suspend(|| log::detail(name));
        }
        self.bar.set_message(name.to_owned());
        self.bar.tick();
    }

    /// Which precision the networks turned out to have.
    pub fn on(&mut self, precision: &str) {
        precision.clone_into(&mut self.device.precision);
    }

    /// One network call is done.
    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// One image is done.
    pub fn image(&mut self, image: &Line<'_>) -> Result<()> {
        let line = if self.json { json_line(image, &self.device)? } else { text_line(image) };
        self.line(&line)
    }

    /// Everything is done: seconds of each stage over the whole run.
    pub fn end(&mut self, n_images: usize, total: &Stages) -> Result<()> {
        self.bar.finish_and_clear();
        if self.json {
            return Ok(());
        }
        let Stages { load, text, sample, decode, png, .. } = *total;
        let stages =
            [("load", load), ("text", text), ("sample", sample), ("decode", decode), ("png", png)]
                .map(|(name, time)| format!("{name} {:.3} s", time.as_secs_f64()));
        let an_image = (sample + decode + png).as_secs_f64() / n_images as f64;
        self.line(&format!("{}; {an_image:.3} s an image", stages.join(", ")))?;
        let Device { name, provider, precision, threads } = &self.device;
        let line = match &*self.device.provider {
            "cpu" => format!("on {provider} ({name}), {threads} threads, {precision}"),
            _ => format!("on {provider} ({name}), {precision}"),
        };
        self.line(&line)
    }

    fn line(&mut self, line: &str) -> Result<()> {
        log::keep(line);
        let lines = &mut self.lines;
        let written = self.bar.suspend(|| writeln!(lines, "{line}").and_then(|()| lines.flush()));
        match written {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    }
}

fn text_line(image: &Line<'_>) -> String {
    let Stages { sample, decode, png, .. } = image.stages;
    let seed = image.seed.map_or_else(String::new, |seed| format!("  seed {seed}"));
    let seconds = (sample + decode + png).as_secs_f64();
    let (file, prompt) = (image.file.display(), image.prompt.replace('\n', " "));
    format!("{file}{seed}  {seconds:.3} s  {prompt}")
}

fn json_line(image: &Line<'_>, device: &Device) -> Result<String> {
    #[derive(Serialize)]
    struct Object<'a> {
        file: Cow<'a, str>,
        prompt: &'a str,
        seed: Option<u64>,
        width: usize,
        height: usize,
        device: &'a str,
        provider: &'a str,
        precision: &'a str,
        milliseconds: Milliseconds,
    }
    #[derive(Serialize)]
    struct Milliseconds {
        load: f64,
        text: f64,
        sample: f64,
        decode: f64,
        png: f64,
    }
    let &Line { file, prompt, seed, width, height, stages } = image;
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let milliseconds = Milliseconds {
        load: ms(stages.load),
        text: ms(stages.text),
        sample: ms(stages.sample),
        decode: ms(stages.decode),
        png: ms(stages.png),
    };
    let file = file.to_string_lossy();
    let Device { name: device, provider, precision, .. } = device;
    Ok(serde_json::to_string(&Object {
        file,
        prompt,
        seed,
        width,
        height,
        device,
        provider,
        precision,
        milliseconds,
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Line<'static> {
        Line {
            file: Path::new("out.png"),
            prompt: "red \"HAT\"",
            seed: Some(7),
            width: 32,
            height: 16,
            stages: Stages {
                load: Duration::from_millis(200),
                text: Duration::from_millis(3),
                sample: Duration::from_micros(1600),
                decode: Duration::from_millis(2),
                png: Duration::from_millis(1),
                networks: Duration::from_millis(4),
            },
        }
    }

    fn printed(json: bool) -> Result<String> {
        let mut lines = Vec::new();
        let device =
            Device { provider: "cpu".into(), name: "A".into(), threads: 2, ..Device::default() };
        let mut report = Report::new(&mut lines, json, 8, device);
        report.on("f32");
        report.image(&image())?;
        report.end(2, &image().stages)?;
        Ok(String::from_utf8(lines)?)
    }

    #[test]
    fn a_line_an_image_then_the_stages() -> Result<()> {
        assert_eq!(
            printed(false)?,
            "out.png  seed 7  0.005 s  red \"HAT\"\n\
             load 0.200 s, text 0.003 s, sample 0.002 s, decode 0.002 s, png 0.001 s; \
             0.002 s an image\non cpu (A), 2 threads, f32\n"
        );
        Ok(())
    }

    #[test]
    fn json_is_one_object_an_image_and_nothing_else() -> Result<()> {
        let text = printed(true)?;
        assert_eq!(text.lines().count(), 1);
        let object: serde_json::Value = serde_json::from_str(&text)?;
        assert_eq!(object["prompt"], "red \"HAT\"");
        assert_eq!(object["seed"], 7);
        assert_eq!((&object["provider"], &object["precision"]), (&"cpu".into(), &"f32".into()));
        assert_eq!(object["milliseconds"]["sample"], 1.6);
        assert_eq!(object["milliseconds"]["load"], 200.0);
        Ok(())
    }

    #[test]
    fn a_closed_reader_is_not_an_error() -> Result<()> {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        Report::new(Closed, true, 1, Device::default()).image(&image())
    }
}
