//! Tiny networks of random parameters, those of `fixtures/networks/make.py`.

use std::fs;
use std::path::{Path, PathBuf};

use flow::checkpoint::{Entry, read_bounded, write_tensors};
use flow::models::aesthetic;
use flow::models::clip::naming::{Naming, OpenClipConfig};
use flow::models::clip::vision::ClipConfig;
use flow::ops::ParamPath;
use flow::ops::shapes::{Manifest, Shapes};
use flow::pipeline::read_json;

use crate::data::splitmix::SplitMix64;

pub(super) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/reward/fixtures/networks")
}

/// n numbers in −1 to 1, as `uniform` in `make.py` draws them.
pub(super) fn uniform(name: &str, n: usize) -> Vec<f64> {
    let hash = |seed: u64, byte| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let mut source = SplitMix64::new(name.bytes().fold(0xcbf2_9ce4_8422_2325, hash));
    (0..n).map(|_| 2.0 * source.unit() - 1.0).collect()
}

/// Writes the parameters that `drawn` in `make.py` draws.
pub(super) fn draw(path: &Path, manifests: &[Manifest]) {
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
pub(super) fn folder(naming: Naming, quick_gelu: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config: ClipConfig = if naming == Naming::Transformers {
        let file = "config.json";
        fs::copy(fixtures().join(file), dir.path().join(file)).unwrap();
        read_json(&fixtures().join(file)).unwrap()
    } else {
        let text = read_bounded(&fixtures().join("open_clip_config.json")).unwrap();
        let text = String::from_utf8(text).unwrap();
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

/// A reward by a tiny CLIP, as a setting of a run, and the folder of its weights.
pub(crate) fn clip() -> (tempfile::TempDir, String) {
    let dir = folder(Naming::OpenClip, true);
    let weights = dir.path().join("clip.safetensors");
    let (weights, tokenizer) = (weights.display(), fixtures().join("tokenizer"));
    let tokenizer = tokenizer.display();
    let table = format!("kind = 'clip', weights = '{weights}', tokenizer = '{tokenizer}'");
    (dir, format!("rewards=[{{name = 'clip', weight = 1.0, {table}}}]"))
}
