//! Comparing checkpoints: every prompt sampled from fixed seeds, scored by rewards and by judges no run
//! trains on.
//!
//! Images and scores stay in the output folder, under names that follow from all that they depend on: the
//! settings, the prompts, and the files, by name, size and time of change. What is there is not made
//! again. What a server answers, or another version of this program computes, leaves no such trace.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use cluster::Group;
use flow::checkpoint::write_atomically;
use flow::log;
use flow::prompts::Prompt;
use serde_json::json;

use self::contestant::Contestant;
use self::metric::Metric;
use self::record::Record;
use self::table::Column;
use crate::data::prompts;
use crate::group;
use crate::network::embeddings::Embeddings;
use crate::network::model::Model;
use crate::picture;
use crate::reward::RewardConfig;
use crate::run::align::Stopped;
use crate::run::config::AlignConfig;
use crate::run::interrupt;
use crate::run::progress::Progress;
use crate::run::report::sample;
use crate::tensor::device::{Compute, precision_name};

mod contestant;
mod metric;
mod record;
mod sheet;
mod stamp;
mod table;
mod votes;
mod wins;

/// Settings of a run that options say here.
pub(super) const OPTIONS: [(&str, &str); 3] =
    [("model", "--model"), ("prompts", "--prompts"), ("seed", "--seed")];

/// What to compare.
pub struct Options<'a> {
    /// Pipeline folders; a LoRA among them goes on the nearest pipeline before it.
    pub models: &'a [String],
    /// Prompts.
    pub prompts: &'a Path,
    /// Images a prompt.
    pub n_images: usize,
    /// Image j of prompt i of P starts from the noise of `seed` + i + j·P.
    pub seed: u64,
    /// Folder for `eval.json`, `eval.md`, `side-by-side.png` and a folder a contestant.
    pub out: &'a Path,
    /// Worker threads of rewards.
    pub threads: usize,
    /// Where tensors live.
    pub compute: Compute,
    /// Who shares the work; all see the same folders.
    pub ranks: Group,
}

/// Samples and scores what is not there yet; prints a Markdown table. Several ranks share batches and prompts,
/// and the first one reports.
///
/// # Errors
/// On all ranks when a model, the prompts or a metric fails, or the output cannot be written; [`Stopped`] when
/// asked to stop.
pub fn run(config: &AlignConfig, options: &Options<'_>) -> Result<()> {
    let outcome = compare(config, options);
    if let Err(error) = outcome.as_ref()
        && !error.is::<Stopped>()
    {
        // None waits for hours of the others' to hear of it.
        options.ranks.abort(&format!("{error:#}"));
    }
    outcome
}

fn compare(config: &AlignConfig, options: &Options<'_>) -> Result<()> {
    let ranks = &options.ranks;
    group::ranks::give_way(ranks, Some(options.out))?;
    let prompts = prompts::read(options.prompts)?;
    if let Some(folder) = &config.embeddings {
        Embeddings::open(folder)?.check(prompts.iter().map(|prompt| &*prompt.text))?;
    }
    let contestants = Contestant::all(options.models)?;
    let names: Vec<&str> = contestants.iter().map(|one| &*one.name).collect();
    let headers = contestant::short(&names);
    let configs: Vec<&RewardConfig> = config.group.rewards.iter().chain(&config.judges).collect();
    let mut metrics = Vec::new();
    for (i, config) in configs.iter().enumerate() {
        let name = &config.name;
        let is_new = configs[..i].iter().all(|other| other.name != *name);
        ensure!(is_new, "two rewards are named {name:?}");
        metrics.push(Metric::new(config, &prompts, options.n_images)?);
    }
    let keys: BTreeMap<String, String> =
        metrics.iter().map(|metric| (metric.config.name.clone(), metric.key.clone())).collect();
    let mut records = contestants
        .iter()
        .map(|one| {
            let settings = settings(config, options, one, &prompts)?;
            Record::open(options.out, one.last_name(), &settings, ranks.rank(), keys.clone())
        })
        .collect::<Result<Vec<Record>>>()?;
    for metric in &mut metrics {
        let size = config.group.rollout.size;
        metric.open_for(&records, options.threads, options.compute.device, size)?;
    }
    let mut held = None;
    let drawn = contestants.iter().zip(&records).try_for_each(|(contestant, record)| {
        let name = &contestant.name;
        held = draw(config, options, contestant, &prompts, record, held.take())
            .with_context(|| format!("cannot evaluate {name}"))?;
        Ok(())
    });
    drop(held);
    together(ranks, drawn)?;
    let scored = contestants.iter().zip(&mut records).try_for_each(|(contestant, record)| {
        let name = &contestant.name;
        metrics.iter().try_for_each(|metric| {
            metric.score(record, name, ranks).with_context(|| format!("cannot evaluate {name}"))
        })
    });
    together(ranks, scored)?;
    if !ranks.is_first() {
        return Ok(());
    }
    records.iter_mut().try_for_each(Record::gather)?;
    let columns = columns(&names, &records, &metrics);
    let names: Vec<&str> = configs.iter().map(|config| &*config.name).collect();
    let text = table::markdown(&columns, &names);
    write_atomically(&options.out.join("eval.md"), text.as_bytes())?;
    write_atomically(&options.out.join("eval.json"), &serde_json::to_vec_pretty(&columns)?)?;
    let sheet = sheet::draw(&headers, &prompts, &records, &columns, &configs)?;
    picture::save(&options.out.join("side-by-side.png"), &sheet)?;
    print!("{text}");
    Ok(())
}

/// What the records of the models called `names` came to.
fn columns(names: &[&str], records: &[Record], metrics: &[Metric<'_>]) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    for (name, record) in names.iter().zip(records) {
        let scores = metrics
            .iter()
            .filter_map(|metric| Some((metric.config.name.clone(), metric.scores(record)?)));
        columns.push(Column::new(name, scores.collect(), &columns));
    }
    columns
}

/// Waits for all ranks to have done their part.
///
/// # Errors
/// What the own part failed with; [`Stopped`] on all ranks where somebody was asked to stop.
fn together(ranks: &Group, part: Result<()>) -> Result<()> {
    let is_stopped = match part {
        Err(error) if error.is::<Stopped>() => true,
        part => part.map(|()| false)?,
    };
    if group::ranks::all(ranks, &is_stopped)?.contains(&true) {
        if ranks.is_first() {
            log::note("stopped: the same command continues");
        }
        bail!(Stopped);
    }
    Ok(())
}

/// Prints the win rates of a file of votes.
///
/// # Errors
/// When it is none.
pub fn votes(file: &Path) -> Result<()> {
    print!("{}", votes::markdown(file)?);
    Ok(())
}

/// All that the images of `contestant` follow from, but for their number.
fn settings(
    config: &AlignConfig,
    options: &Options<'_>,
    contestant: &Contestant,
    prompts: &[Prompt],
) -> Result<serde_json::Value> {
    let texts: Vec<&str> = prompts.iter().map(|prompt| &*prompt.text).collect();
    let mut files = contestant.stamps()?;
    if let Some(folder) = &config.embeddings {
        files.extend(stamp::of(folder)?);
    }
    Ok(json!({
        "files": files,
        "rollout": config.group.rollout,
        "seed": options.seed,
        "device": if options.compute.device.is_cuda() { "cuda" } else { "cpu" },
        "precision": precision_name(options.compute.kind),
        "prompts": texts,
    }))
}

/// Draws the images that `record` lacks, the images of a batch always together, so that each has the same
/// bits whenever it is drawn. Returns the last model that was needed.
fn draw(
    config: &AlignConfig,
    options: &Options<'_>,
    contestant: &Contestant,
    prompts: &[Prompt],
    record: &Record,
    held: Option<Model>,
) -> Result<Option<Model>> {
    let rollout = &config.group.rollout;
    let all: Vec<usize> = (0..prompts.len()).collect();
    let batches = (0..options.n_images)
        .flat_map(|image| all.chunks(rollout.batch).map(move |batch| (image, batch)));
    let (rank, world) = (options.ranks.rank(), options.ranks.world());
    let own: Vec<(usize, &[usize])> = batches.skip(rank).step_by(world).collect();
    let total: usize = own.iter().map(|(_, batch)| batch.len()).sum();
    let is_missing = |(image, batch): &(usize, &[usize])| {
        !batch.iter().all(|&prompt| record.has(prompt, *image))
    };
    let missing: Vec<(usize, &[usize])> = own.into_iter().filter(is_missing).collect();
    if missing.is_empty() {
        return Ok(held);
    }
    let model = contestant.load(held, config, options.compute)?;
    let size = rollout.latent_size(&model.pipeline)?;
    let plan = rollout.plan(&model.pipeline.scheduler, &size)?;
    let guidance = rollout.guidance(&model.pipeline)?;
    if model.embeddings.is_none() {
        prompts::tell_cut(&model.pipeline.dir, prompts.iter().map(|prompt| &*prompt.text))?;
    }
    let n_missing: usize = missing.iter().map(|(_, batch)| batch.len()).sum();
    let progress = Progress::new("sample", total, total - n_missing);
    for (image, batch) in missing {
        check_on(&options.ranks)?;
        let texts: Vec<&str> = batch.iter().map(|&prompt| &*prompts[prompt].text).collect();
        let seed = options.seed + (image * prompts.len() + batch[0]) as u64;
        let images = sample(&model, &texts, seed, &plan, &size, guidance, batch.len())?;
        for (&prompt, pixels) in batch.iter().zip(&images) {
            record.save(prompt, image, pixels)?;
        }
        progress.advance_by(batch.len(), &contestant.name);
    }
    Ok(Some(model))
}

/// Ends the work where someone asked for it, or another of `ranks` has failed.
fn check_on(ranks: &Group) -> Result<()> {
    if interrupt::asked() {
        bail!(Stopped);
    }
    Ok(ranks.check()?)
}
