//! What was typed.
#![expect(clippy::doc_markdown, reason = "these comments are the help text")]

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, RangedI64ValueParser, TypedValueParser};
use clap::{Parser, ValueEnum};
use flow::pipeline::Component;
use manual::says::Says;

use crate::element::Float;
use crate::export::Request;
use crate::external::Placement;
use crate::part::Part;
use crate::precision::{BLOCK, BLOCKS, Choice, Modulation, Precision, VAE};
use crate::target::{Attention, Target};
use crate::verify::Asked;
use crate::verify::pictures::{MAX_PICTURES, MAX_PSNR, MAX_SIDE};

/// Exports a FLUX checkpoint to ONNX.
///
/// Reads a diffusers pipeline folder and writes the folder that Hugging Face Optimum would write for
/// it: text_encoder, text_encoder_2, transformer, vae_decoder and vae_encoder, each with model.onnx
/// (open batch, token and image sizes, f32 inputs and outputs) and its weights, the configs, tokenizers
/// and scheduler. `ng-sample --model DIR` makes images from it. A table of what was written goes to standard
/// output.
#[derive(Clone, Debug, Parser)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag")]
#[command(
    name = "ng-export",
    version,
    after_help = "Other commands: ng-export verify, ng-export inspect, ng-export wrap (each with --help).\n\
                  Exit codes: 0 exported, 1 failed and left nothing behind, 2 wrong usage, 130 interrupted."
)]
pub struct Args {
    /// The pipeline folder: model_index.json, transformer/, vae/, text_encoder/, ...
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// The folder to make; it appears when it is complete
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Make these graphs alone, separated by commas; by default all
    #[arg(long, value_name = "PART", value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Say what would be written and how long that would take; write nothing
    #[arg(long, conflicts_with_all = ["verify", "resume"])]
    dry_run: bool,
    /// When interrupted, leave what is written, and go on with what an interrupted export of the same files and
    /// options left. Without it an interrupted export leaves nothing
    #[arg(long)]
    resume: bool,
    /// Merge the adapters of a LoRA file or folder, whoever trained it; repeatable, one after the other
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_parser = flow::lora::scaled_path)]
    loras: Vec<(PathBuf, f64)>,
    /// What runs the export
    #[arg(long, value_name = "TARGET", value_enum, default_value_t)]
    target: Target,
    /// How weights are stored
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    precision: Precision,
    #[arg(long, value_name = "N", help = block_size())]
    block_size: Option<usize>,
    /// How modulation layers (norm*.linear) are stored where others are quantised
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    modulation: Modulation,
    /// Type of activations and of what is not quantised; by default the target's
    #[arg(long, value_name = "TYPE", value_enum)]
    activations: Option<Float>,
    /// Type of the autoencoder; by default f32
    #[arg(long, value_name = "TYPE", value_parser = vae())]
    vae: Option<Float>,
    /// Another form of attention than the target's
    #[arg(long, value_name = "FORM", value_enum)]
    attention: Option<Attention>,
    /// Give every layer of the transformer inputs for an adapter, which need not be given
    #[arg(long)]
    lora_slots: bool,
    /// Copy weights that could stay in the checkpoint's files, so that the folder stands alone
    #[arg(long)]
    copy_weights: bool,
    /// Leave weights in the checkpoint's files, linked into the folder, wherever they can be used as they
    /// are; by default in files of 1 GiB and more (Python's onnx refuses links, runtimes do not)
    #[arg(long, conflicts_with = "copy_weights")]
    link_weights: bool,
    /// Run every block of every graph in ONNX Runtime and the checkpoint in plain Rust, write both's
    /// differences into the folder, and fail when one is beyond its limit
    #[arg(long)]
    verify: bool,
    #[arg(long, value_name = "X", requires = "verify", value_parser = error(), help = format!(
        "Largest error, as a share of the largest value, that passes; by default {}",
        of_each(|precision| precision.max_error().to_string())
    ))]
    max_error: Option<f32>,
    #[arg(long, value_name = "N", requires = "verify", value_parser = pictures(), help = format!(
        "Pictures of fixed prompts that --verify makes by export and checkpoint to compare; by default \
         {MAX_PICTURES} where weights are lossy and the checkpoint is small enough for plain Rust, of {MAX_SIDE} \
         pixels at most"
    ))]
    pictures: Option<u8>,
    #[arg(long, value_name = "DB", requires = "verify", value_parser = psnr(), help = format!(
        "Least PSNR of a picture that passes; by default {}",
        of_each(|precision| precision.limits().min_psnr.to_string())
    ))]
    min_psnr: Option<f64>,
    #[arg(long, value_name = "X", requires = "verify", value_parser = gmsd(), help = format!(
        "Largest GMSD of a picture (0 is none, 0.35 all is lost) that passes; by default {}",
        of_each(|precision| precision.limits().max_gmsd.to_string())
    ))]
    max_gmsd: Option<f64>,
    /// Replace an earlier export
    #[arg(long)]
    force: bool,
    /// Threads of ONNX Runtime under --verify; by default one a processor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// How much is said
    #[command(flatten)]
    pub says: Says,
}

/// Compares an export with the checkpoint it was made from, block by block, and its files with SHA256SUMS.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ng-export verify",
    bin_name = "ng-export verify",
    after_help = "Exit codes: 0 within its limits, 1 not, 2 wrong usage."
)]
pub struct Verify {
    /// The export
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// The checkpoint
    #[arg(long, value_name = "CHECKPOINT")]
    pub checkpoint: PathBuf,
    /// The adapters that were merged, as they were given to the export
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_parser = flow::lora::scaled_path)]
    pub loras: Vec<(PathBuf, f64)>,
    /// Another limit than the export's own
    #[arg(long, value_name = "X", value_parser = error())]
    pub max_error: Option<f32>,
    /// Pictures to make and compare, as in an export
    #[arg(long, value_name = "N", value_parser = pictures())]
    pub pictures: Option<u8>,
    /// Least PSNR of a picture that passes
    #[arg(long, value_name = "DB", value_parser = psnr())]
    pub min_psnr: Option<f64>,
    /// Largest GMSD of a picture that passes
    #[arg(long, value_name = "X", value_parser = gmsd())]
    pub max_gmsd: Option<f64>,
    /// Threads of ONNX Runtime; by default one a processor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// How much is said
    #[command(flatten)]
    pub says: Says,
}

/// Says what a checkpoint or an export is and holds.
#[derive(Clone, Debug, Parser)]
#[command(name = "ng-export inspect", bin_name = "ng-export inspect")]
pub struct Inspect {
    /// A pipeline folder
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// How much is said
    #[command(flatten)]
    pub says: Says,
}

/// Makes an ONNX model of a TensorRT engine, which ONNX Runtime's provider of the same version runs, that of
/// TensorRT or of TensorRT for RTX.
#[derive(Clone, Debug, Parser)]
#[command(name = "ng-export wrap", bin_name = "ng-export wrap")]
pub struct Wrap {
    /// The engine, as trtexec saves it
    #[arg(value_name = "PLAN")]
    pub plan: PathBuf,
    /// The graph that it was built from
    #[arg(long, value_name = "MODEL.onnx")]
    pub graph: PathBuf,
    /// Compute capability of the GPU that built it: 90 is Hopper
    #[arg(long, value_name = "SM", value_parser = clap::value_parser!(u32).range(50..=200))]
    pub architecture: u32,
    /// The model to write, in the engine's folder or above it
    #[arg(short, long, value_name = "FILE.onnx")]
    pub out: PathBuf,
    /// How much is said
    #[command(flatten)]
    pub says: Says,
}

/// A value of each precision, for the help text.
fn of_each(value: impl Fn(Precision) -> String) -> String {
    let all = Precision::value_variants().iter();
    let all: Vec<_> = all.map(|&p| format!("{} {}", p.name(), value(p))).collect();
    all.join(", ")
}

fn block_size() -> String {
    let sizes: Vec<_> = BLOCKS.filter(|n| n.is_power_of_two()).map(|n| n.to_string()).collect();
    format!(
        "Numbers that share a scale: {}; by default {BLOCK}, with fp8 a whole matrix",
        sizes.join(", ")
    )
}

fn vae() -> impl TypedValueParser<Value = Float> {
    let values = VAE.iter().filter_map(ValueEnum::to_possible_value).collect::<Vec<_>>();
    PossibleValuesParser::new(values).try_map(|name| Float::from_str(&name, false))
}

/// Of the largest value: beyond 1 nothing is compared.
fn error() -> impl TypedValueParser<Value = f32> {
    number(0.0..=1.0).map(|x| x as f32)
}

fn psnr() -> impl TypedValueParser<Value = f64> {
    number(0.0..=MAX_PSNR)
}

fn gmsd() -> impl TypedValueParser<Value = f64> {
    number(0.0..=1.0)
}

fn number(range: RangeInclusive<f64>) -> impl TypedValueParser<Value = f64> {
    let parse = move |text: String| match text.parse() {
        Ok(x) if range.contains(&x) => Ok(x),
        _ => Err(format!("a number from {} to {} is needed", range.start(), range.end())),
    };
    clap::builder::StringValueParser::new().try_map(parse)
}

fn pictures() -> RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(0..=MAX_PICTURES as i64)
}

impl Args {
    /// Whether nothing is written.
    pub fn is_dry(&self) -> bool {
        self.dry_run
    }

    /// A line about what was typed and changes nothing.
    pub fn note(&self) -> Option<String> {
        if self.threads.is_some() && !self.verify {
            return Some("note: --threads changes nothing without --verify".to_owned());
        }
        let Request { parts, choice, loras, .. } = self.clone().request();
        let mut idle = choice.idle(&parts);
        if !loras.is_empty() && parts.iter().all(|part| part.component() == Component::Vae) {
            idle.push("--lora");
        }
        let idle = idle.join(" and ");
        (!idle.is_empty()).then(|| format!("note: nothing that --only names is changed by {idle}"))
    }

    /// What it means.
    pub fn request(self) -> Request {
        Request {
            checkpoint: self.checkpoint,
            target: self.out,
            parts: match self.only.as_slice() {
                [] => Part::ALL.to_vec(),
                only => Part::ALL.into_iter().filter(|part| only.contains(part)).collect(),
            },
            loras: self.loras,
            choice: Choice {
                target: self.target,
                precision: self.precision,
                block: self.block_size,
                modulation: self.modulation,
                activations: self.activations,
                vae: self.vae,
                attention: self.attention,
                slots: self.lora_slots,
            },
            placement: match (self.copy_weights, self.link_weights) {
                (true, _) => Placement::Copied,
                (_, true) => Placement::Linked,
                _ => Placement::Auto,
            },
            replace: self.force,
            resume: self.resume,
            verify: self.verify,
            asked: Asked {
                max_error: self.max_error,
                min_psnr: self.min_psnr,
                max_gmsd: self.max_gmsd,
                wanted: self.pictures.into(),
            },
            threads: threads(self.threads),
        }
    }
}

/// As many as asked for, else one a processor.
pub fn threads(asked: Option<u16>) -> usize {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.map_or_else(available, usize::from)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    const EXPORT: &str = "ng-export signs --out onnx";
    const VERIFY: &str = "ng-export onnx --checkpoint signs";

    fn parsed<T: Parser>(always: &str, more: &str) -> Result<T, clap::Error> {
        T::try_parse_from(always.split(' ').chain(more.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let args: Args = parsed(EXPORT, "--verify --threads 3").unwrap();
        assert_eq!(args.note(), None);
        let request = args.request();
        assert_eq!((request.threads, request.verify, request.replace), (3, true, false));
        assert!(parsed::<Args>("ng-export signs", "").is_err(), "--out is required");
        assert!(parsed::<Args>(EXPORT, "--threads 0").is_err(), "no threads cannot work");
    }

    #[test]
    fn what_changes_nothing_is_said() {
        let args: Args = parsed(EXPORT, "--threads 3").unwrap();
        assert!(args.note().is_some_and(|note| note.contains("--verify")));
        for (typed, idle) in [
            ("--only vae_decoder --precision int8 --lora a", Some("--precision and --lora")),
            ("--only vae_decoder --target tensorrt --precision f16", Some("--precision")),
            ("--only vae_decoder --vae f16", None),
            ("--only transformer --vae f16 --lora a", Some("--vae")),
            ("--only text_encoder --lora-slots --attention decomposed", Some("--lora-slots")),
            ("--only text_encoder_2 --precision int4 --modulation same", Some("--modulation")),
            ("--only vae_encoder,transformer --precision int4 --lora-slots", None),
            ("--precision int4 --lora a", None),
        ] {
            let note = parsed::<Args>(EXPORT, typed).unwrap().note();
            let says =
                idle.map(|idle| format!("note: nothing that --only names is changed by {idle}"));
            assert_eq!(note, says, "{typed}");
        }
    }

    #[test]
    fn a_limit_is_a_number_that_something_can_be_beyond() {
        for typed in ["max-error=-5", "max-error=nan", "max-error=inf", "max-error=1e9"]
            .into_iter()
            .chain(["min-psnr=nan", "min-psnr=-inf", "min-psnr=101"])
            .chain(["max-gmsd=nan", "max-gmsd=inf", "max-gmsd=-0.1", "max-gmsd=x"])
        {
            let export = parsed::<Args>(EXPORT, &format!("--verify --{typed}")).unwrap_err();
            let verify = parsed::<Verify>(VERIFY, &format!("--{typed}")).unwrap_err();
            for error in [export, verify] {
                assert_eq!(error.exit_code(), 2);
                assert!(error.to_string().contains("a number from 0 to"), "{error}");
            }
        }
        let limits = "--max-error 0.5 --min-psnr 20 --max-gmsd 0.3";
        let verify: Verify = parsed(VERIFY, limits).unwrap();
        assert_eq!((verify.max_error, verify.min_psnr), (Some(0.5), Some(20.0)));
        assert_eq!(verify.max_gmsd, Some(0.3));
    }

    #[test]
    fn the_autoencoder_has_the_types_that_are_listed() {
        for (typed, is) in [("f16", Some(Float::F16)), ("f32", Some(Float::F32)), ("bf16", None)] {
            let request = parsed::<Args>(EXPORT, &format!("--vae {typed}")).map(Args::request);
            assert_eq!(request.ok().and_then(|request| request.choice.vae), is, "{typed}");
        }
    }

    #[test]
    fn usage_names_the_command() {
        let usage = |error: clap::Error| error.to_string();
        let all = [
            ("verify", usage(parsed::<Verify>("ng-export", "-h").unwrap_err())),
            ("inspect", usage(parsed::<Inspect>("ng-export", "-h").unwrap_err())),
            ("wrap", usage(parsed::<Wrap>("ng-export", "-h").unwrap_err())),
        ];
        for (name, help) in all {
            assert!(help.contains(&format!("Usage: ng-export {name} ")), "{help}");
        }
    }
}
