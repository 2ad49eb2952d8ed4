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
use sampler::{
    args::{Cli, Command},
    parameters::{Origin, Parameters},
    run::Run,
    server::args::serve,
};
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
        let signs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/signs");
        for file in [
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_config.json",
            "tokenizer_2/tokenizer.json",
            "tokenizer_2/tokenizer_config.json",
        ] {
            export.write(file, &fs::read_to_string(signs.join(file))?)?;
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
    fn run(&self, options: &str) -> Result<Run> {
        let folder = self.0.path().to_str().unwrap();
        let output = if options.contains(" -o ") { "" } else { " -o @/out.png" };
        let typed = format!("ng-sample --model @ {options}{output}").replace('@', folder);
        Run::new(&Cli::try_parse_from(typed.split(' '))?.generate)
    }

    /// The error line and the exit code that goes with it.
    fn refusal(&self, options: &str) -> (String, u8) {
        match self.run(options) {
            Ok(_) => panic!("{options} was accepted"),
            Err(error) => (format!("{error:#}"), if error.is::<Usage>() { 2 } else { 1 }),
        }
    }
}

const VAE: &str = r#"{"block_out_channels": [8, 8, 8], "latent_channels": 16,
    "norm_num_groups": 4, "scaling_factor": 0.36, "shift_factor": 0.1, "sample_size": 32}"#;
const CLIP: &str = r#"{"vocab_size": 99, "hidden_size": 24, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu"}"#;
const T5: &str = r#"{"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
    "num_heads": 4, "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}"#;

#[test]
fn defaults_come_from_the_model() -> Result<()> {
    let export = Export::new(true)?;
    let run = export.run("--prompt fox --seed 7")?;
    assert_eq!(run.images.len(), 1);
    assert_eq!(run.images[0].file, export.path("out.png"));
    let job = &run.images[0].job;
    assert_eq!((job.width, job.height, job.size.tokens()), (32, 32, 16));
    assert_eq!(job.guidance, Some(3.5));
    assert!((job.shift - 3.0).abs() < 1e-12);
    assert_eq!((job.steps, job.plan.len()), (8, 8));
    assert_eq!(Parameters::of(job, "m").origin, Origin::Seed(7));
    assert_eq!(job.initial(), Noise::new(7).normal(0, 16 * 8 * 8));

    export.write("vae_decoder/config.json", &VAE.replace(", \"sample_size\": 32", ""))?;
    let full = export.run("--prompt fox --height 64 --shift 2 --solver heun --steps 3")?;
    let full = &full.images[0].job;
    assert_eq!((full.width, full.height), (1024, 64));
    assert!((full.shift - 2.0).abs() < 1e-12);
    assert_eq!((full.steps, full.plan.len()), (3, 5));
    Ok(())
}

#[test]
fn seeds_run_within_a_prompt_and_not_across() -> Result<()> {
    let export = Export::new(false)?;
    export.write("p.txt", "fox\nowl\n")?;
    let run = export.run("--prompts @/p.txt -n 2 --seed 5 --sheet @/sheet.png")?;
    let jobs: Vec<_> = run.images.iter().map(|image| &image.job).collect();
    let made: Vec<_> = jobs.iter().map(|job| (&*job.prompt, job.seed)).collect();
    assert_eq!(made, [("fox", 5), ("fox", 6), ("owl", 5), ("owl", 6)]);
    assert_eq!(run.images[3].file, export.path("out-003.png"));
    assert_eq!(jobs[0].guidance, None);
    assert_eq!(jobs[0].initial(), jobs[2].initial());
    assert_ne!(jobs[0].initial(), jobs[1].initial());
    Ok(())
}

#[test]
fn a_line_of_a_prompt_file_has_its_own_settings() -> Result<()> {
    let export = Export::new(false)?;
    let lines =
        "{\"prompt\":\"fox\",\"seed\":9,\"steps\":4,\"id\":1}\n{\"prompt\":\"owl\",\"width\":64}";
    export.write("p.jsonl", lines)?;
    let run = export.run("--prompts @/p.jsonl --seed 5 --steps 6")?;
    let of = |i: usize| (run.images[i].job.seed, run.images[i].job.steps, run.images[i].job.width);
    assert_eq!([of(0), of(1)], [(9, 4, 32), (5, 6, 64)]);
    assert!(run.notices[0].contains("p.jsonl: id are no settings"), "{:?}", run.notices);
    export.write("p.jsonl", "{\"prompt\":\"fox\",\"steps\":\"many\"}")?;
    let (message, code) = export.refusal("--prompts @/p.jsonl");
    assert!(message.contains("\"fox\": steps \"many\": not a whole number"), "{message}");
    assert_eq!(code, 2);
    Ok(())
}

#[test]
fn a_random_seed_is_drawn_and_known() -> Result<()> {
    let export = Export::new(false)?;
    let seeds = |typed: &str| -> Result<Vec<u64>> {
        Ok(export.run(typed)?.images.iter().map(|image| image.job.seed).collect())
    };
    let two = seeds("--prompt fox --seed -1 -n 2")?;
    assert!(two[1] == two[0] + 1 && two[0] < 1 << 32, "{two:?}");
    assert_ne!(two, seeds("--prompt fox --seed=-1 -n 2")?);
    Ok(())
}

#[test]
fn what_is_replaced_is_said() -> Result<()> {
    let (export, home) = (Export::new(false)?, tempfile::tempdir()?);
    let command = format!("--prompt fox --count 2 -o {}", home.path().display());
    assert!(export.run(&command)?.notices.is_empty());
    for (name, says) in [("001.png", "001.png is there"), ("000.png", "2 files are there")] {
        fs::write(home.path().join(name), "")?;
        let notices = export.run(&command)?.notices;
        assert!(notices.len() == 1 && notices[0].contains(says), "{notices:?}");
    }
    Ok(())
}

#[test]
fn what_is_cut_is_said() -> Result<()> {
    let export = Export::new(false)?;
    let words = "fox,".repeat(300);
    let run = export.run(&format!("--prompt {words} --max-sequence-length 20"))?;
    assert!(
        run.notices.iter().any(|n| n.contains("T5") && n.contains("are cut")),
        "{:?}",
        run.notices
    );
    assert!(export.run("--prompt fox")?.notices.is_empty());
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
    let two = export.run("--prompt fox -n 2 --noise @/n.safetensors")?;
    assert_eq!(two.images[1].job.initial(), noise[1024..]);
    let origin = Parameters::of(&two.images[1].job, "m").origin;
    assert_eq!(origin, Origin::File("n.safetensors"));
    let (message, code) = export.refusal("--prompt fox -n 3 --noise @/n.safetensors");
    assert!(message.contains("holds noise for 2 images; give 1 or 3"), "{message}");
    assert_eq!(code, 1);

    write(&[1, 16, 8, 8], &noise[..1024])?;
    let all = export.run("--prompt fox -n 3 --noise @/n.safetensors")?;
    assert_eq!(all.images[2].job.initial(), noise[..1024]);
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
    export.write("heun.jsonl", r#"{"prompt": "fox", "solver": "Heun"}"#)?;
    for (options, expected) in [
        ("--prompt fox --width 36", "invalid image size 36x32"),
        ("--prompt fox --width 4000000000 --height 4000000000", "above the limit"),
        ("--prompt fox --guidance 3", "embeds no guidance"),
        ("--prompt fox --shift 0", "invalid shift 0"),
        ("--prompt fox --shift nan", "invalid shift NaN"),
        ("--prompt fox --shift -1", "invalid shift -1"),
        ("--prompt fox --skip --solver heun", "--skip is not for the solver heun"),
        ("--prompts @/heun.jsonl --skip", "--skip is not for the solver heun"),
        ("--prompt fox --seed 18446744073709551615 -n 2", "passes the largest seed"),
        ("--prompt fox --seed fox", "--seed fox is no seed"),
        ("--prompt fox --guidance nan", "embeds no guidance"),
        ("--prompt fox --strength 0.5", "--strength is for an initial image"),
        ("--prompt fox -o out.gif", "images are written as PNG"),
        ("--prompt fox --sheet @/sheet.gif", "end its name in .png"),
        ("--prompt fox --sheet @/out.png", "out.png would be written twice"),
    ] {
        let (message, code) = export.refusal(options);
        assert!(message.contains(expected), "{expected} is not in: {message}");
        assert_eq!(code, 2, "{options}: {message}");
    }
    for options in ["--solver ddim", "--provider rocm"] {
        let typed = format!("ng-sample --model m --prompt p {options}");
        assert!(Cli::try_parse_from(typed.split(' ')).is_err(), "{options} was accepted");
    }
    for typed in ["ng-sample --model m", "ng-sample --prompt p", "ng-sample -p p --prompts f -m m"]
    {
        assert!(Cli::try_parse_from(typed.split(' ')).is_err(), "{typed} was accepted");
    }
    Ok(())
}

#[test]
fn a_number_out_of_its_range_is_told_the_range() {
    let told = |typed: &str, range: &str| {
        let message = not_parsed(typed);
        assert!(message.contains(&format!("is not in {range}")), "{typed}: {message}");
    };
    for (options, range) in [
        ("--steps 0", "1..=1000"),
        ("--steps 1001", "1..=1000"),
        ("--steps -3", "1..=1000"),
        ("--width -16", "0..=4294967295"),
        ("-H -16", "0..=4294967295"),
        ("--threads 0", "1..=1024"),
        ("--threads -1", "1..=1024"),
        ("--device -1", "0..=255"),
        ("--max-sequence-length 513", "2..=512"),
        ("--max-sequence-length -1", "2..=512"),
        ("-n 0", "1..=10000"),
        ("-n -2", "1..=10000"),
    ] {
        told(&format!("ng-sample --model m --prompt p {options}"), range);
    }
    for (options, range) in [
        ("--queue -1", "1..=100000"),
        ("--batch -1", "1..=64"),
        ("--max-steps -1", "1..=1000"),
        ("--max-images -1", "1..=1000"),
        ("--max-pixels -1", "1..=67108864"),
        ("--keep -1", "0..=4294967295"),
        ("--keep-megabytes -1", "0..=4294967295"),
        ("--grace -1", "0..=4294967295"),
    ] {
        told(&format!("ng-sample serve --model m {options}"), range);
    }
}

#[test]
fn both_ways_to_give_prompts_are_named() {
    for typed in ["ng-sample --model m", "ng-sample generate --model m", "ng-sample compare -m m"] {
        let message = not_parsed(typed);
        assert!(message.contains("<--prompt <TEXT>|--prompts <FILE>>"), "{message}");
    }
    assert!(not_parsed("ng-sample").contains("--model <DIR>"));
    for old in ["ng-sample --inspect a.png", "ng-sample inspect a.png"] {
        assert!(Cli::try_parse_from(old.split(' ')).is_ok(), "{old}");
    }
}

fn not_parsed(typed: &str) -> String {
    let parsed = Cli::try_parse_from(typed.split(' '));
    parsed.err().unwrap_or_else(|| panic!("{typed} was accepted")).to_string()
}

#[test]
fn what_has_no_effect_is_said() -> Result<()> {
    let export = Export::new(false)?;
    let lines = "{\"prompt\": \"fox\"}\n{\"prompt\": \"owl\", \"steps\": 8}\n{\"prompt\": \"hen\"}";
    export.write("p.jsonl", lines)?;
    let run = export.run("--prompts @/p.jsonl --device 0 --engines @/engines --skip --steps 4")?;
    let of = |option: &str| run.notices.iter().filter(|said| said.starts_with(option)).count();
    assert_eq!(["--device 0", "--engines", "--skip"].map(of), [1, 1, 1], "{:?}", run.notices);
    let skip: Vec<bool> = run.images.iter().map(|image| image.job.skip).collect();
    assert_eq!(skip, [false, true, false]);
    let run = export.run("--prompt fox --provider tensorrt --device 1 --engines @/engines")?;
    assert!(!run.notices.iter().any(|said| said.contains("no effect")), "{:?}", run.notices);
    Ok(())
}

#[test]
fn a_server_whose_default_size_is_too_large_does_not_start() -> Result<()> {
    let export = Export::new(false)?;
    let folder = export.0.path().to_str().unwrap();
    let typed =
        format!("ng-sample serve --model fox={folder} --listen 127.0.0.1:0 --max-pixels 1023");
    let cli = Cli::try_parse_from(typed.split(' '))?;
    let Some(Command::Serve(args)) = cli.command else { panic!("{typed} serves") };
    let error = serve(&args).unwrap_err();
    let expected = "--max-pixels 1023 is below the 32x32 that model fox makes";
    assert!(error.is::<Usage>() && error.to_string().contains(expected), "{error}");
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
    let args = Cli::parse_from(["ng-sample", "-p", "fox", "--model", model.to_str().unwrap()]);
    format!("{:#}", Run::new(&args.generate).err().expect("no such model"))
}
