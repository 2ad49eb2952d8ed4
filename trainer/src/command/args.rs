//! The command line.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args, Parser, Subcommand};
use flow::checkpoint::MAX_SHARD_BYTES;
use flow::latents::MAX_PIXELS;
use flow::solver::{DEFAULT_SOLVER, DEFAULT_STEPS, SOLVERS};
use flow::tokens::MAX_TEXT_TOKENS;
use manual::says::Says;

use self::values::whole;
use super::plan::UTILISATION;
use crate::network::lora::RANK;
use crate::tensor::device::PRECISIONS;

#[cfg(test)]
mod tests;
pub(super) mod values;

/// Arguments of `bench` that say which passes are measured.
const OF_PASSES: [&str; 6] = ["sizes", "batch", "text_tokens", "lora_rank", "plain", "stream"];

/// Aligns flow-matching text-to-image models with human preference (Neighbor GRPO).
#[derive(Parser)]
#[command(name = "ng-train", bin_name = "ng-train", version)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 asked for in a wrong way (command line or a setting), \
    130 stopped by a signal."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Where tensors live: auto, cpu, cuda or cuda:N
    #[arg(long, global = true, default_value = "auto")]
    pub device: String,
    /// What networks compute in; auto is bf16 on a GPU, f32 on the CPU
    #[arg(long, global = true, default_value = "auto",
          value_parser = PossibleValuesParser::new(PRECISIONS))]
    pub precision: String,
    /// CPU threads [default: all cores]
    #[arg(long, global = true, value_parser = whole(1..=1024), allow_negative_numbers = true)]
    pub threads: Option<usize>,
    #[command(flatten)]
    pub says: Says,
}

/// Who shares the work.
#[derive(Args)]
pub struct RankArgs {
    /// Share the work among so many processes of this machine, which all see the same folders [default: one a GPU
    /// where torchrun's, Slurm's or a machine's variables ask for several, else one]
    #[arg(long, value_name = "N", value_parser = whole(1..=512), allow_negative_numbers = true)]
    pub processes: Option<usize>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Align a model: roll out, reward, update
    ///
    /// The output folder gets metrics.jsonl and a TensorBoard event file, curve.png, samples/ (a sheet
    /// every save_every iterations), checkpoints/ (complete, for --resume) and, at the end, aligned/: a
    /// pipeline folder that diffusers loads. Ctrl-C saves and stops.
    Align {
        #[command(flatten)]
        source: SourceArgs,
        /// Continue from the newest checkpoint of the output folder
        #[arg(long)]
        resume: bool,
        /// Read and check everything, print the plan, and train nothing
        #[arg(long, conflicts_with_all = ["resume", "record_update"])]
        dry_run: bool,
        /// Store the tensors of the first iteration's last update as safetensors
        #[arg(long, value_name = "FILE")]
        record_update: Option<PathBuf>,
        #[command(flatten)]
        ranks: RankArgs,
    },
    /// List the runs that ship, show a run's settings with where each is from, or explain what settings there are
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Train a small model from captioned images: autoencoder, then flow
    ///
    /// Ctrl-C saves and stops; what is needed to go on is saved every ten minutes, too, into a folder beside the
    /// output.
    Pretrain {
        #[command(flatten)]
        source: SourceArgs,
        /// Continue an unfinished run
        #[arg(long)]
        resume: bool,
    },
    /// Compare checkpoints on a prompt file; writes eval.md, eval.json and side-by-side.png
    ///
    /// The tables have each metric's mean, and how often each model beats those before it on the same prompt
    /// and noise. Images and scores stay in the output folder; what is known of a model under the same
    /// settings, by the names, sizes and times of its files, is not made again, so the same command goes on
    /// where a stopped one was.
    Eval {
        /// Pipeline folder, a LoRA (with :SCALE) on the pipeline before it, or a folder of such or of runs: each in the
        /// order of their names; repeatable
        #[arg(long = "model", required_unless_present = "votes", value_name = "DIR|LORA[:SCALE]",
              value_parser = values::model)]
        models: Vec<String>,
        /// Prompt file: .txt, .json, .jsonl, .csv, .tsv or .parquet; or a folder of them
        #[arg(long, value_name = "FILE|DIR", required_unless_present = "votes")]
        prompts: Option<PathBuf>,
        /// Instead of all this: print the win rates of votes that the page of ng-sample serve saved
        #[arg(long, value_name = "FILE", group = "run", conflicts_with_all = ["models", "prompts", "processes"])]
        votes: Option<PathBuf>,
        /// Images a prompt
        #[arg(short = 'n', long = "images", alias = "count", value_name = "N", default_value_t = 1,
              value_parser = whole(1..=1000), allow_negative_numbers = true)]
        n_images: usize,
        /// Image j of prompt i of P starts from the noise of seed + i + j*P
        #[arg(short, long, default_value_t = 0, value_parser = values::seed, allow_negative_numbers = true)]
        seed: u64,
        /// Folder for the results
        #[arg(short, long, alias = "output", value_name = "DIR", default_value = "out/eval")]
        out: PathBuf,
        #[command(flatten)]
        ranks: RankArgs,
        /// Rewards, judges, rollout, embeddings and stream come from it
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Score images that exist; prints one JSON line an image
    ///
    /// Scales, higher being better: hpsv2, pickscore and clip are cosines, about 0.2 to 0.4, 0.18 to 0.24
    /// and 0.1 to 0.4; image-reward is about -2.5 to 2.5, aesthetic 1 to 10, jpeg in kB, colour 0 to 1, grid
    /// 0 dB without a pattern of patches and below 0 with one.
    /// docs/rewards.md has the files and how each prepares images. Means over all images are told at the end.
    #[command(group = ArgGroup::new("shown").required(true).args(["prompt", "prompts"]))]
    Score {
        /// PNG, JPEG or WebP files, or folders of them, in the order of their names
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<PathBuf>,
        /// What all of them should show
        #[arg(long, value_name = "TEXT")]
        prompt: Option<String>,
        /// What they should show, one after the other, as `ng-sample --prompts` makes them: a .txt, .json,
        /// .jsonl, .csv, .tsv or .parquet file with as many prompts, or of several images a prompt fewer
        #[arg(long, value_name = "FILE")]
        prompts: Option<PathBuf>,
        /// Rewards and judges come from it
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Run methods side by side for the same time, over several seeds, and report
    ///
    /// The output folder gets report.md with tables at equal iterations, network passes and seconds,
    /// curves as PNG, side-by-side/ and runs/. What is finished is not run again.
    Compare {
        /// Runs at a time, one thread each [default: all cores, or as many as there are GPUs]
        #[arg(long, value_name = "N", value_parser = whole(1..=1024), allow_negative_numbers = true)]
        jobs: Option<usize>,
        /// What is compared
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Sample images from a checkpoint through libtorch
    Sample(SampleArgs),
    /// Write reference.safetensors into a pipeline folder, for `ng-export --verify`
    Reference {
        /// Pipeline folder
        model: PathBuf,
    },
    /// Embed prompts once, so that training never holds the text encoders
    ///
    /// The encoders are read block by block and need little memory. A run that was stopped goes on where
    /// it was; texts that are known are not embedded again. `align` reads the cache by its setting
    /// embeddings.
    Embed {
        /// Pipeline folder
        #[arg(long, value_name = "DIR", required_unless_present = "import")]
        model: Option<PathBuf>,
        /// Prompt file: .txt, .json, .jsonl, .csv, .tsv or .parquet; or a folder of them
        #[arg(long, value_name = "FILE|DIR", required_unless_present = "import")]
        prompts: Option<PathBuf>,
        /// Take over embeddings that DanceGRPO made: its videos2caption.json
        #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "prompts"])]
        import: Option<PathBuf>,
        /// Folder of the cache
        #[arg(short, long, alias = "output", value_name = "DIR")]
        out: PathBuf,
    },
    /// Make a pipeline folder, or a file of adapters, of a run's checkpoint
    ///
    /// Runs of several processes leave a file a process in their checkpoints. What is written is what the run
    /// would have ended with there: the moving average of the weights, where it keeps one. Memory: a tensor.
    Consolidate {
        /// Checkpoint, as in RUN/checkpoints/iteration-000050
        from: PathBuf,
        /// Folder to write; it must not exist
        #[arg(short, long, alias = "output", value_name = "DIR")]
        out: PathBuf,
        /// Most GB (10⁹ bytes) of weights in one file
        #[arg(long, value_name = "GB", default_value_t = MAX_SHARD_BYTES as f64 / 1e9, value_parser = values::gb,
              allow_negative_numbers = true)]
        shard_gb: f64,
    },
    /// Make a checkpoint of one kind from one of another
    ///
    /// FROM a file that PyTorch pickled (.pt, .pth, .bin, .ckpt), or the .bin.index.json of several, without
    /// running what is in it: TO is a safetensors file. FROM a checkpoint in one file, as ComfyUI and BFL have it, or a GGUF file: TO is a
    /// pipeline folder, with what the file lacks taken from --like. FROM a pipeline folder: TO is its
    /// transformer as one safetensors file in BFL's names, which ComfyUI opens.
    Convert {
        /// File or pipeline folder
        from: PathBuf,
        /// What to write
        to: PathBuf,
        /// Pipeline folder with the tokenizers, the configs and whatever networks FROM lacks
        #[arg(long, value_name = "DIR")]
        like: Option<PathBuf>,
    },
    /// Say what a run will cost: parameters, network passes, memory a rank, seconds
    Plan {
        /// flux.1-dev, flux.1-schnell, or a pipeline folder
        #[arg(long, value_name = "NAME|DIR")]
        model: String,
        /// T5 tokens a prompt
        #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS,
              value_parser = whole(1..=MAX_TEXT_TOKENS as i64), allow_negative_numbers = true)]
        text_tokens: usize,
        /// Rank of adapters [default: the run's lora.rank, else 64]
        #[arg(long, value_name = "N", value_parser = values::rank, allow_negative_numbers = true)]
        lora_rank: Option<usize>,
        /// Share of an H800's dense bf16 peak (989 TFLOP/s) that is reached, above 0 and at most 1
        #[arg(long, value_name = "SHARE", default_value_t = UTILISATION, value_parser = values::share,
              allow_negative_numbers = true)]
        utilisation: f64,
        /// The run: --set rollout.size=[1024,1024] and the like change it
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Measure a velocity and a training pass on this device, with random weights made there
    ///
    /// The training pass is forward and backward of adapters, each block computed again from its input.
    /// GB are those above the weights.
    Bench {
        /// flux.1-dev, flux.1-schnell, or a pipeline folder
        #[arg(long, value_name = "NAME|DIR")]
        model: String,
        /// Pixels; repeatable [default: the model's own size]
        #[arg(long = "size", value_name = "WIDTHxHEIGHT", value_parser = values::size)]
        sizes: Vec<[usize; 2]>,
        /// Images at a time
        #[arg(long, value_name = "N", default_value_t = 1,
              value_parser = whole(1..=1024), allow_negative_numbers = true)]
        batch: usize,
        /// T5 tokens a prompt
        #[arg(long, value_name = "N", default_value_t = MAX_TEXT_TOKENS,
              value_parser = whole(1..=MAX_TEXT_TOKENS as i64), allow_negative_numbers = true)]
        text_tokens: usize,
        /// Rank of adapters
        #[arg(long, value_name = "N", default_value_t = RANK, value_parser = values::rank,
              allow_negative_numbers = true)]
        lora_rank: usize,
        /// Keep all activations for backward in place of computing blocks again
        #[arg(long)]
        plain: bool,
        /// Read the folder's own weights from disk block by block: for models larger than memory
        #[arg(long)]
        stream: bool,
        /// Passes of each kind, of which the median is told; or iterations
        #[arg(long, value_name = "N", default_value_t = 3,
              value_parser = whole(1..=1000), allow_negative_numbers = true)]
        repeats: usize,
        /// Instead of passes, measure iterations of a run that ships: rollout, decoding, rewards, update. MODEL is
        /// a folder, which may lack weights
        #[arg(long, value_name = "PRESET", conflicts_with_all = OF_PASSES)]
        iteration: Option<String>,
        /// Replace one of that run's settings; repeatable
        // A requirement is waived where something conflicts with what is required.
        #[arg(long = "set", value_name = "KEY=VALUE", requires = "iteration", conflicts_with_all = OF_PASSES)]
        settings: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint of random bf16 weights, for benchmarks and tests
    Init {
        /// flux.1-dev, flux.1-schnell (these with a tokenizer of letters), or a pipeline folder
        #[arg(long, value_name = "NAME|DIR")]
        like: String,
        /// Folder to write; it must not exist
        #[arg(short, long, alias = "output", value_name = "DIR")]
        out: PathBuf,
        /// The weights follow from it
        #[arg(long, default_value_t = 0, value_parser = values::seed, allow_negative_numbers = true)]
        seed: u64,
        /// Leave every weight 0, in sparse files that take no room on disk
        #[arg(long)]
        zero: bool,
        /// Most GB (10⁹ bytes) of weights in one file
        #[arg(long, value_name = "GB", default_value_t = MAX_SHARD_BYTES as f64 / 1e9, value_parser = values::gb,
              allow_negative_numbers = true)]
        shard_gb: f64,
    },
    /// Render the captioned images that the embedded model is trained on
    Signs {
        /// Folder to write; it must not exist
        out: PathBuf,
        /// Images
        #[arg(short, default_value_t = 16_000,
              value_parser = whole(1..=10_000_000), allow_negative_numbers = true)]
        n: usize,
    },
}

/// Where a configuration comes from.
#[derive(Args)]
#[command(group = ArgGroup::new("run").required(true).args(["preset", "config"]))]
pub struct SourceArgs {
    /// A run that ships with the program; `ng-train config list` has them [or --config]
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// A run described by a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Replace one setting, as in optimizer.learning_rate=1e-5 or rewards.0.weight=2; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub settings: Vec<String>,
}

/// What to know of settings.
#[derive(Subcommand)]
pub enum ConfigCommand {
    /// List the presets of align, compare and pretrain, and the algorithms
    List,
    /// Show every setting of a run and where it is said
    ///
    /// A preset is that of align, of compare or of pretrain, whichever first has the NAME; compare:NAME and
    /// pretrain:NAME are those of these. A file is one of align.
    Show {
        #[command(flatten)]
        source: SourceArgs,
    },
    /// Explain the settings of align, compare and pretrain, all of them or those that begin with KEY
    Explain {
        /// As in rollout, rollout.steps or rewards.0.weight
        #[arg(value_name = "KEY")]
        key: Option<String>,
    },
}

#[derive(Args)]
pub struct SampleArgs {
    /// Pipeline folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What to draw
    #[arg(long)]
    pub prompt: String,
    /// Images
    #[arg(short, long = "count", default_value_t = 1,
          value_parser = whole(1..=10_000), allow_negative_numbers = true)]
    pub n: usize,
    /// Image i starts from the noise of seed + i
    #[arg(short, long, default_value_t = 0, value_parser = values::seed, allow_negative_numbers = true)]
    pub seed: u64,
    /// How a step is taken
    #[arg(long, default_value = DEFAULT_SOLVER.name(),
          value_parser = PossibleValuesParser::new(SOLVERS.map(|(name, _)| name)))]
    pub solver: String,
    /// Steps
    #[arg(long, default_value_t = DEFAULT_STEPS,
          value_parser = whole(1..=1000), allow_negative_numbers = true)]
    pub steps: usize,
    /// Constant shift of the time grid [default: the checkpoint's scheduler]
    #[arg(long, value_parser = values::shift, allow_negative_numbers = true)]
    pub shift: Option<f64>,
    /// Guidance scale [default: 3.5 if the model embeds one]
    #[arg(long, value_parser = values::guidance, allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// Pixels, with -H [default: the model's own]
    #[arg(short = 'W', long, requires = "height", value_parser = whole(1..=MAX_PIXELS as i64),
          allow_negative_numbers = true)]
    pub width: Option<usize>,
    /// Pixels, with -W [default: the model's own]
    #[arg(short = 'H', long, requires = "width", value_parser = whole(1..=MAX_PIXELS as i64),
          allow_negative_numbers = true)]
    pub height: Option<usize>,
    /// Start from this noise: safetensors, tensor `latents` [n, Z, h, w]
    #[arg(long, value_name = "FILE")]
    pub noise: Option<PathBuf>,
    /// Add the adapters of a LoRA file or folder; repeatable, summed
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_parser = values::lora)]
    pub loras: Vec<(PathBuf, f64)>,
    /// Keep weights on disk and read them block by block: for models larger than memory
    #[arg(long)]
    pub stream: bool,
    /// Store the final latents there
    #[arg(long, value_name = "FILE")]
    pub latents_out: Option<PathBuf>,
    /// PNG file; several images get a number before the extension
    #[arg(short, long, alias = "output", value_name = "FILE", default_value = "out.png")]
    pub out: PathBuf,
}
