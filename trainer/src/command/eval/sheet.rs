//! The contestants' images side by side.

use anyhow::{Result, ensure};
use flow::prompts::Prompt;
use image::RgbImage;

use super::record::Record;
use super::table::Column;
use crate::picture::sheet::{self, Cell, Row};
use crate::reward::{Measure, RewardConfig, RewardKind};

/// Prompts of the sheet.
const ROWS: usize = 24;
/// Small images are shown this wide at least, pixels.
const SIDE: u32 = 96;
/// Panels beside each other.
const PANELS: usize = 3;

/// The first image of prompts spread over all, framed by whether it was read exactly where a metric
/// measures that.
///
/// # Errors
/// When images cannot be read, or have different sizes.
pub(super) fn draw(
    headers: &[String],
    prompts: &[Prompt],
    records: &[Record],
    columns: &[Column],
    metrics: &[&RewardConfig],
) -> Result<RgbImage> {
    let exact = metrics
        .iter()
        .find(|metric| matches!(metric.kind, RewardKind::Ocr { measure: Measure::Exact, .. }));
    let verdict = |column: &Column, prompt: usize| {
        let rows = column.scores(&exact?.name)?;
        Some(rows[prompt][0] == 1.0)
    };
    let stride = (prompts.len() / ROWS).max(1);
    let shown: Vec<usize> = (0..prompts.len()).step_by(stride).take(ROWS).collect();
    let images = shown
        .iter()
        .map(|&prompt| records.iter().map(|record| record.image(prompt, 0)).collect())
        .collect::<Result<Vec<Vec<RgbImage>>>>()?;
    let sizes: Vec<(u32, u32)> = images[0].iter().map(RgbImage::dimensions).collect();
    ensure!(
        sizes.iter().all(|size| *size == sizes[0]),
        "the models draw images of sizes {sizes:?}: --set rollout.size=[WIDTH,HEIGHT]"
    );
    let rows: Vec<Row<'_>> = shown
        .iter()
        .zip(&images)
        .map(|(&prompt, images)| Row {
            label: prompts[prompt].text.clone(),
            cells: images
                .iter()
                .zip(columns)
                .map(|(image, column)| Cell {
                    verdict: verdict(column, prompt),
                    ..Cell::new(image)
                })
                .collect(),
        })
        .collect();
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    Ok(sheet::side_by_side(&headers, &rows, (SIDE / sizes[0].0).max(1), PANELS))
}
