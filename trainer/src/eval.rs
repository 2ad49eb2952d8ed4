//! Comparing checkpoints: every prompt sampled from fixed seeds, scored by rewards and by judges no run
//! trains on.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::write_atomically;
use image::RgbImage;
use serde::Serialize;

use crate::align::AlignConfig;
use crate::device::Compute;
use crate::model::{Loading, Model};
use crate::picture;
use crate::prompts;
use crate::report::sample;
use crate::reward::{RewardConfig, Rewards};
use crate::sheet::{self, Cell, Row};
use flow::prompts::Prompt;

/// What to compare.
pub struct Options<'a> {
    /// Pipeline folders, the first being the one others are compared with.
    pub models: &'a [PathBuf],
    /// Prompts, one image each.
    pub prompts: &'a Path,
    /// Image i starts from the noise of `seed` + i.
    pub seed: u64,
    /// Folder for `eval.json`, `eval.md` and `side-by-side.png`.
    pub out: &'a Path,
    /// Worker threads of rewards.
    pub threads: usize,
    /// Where tensors live.
    pub compute: Compute,
}

/// One model's scores.
#[derive(Serialize)]
struct Column {
    model: PathBuf,
    /// Mean of each metric.
    means: Vec<(String, f64)>,
    /// One row a prompt, in the order of the metrics.
    per_prompt: Vec<Vec<f64>>,
}

/// Prompts of the side-by-side sheet.
const SHEET_ROWS: usize = 24;

/// Samples and scores; prints a Markdown table.
///
/// # Errors
/// When a model, the prompts or a metric fails, or the output cannot be written.
pub fn run(config: &AlignConfig, options: &Options<'_>) -> Result<()> {
    let prompts = prompts::read(options.prompts)?;
    let metrics: Vec<RewardConfig> = config.rewards.iter().chain(&config.judges).cloned().collect();
    let rewards = Rewards::open(&metrics, options.threads, options.compute.device)?;
    rewards.check(&prompts)?;
    let mut columns = Vec::new();
    let mut pictures = Vec::new();
    for path in options.models {
        let (column, images) = score(config, options, path, &prompts, &rewards)
            .with_context(|| format!("cannot evaluate {}", path.display()))?;
        columns.push(column);
        pictures.push(images);
    }
    let table = table(&columns);
    write_atomically(&options.out.join("eval.md"), table.as_bytes())?;
    write_atomically(&options.out.join("eval.json"), &serde_json::to_vec_pretty(&columns)?)?;
    let right = columns.iter().map(|column| exact(column, &metrics)).collect::<Vec<_>>();
    let sheet = side_by_side(options.models, &prompts, &pictures, &right);
    picture::save(&options.out.join("side-by-side.png"), &sheet)?;
    print!("{table}");
    Ok(())
}

fn score(
    config: &AlignConfig,
    options: &Options<'_>,
    path: &Path,
    prompts: &[Prompt],
    rewards: &Rewards,
) -> Result<(Column, Vec<RgbImage>)> {
    let model = Model::load(path, Loading::to_sample(options.compute, false))?;
    let size = model.latent_size(config.rollout.size)?;
    let plan = config.rollout.plan(&model.pipeline.scheduler, &size)?;
    let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    let (guidance, batch) = (config.rollout.guidance, config.rollout.batch);
    let images = sample(&model, &texts, options.seed, &plan, &size, guidance, batch)?;
    let scores =
        rewards.score(&prompts.iter().collect::<Vec<_>>(), &images.iter().collect::<Vec<_>>())?;
    let mut means = Vec::new();
    let mut per_prompt = vec![Vec::new(); prompts.len()];
    for ((name, _), outcome) in rewards.weights().zip(&scores.outcomes) {
        let Some(values) = &outcome.scores else {
            let why = outcome.error.as_deref().unwrap_or("no scores");
            eprintln!("warning: {name} is left out: {why}");
            continue;
        };
        ensure!(values.len() == prompts.len(), "{name} gave {} scores", values.len());
        means.push((name.to_owned(), values.iter().sum::<f64>() / values.len() as f64));
        for (row, value) in per_prompt.iter_mut().zip(values) {
            row.push(*value);
        }
    }
    Ok((Column { model: path.to_owned(), means, per_prompt }, images))
}

/// Whether each prompt was read exactly by the first metric that measures it so.
fn exact(column: &Column, metrics: &[RewardConfig]) -> Option<Vec<bool>> {
    use crate::reward::{Measure, RewardKind};
    let is_exact = |name: &str| {
        metrics.iter().any(|metric| {
            metric.name == name
                && matches!(metric.kind, RewardKind::Ocr { measure: Measure::Exact, .. })
        })
    };
    let at = column.means.iter().position(|(name, _)| is_exact(name))?;
    Some(column.per_prompt.iter().map(|row| row[at] == 1.0).collect())
}

fn table(columns: &[Column]) -> String {
    let row = |first: &str, cells: Vec<String>| format!("| {first} | {} |\n", cells.join(" | "));
    let means = &columns[0].means;
    let mut table = row("model", means.iter().map(|(name, _)| name.clone()).collect());
    table += &row("---", means.iter().map(|_| "---:".to_owned()).collect());
    for column in columns {
        let cells = column.means.iter().map(|(_, value)| format!("{value:.3}")).collect();
        table += &row(&column.model.display().to_string(), cells);
    }
    table
}

fn side_by_side(
    models: &[PathBuf],
    prompts: &[Prompt],
    pictures: &[Vec<RgbImage>],
    right: &[Option<Vec<bool>>],
) -> RgbImage {
    let names: Vec<String> = models
        .iter()
        .map(|path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned())
        .collect();
    let headers: Vec<&str> = names.iter().map(String::as_str).collect();
    let stride = (prompts.len() / SHEET_ROWS).max(1);
    let rows: Vec<Row<'_>> = (0..prompts.len())
        .step_by(stride)
        .take(SHEET_ROWS)
        .map(|i| Row {
            label: prompts[i].text.clone(),
            cells: pictures
                .iter()
                .zip(right)
                .map(|(images, right)| Cell {
                    verdict: right.as_ref().map(|right| right[i]),
                    ..Cell::new(&images[i])
                })
                .collect(),
        })
        .collect();
    sheet::side_by_side(&headers, &rows, (96 / pictures[0][0].width()).max(1), 3)
}
