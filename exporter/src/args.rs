//! What was typed.
#![expect(clippy::doc_markdown, reason = "these comments are the help text")]

use std::path::PathBuf;

use clap::Parser;

use crate::export::Request;

/// Exports a FLUX checkpoint to ONNX.
///
/// Reads a diffusers pipeline folder and writes the folder that Hugging Face Optimum would write for
/// it: text_encoder, text_encoder_2, transformer, vae_decoder and vae_encoder, each with model.onnx
/// and model.onnx_data (f32, opset 23, open batch, token and image sizes), the configs, tokenizers
/// and scheduler. `ng-sample --model DIR` makes images from it. A table of what was written goes to
/// standard output.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ng-export",
    version,
    after_help = "Exit codes: 0 exported, 1 failed and left nothing behind, 2 wrong usage."
)]
pub struct Args {
    /// The pipeline folder: model_index.json, transformer/, vae/, text_encoder/, ...
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// The folder to make; it appears when it is complete
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Merge the adapters of a LoRA file or folder, whoever trained it; repeatable, one after the other
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_parser = flow::lora::scaled_path)]
    loras: Vec<(PathBuf, f64)>,
    /// Run every graph in ONNX Runtime against CHECKPOINT/reference.safetensors (made by `ng-train
    /// reference CHECKPOINT`) and fail when one differs by more than 1e-5 of its largest value
    #[arg(long)]
    verify: bool,
    /// Replace an earlier export
    #[arg(long)]
    force: bool,
    /// Threads of ONNX Runtime under --verify; by default one a processor
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Args {
    /// What it means.
    pub fn request(self) -> Request {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        Request {
            checkpoint: self.checkpoint,
            target: self.out,
            loras: self.loras,
            replace: self.force,
            verify: self.verify,
            threads: self.threads.map_or_else(available, usize::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let typed = ["ng-export", "signs", "--out", "onnx", "--verify", "--threads", "3"];
        let request = Args::parse_from(typed).request();
        assert_eq!((request.threads, request.verify, request.replace), (3, true, false));
        assert!(Args::try_parse_from(["ng-export", "signs"]).is_err(), "--out is required");
        assert!(
            Args::try_parse_from(["ng-export", "a", "--out", "b", "--threads", "0"]).is_err(),
            "no threads cannot work"
        );
    }
}
