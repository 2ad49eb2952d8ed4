//! Engines of TensorRT for RTX out of graphs that `ng-export --target tensorrt-rtx` wrote; with the feature
//! `enterprise`, of data-centre TensorRT out of those of `--target tensorrt`. Which of both is decided when this
//! is compiled, because the binding is.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;
use serde_json::json;
use trtx::interfaces::MonitorProgress;
use trtx::{
    Builder, LogHandler, Logger, OnnxParser, OptProfileSelector, ProfilingVerbosity, Severity,
    trtx_sys,
};

#[cfg(not(feature = "enterprise"))]
#[path = "consumer.rs"]
mod library;
#[cfg(feature = "enterprise")]
#[path = "data_centre.rs"]
mod library;

use library::{Architecture, LIBRARIES, MAGIC, PACKAGE, architecture};

/// Why a layer's line of the builder's log is one: these two stand in it.
const LAYER: [&str; 2] = ["Name: ", ", LayerType: "];

/// Builds engines of one exported graph with TensorRT for RTX, for consumer GPUs that need not be there (or, built
/// with the feature `enterprise`, with data-centre TensorRT for the GPU that is).
///
/// Beside the graph come model.smN.plan and model.smN.json, a report: bytes, seconds, profile, layers by kind.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ng-engine",
    version,
    after_help = "`ng-export wrap PLAN --graph GRAPH --architecture N` makes an ONNX model of an engine.\n\
                  Exit codes: 0 built, 1 failed, 2 wrong usage."
)]
pub struct Args {
    /// The graph, of `ng-export --target tensorrt-rtx`
    #[arg(value_name = "MODEL.onnx")]
    pub graph: PathBuf,
    /// Compute capabilities, separated by commas: 75, 80, 86, 89 or 120
    #[arg(long, value_name = "SM", value_delimiter = ',', required = true)]
    pub architecture: Vec<u32>,
    /// Folder of the library
    #[arg(long, value_name = "DIR")]
    pub library: PathBuf,
    /// Sides in pixels of the smallest, the usual and the largest image
    #[arg(
        long,
        value_name = "MIN,USUAL,MAX",
        value_delimiter = ',',
        num_args = 1,
        default_value = "256,1024,1024"
    )]
    pub size: Vec<i64>,
    /// Most images at once
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: i64,
    /// Text tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub text: i64,
    /// Pixels that a latent cell covers across; an image token is two cells
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub cell: i64,
}

/// Builds every engine asked for; a line about each.
///
/// # Errors
/// When an architecture is none of TensorRT for RTX, the library is missing or of another version, a graph is
/// not understood, or a file cannot be written.
pub fn build(args: &Args) -> Result<Vec<String>> {
    let targets = args.architecture.iter().map(|&sm| Ok((sm, architecture(sm)?)));
    let targets = targets.collect::<Result<Vec<_>>>()?;
    let &[smallest, usual, largest] = args.size.as_slice() else {
        bail!("--size: three sides are needed, such as 256,1024,1024");
    };
    ensure!(
        0 < smallest && smallest <= usual && usual <= largest,
        "--size: {smallest}, {usual}, {largest} do not rise"
    );
    ensure!(args.graph.is_file(), "{}: no such file", args.graph.display());
    load(&args.library)?;
    targets.into_iter().map(|(sm, architecture)| engine(args, sm, architecture)).collect()
}

fn load(folder: &Path) -> Result<()> {
    for name in LIBRARIES {
        ensure!(
            folder.join(name).is_file(),
            "{} holds no {name}: install {PACKAGE} and give the folder of its libraries",
            folder.display()
        );
    }
    // Without a driver some of them end the process.
    library::check_driver()?;
    let [library, parser] = LIBRARIES.map(|name| folder.join(name));
    let failed = |path: &Path| format!("cannot load {}", path.display());
    trtx::dynamically_load_tensorrt(Some(&library)).with_context(|| failed(&library))?;
    trtx::dynamically_load_tensorrt_onnxparser(Some(&parser)).with_context(|| failed(&parser))
}

/// What the library said.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Heard>>);

#[derive(Default)]
struct Heard {
    errors: Vec<String>,
    layers: BTreeMap<String, usize>,
}

impl LogHandler for Said {
    fn log(&self, severity: Severity, message: &str) {
        let Ok(mut heard) = self.0.lock() else { return };
        if matches!(severity, Severity::Error | Severity::InternalError) {
            heard.errors.push(message.lines().next().unwrap_or_default().to_owned());
        }
        for line in message.lines() {
            if let Some((_, kind)) = line.split_once(LAYER[1]).filter(|_| line.contains(LAYER[0])) {
                let kind = kind.split(',').next().unwrap_or_default();
                *heard.layers.entry(kind.to_owned()).or_default() += 1;
            }
        }
    }
}

/// Tells of phases on standard error.
struct Phases;

impl MonitorProgress for Phases {
    fn phase_start(&self, phase: &str, _parent: Option<&str>, n_steps: i32) {
        eprintln!("{phase}: {n_steps} steps");
    }

    fn step_complete(&self, _phase: &str, _step: i32) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn phase_finish(&self, _phase: &str) {}
}

fn engine(args: &Args, sm: u32, architecture: Architecture) -> Result<String> {
    let (start, said) = (Instant::now(), Said::default());
    let graph = args.graph.display();
    let why = |what: &str| -> anyhow::Error {
        let heard = said.0.lock().map(|heard| heard.errors.join("; ")).unwrap_or_default();
        anyhow!("{graph}: {what} for sm_{sm}: {heard}")
    };
    let logger = Logger::new(said.clone())?;
    let mut builder = Builder::new(&logger)
        .map_err(|_| anyhow!("{}: not the library of {PACKAGE}", args.library.display()))?;
    let network = builder.create_network(0)?;
    let mut config = builder.create_config()?;
    let mut parser = OnnxParser::new(network, &logger)?;
    let path = args.graph.to_str().context("the graph's path is no UTF-8")?;
    parser.parse_from_file(path, 0).map_err(|_| why("not understood"))?;
    let mut profile = builder.creata_optimization_profile()?;
    let mut shapes = BTreeMap::new();
    for index in 0..parser.network().nb_inputs() {
        let input = parser.network().input(index)?;
        let (name, open) = (input.name(parser.network())?, input.dimensions(parser.network())?);
        let of = |batch, side| -> Result<Vec<i64>> {
            let known = axes(args, &name, batch, side)?;
            ensure!(known.len() == open.len(), "{graph}: input {name} has {} axes", open.len());
            Ok(open.iter().zip(known).map(|(&n, k)| if n < 0 { k } else { n }).collect())
        };
        let choices = [
            (OptProfileSelector::kMIN, 1, args.size[0]),
            (OptProfileSelector::kOPT, 1, args.size[1]),
            (OptProfileSelector::kMAX, args.batch, args.size[2]),
        ];
        let mut of_input = Vec::new();
        for (selector, batch, side) in choices {
            let shape = of(batch, side)?;
            let mut dims = trtx_sys::Dims64 { nbDims: shape.len() as i32, d: [0; 8] };
            dims.d[..shape.len()].copy_from_slice(&shape);
            profile.set_dimensions(&name, selector, &dims)?;
            of_input.push(shape);
        }
        shapes.insert(name, of_input);
    }
    config.add_optimization_profile(&mut profile)?;
    library::build_for(architecture, &mut config)?;
    config.set_profiling_verbosity(ProfilingVerbosity::kDETAILED);
    config.set_progress_monitor(Box::new(Phases))?;
    let built = builder.build_serialized_network(parser.network_mut(), &mut config);
    let built = built.map_err(|_| why("no engine"))?;
    ensure!(built.starts_with(MAGIC), "{graph}: what was built is no engine of {PACKAGE}");
    library::check_header(&logger, &built).with_context(|| format!("{graph}: sm_{sm}"))?;
    let seconds = start.elapsed().as_secs_f64();
    let layers = said.0.lock().map(|heard| heard.layers.clone()).unwrap_or_default();
    let report = json!({
        "architecture": sm, "library": PACKAGE, "bytes": built.len(), "seconds": seconds,
        "profile": shapes, "layers": layers,
    });
    write(&args.graph.with_extension(format!("sm{sm}.plan")), &built)?;
    let text = serde_json::to_vec_pretty(&report)?;
    write(&args.graph.with_extension(format!("sm{sm}.json")), &text)?;
    let kinds: Vec<String> = layers.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    Ok(format!(
        "sm_{sm}: {:.1} MB in {seconds:.1} s; {}",
        built.len() as f64 / 1e6,
        kinds.join(", ")
    ))
}

/// What open axes of an input are at `batch` images of `side` pixels.
fn axes(args: &Args, input: &str, batch: i64, side: i64) -> Result<Vec<i64>> {
    let (cells, text) = (side / args.cell, args.text);
    let tokens = (cells / 2) * (cells / 2);
    Ok(match input {
        "hidden_states" => vec![batch, tokens, 0],
        "encoder_hidden_states" => vec![batch, text, 0],
        "pooled_projections" => vec![batch, 0],
        "timestep" | "guidance" => vec![batch],
        "txt_ids" => vec![text, 3],
        "img_ids" => vec![tokens, 3],
        "input_ids" => vec![batch, text],
        "latent_sample" => vec![batch, 0, cells, cells],
        "sample" => vec![batch, 3, side, side],
        _ => bail!("unknown input {input}: export without --lora-slots"),
    })
}

/// Writes beside, then renames.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    written.with_context(|| {
        let _ = fs::remove_file(&partial);
        format!("cannot write {}", path.display())
    })
}
