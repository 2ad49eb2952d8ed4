//! What whole iterations of a run take on a device: the code of `align`, without what it reads and writes.

use std::fmt;

use anyhow::{Context, Result, ensure};
use cluster::Group;
use flow::noise::Noise;
use flow::prompts::Prompt;
use serde::Serialize;

use crate::algorithm::Algorithm;
use crate::group::experience::{Sources, gather};
use crate::network::model::{Missing, Model};
use crate::network::optimizer::AdamW;
use crate::reward::Rewards;
use crate::run::config::AlignConfig;
use crate::run::update;
use crate::tensor::device::{self, Compute};

/// What is drawn.
const PROMPT: &str = "a red fox in the snow";

/// What to measure.
pub struct Options<'a> {
    /// The run; networks of its model that have no weights get random ones, on the device.
    pub config: &'a AlignConfig,
    /// Iterations.
    pub repeats: usize,
    /// Whether to print JSON.
    pub json: bool,
    /// Worker threads of rewards.
    pub threads: usize,
    /// Where it runs.
    pub compute: Compute,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    device: String,
    precision: String,
    width: usize,
    height: usize,
    /// Image tokens.
    tokens: usize,
    /// Prompts, and images of each.
    prompts: usize,
    group: usize,
    /// Images at a time.
    batch: usize,
    /// Numbers that train.
    trained: f64,
    /// GB (10⁹ bytes) in use at the peak.
    peak_gb: Option<f64>,
    rows: Vec<Row>,
}

/// One iteration.
#[derive(Serialize)]
struct Row {
    rollout_s: f64,
    decode_s: f64,
    reward_s: f64,
    update_s: f64,
    /// Images that went through the network forward, and forward and backward.
    forward: f64,
    training: usize,
    /// Largest |log ρ| before the first update.
    log_ratio_first: Option<f64>,
}

/// Measures and prints.
///
/// # Errors
/// When the run's size does not fit its model, or nothing trains.
pub fn run(options: &Options<'_>) -> Result<()> {
    let Options { config, repeats, threads, compute, .. } = *options;
    let model = config.open(compute, &Group::alone(), Missing::Fill(Noise::new(0)))?;
    let size = config.group.rollout.latent_size(&model.pipeline)?;
    let rewards = Rewards::open(&config.group.rewards, threads, compute.device)?;
    let grid = config.group.rollout.grid(&model.pipeline.scheduler, &size);
    let mut algorithm = config.setting()?.open(grid);
    algorithm.begin(model.engine.trained());
    let mut optimizer = AdamW::new(config.optimizer.clone(), &[model.engine.trained()]);
    let group = &config.group;
    let sources = Sources { config: group, model: &model, rewards: &rewards, size, watch: &() };
    let rows = (0..repeats)
        .map(|index| once(config, &sources, &mut *algorithm, &mut optimizer, index))
        .collect::<Result<Vec<Row>>>()?;
    let factor = model.pipeline.vae.factor();
    let report = Report {
        device: format!("{:?}", compute.device),
        precision: device::precision_name(compute.kind).to_owned(),
        width: size.width * factor,
        height: size.height * factor,
        tokens: size.tokens(),
        prompts: group.prompts_per_iteration,
        group: group.group_size,
        batch: group.rollout.batch,
        trained: trained(&model),
        peak_gb: device::peak_bytes(compute.device).map(|bytes| bytes / 1e9),
        rows,
    };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

fn once(
    config: &AlignConfig,
    sources: &Sources<'_>,
    algorithm: &mut dyn Algorithm,
    optimizer: &mut AdamW,
    index: usize,
) -> Result<Row> {
    let numbered = || format!("iteration {}", index + 1);
    let Sources { config: group, model, .. } = *sources;
    let prompt = Prompt::new(PROMPT);
    let prompts = vec![&prompt; group.prompts_per_iteration];
    let rollout = algorithm.rollout(index)?;
    let forward = rollout.nfe(group.group_size);
    let experience = gather(sources, rollout, &prompts, index).with_context(numbered)?;
    let outcome = update::run(config, algorithm, sources, optimizer, &experience, None, &|| false)
        .with_context(numbered)?;
    ensure!(outcome.n_updates > 0, "{}: the rewards of every group are alike", numbered());
    algorithm.finish(model.engine.trained(), optimizer.n_steps())?;
    let [rollout_s, decode_s, reward_s] = experience.seconds;
    let images = (prompts.len() * group.group_size) as f64;
    Ok(Row {
        rollout_s,
        decode_s,
        reward_s,
        update_s: outcome.seconds,
        forward: forward * images + outcome.n_references as f64,
        training: outcome.n_passes,
        log_ratio_first: outcome.log_ratio_first,
    })
}

fn trained(model: &Model) -> f64 {
    model.engine.trained().masters().map(|master| master.numel() as f64).sum()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} in {}: {} prompts of {} images of {}x{}, {} at a time; {:.1} M numbers train; {} GB at the \
             peak\n\n   rollout s   decode s   reward s   update s   forward   training   first |log ratio|",
            self.device,
            self.precision,
            self.prompts,
            self.group,
            self.width,
            self.height,
            self.batch,
            self.trained / 1e6,
            self.peak_gb.map_or("?".to_owned(), |gb| format!("{gb:.1}")),
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:>12.3}{:>11.3}{:>11.3}{:>11.3}{:>10.0}{:>11}{:>20}",
                row.rollout_s,
                row.decode_s,
                row.reward_s,
                row.update_s,
                row.forward,
                row.training,
                row.log_ratio_first.map_or("none".to_owned(), |largest| format!("{largest:.1e}")),
            )?;
        }
        Ok(())
    }
}
