//! A whole run: prompts to embeddings, noise to latents, latents to files.

use std::{io::Write, panic::resume_unwind, thread, time::Duration};

use anyhow::{Context, Result};
use flow::checkpoint::{Entry, write_atomically, write_tensors};
use onnx::Options;

use crate::{
    engine::{Condition, Decoder, TextEncoders, Transformer},
    picture::{Parameters, Picture},
    report::{Finished, Report, Stages, timed},
    request::{Image, Request},
    sample::denoise,
};

/// Makes every image of `request`, telling `lines` about each.
///
/// ### Why images are made one by one
/// A batch would let the matrix kernels choose another order of additions, and an image's bits would
/// depend on its company. The text encoders are closed before the transformer is opened: together
/// they are the largest part of a pipeline after it.
///
/// # Errors
/// A network that fails or answers with numbers that are not finite, or a file that cannot be
/// written. Images finished before that stay.
pub fn run(request: &Request, lines: impl Write) -> Result<()> {
    let n_calls = request.images.len() * request.plan.len();
    let mut report = Report::new(lines, request.json, n_calls as u64);
    let options = Options { threads: request.threads };
    let mut total = Stages::default();

    report.stage("reading prompts");
    let texts = encode(request, options, &mut total)?;

    let Request { pipeline, size, guidance, .. } = request;
    report.stage("loading");
    let (transformer, decoder) = timed(&mut total.load, || {
        thread::scope(|scope| {
            let decoder = scope.spawn(|| Decoder::open(pipeline, options));
            let transformer = Transformer::open(pipeline, size, *guidance, options);
            (transformer, decoder.join().unwrap_or_else(|panic| resume_unwind(panic)))
        })
    });
    let (mut transformer, mut decoder) = (transformer?, decoder?);

    report.stage("");
    let mut latents = Vec::new();
    let mut pictures = Vec::new();
    for (index, image) in request.images.iter().enumerate() {
        let text = &texts[image.prompt];
        let mut stages = Stages { load: total.load, text: text.time, ..Stages::default() };
        let mut denoiser = transformer.conditioned(&text.condition)?;
        let noise = size.pack(&request.initial(index));
        let x0 = timed(&mut stages.sample, || {
            denoise(&mut denoiser, &request.plan, noise, || report.step())
        })
        .with_context(|| format!("cannot sample {}", image.file.display()))?;
        let x0 = size.unpack(&x0);
        let picture = timed(&mut stages.decode, || decoder.decode(&x0, size))?;
        timed(&mut stages.png, || save(request, index, &picture))?;
        report.image(&finished(request, image, stages))?;
        total.sample += stages.sample;
        total.decode += stages.decode;
        total.png += stages.png;
        if request.latents_file.is_some() {
            latents.extend(x0);
        }
        if request.sheet.is_some() {
            pictures.push(picture);
        }
    }
    save_latents(request, &latents)?;
    timed(&mut total.png, || save_sheet(request, &pictures))?;
    report.end(request.images.len(), &total)
}

/// A prompt's embeddings and the time they took.
struct Text {
    condition: Condition,
    time: Duration,
}

fn encode(request: &Request, options: Options, total: &mut Stages) -> Result<Vec<Text>> {
    let mut encoders = timed(&mut total.load, || {
        TextEncoders::open(&request.pipeline, request.text_tokens, options)
    })?;
    let mut texts = Vec::with_capacity(request.prompts.len());
    for prompt in &request.prompts {
        let mut time = Duration::ZERO;
        let condition = timed(&mut time, || encoders.encode(prompt))?;
        total.text += time;
        texts.push(Text { condition, time });
    }
    Ok(texts)
}

fn save(request: &Request, index: usize, picture: &Picture) -> Result<()> {
    let image = &request.images[index];
    let text = request.metadata.then(|| {
        let parameters = Parameters {
            prompt: &request.prompts[image.prompt],
            steps: request.n_steps,
            solver: request.solver,
            guidance: request.guidance,
            origin: request.origin(index),
            width: request.width,
            height: request.height,
            model: &request.model,
            shift: request.shift,
        };
        parameters.text()
    });
    write_atomically(&image.file, &picture.png(text.as_deref())?)?;
    Ok(())
}

fn finished<'a>(request: &'a Request, image: &'a Image, stages: Stages) -> Finished<'a> {
    Finished {
        file: &image.file,
        prompt: &request.prompts[image.prompt],
        seed: request.noise.is_none().then_some(image.seed),
        width: request.width,
        height: request.height,
        stages,
    }
}

fn save_latents(request: &Request, latents: &[f32]) -> Result<()> {
    let Some(file) = &request.latents_file else { return Ok(()) };
    let shape =
        [request.images.len(), request.size.channels, request.size.height, request.size.width];
    write_tensors(file, &[Entry::f32("latents", &shape, latents)], &[])?;
    Ok(())
}

fn save_sheet(request: &Request, pictures: &[Picture]) -> Result<()> {
    let Some((file, layout)) = &request.sheet else { return Ok(()) };
    write_atomically(file, &layout.draw(pictures).png(None)?)?;
    Ok(())
}
