//! The preset `table-1` as it ships, with tiny random networks in place of the published ones.

use std::fs;
use std::path::Path;

use flow::checkpoint::{Entry, write_tensors};
use flow::models::aesthetic;
use flow::models::blip::BlipVisionConfig;
use flow::models::clip::naming::{Naming, OpenClipConfig};
use flow::models::clip::vision::ClipConfig;
use flow::models::image_reward::ImageRewardConfig;
use flow::ops::ParamPath;
use flow::ops::shapes::{Manifest, Shapes};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tests::fixture::{Fixture, PIPELINES, copy_folder, root};
use tests::program::{Ended, Program, typed};

use crate::trust::answering;

/// Answers of the vision-language model, by caption.
const ALIGNMENT: [(&str, &str); 2] = [("a red fox", "3.5"), ("a blue owl", "4")];

fn read<T: DeserializeOwned>(path: &Path) -> T {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Writes `manifests`: waves as large as random initialisation, and ones where a scale is.
fn draw(path: &Path, manifests: &[Manifest]) {
    let tensor = |(name, shape): (&'_ str, &[usize])| {
        let is_scale = shape.len() == 1 && name.ends_with("weight");
        let gain = (3.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        let value = |i: usize| if is_scale { 1.0 } else { gain * (i as f32 * 1.7).sin() };
        let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
        Entry::f32(name, shape, &values)
    };
    let entries: Vec<Entry<'_>> =
        manifests.iter().flat_map(Manifest::entries).map(tensor).collect();
    write_tensors(path, &entries, &[]).unwrap();
}

fn draw_clip(path: &Path, naming: Naming, config: &ClipConfig) {
    let towers = [config.image_manifest(), config.text_manifest()];
    draw(path, &towers.map(|tower| naming.manifest(&tower)));
}

/// The files that the preset names, those that are pickled as safetensors. All networks are tiny.
fn files(home: &Path) {
    let fixtures = root().join("trainer/src/reward/fixtures/networks");
    let rewards = home.join("rewards");
    copy_folder(&fixtures.join("tokenizer"), &home.join("FLUX.1-dev/tokenizer"));
    copy_folder(&fixtures.join("bert"), &rewards.join("bert-base-uncased"));
    let mut config: Value = read(&fixtures.join("open_clip_config.json"));
    let write_config = |folder: &Path, config: &Value| {
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("open_clip_config.json"), config.to_string()).unwrap();
        serde_json::from_value::<OpenClipConfig>(config.clone()).unwrap().clip()
    };
    let clip = write_config(&rewards, &config);
    draw_clip(&rewards.join("HPS_v2.1_compressed.safetensors"), Naming::OpenClip, &clip);
    config["model_cfg"]["quick_gelu"] = true.into();
    config["model_cfg"]["vision_cfg"]["patch_size"] = 14.into();
    config["model_cfg"]["vision_cfg"]["image_size"] = 42.into();
    config["preprocess_cfg"] = json!({ "interpolation": "bicubic", "resize_mode": "squash" });
    let folder = rewards.join("DFN5B-CLIP-ViT-H-14-378");
    let clip = write_config(&folder, &config);
    draw_clip(&folder.join("open_clip_pytorch_model.safetensors"), Naming::OpenClip, &clip);
    let clip: ClipConfig = read(&fixtures.join("config.json"));
    for name in ["PickScore_v1", "clip-vit-large-patch14"] {
        fs::create_dir(rewards.join(name)).unwrap();
        let place = |file: &str| rewards.join(name).join(file);
        fs::copy(fixtures.join("config.json"), place("config.json")).unwrap();
        draw_clip(&place("model.safetensors"), Naming::Transformers, &clip);
    }
    let (shapes, width) = (Shapes::new(), clip.projection_dim);
    aesthetic::score(&shapes, &ParamPath::root(), &vec![1, width], width);
    draw(&rewards.join("sac+logos+ava1-l14-linearMSE.safetensors"), &[shapes.manifest()]);
    fs::copy(fixtures.join("med_config.json"), rewards.join("med_config.json")).unwrap();
    let vision = BlipVisionConfig { width: 128, layers: 2, image_size: 32, patch_size: 8 };
    let blip = ImageRewardConfig { vision, text: read(&fixtures.join("med_config.json")) };
    draw(&rewards.join("ImageReward.safetensors"), &[blip.manifest()]);
}

/// A vision-language model that was trained on the question for alignment.
fn judge(request: &Value) -> Value {
    assert_eq!(request["model"], "UnifiedReward");
    let content = &request["messages"][0]["content"];
    let image = content[0]["image_url"]["url"].as_str().unwrap();
    assert!(image.starts_with("data:image/png;base64,"));
    let question = content[1]["text"].as_str().unwrap();
    let asked = |(caption, _): &&(&str, &str)| question.ends_with(&format!("[{caption}]"));
    let (_, score) = ALIGNMENT.iter().find(asked).unwrap_or_else(|| panic!("{question}"));
    let text = format!(
        "Word-wise Scores: [[\"a\", 0.1]]\n\nAlignment Score (1-5): {score}\nCoherence Score (1-5): 1\n\
         Style Score (1-5): 2"
    );
    json!({ "choices": [{ "message": { "role": "assistant", "content": text } }] })
}

#[test]
fn the_papers_table_has_its_six_columns_and_the_grid() {
    let (home, fixture) = (tempfile::tempdir().unwrap(), Fixture::open(PIPELINES[0]));
    files(home.path());
    let prompts = home.path().join("HPDv2/benchmark");
    fs::create_dir_all(&prompts).unwrap();
    for (name, (caption, _)) in ["anime.json", "photo.json"].iter().zip(ALIGNMENT) {
        fs::write(prompts.join(name), json!([caption]).to_string()).unwrap();
    }
    let (address, answered) =
        answering("127.0.0.1:0", ALIGNMENT.len(), |_, request| judge(request));
    let mut command = Program::Train.command(["eval", "--preset", "table-1"]);
    command.current_dir(home.path()).args(["--model", &typed(&fixture.pipeline)]);
    command.args(["--prompts", "HPDv2/benchmark", "--out", "out"]);
    for setting in [
        "rollout.size=[144, 144]", // the least that has eight periods of the grid
        "rollout.steps=2",
        "rewards.0.weights=rewards/HPS_v2.1_compressed.safetensors",
        "rewards.2.weights=rewards/ImageReward.safetensors",
        "judges.0.weights=rewards/DFN5B-CLIP-ViT-H-14-378/open_clip_pytorch_model.safetensors",
        &format!("judges.1.url=http://{address}/v1/chat/completions"),
        "judges.2.weights=rewards/sac+logos+ava1-l14-linearMSE.safetensors",
    ] {
        command.args(["--set", setting]);
    }
    Ended::after(&mut command).succeeded();
    answered.join().unwrap();
    let table = fs::read_to_string(home.path().join("out/eval.md")).unwrap();
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.trim_matches(['|', ' ']).split(" | ").collect()).collect();
    let names = ["hpsv2", "pickscore", "image-reward", "clip", "unified", "aesthetic", "grid"];
    assert_eq!(rows[0][1..], names, "{table}");
    let means: Vec<f64> = rows[2][1..].iter().map(|cell| cell.parse().unwrap()).collect();
    let [hpsv2, pickscore, _, clip, unified, _, grid] = means[..] else { panic!("{table}") };
    assert!([hpsv2, pickscore, clip].iter().all(|cosine| cosine.abs() <= 1.0), "{table}");
    assert!(unified == 3.75 && grid <= 0.0, "{table}");
}
