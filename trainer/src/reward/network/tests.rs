//! Tiny networks against the packages that define the scores; see `fixtures/networks/make.py`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use flow::checkpoint::{Entry, Weights, write_tensors};
use flow::models::aesthetic;
use flow::models::blip::BlipVisionConfig;
use flow::models::clip::naming::{Naming, OpenClipConfig};
use flow::models::clip::vision::ClipConfig;
use flow::models::image_reward::ImageRewardConfig;
use flow::ops::ParamPath;
use flow::ops::shapes::{Manifest, Shapes};
use flow::pipeline::read_json;
use serde::Deserialize;
use tch::Device;

use super::*;
use crate::data::splitmix::SplitMix64;
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

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/networks")
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

/// n numbers in −1 to 1, as `uniform` in `make.py` draws them.
fn uniform(name: &str, n: usize) -> Vec<f64> {
    let hash = |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let mut source = SplitMix64::new(name.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    (0..n).map(|_| 2.0 * source.unit() - 1.0).collect()
}

/// Writes the parameters that `drawn` in `make.py` draws.
fn draw(path: &Path, manifests: &[Manifest]) {
    let entries: Vec<Entry<'_>> = manifests
        .iter()
        .flat_map(Manifest::entries)
        .map(|(name, shape)| {
            let values = uniform(name, shape.iter().product());
            let values: Vec<f32> = if shape.len() >= 2 {
                let gain = (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt();
                values.iter().map(|u| (gain * u) as f32).collect()
            } else {
                let base = f64::from(name.ends_with("weight"));
                values.iter().map(|u| (0.25 * u + base) as f32).collect()
            };
            Entry::f32(name, shape, &values)
        })
        .collect();
    write_tensors(path, &entries, &[]).unwrap();
}

/// A folder of each package's weights with their configs beside them.
fn folder(naming: Naming, quick_gelu: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config: ClipConfig = if naming == Naming::Transformers {
        let file = "config.json";
        fs::copy(fixtures().join(file), dir.path().join(file)).unwrap();
        read_json(&fixtures().join(file)).unwrap()
    } else {
        let text = fs::read_to_string(fixtures().join("open_clip_config.json")).unwrap();
        let flag = format!("\"quick_gelu\": {quick_gelu}, \"embed_dim\"");
        let text = text.replace("\"embed_dim\"", &flag);
        fs::write(dir.path().join("open_clip_config.json"), &text).unwrap();
        serde_json::from_str::<OpenClipConfig>(&text).unwrap().clip()
    };
    let towers = [config.image_manifest(), config.text_manifest()];
    draw(&dir.path().join("clip.safetensors"), &towers.map(|tower| naming.manifest(&tower)));
    let shapes = Shapes::new();
    let width = config.projection_dim;
    aesthetic::score(&shapes, &ParamPath::root(), &vec![1, width], width);
    draw(&dir.path().join("head.safetensors"), &[shapes.manifest()]);
    dir
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
