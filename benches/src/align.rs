//! Iterations of `ng-train align`, timed by the run itself.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{median, program};

/// Medians over the iterations after the first.
pub struct Cost {
    /// Network passes an image: forward in the rollout, forward and backward in the update.
    pub nfe: [f64; 2],
    /// Seconds of rollout, update, and the iteration without its rewards.
    pub seconds: [f64; 3],
    /// Seconds of decoding.
    pub decode: f64,
}

/// An iteration of 4 prompts of 12 members, whose reward costs hardly any time.
pub const FOUR_GROUPS: [&str; 4] = [
    r#"rewards=[{name = "jpeg", kind = "jpeg", prefer = "small", weight = 1.0}]"#,
    "judges=[]",
    "prompts_per_iteration=4",
    "group_size=12",
];

/// Who computes.
#[derive(Clone, Copy)]
pub struct Team {
    pub ranks: usize,
    /// Of each.
    pub threads: usize,
}

/// Runs `iterations` after one that warms up, of the preset `signs` with `settings` from `model` on one
/// thread; `folder` gets the run.
///
/// # Errors
/// When the run fails.
pub fn measure(model: &Path, settings: &[&str], iterations: usize, folder: &Path) -> Result<Cost> {
    measure_of(Team { ranks: 1, threads: 1 }, model, settings, iterations, folder)
}

/// [`measure`] of a team.
///
/// # Errors
/// When the run fails.
pub fn measure_of(
    team: Team,
    model: &Path,
    settings: &[&str],
    iterations: usize,
    folder: &Path,
) -> Result<Cost> {
    let mut command = Command::new(program::built("ng-train")?);
    command.args(["align", "--preset", "signs", "--threads", &team.threads.to_string()]);
    if team.ranks > 1 {
        command.args(["--processes", &team.ranks.to_string()]);
    }
    command.args(["--set", "validate_every=0"]);
    let iterations = format!("iterations={}", iterations + 1);
    let model = format!("model={}", model.display());
    let output = format!("output={}", folder.display());
    for setting in settings.iter().copied().chain([&*iterations, &*model, &*output]) {
        command.args(["--set", setting]);
    }
    program::run(&mut command)?;
    let lines = fs::read_to_string(folder.join("metrics.jsonl")).context("no metrics.jsonl")?;
    let records = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let warm = &records[1..];
    let all = |name: &str| {
        let values = warm.iter().map(|record| record[name].as_f64());
        values.collect::<Option<Vec<f64>>>().with_context(|| format!("metrics without {name}"))
    };
    let middle = |name: &str| Ok::<f64, anyhow::Error>(median(&all(name)?));
    let without_reward: Vec<f64> = all("seconds/iteration")?
        .iter()
        .zip(all("seconds/reward")?)
        .map(|(iteration, reward)| iteration - reward)
        .collect();
    Ok(Cost {
        nfe: [middle("nfe/rollout")?, middle("nfe/update")?],
        seconds: [middle("seconds/rollout")?, middle("seconds/update")?, median(&without_reward)],
        decode: middle("seconds/decode")?,
    })
}
