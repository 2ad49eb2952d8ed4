//! What was typed after `ng-sample serve`, and the run that it means.

use std::{
    fs,
    future::pending,
    io::{Write, stdout},
    net::SocketAddr,
    path::{Path, PathBuf},
    process,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use flow::{checkpoint::read_bounded, latents::MAX_PIXELS, usage::Usage};
use serde_json::json;
use tokio::{
    net::TcpListener,
    runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{
    engine::{Engine, Memory, Options},
    export::Export,
    runtime::RuntimeArgs,
};

use super::{
    ask::{Card, Limits},
    guard::Guard,
    listen,
    log::Log,
    service::{Patience, Service, Settings},
    store::Keep,
    worker,
};

/// The variable that may hold the token, where a file is unhandy.
const TOKEN: &str = "NG_SAMPLE_TOKEN";
/// Fewest bytes of a token.
const MIN_TOKEN: usize = 16;

/// Images that share a call of the network where that changes none of them.
const BATCH: usize = 4;

/// Arguments of `serve`.
#[derive(Clone, Debug, Args)]
#[command(after_help = ADDRESSES)]
pub struct ServeArgs {
    /// Folder that `ng-export` or Optimum wrote; NAME is what clients call it [default: the folder's].
    /// Repeat it for more models; the first is the default.
    #[arg(short, long = "model", value_name = "[NAME=]DIR", required = true)]
    pub models: Vec<String>,

    /// Address and port; port 0 takes a free one.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// File with the token that clients must bring; or the variable NG_SAMPLE_TOKEN.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// Name that clients may call this server by, besides this machine's loopback names: what a proxy
    /// passes on as Host. Repeat it for more.
    #[arg(long = "allow-host", value_name = "NAME")]
    pub allow_hosts: Vec<String>,

    /// Images that may wait; a request beyond that gets 429.
    #[arg(long, value_name = "N", default_value_t = 64,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub queue: u32,

    /// Waiting images of one size and plan that may share the calls of the network [default: 4 where
    /// that leaves an image's bits alone, which is on the CPU with f32 weights, and 1 elsewhere].
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub batch: Option<u16>,

    /// Most images of a request.
    #[arg(long, value_name = "N", default_value_t = 10,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub max_images: u16,

    /// Most steps of a request; one that asks for no number gets these at most, too.
    #[arg(long, value_name = "N", default_value_t = 100,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub max_steps: u16,

    /// Most pixels of an image.
    #[arg(long, value_name = "N", default_value_t = 2048 * 2048,
          allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..=MAX_PIXELS as i64))]
    pub max_pixels: u32,

    /// Seconds that an ended job can be asked for.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, allow_negative_numbers = true)]
    pub keep: u32,

    /// Megabytes of ended jobs' images that are kept.
    #[arg(long, value_name = "MB", default_value_t = 256, allow_negative_numbers = true)]
    pub keep_megabytes: u32,

    /// Seconds that accepted work may take when the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, allow_negative_numbers = true)]
    pub grace: u32,

    /// Folder of LoRAs that clients may name; the models need slots for them.
    #[arg(long, value_name = "DIR")]
    pub loras: Option<PathBuf>,

    #[command(flatten)]
    pub runtime: RuntimeArgs,

    /// Write prompts and seeds into the log.
    #[arg(long)]
    pub log_prompts: bool,
}

const ADDRESSES: &str = "\
On a loopback address only requests to this machine's own names are served, and only pages of this
server itself may send them. Any other address, and --allow-host, need a token.

SIGTERM or Ctrl-C: no new work is taken, what was accepted is answered, the program ends.";

/// Opens the models and serves them until a signal.
///
/// # Errors
/// [`Usage`] for arguments that contradict each other; else what is wrong with a model, the token's file
/// or the address.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let guard = guard(args)?;
    if let Some(folder) = &args.loras {
        ensure!(folder.is_dir(), "--loras {} is no folder", folder.display());
    }
    let options = args.runtime.options(Memory::Keep)?;
    let cards: Vec<Card> =
        args.models.iter().map(|typed| card(typed, &options)).collect::<Result<_>>()?;
    for (index, card) in cards.iter().enumerate() {
        if cards[..index].iter().any(|earlier| earlier.name == card.name) {
            let message = format!("two models are named {:?}; give NAME=DIR", card.name);
            bail!(Usage(message));
        }
        check_default_size(card, args.max_pixels as usize)?;
    }
    let options = Options { batch: batch(args, &cards, &options), ..options };
    let listener = std::net::TcpListener::bind(args.listen)
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let log = Log { silent: false, prompts: args.log_prompts };
    for notice in notices(args, &cards, &options) {
        log.event("notice", json!({"notice": notice}));
    }
    let engines = open(&cards, &options)?;
    let precision = engines.first().map(Engine::precision).unwrap_or_default();
    let service = Service::new(settings(args, cards, guard, precision, log));
    let worker = worker::start(service.clone(), engines)?;
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let grace = Duration::from_secs(args.grace.into());
    let names: Vec<&str> = service.cards.iter().map(|card| card.name.as_str()).collect();
    service.log.event("listening", json!({"address": address.to_string(), "models": names}));
    writeln!(stdout(), "http://{address}")?;
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener)?;
        listen::serve(listener, service.clone(), told_to_stop(), grace).await
    })?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    // The queue is closed and empty, and what was running has ended or was cancelled.
    let _ = worker.join();
    service.log.event("stopped", json!({}));
    Ok(())
}

/// A request that gives no size must not be refused for the size.
fn check_default_size(card: &Card, max_pixels: usize) -> Result<()> {
    let side = card.export.default_side();
    let pixels = side.saturating_mul(side);
    if pixels > max_pixels {
        let message = format!(
            "--max-pixels {max_pixels} is below the {side}x{side} that model {} makes where no size \
             is given: give at least {pixels}",
            card.name
        );
        bail!(Usage(message));
    }
    Ok(())
}

/// What a person should know before networks are opened.
fn notices(args: &ServeArgs, cards: &[Card], options: &Options) -> Vec<String> {
    let unused = args.loras.as_ref().filter(|_| !cards.iter().any(Card::has_slots));
    let unused = unused.map(|folder| {
        format!(
            "--loras {} has no effect: no model that is served has slots for LoRAs; export one with \
             `ng-export --lora-slots`",
            folder.display()
        )
    });
    args.runtime.notices(options).into_iter().chain(unused).collect()
}

/// Images that share a call of the network: as typed, else several where their bits stay the same.
fn batch(args: &ServeArgs, cards: &[Card], options: &Options) -> usize {
    let exactly = |card: &Card| options.batches_exactly(&card.export.description.precision);
    let default = if cards.iter().all(exactly) { BATCH } else { 1 };
    args.batch.map_or(default, usize::from)
}

/// Engines of all models, every network loaded.
fn open(cards: &[Card], options: &Options) -> Result<Vec<Engine>> {
    let open = |card: &Card| {
        let mut engine = Engine::closed(card.export.clone(), options);
        engine.open_all().with_context(|| format!("cannot open model {}", card.name))?;
        Ok(engine)
    };
    cards.iter().map(open).collect()
}

fn settings(
    args: &ServeArgs,
    cards: Vec<Card>,
    guard: Guard,
    precision: String,
    log: Log,
) -> Settings {
    Settings {
        cards,
        loras: args.loras.clone(),
        provider: args.runtime.provider.clone(),
        precision,
        queue: args.queue as usize,
        keep: Keep {
            time: Duration::from_secs(args.keep.into()),
            bytes: (args.keep_megabytes as usize) << 20,
        },
        limits: Limits {
            steps: args.max_steps.into(),
            images: args.max_images.into(),
            pixels: args.max_pixels as usize,
        },
        patience: Patience::default(),
        guard,
        log,
    }
}

/// The first SIGTERM or Ctrl-C; a second ends the program at once.
async fn told_to_stop() {
    let [Ok(mut terminate), Ok(mut interrupt)] =
        [SignalKind::terminate(), SignalKind::interrupt()].map(signal)
    else {
        return pending().await;
    };
    let mut told = async move || {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    told().await;
    tokio::spawn(async move {
        told().await;
        process::exit(130);
    });
}

fn guard(args: &ServeArgs) -> Result<Guard> {
    let token = token(args)?;
    let loopback = args.listen.ip().to_canonical().is_loopback();
    if token.is_none() && !loopback {
        bail!(Usage(format!(
            "--listen {} can be reached from other machines: give a token with --token-file or \
             {TOKEN}, or listen on 127.0.0.1",
            args.listen
        )));
    }
    if token.is_none() && !args.allow_hosts.is_empty() {
        bail!(Usage(format!(
            "--allow-host lets requests from elsewhere in: give a token with --token-file or {TOKEN}"
        )));
    }
    Ok(Guard { loopback, hosts: args.allow_hosts.clone(), token })
}

fn token(args: &ServeArgs) -> Result<Option<String>> {
    let (place, text) = match &args.token_file {
        Some(file) => {
            let bytes = read_bounded(file).context("--token-file")?;
            let text = String::from_utf8(bytes)
                .with_context(|| format!("--token-file {}", file.display()))?;
            (file.display().to_string(), text)
        }
        None => match std::env::var(TOKEN) {
            Ok(text) => (TOKEN.to_owned(), text),
            Err(_) => return Ok(None),
        },
    };
    let token = text.trim();
    let plain = token.bytes().all(|byte| byte.is_ascii_graphic());
    ensure!(
        token.len() >= MIN_TOKEN && plain,
        "{place}: a token has at least {MIN_TOKEN} printable characters and no spaces"
    );
    Ok(Some(token.to_owned()))
}

/// `[NAME=]DIR`.
fn card(typed: &str, options: &Options) -> Result<Card> {
    let (name, folder) = match typed.split_once('=') {
        Some((name, folder)) if !name.contains('/') => (Some(name), Path::new(folder)),
        _ => (None, Path::new(typed)),
    };
    let export = Export::open(folder, options.text_tokens)?;
    for notice in export.pipeline.notices() {
        Log::default().event("notice", json!({"notice": notice}));
    }
    let name = name.unwrap_or(&export.name).to_owned();
    if name.is_empty() || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        bail!(Usage(format!("{name:?} is no name for a model: give NAME=DIR without spaces")));
    }
    let modified = fs::metadata(folder.join("model_index.json")).and_then(|file| file.modified());
    let created = modified.ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(Card { name, created: created.unwrap_or_default().as_secs(), export: Arc::new(export) })
}
