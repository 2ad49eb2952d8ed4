//! What a run shows while it goes: metrics, a reward curve, sheets of samples.

use std::path::{Path, PathBuf};

use anyhow::Result;
use flow::latents::LatentSize;
use flow::prompts::Prompt;
use flow::solver::Step;
use image::RgbImage;

use crate::group::experience::{self, Experience};
use crate::network::model::Model;
use crate::picture;
use crate::picture::plot::{self, Panel, Series};
use crate::picture::sheet::{self, Cell};
use crate::run::config::AlignConfig;
use crate::run::metrics::{self, Metrics, Record};
use crate::run::state::Position;
use crate::run::update::Outcome;
use crate::run::validation::Validated;

/// Images of a sheet.
const SHEET: usize = 24;
/// Images of a row of it.
const SHEET_COLUMNS: usize = 8;
/// Sheets show small images this large at least, pixels.
const SHEET_SIDE: u32 = 96;

/// The files of one run.
pub(crate) struct Report {
    metrics: Metrics,
    folder: PathBuf,
    sheet_prompts: Vec<String>,
    guidance: f64,
    batch: usize,
    size: LatentSize,
    plan: Vec<Step>,
}

impl Report {
    /// Starts the files of a new run, with a sheet of the untrained model, or goes on with those of
    /// `found`.
    pub(crate) fn open(
        config: &AlignConfig,
        sheet_prompts: &[Prompt],
        found: Option<&Position>,
        model: &Model,
        size: &LatentSize,
        plan: &[Step],
    ) -> Result<Self> {
        let folder = config.output.clone();
        let metrics = match found {
            Some(position) => Metrics::resume(&folder, position.iteration as u64)?,
            None => Metrics::create(&folder)?,
        };
        let text = toml::to_string(&config.resolved()?)?;
        flow::checkpoint::write_atomically(&folder.join("config.toml"), text.as_bytes())?;
        let first = found.map_or(0, |position| position.iteration as u64);
        let mut metrics = metrics;
        metrics.text(first, "settings", &format!("```toml\n{text}```\n"))?;
        let mut report = Self {
            metrics,
            folder,
            sheet_prompts: sheet_prompts
                .iter()
                .take(SHEET)
                .map(|prompt| prompt.text.clone())
                .collect(),
            guidance: config.group.rollout.guidance(&model.pipeline)?,
            batch: config.group.rollout.batch,
            size: *size,
            plan: plan.to_vec(),
        };
        if found.is_none() {
            report.draw(0, model)?;
        }
        Ok(report)
    }

    /// Brings what was said so far to disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.metrics.sync()
    }

    /// Seconds of the run so far.
    pub(crate) fn wall(&self) -> f64 {
        self.metrics.wall()
    }

    /// Writes the metrics of iteration `step` (from 1) and returns the line that progress shows.
    pub(crate) fn log(
        &mut self,
        step: usize,
        config: &AlignConfig,
        experience: &Experience,
        outcome: &Outcome,
        seconds: f64,
    ) -> Result<String> {
        let mut values: Vec<(String, f64)> = Vec::new();
        let mut put = |name: &str, value: f64| values.push((name.to_owned(), value));
        let mut line = of_rewards(config, experience, &mut put);
        let flat = experience.advantages.iter().filter(|group| group.is_flat).count();
        let n_groups = experience.advantages.len() as f64;
        let norms = experience
            .advantages
            .iter()
            .map(|a| a.values.iter().map(|x| x * x).sum::<f64>().sqrt());
        put("advantage/norm", mean(norms));
        put("advantage/flat_groups", flat as f64 / n_groups);
        for (name, value) in &outcome.means {
            put(name, *value);
        }
        for (name, value) in [
            ("policy/log_ratio_first", outcome.log_ratio_first),
            ("policy/log_ratio_max", outcome.log_ratio_max),
            ("optimizer/grad_norm", outcome.last_step.map(|step| step.grad_norm)),
            ("optimizer/below_eps", outcome.last_step.map(|step| step.below_eps)),
            ("optimizer/learning_rate", outcome.last_step.map(|step| step.rate)),
        ] {
            if let Some(value) = value {
                put(name, value);
            }
        }
        if let Some(clipped) = outcome.clipped() {
            line.push(format!("clipped {:.0} %", 100.0 * clipped));
        }
        put("optimizer/updates", outcome.n_updates as f64);
        let per_image = |passes: usize| passes as f64 / (n_groups * config.group.group_size as f64);
        let rollout = experience.rollout.nfe(config.group.group_size);
        put("nfe/rollout", rollout + per_image(outcome.n_references));
        put("nfe/update", per_image(outcome.n_passes));
        for (name, value) in ["rollout", "decode", "reward"].iter().zip(experience.seconds) {
            put(&format!("seconds/{name}"), value);
        }
        put("seconds/update", outcome.seconds);
        put("seconds/iteration", seconds);
        let values: Vec<(&str, f64)> = values.iter().map(|(name, v)| (name.as_str(), *v)).collect();
        self.metrics.write(step as u64, &values)?;
        Ok(line.join("  "))
    }

    /// Draws the samples after `done` iterations, and the curve so far.
    pub(crate) fn draw(&mut self, done: usize, model: &Model) -> Result<()> {
        let texts: Vec<&str> = self.sheet_prompts.iter().map(String::as_str).collect();
        let images = sample(model, &texts, 0, &self.plan, &self.size, self.guidance, self.batch)?;
        let cells: Vec<Cell<'_>> = images.iter().map(Cell::new).collect();
        let scale = (SHEET_SIDE / images[0].width()).max(1);
        let grid = sheet::grid(&cells, SHEET_COLUMNS, scale);
        picture::save(&self.folder.join(format!("samples/iteration-{done:06}.png")), &grid)?;
        self.metrics.image(done as u64, "samples", &grid)?;
        let read = |file| metrics::read_jsonl(&self.folder.join(file)).unwrap_or_default();
        curves(&self.folder.join("curve.png"), &read(metrics::FILE), &read(metrics::VALIDATION))
    }

    /// Writes what a validation after `done` iterations found, which counts for no time of the run, and returns the
    /// line that says so.
    pub(crate) fn validated(&mut self, done: usize, found: &Validated) -> Result<String> {
        self.metrics.leave_out(found.seconds);
        let values: Vec<(&str, f64)> =
            found.means.iter().map(|(name, mean)| (name.as_str(), *mean)).collect();
        let seconds = [("seconds/validation", found.seconds)];
        self.metrics.write_validation(done as u64, &[&values[..], &seconds].concat())?;
        let means = values
            .iter()
            .map(|(name, mean)| format!("{} {mean:.3}", name.trim_start_matches("validation/")));
        let best = if found.is_better && done > 0 { "  the best so far" } else { "" };
        Ok(format!("held out after {done}: {}{best}", means.collect::<Vec<_>>().join("  ")))
    }
}

/// Draws a panel a reward: its mean and spread in training, and its mean over held-out prompts; and one a judge.
fn curves(path: &Path, training: &[Record], held_out: &[Record]) -> Result<()> {
    let names = |records: &[Record], of: &str| -> Vec<String> {
        let names = records.iter().flat_map(|record| record.values.keys());
        let mut names: Vec<String> =
            names.filter_map(|name| name.strip_prefix(of)).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        names
    };
    let rewards = names(training, "reward/");
    let mut judges = names(held_out, "validation/");
    judges.retain(|name| !rewards.contains(name));
    let curves: Vec<Curves> = rewards
        .into_iter()
        .chain(judges)
        .map(|name| Curves::new(name, training, held_out))
        .filter(|curves| !curves.training.is_empty() || !curves.held_out.is_empty())
        .collect();
    if curves.is_empty() {
        return Ok(());
    }
    plot::panels(path, &curves.iter().map(Curves::panel).collect::<Vec<_>>(), "iteration")
}

/// What the panel of a reward or judge is drawn from.
struct Curves {
    name: String,
    training: Vec<(f64, f64)>,
    held_out: Vec<(f64, f64)>,
    band: Vec<(f64, f64, f64)>,
}

impl Curves {
    fn new(name: String, training: &[Record], held_out: &[Record]) -> Self {
        let of = |records: &[Record], of: &str| metrics::series(records, &format!("{of}/{name}"));
        let (means, spreads) = (of(training, "reward"), of(training, "reward_std"));
        // The mean less and plus the spread, averaged as the plot averages means; both are there or neither is.
        let edge = |sign: f64| {
            let points = means.iter().zip(&spreads);
            let points = points.map(|(&(x, mean), &(_, spread))| (x, mean + sign * spread));
            plot::smoothed(&points.collect::<Vec<_>>())
        };
        let band = edge(-1.0).into_iter().zip(edge(1.0));
        let band = band.map(|((x, low), (_, high))| (x, low, high)).collect();
        Self { held_out: of(held_out, "validation"), training: means, band, name }
    }

    fn panel(&self) -> Panel<'_> {
        let named = |name, points: &'_ [_]| if points.is_empty() { "" } else { name };
        let training = Series {
            name: named("in training, with the spread in a group", &self.training),
            points: &self.training,
            is_smooth: false,
            band: &self.band,
        };
        let held_out = Series {
            name: named("held out", &self.held_out),
            points: &self.held_out,
            is_smooth: true,
            band: &[],
        };
        Panel { title: &self.name, y: "mean", series: vec![training, held_out] }
    }
}

/// Puts failures, mean and spread of each reward, and says the means.
fn of_rewards(
    config: &AlignConfig,
    experience: &Experience,
    put: &mut impl FnMut(&str, f64),
) -> Vec<String> {
    let mut line: Vec<String> = Vec::new();
    for (index, reward) in config.group.rewards.iter().enumerate() {
        let groups: Vec<&[f64]> = experience
            .scores
            .iter()
            .filter_map(|scores| scores.outcomes[index].scores.as_deref())
            .collect();
        let outcomes = experience.scores.iter().map(|scores| &scores.outcomes[index]);
        put(
            &format!("reward_failures/{}", reward.name),
            outcomes.map(|o| f64::from(o.failures)).sum(),
        );
        if groups.is_empty() {
            continue;
        }
        let reward_mean = mean(groups.iter().map(|group| mean(group.iter().copied())));
        put(&format!("reward/{}", reward.name), reward_mean);
        put(&format!("reward_std/{}", reward.name), mean(groups.iter().map(|group| std(group))));
        line.push(format!("{} {reward_mean:.3}", reward.name));
    }
    line
}

/// One image a prompt; image i starts from the noise of `seed` + i.
pub(crate) fn sample(
    model: &Model,
    prompts: &[&str],
    seed: u64,
    plan: &[Step],
    size: &LatentSize,
    guidance: f64,
    batch: usize,
) -> Result<Vec<RgbImage>> {
    let condition = model.encode(prompts, guidance, size)?;
    let noise: Vec<Vec<f32>> = (seed..).take(prompts.len()).map(|seed| size.noise(seed)).collect();
    let eps = model.pack(&noise, size);
    let trajectory = experience::solve_in_batches(model, plan, eps, &condition, batch)?;
    model.decode(&trajectory.x0, size)
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values.into_iter().fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    sum / f64::from(n.max(1))
}

fn std(values: &[f64]) -> f64 {
    let centre = mean(values.iter().copied());
    mean(values.iter().map(|x| (x - centre).powi(2))).sqrt()
}
