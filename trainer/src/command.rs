//! The commands, and which of them the command line asks for.

use std::num::NonZero;

use anyhow::{Context, Result, bail, ensure};
use cluster::Topology;
use flow::checksums::Checksums;
use flow::log;
use flow::usage::Usage;

use self::args::{Cli, Command, ConfigCommand, SampleArgs, SourceArgs};
use crate::data::signs;
use crate::group::rollout::RolloutConfig;
use crate::network::lora::RANK;
use crate::network::{model, reference};
use crate::run::config::AlignConfig;
use crate::run::settings::{self, Source};
use crate::run::{align, interrupt};
use crate::tensor::device;

pub mod args;
pub mod bench;
pub mod compare;
mod config;
mod consolidate;
mod convert;
pub mod embed;
pub mod eval;
pub mod init;
pub mod plan;
pub mod pretrain;
mod published;
mod ranks;
pub mod reason;

pub use self::ranks::Failed;
pub mod sample;
pub mod score;

/// Does what the command line asks for.
///
/// # Errors
/// Whatever is wrong, in one line.
pub fn run(cli: &Cli) -> Result<()> {
    let place = match &cli.command {
        Command::Align { ranks, .. } | Command::Eval { ranks, .. } => {
            match ranks::place(ranks.processes)? {
                ranks::Place::Started => return Ok(()),
                ranks::Place::Here(topology) => topology,
            }
        }
        _ => None,
    };
    cli.says.open().map_err(Usage)?;
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let n_local = place.as_ref().map_or(1, |topology| topology.local_world);
    let threads = cli.threads.unwrap_or((cores / n_local).max(1));
    tch::set_num_threads(threads as i32);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    let device = ranks::device(&cli.device, place.as_ref());
    computes_nothing(cli)?;
    let compute = device::compute(&device, &cli.precision)?;
    let is_patient = matches!(
        cli.command,
        Command::Align { .. }
            | Command::Pretrain { .. }
            | Command::Eval { .. }
            | Command::Compare { .. }
            | Command::Embed { .. }
            | Command::Init { .. }
    );
    interrupt::listen(is_patient, ranks::answers(place.as_ref()))?;
    carry_out(cli, place.as_ref(), threads, compute)
}

/// Refuses to be told on what to compute where nothing is computed.
fn computes_nothing(cli: &Cli) -> Result<()> {
    let name = match &cli.command {
        Command::Config { .. } => "config",
        Command::Consolidate { .. } => "consolidate",
        Command::Convert { .. } => "convert",
        Command::Init { .. } => "init",
        Command::Plan { .. } => "plan",
        Command::Signs { .. } => "signs",
        _ => return Ok(()),
    };
    // That is where they do what they do.
    let is_here = ["auto", "cpu"].contains(&&*cli.device);
    for (option, value, is_meant) in [
        ("--device", &cli.device, is_here),
        ("--precision", &cli.precision, cli.precision == "auto"),
    ] {
        let why = || Usage(format!("{option} {value}: {name} computes no network, leave it out"));
        ensure!(is_meant, why());
    }
    Ok(())
}

/// Refuses settings that an option of `command` says.
fn said_by_options(command: &str, settings: &[String], options: &[(&str, &str)]) -> Result<()> {
    for (key, option) in options {
        if let Some(setting) = settings.iter().find(|setting| settings::key(setting) == *key) {
            bail!(Usage(format!("--set {setting}: {command} reads {option} in its place")));
        }
    }
    Ok(())
}

fn carry_out(
    cli: &Cli,
    place: Option<&Topology>,
    threads: usize,
    compute: device::Compute,
) -> Result<()> {
    match &cli.command {
        Command::Align { .. } => align(&cli.command, place, threads, compute),
        Command::Config { command } => match command {
            ConfigCommand::List => {
                config::list();
                Ok(())
            }
            ConfigCommand::Show { source } => config::show(&of(source), &source.settings),
            ConfigCommand::Explain { key } => config::explain(key.as_deref()),
        },
        Command::Pretrain { source, resume } => {
            let config =
                settings::read(&of(source), &pretrain::PRETRAIN_PRESETS, &source.settings)?;
            pretrain::run(&config, *resume, f32_device("pretrain", &cli.precision, compute)?)
        }
        Command::Eval { .. } => evaluate(&cli.command, place, threads, compute),
        Command::Score { images, prompt, prompts, source } => {
            said_by_options("score", &source.settings, &[("prompts", "--prompts")])?;
            let config = settings::read(&of(source), &settings::ALIGN_PRESETS, &source.settings)?;
            let shown = match (prompt, prompts) {
                (Some(text), _) => score::Shown::All(text),
                (None, Some(file)) => score::Shown::Each(file),
                (None, None) => bail!("--prompt or --prompts is missing"),
            };
            let device = f32_device("score", &cli.precision, compute)?;
            score::run(&config, &score::Options { images, shown, threads, device })
        }
        Command::Compare { jobs, source } => {
            let config = settings::read(&of(source), &compare::COMPARE_PRESETS, &source.settings)?;
            let on_gpus = if compute.device.is_cuda() { device::n_gpus() } else { None };
            let jobs = jobs.or(on_gpus).unwrap_or(threads);
            let (device, precision) = (&cli.device, &cli.precision);
            compare::run(&config, &compare::Options { jobs, device, precision })
        }
        Command::Sample(args) => sample::run(&sample_options(args, compute)),
        Command::Reference { model } => {
            let loading = model::Loading::to_sample(compute, false);
            let loaded = model::Model::load(model, loading)?;
            reference::write(&loaded, model)?;
            Checksums::renew(model, flow::reference::FILE)?;
            println!("{}", model.join(flow::reference::FILE).display());
            Ok(())
        }
        Command::Embed { model, prompts, import, out } => match (import, model, prompts) {
            (Some(list), ..) => embed::import(list, out),
            (None, Some(model), Some(prompts)) => {
                embed::run(&embed::Options { model, prompts, out, compute })
            }
            _ => unreachable!("the command line asks for one or the other"),
        },
        Command::Plan { .. } | Command::Bench { .. } => measure(&cli.command, threads, compute),
        Command::Consolidate { .. }
        | Command::Convert { .. }
        | Command::Init { .. }
        | Command::Signs { .. } => make(&cli.command),
    }
}

fn align(
    command: &Command,
    place: Option<&Topology>,
    threads: usize,
    compute: device::Compute,
) -> Result<()> {
    let Command::Align { source, resume, dry_run, record_update, .. } = command else {
        unreachable!("called for this");
    };
    let mut run = settings::align(&of(source), &source.settings)?;
    let output = (!dry_run).then_some(&*run.config.output);
    let ranks = ranks::join(place, &run.config, compute, output)?;
    run.notes.iter().for_each(|note| log::note(note));
    plan::settle(&mut run.config, place, compute, &ranks)?;
    if *dry_run {
        return if ranks.is_first() { plan::dry(&run.config, compute) } else { Ok(()) };
    }
    let (resume, record_update) = (*resume, record_update.clone());
    let options = align::Options { resume, record_update, threads, compute, ranks };
    align::run(&run.config, &options)
}

fn evaluate(
    command: &Command,
    place: Option<&Topology>,
    threads: usize,
    compute: device::Compute,
) -> Result<()> {
    let Command::Eval { models, prompts, n_images, seed, out, source, votes, .. } = command else {
        unreachable!("called for this");
    };
    if let Some(votes) = votes {
        return eval::votes(votes);
    }
    let prompts = prompts.as_deref().context("--prompts is missing")?;
    said_by_options("eval", &source.settings, &eval::OPTIONS)?;
    let config: AlignConfig =
        settings::read(&of(source), &settings::ALIGN_PRESETS, &source.settings)?;
    let ranks = ranks::meet(place, &config, compute)?;
    let (n_images, seed) = (*n_images, *seed);
    eval::run(
        &config,
        &eval::Options { models, prompts, n_images, seed, out, threads, compute, ranks },
    )
}

/// What a model costs, counted or measured.
fn measure(command: &Command, threads: usize, compute: device::Compute) -> Result<()> {
    match command {
        Command::Plan { model, text_tokens, lora_rank, utilisation, source } => {
            let of_lora = lora_rank.map(|_| ("lora.rank", "--lora-rank"));
            let options: Vec<_> = [("model", "--model")].into_iter().chain(of_lora).collect();
            said_by_options("plan", &source.settings, &options)?;
            let run = settings::align(&of(source), &source.settings)?;
            let own = run.config.lora.as_ref().map(|lora| lora.rank);
            plan::run(&plan::Options {
                config: &run.config,
                pipeline: &published::open(model)?,
                text_tokens: *text_tokens,
                lora_rank: lora_rank.or(own).unwrap_or(RANK),
                utilisation: *utilisation,
            })
        }
        Command::Bench { iteration: Some(preset), model, settings, repeats, json, .. } => {
            said_by_options("bench", settings, &[("model", "--model")])?;
            let own = [format!("model={model}")];
            let settings = [&settings[..], &own].concat();
            let run = settings::align(&Source::Preset(preset), &settings)?;
            bench::iteration::run(&bench::iteration::Options {
                config: &run.config,
                repeats: *repeats,
                json: *json,
                threads,
                compute,
            })
        }
        Command::Bench {
            model,
            sizes,
            batch,
            text_tokens,
            lora_rank,
            plain,
            stream,
            repeats,
            json,
            ..
        } => bench::run(&bench::Options {
            pipeline: &published::open(model)?,
            sizes,
            batch: *batch,
            text_tokens: *text_tokens,
            lora_rank: *lora_rank,
            plain: *plain,
            stream: *stream,
            repeats: *repeats,
            json: *json,
            compute,
        }),
        _ => unreachable!("called for these"),
    }
}

/// Files for other commands.
fn make(command: &Command) -> Result<()> {
    match command {
        Command::Consolidate { from, out, shard_gb } => {
            consolidate::run(from, out, (shard_gb * 1e9) as usize)
        }
        Command::Convert { from, to, like } => convert::run(from, to, like.as_deref()),
        Command::Init { like, out, seed, zero, shard_gb } => init::run(&init::Options {
            like,
            out,
            seed: *seed,
            zero: *zero,
            max_shard_bytes: (shard_gb * 1e9) as usize,
        }),
        Command::Signs { out, n } => {
            let config = signs::SignsConfig { n_images: *n, ..signs::SignsConfig::default() };
            signs::write(out, &config)
                .with_context(|| format!("cannot write {}", out.display()))?;
            println!("{}", out.display());
            Ok(())
        }
        _ => unreachable!("called for these"),
    }
}

/// The device of `command`, which computes in f32.
///
/// # Errors
/// When another precision is asked for.
fn f32_device(command: &str, precision: &str, compute: device::Compute) -> Result<tch::Device> {
    ensure!(
        precision != "bf16",
        Usage(format!("--precision bf16: {command} computes in f32, leave it out"))
    );
    Ok(compute.device)
}

fn of(args: &SourceArgs) -> Source<'_> {
    match (&args.preset, &args.config) {
        (_, Some(path)) => Source::File(path),
        (preset, None) => Source::Preset(preset.as_deref().unwrap_or_default()),
    }
}

fn sample_options(args: &SampleArgs, compute: device::Compute) -> sample::Options<'_> {
    sample::Options {
        model: &args.model,
        prompt: &args.prompt,
        n: args.n,
        seed: args.seed,
        rollout: RolloutConfig {
            solver: args.solver.clone(),
            steps: args.steps,
            shift: args.shift,
            guidance: args.guidance,
            size: args.width.zip(args.height).map(|(width, height)| [width, height]),
            batch: args.n.max(1),
        },
        noise: args.noise.as_deref(),
        latents_out: args.latents_out.as_deref(),
        out: &args.out,
        loras: &args.loras,
        stream: args.stream,
        compute,
    }
}
