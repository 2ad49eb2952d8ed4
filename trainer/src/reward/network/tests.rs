//! Tiny networks against the packages that define the scores; see `fixtures/networks/make.py`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use flow::checkpoint::{Entry, Weights, write_tensors};
use flow::models::blip::BlipVisionConfig;
use flow::models::clip::naming::Naming;
use flow::models::image_reward::ImageRewardConfig;
use flow::pipeline::read_json;
use serde::Deserialize;
use tch::Device;

use super::tiny::{draw, fixtures, folder, uniform};
use super::*;
use crate::reward::preparation::Fit;
use crate::reward::{RewardConfig, Rewards};

#[derive(Deserialize)]
struct Case {
    prompts: Vec<String>,
    images: Vec<String>,
    #[serde(flatten)]
    results: Results,
}

#[derive(Deserialize)]
struct Results {
    /// Package → prompt → image.
    scores: BTreeMap<String, Vec<Vec<f64>>>,
    /// Fit → image → eight projections.
    pixels: BTreeMap<String, Vec<Vec<f64>>>,
}

fn case() -> Case {
    let mut case: Case = read_json(&fixtures().join("clip.json")).unwrap();
    let other: Results = read_json(&fixtures().join("image-reward.json")).unwrap();
    case.results.scores.extend(other.scores);
    // Both packages crop alike.
    assert_eq!(case.results.pixels["crop"], other.pixels["crop"]);
    case
}

fn images(case: &Case) -> Vec<RgbImage> {
    let open = |name: &String| image::open(fixtures().join(format!("{name}.png"))).unwrap();
    case.images.iter().map(|name| open(name).to_rgb8()).collect()
}

/// A tiny ImageReward.
fn image_reward() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let file = "med_config.json";
    fs::copy(fixtures().join(file), dir.path().join(file)).unwrap();
    let config = ImageRewardConfig {
        vision: BlipVisionConfig { width: 128, layers: 2, image_size: 32, patch_size: 8 },
        text: read_json(&fixtures().join(file)).unwrap(),
    };
    let path = dir.path().join("reward.safetensors");
    draw(&path, &[config.manifest()]);
    let read = BlipVisionConfig::of(
        &Weights::open_file(&path).unwrap(),
        &ImageRewardConfig::vision_path(),
    );
    assert_eq!(read, Some(config.vision));
    dir
}

fn open(kind: &str, settings: &[(&str, PathBuf)]) -> Result<Rewards> {
    let mut table = format!("name = 'a'\nweight = 1\nretries = 0\nkind = '{kind}'\n");
    for (key, path) in settings {
        writeln!(table, "{key} = '{}'", path.display())?;
    }
    let config: RewardConfig = toml::from_str(&table)?;
    Rewards::open(&[config], 2, Device::Cpu)
}

fn tokenizer() -> (&'static str, PathBuf) {
    ("tokenizer", fixtures().join("tokenizer"))
}

/// Scores every image of the case for every prompt and compares.
fn compare(rewards: &Rewards, package: &str) {
    let case = case();
    let images = images(&case);
    let mut worst = 0.0f64;
    for (prompt, expected) in case.prompts.iter().zip(&case.results.scores[package]) {
        let prompt = Prompt::new(prompt);
        let scores = rewards
            .score(&vec![&prompt; images.len()], &images.iter().collect::<Vec<_>>())
            .unwrap();
        let scores = scores.outcomes[0].scores.clone().unwrap();
        for ((score, expected), image) in scores.iter().zip(expected).zip(&case.images) {
            worst = worst.max((score - expected).abs());
            assert!((score - expected).abs() < 1e-5, "{package}, {image}: {score}, not {expected}");
        }
    }
    println!("{package}: at most {worst:.1e} from the package");
}

#[test]
fn hpsv2_scores_as_its_package() {
    let dir = folder(Naming::OpenClip, false);
    let weights = ("weights", dir.path().join("clip.safetensors"));
    compare(&open("hpsv2", &[weights, tokenizer()]).unwrap(), "hpsv2");
}

#[test]
fn clip_scores_as_open_clip_and_transformers() {
    for (kind, package, naming, quick_gelu) in [
        ("clip", "open_clip", Naming::OpenClip, true),
        ("clip", "transformers", Naming::Transformers, false),
        ("pickscore", "transformers", Naming::Transformers, false),
    ] {
        let dir = folder(naming, quick_gelu);
        let weights = ("weights", dir.path().join("clip.safetensors"));
        compare(&open(kind, &[weights, tokenizer()]).unwrap(), package);
    }
}

/// Names with what wrappers put before them, a text tower of its own, buffers and other tensors.
#[test]
fn other_names_and_extra_tensors_score_alike() {
    type Rename = fn(&str) -> String;
    let wrapped: Rename = |name| format!("module._orig_mod.{name}");
    let custom: Rename = |name| {
        if name.starts_with("visual.") { name.to_owned() } else { format!("text.{name}") }
    };
    let same: Rename = str::to_owned;
    for (naming, package, rename, extra) in [
        (Naming::OpenClip, "open_clip", wrapped, "module._orig_mod.logit_bias"),
        (Naming::OpenClip, "open_clip", custom, "text.attn_mask"),
        (Naming::Transformers, "transformers", same, "text_model.embeddings.position_ids"),
    ] {
        let dir = folder(naming, true);
        let path = dir.path().join("clip.safetensors");
        let weights = Weights::open_file(&path).unwrap();
        let mut entries = weights.entries();
        for entry in &mut entries {
            entry.name = rename(&entry.name);
        }
        entries.push(Entry::i64(extra, &[1, 2], &[0, 1]));
        let other = dir.path().join("other.safetensors");
        write_tensors(&other, &entries, &[]).unwrap();
        compare(&open("clip", &[("weights", other), tokenizer()]).unwrap(), package);
    }
}

#[test]
fn image_reward_scores_as_its_package() {
    let dir = image_reward();
    let weights = ("weights", dir.path().join("reward.safetensors"));
    let tokenizer = ("tokenizer", fixtures().join("bert"));
    compare(&open("image-reward", &[weights, tokenizer]).unwrap(), "image-reward");
}

#[test]
fn aesthetic_scores_as_its_source() {
    let dir = folder(Naming::OpenClip, true);
    let weights = ("weights", dir.path().join("head.safetensors"));
    let clip = ("clip", dir.path().join("clip.safetensors"));
    compare(&open("aesthetic", &[weights, clip]).unwrap(), "aesthetic");
}

#[test]
fn images_are_prepared_as_the_packages_do() {
    let case = case();
    let fits = [("pad", Fit::Pad), ("crop", Fit::Crop), ("crop_down", Fit::CropDown)];
    let mut worst = 0.0f64;
    for (name, fit) in fits {
        let preparation = Preparation { fit, side: 32 };
        for (image, expected) in images(&case).iter().zip(&case.results.pixels[name]) {
            let pixels = Vec::<f32>::try_from(preparation.pixels(image).flatten(0, -1)).unwrap();
            let drawn = uniform("pixels", 8 * pixels.len());
            for (row, expected) in drawn.chunks(pixels.len()).zip(expected) {
                let sum: f64 = row.iter().zip(&pixels).map(|(a, b)| a * f64::from(*b)).sum();
                worst = worst.max((sum - expected).abs());
                // One step of one pixel's value would move it by 0.015 times a drawn number.
                assert!((sum - expected).abs() < 1e-3, "{name}: {sum}, not {expected}");
            }
        }
    }
    println!("projections of pixels: at most {worst:.1e} from the packages");
}

#[test]
fn squashed_images_give_up_their_ratio() {
    let image = RgbImage::from_fn(64, 32, |x, _| image::Rgb([if x < 32 { 255 } else { 0 }; 3]));
    let pixels = Preparation { fit: Fit::Squash, side: 32 }.pixels(&image);
    assert_eq!(pixels.size(), [1, 3, 32, 32]);
    assert!(pixels.double_value(&[0, 0, 5, 3]) > 1.9 && pixels.double_value(&[0, 0, 5, 28]) < -1.7);
}

/// The slope along the gradient, and the score itself, which is that of the image in bytes up to rounding.
#[test]
fn gradients_are_those_of_the_scores() {
    let (dir, blip) = (folder(Naming::OpenClip, true), image_reward());
    let weights = || ("weights", dir.path().join("clip.safetensors"));
    let of_blip = ("weights", blip.path().join("reward.safetensors"));
    let head = ("weights", dir.path().join("head.safetensors"));
    let bert = ("tokenizer", fixtures().join("bert"));
    let clip = ("clip", dir.path().join("clip.safetensors"));
    let (case, prompt) = (case(), Prompt::new("a red cat"));
    for (kind, settings) in [
        ("hpsv2", [weights(), tokenizer()]),
        ("clip", [weights(), tokenizer()]),
        ("image-reward", [of_blip, bert]),
        ("aesthetic", [head, clip]),
    ] {
        let rewards = open(kind, &settings).unwrap();
        for (bytes, name) in images(&case).iter().zip(&case.images) {
            let image = Tensor::from_slice(bytes.as_raw()).to_kind(Kind::Float) / 255.0;
            let shape = [1, i64::from(bytes.height()), i64::from(bytes.width()), 3];
            let image = image.reshape(shape).permute([0, 3, 1, 2]).contiguous();
            let (score, gradient) = rewards.gradient(&prompt, &image).unwrap();
            let scored = rewards.score(&[&prompt], &[bytes]).unwrap();
            let expected = scored.outcomes[0].scores.as_ref().unwrap()[0];
            assert!((score - expected).abs() < 1e-2, "{kind}, {name}: {score}, not {expected}");
            let slope = gradient.norm().double_value(&[]);
            assert!(slope > 1e-4, "{kind}, {name}: {slope}");
            let step = 3e-3 / slope;
            let at = |by: f64| {
                let moved = &image + &gradient * (by / slope);
                rewards.gradient(&prompt, &moved).unwrap().0
            };
            let quotient = (at(step) - at(-step)) / (2.0 * step);
            assert!((quotient / slope - 1.0).abs() < 0.02, "{kind}, {name}: {quotient}, {slope}");
        }
    }
}

fn error(kind: &str, settings: &[(&str, PathBuf)]) -> String {
    format!("{:#}", open(kind, settings).err().expect("a refusal"))
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = folder(Naming::OpenClip, true);
    let weights = || ("weights", dir.path().join("clip.safetensors"));
    let settings = [weights(), ("tokenizer", dir.path().to_owned())];
    assert!(error("clip", &settings).contains("vocab.json"));
    let settings = [("weights", dir.path().join("absent.safetensors")), tokenizer()];
    assert!(error("clip", &settings).contains("absent.safetensors"));
    let heads = [("weights", dir.path().join("head.safetensors")), tokenizer()];
    assert!(error("clip", &heads).contains("config.json"));
    assert!(error("image-reward", &heads).contains("no image encoder"));
    let config = dir.path().join("open_clip_config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("714", "700")).unwrap();
    assert!(error("clip", &[weights(), tokenizer()]).contains("714 tokens"));
    fs::remove_file(&config).unwrap();
    assert!(error("clip", &[weights(), tokenizer()]).contains("open_clip_config.json"));
    let misfit = error("hpsv2", &[weights(), tokenizer()]);
    assert!(misfit.contains("token_embedding.weight has shape [714, 24]"), "{misfit}");
}
