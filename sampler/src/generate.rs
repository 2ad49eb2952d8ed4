//! A whole run: prompts to embeddings, noise to latents, latents to files.

use std::{io::Write, time::Duration};

use anyhow::{Context, Result};
use flow::checkpoint::{Entry, write_atomically, write_tensors};

use crate::{
    device,
    engine::{Engine, Finished, Memory, Watch},
    format::Format,
    parameters::Parameters,
    picture::Picture,
    progress::Progress,
    report::{Device, Line, Report, Stages, timed},
    request::Job,
    run::{Image, Run},
};

/// Makes every image of `run`, telling `lines` about each.
///
/// # Errors
/// A network that fails or answers with numbers that are not finite, or a file that cannot be
/// written. Images finished before that stay.
pub fn run(run: &Run, lines: impl Write) -> Result<()> {
    let n_calls: usize = run.images.iter().map(|image| image.job.plan.len()).sum();
    let device = Device {
        name: device::name(run.options.provider, run.options.device),
        provider: run.options.provider.to_string(),
        precision: String::new(),
        threads: run.options.threads,
    };
    let report = Report::new(lines, run.json, n_calls as u64, device);
    for notice in &run.notices {
        report.notice(notice);
    }
    let mut engine = Engine::closed(run.export.clone(), &run.options);
    let jobs: Vec<Job> = run.images.iter().map(|image| image.job.clone()).collect();
    report.stage("reading prompts");
    if run.options.memory != Memory::Keep {
        engine.read(&jobs)?;
    }
    report.stage("");
    let mut files =
        Files { run, report, total: Stages::default(), latents: Vec::new(), pictures: Vec::new() };
    for (index, job) in jobs.iter().enumerate() {
        let mut one = One { files: &mut files, index, result: Ok(()) };
        engine.generate(std::slice::from_ref(job), &mut one);
        one.result?;
    }
    files.total.load = engine.load();
    files.end()
}

/// What the images of a run become.
struct Files<'a, W> {
    run: &'a Run,
    report: Report<W>,
    total: Stages,
    latents: Vec<f32>,
    pictures: Vec<Picture>,
}

/// The image under way.
struct One<'a, 'b, W> {
    files: &'a mut Files<'b, W>,
    index: usize,
    result: Result<()>,
}

impl<W: Write> Watch for One<'_, '_, W> {
    fn step(&mut self, _: usize, _: &mut Progress<'_>) {
        self.files.report.step();
    }

    fn done(&mut self, _: usize, image: Result<Finished>) {
        let file = self.files.run.images[self.index].file.display();
        self.result = image
            .with_context(|| format!("cannot make {file}"))
            .and_then(|image| self.files.keep(self.index, image));
    }
}

impl<W: Write> Files<'_, W> {
    /// Writes an image and says so.
    fn keep(&mut self, index: usize, image: Finished) -> Result<()> {
        let Finished { picture, latents, mut stages, precision } = image;
        self.report.on(&precision);
        let of = &self.run.images[index];
        timed(&mut stages.png, || save(self.run, of, &picture))?;
        self.report.image(&line(of, stages))?;
        self.total.text += stages.text;
        self.total.sample += stages.sample;
        self.total.decode += stages.decode;
        self.total.png += stages.png;
        if self.run.latents_file.is_some() {
            self.latents.extend(latents);
        }
        if self.run.sheet.is_some() {
            self.pictures.push(picture);
        }
        Ok(())
    }

    /// Writes what holds all images.
    fn end(mut self) -> Result<()> {
        save_latents(self.run, &self.latents)?;
        let mut png = Duration::ZERO;
        timed(&mut png, || save_sheet(self.run, &self.pictures))?;
        self.total.png += png;
        self.report.end(self.run.images.len(), &self.total)
    }
}

fn save(run: &Run, image: &Image, picture: &Picture) -> Result<()> {
    let text = run.metadata.then(|| Parameters::of(&image.job, &run.export.name).text());
    let format = Format::of(&image.file).unwrap_or(Format::Png);
    let bytes = format.encode(picture, text.as_deref())?;
    if run.is_piped() {
        return Ok(std::io::stdout().lock().write_all(&bytes)?);
    }
    Ok(write_atomically(&image.file, &bytes)?)
}

fn line(image: &Image, stages: Stages) -> Line<'_> {
    let Image { file, job } = image;
    let seed = job.noise.is_none().then_some(job.seed);
    Line { file, prompt: &job.prompt, seed, width: job.width, height: job.height, stages }
}

fn save_latents(run: &Run, latents: &[f32]) -> Result<()> {
    let Some(file) = &run.latents_file else { return Ok(()) };
    let size = run.images[0].job.size;
    let shape = [run.images.len(), size.channels, size.height, size.width];
    write_tensors(file, &[Entry::f32("latents", &shape, latents)], &[])?;
    Ok(())
}

fn save_sheet(run: &Run, pictures: &[Picture]) -> Result<()> {
    let Some((file, layout)) = &run.sheet else { return Ok(()) };
    let format = Format::of(file).unwrap_or(Format::Png);
    Ok(write_atomically(file, &format.encode(&layout.draw(pictures), None)?)?)
}
