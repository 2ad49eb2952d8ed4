//! The thread that owns the networks and works the queue off.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    thread::{Builder, JoinHandle},
    time::Instant,
};

use anyhow::{Result, anyhow};

use crate::{
    engine::{Engine, Finished, Watch, is_cancelled},
    parameters::Parameters,
    progress::Progress,
    report::Stages,
    request::Job as Image,
};

use super::{drawing::Drawing, job::Preview, metrics::Stage, queue::Row, service::Service};

/// Starts the worker with an engine for each of the service's models. It takes as many images at a time
/// as an engine draws together, and ends when the queue is closed and empty.
pub fn start(service: Arc<Service>, mut engines: Vec<Engine>) -> io::Result<JoinHandle<()>> {
    Builder::new().name("worker".into()).spawn(move || {
        let _alive = Alive(service.clone());
        loop {
            let most = |drawing: &Drawing| engines[drawing.model].most(&drawing.first);
            let rows = service.queue.take(most);
            let Some(first) = rows.first() else { return };
            draw(&service, &mut engines[first.job.drawing.model], &rows);
        }
    })
}

/// However the worker ends, the service learns of it.
struct Alive(Arc<Service>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::SeqCst);
    }
}

fn draw(service: &Service, engine: &mut Engine, rows: &[Row]) {
    service.metrics.batch.observe(rows.len() as f64);
    let images: Vec<Image> = rows.iter().map(|row| row.job.drawing.image(row.index)).collect();
    let mut desk = Desk { service, rows, images: &images, since: Instant::now() };
    // A panic over one drawing must not take the service with it.
    let drawn = catch_unwind(AssertUnwindSafe(|| engine.generate(&images, &mut desk)));
    if let Err(panic) = drawn {
        let error = anyhow!("the engine panicked: {}", said(&*panic));
        for row in rows {
            service.fail(&row.job, &error);
        }
    }
}

/// Passes on what the engine does.
struct Desk<'a> {
    service: &'a Service,
    rows: &'a [Row],
    images: &'a [Image],
    /// When the image before was done.
    since: Instant,
}

impl Watch for Desk<'_> {
    fn begin(&mut self, index: usize) {
        let job = &self.rows[index].job;
        if job.begin() {
            self.service.metrics.queue_wait.observe(job.queued.elapsed().as_secs_f64());
        }
    }

    fn step(&mut self, index: usize, progress: &mut Progress<'_>) {
        let Row { job, index: image } = &self.rows[index];
        let drawing = &job.drawing;
        if !drawing.preview_is_due(progress.step, progress.of) {
            return job.step(None);
        }
        let file = progress.preview().and_then(|picture| drawing.encoding.encode(&picture, None));
        match file {
            Ok(file) => {
                let (image, step) = (*image, progress.step);
                job.step(Some(Preview { image, step, file: file.into() }));
            }
            // The run itself was cancelled, or will fail in the same way and say so.
            Err(_) => job.step(None),
        }
    }

    fn done(&mut self, index: usize, image: Result<Finished>) {
        let row = &self.rows[index];
        let file = image.and_then(|finished| {
            let drawing = &row.job.drawing;
            let model = &self.service.cards[drawing.model].name;
            let text = Parameters::of(&self.images[index], model).text();
            Ok((drawing.encoding.encode(&finished.picture, Some(&text))?, finished.stages))
        });
        match file {
            Ok((file, stages)) => {
                self.service.count_image(&row.job, self.since.elapsed());
                count_stages(self.service, row, &stages);
                if row.job.image(row.index, file.into()) {
                    self.service.complete(&row.job);
                }
            }
            // Whoever cancelled it has ended the job.
            Err(error) if is_cancelled(&error) => {}
            Err(error) => self.service.fail(&row.job, &error),
        }
        self.since = Instant::now();
    }
}

fn count_stages(service: &Service, row: &Row, stages: &Stages) {
    for (stage, time) in
        [("text", stages.text), ("sample", stages.sample), ("decode", stages.decode)]
    {
        let labels = Stage {
            stage: stage.to_owned(),
            provider: service.provider.clone(),
            precision: service.precision.clone(),
            size: row.job.drawing.size_name(),
        };
        service.metrics.stage.get_or_create(&labels).observe(time.as_secs_f64());
    }
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a word")
}
