//! Arguments against a model's configs: what is resolved, and what each refusal says.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use clap::Parser;
use flow::{
    checkpoint::{Entry, write_tensors},
    noise::Noise,
    usage::Usage,
};
use sampler::{args::Args, picture::Origin, request::Request};
use tempfile::TempDir;

/// A folder with the configs of an export and files where its graphs would be.
struct Export(TempDir);

impl Export {
    fn new(guidance_embeds: bool) -> Result<Self> {
        let export = Self(tempfile::tempdir()?);
        let transformer = format!(
            r#"{{"in_channels": 64, "num_layers": 1, "num_single_layers": 1,
                "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
                "pooled_projection_dim": 24, "guidance_embeds": {guidance_embeds},
                "axes_dims_rope": [4, 6, 6]}}"#
        );
        for (file, content) in [
            ("model_index.json", r#"{"_class_name": "FluxPipeline"}"#),
            ("transformer/config.json", transformer.as_str()),
            ("vae_decoder/config.json", VAE),
            ("text_encoder/config.json", CLIP),
            ("text_encoder_2/config.json", T5),
            ("scheduler/scheduler_config.json", r#"{"shift": 3.0}"#),
        ] {
            export.write(file, content)?;
        }
        for component in ["transformer", "vae_decoder", "text_encoder", "text_encoder_2"] {
            export.write(&format!("{component}/model.onnx"), "")?;
        }
        Ok(export)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn write(&self, file: &str, content: &str) -> Result<()> {
        let path = self.path(file);
        fs::create_dir_all(path.parent().unwrap())?;
        Ok(fs::write(path, content)?)
    }

    /// `options` are split at spaces; `@` stands for the folder.
    fn request(&self, options: &str) -> Result<Request> {
        let folder = self.0.path().to_str().unwrap();
        let output = if options.contains(" -o ") { "" } else { " -o @/out.png" };
        let typed = format!("ng-sample --model @ {options}{output}").replace('@', folder);
        Request::new(&Args::try_parse_from(typed.split(' '))?)
    }

    /// The error line and the exit code that goes with it.
    fn refusal(&self, options: &str) -> (String, u8) {
        match self.request(options) {
            Ok(_) => panic!("{options} was accepted"),
            Err(error) => (format!("{error:#}"), if error.is::<Usage>() { 2 } else { 1 }),
        }
    }
}

const VAE: &str = r#"{"block_out_channels": [8, 8, 8], "latent_channels": 16,
    "norm_num_groups": 4, "scaling_factor": 0.36, "shift_factor": 0.1, "sample_size": 32}"#;
const CLIP: &str = r#"{"vocab_size": 99, "hidden_size": 24, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16,
    "hidden_act": "quick_gelu"}"#;
const T5: &str = r#"{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
    "num_heads": 4, "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}"#;

#[test]
fn defaults_come_from_the_model() -> Result<()> {
    let export = Export::new(true)?;
    let request = export.request("--prompt fox --seed 7")?;
    assert_eq!((request.width, request.height, request.size.tokens()), (32, 32, 16));
    assert_eq!(request.guidance, Some(3.5));
    assert!((request.shift - 3.0).abs() < 1e-12);
    assert_eq!((request.n_steps, request.plan.len()), (8, 8));
    assert_eq!(request.images.len(), 1);
    assert_eq!(request.images[0].file, export.path("out.png"));
    assert_eq!(request.origin(0), Origin::Seed(7));
    assert_eq!(request.initial(0), Noise::new(7).normal(0, 16 * 8 * 8));

    export.write("vae_decoder/config.json", &VAE.replace(", \"sample_size\": 32", ""))?;
    let full = export.request("--prompt fox --height 64 --shift 2 --solver heun --steps 3")?;
    assert_eq!((full.width, full.height), (1024, 64));
    assert!((full.shift - 2.0).abs() < 1e-12);
    assert_eq!((full.n_steps, full.plan.len()), (3, 5));
    Ok(())
}

#[test]
fn seeds_run_within_a_prompt_and_not_across() -> Result<()> {
    let export = Export::new(false)?;
    export.write("p.txt", "fox\nowl\n")?;
    let request = export.request("--prompts @/p.txt -n 2 --seed 5 --sheet @/sheet.png")?;
    let made: Vec<_> = request.images.iter().map(|i| (i.prompt, i.seed)).collect();
    assert_eq!(made, [(0, 5), (0, 6), (1, 5), (1, 6)]);
    assert_eq!(request.images[3].file, export.path("out-003.png"));
    assert_eq!(request.guidance, None);
    assert_eq!(request.initial(0), request.initial(2));
    assert_ne!(request.initial(0), request.initial(1));
    Ok(())
}

#[test]
fn noise_from_a_file_replaces_the_seeds() -> Result<()> {
    let export = Export::new(false)?;
    let noise = Noise::new(1).normal(0, 2 * 16 * 8 * 8);
    let write = |shape: &[usize], values: &[f32]| {
        write_tensors(&export.path("n.safetensors"), &[Entry::f32("latents", shape, values)], &[])
    };
    write(&[2, 16, 8, 8], &noise)?;
    let two = export.request("--prompt fox -n 2 --noise @/n.safetensors")?;
    assert_eq!(two.initial(1), noise[1024..]);
    assert_eq!(two.origin(1), Origin::File("n.safetensors"));
    let (message, code) = export.refusal("--prompt fox -n 3 --noise @/n.safetensors");
    assert!(message.contains("holds noise for 2 images; give 1 or 3"), "{message}");
    assert_eq!(code, 1);

    write(&[1, 16, 8, 8], &noise[..1024])?;
    let all = export.request("--prompt fox -n 3 --noise @/n.safetensors")?;
    assert_eq!(all.initial(2), noise[..1024]);
    write(&[1, 16, 4, 16], &noise[..1024])?;
    let (message, _) = export.refusal("--prompt fox --noise @/n.safetensors");
    assert!(message.contains("has shape [1, 16, 4, 16], not [N, 16, 8, 8]"), "{message}");
    write(&[1, 16, 8, 8], &[f32::NAN; 1024])?;
    let (message, _) = export.refusal("--prompt fox --noise @/n.safetensors");
    assert!(message.contains("n.safetensors: tensor latents is not finite"), "{message}");
    let other = [Entry::f32("noise", &[1], &[0.0])];
    write_tensors(&export.path("n.safetensors"), &other, &[])?;
    let (message, _) = export.refusal("--prompt fox --noise @/n.safetensors");
    assert!(message.contains("tensor latents is missing"), "{message}");
    Ok(())
}

#[test]
fn wrong_arguments_are_usage_errors() -> Result<()> {
    let export = Export::new(false)?;
    for (options, expected) in [
        ("--prompt fox --width 36", "invalid image size 36x32"),
        ("--prompt fox --width 4000000000 --height 4000000000", "above the limit"),
        ("--prompt fox --guidance 3", "embeds no guidance"),
        ("--prompt fox --shift 0", "invalid shift 0"),
        ("--prompt fox --shift nan", "invalid shift NaN"),
        ("--prompt fox --max-sequence-length 513", "not from 2 to 512"),
        ("--prompt fox --seed 18446744073709551615 -n 2", "passes the largest seed"),
        ("--prompt fox -o out.jpg", "images are written as PNG"),
        ("--prompt fox --sheet @/sheet.jpg", "a sheet is a PNG"),
        ("--prompt fox --sheet @/out.png", "out.png would be written twice"),
    ] {
        let (message, code) = export.refusal(options);
        assert!(message.contains(expected), "{expected} is not in: {message}");
        assert_eq!(code, 2, "{options}: {message}");
    }
    for options in
        ["--steps 0", "--steps 1001", "--solver ddim", "--threads 0", "-n 0", "--seed -1"]
    {
        let typed = format!("ng-sample --model m --prompt p {options}");
        assert!(Args::try_parse_from(typed.split(' ')).is_err(), "{options} was accepted");
    }
    for typed in ["ng-sample --model m", "ng-sample --prompt p", "ng-sample -p p --prompts f -m m"]
    {
        assert!(Args::try_parse_from(typed.split(' ')).is_err(), "{typed} was accepted");
    }
    Ok(())
}

#[test]
fn wrong_files_are_named() -> Result<()> {
    let export = Export::new(false)?;
    export.write("empty.txt", "\n")?;
    export.write("file", "")?;
    fs::create_dir(export.path("folder.png"))?;
    for (options, expected) in [
        ("--prompts @/absent.txt", "absent.txt: No such file"),
        ("--prompts @/empty.txt", "empty.txt: holds no prompt"),
        ("--prompt fox --noise @/absent.safetensors", "absent.safetensors"),
        ("--prompt fox --noise @/empty.txt", "empty.txt"),
        ("--prompt fox -o @/file/out.png", "file: it is not a folder"),
        ("--prompt fox -o @/folder.png", "folder.png: it is a folder"),
        ("--prompt fox --latents-out @/file/l.safetensors", "file: it is not a folder"),
    ] {
        let (message, code) = export.refusal(options);
        assert!(message.contains(expected), "{expected} is not in: {message}");
        assert_eq!(code, 1, "{options}: {message}");
    }
    Ok(())
}

#[test]
fn a_folder_that_is_no_export_is_refused() -> Result<()> {
    let export = Export::new(false)?;
    fs::remove_file(export.path("text_encoder_2/model.onnx"))?;
    let (message, code) = export.refusal("--prompt fox");
    assert!(message.contains("text_encoder_2/model.onnx is missing"), "{message}");
    assert!(message.contains("ng-export"), "{message}");
    assert_eq!(code, 1);
    for (model, expected) in [
        (export.path("absent"), "no such folder"),
        (export.path("transformer"), "model_index.json"),
    ] {
        let message = refused_model(&model);
        assert!(message.contains(expected), "{expected} is not in: {message}");
        assert!(message.contains(model.to_str().unwrap()), "{message}");
    }
    export.write("vae_decoder/config.json", "{")?;
    let (message, _) = export.refusal("--prompt fox");
    assert!(message.contains("vae_decoder/config.json"), "{message}");
    Ok(())
}

fn refused_model(model: &Path) -> String {
    let args = Args::parse_from(["ng-sample", "-p", "fox", "--model", model.to_str().unwrap()]);
    format!("{:#}", Request::new(&args).err().expect("no such model"))
}
