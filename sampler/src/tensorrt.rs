//! What TensorRT is told before it builds an engine: the shapes it will meet, and where to keep it.

use std::{
    collections::BTreeMap,
    env, fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

use flow::{checkpoint::read_bounded, latents::LatentSize, pipeline::Pipeline};
use onnx::Profile;

use crate::networks::{TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER, VAE_ENCODER};

/// Pixels of the smallest side that an engine takes.
const SMALLEST: usize = 256;
/// Pixels of the largest side that is decoded at once.
const TILE: usize = 1024;

/// Shapes of every graph's inputs for one to `batch` images, usually one, of a side from 256 pixels to
/// `side`, the usual and largest, with rows of `text` CLIP and T5 tokens.
pub fn profiles(
    pipeline: &Pipeline,
    side: usize,
    text: [usize; 2],
    batch: usize,
) -> BTreeMap<&'static str, Profile> {
    let (config, vae) = (&pipeline.transformer, &pipeline.vae);
    let factor = vae.factor();
    let cells = |side: usize| LatentSize {
        channels: vae.latent_channels,
        height: side / factor,
        width: side / factor,
    };
    let sides = [SMALLEST.min(side), side, side].map(cells);
    let tiles = [SMALLEST.min(side), TILE.min(side), TILE.min(side)].map(cells);
    let fixed = |name: &str, shape: &[usize]| (name.to_owned(), [0; 3].map(|_| shape.to_vec()));
    let [clip, t5] = text;
    let together = |name: &str, shape: &[usize]| {
        let of = |n: usize| [&[n], shape].concat();
        (name.to_owned(), [of(1), of(1), of(batch)])
    };
    let tokens = |n: usize, size: &LatentSize| vec![n, size.tokens(), config.in_channels];
    let [smallest, usual, largest] = &sides;
    let tokens = [tokens(1, smallest), tokens(1, usual), tokens(batch, largest)];
    let ids = |size: LatentSize| vec![size.tokens(), 3];
    let latent = |size: LatentSize| vec![1, size.channels, size.height, size.width];
    let pixels = |size: LatentSize| vec![1, 3, size.height * factor, size.width * factor];
    let mut transformer = vec![
        ("hidden_states".to_owned(), tokens),
        together("encoder_hidden_states", &[t5, config.joint_attention_dim]),
        together("pooled_projections", &[config.pooled_projection_dim]),
        together("timestep", &[]),
        ("img_ids".to_owned(), sides.map(ids)),
        fixed("txt_ids", &[t5, 3]),
    ];
    if config.guidance_embeds {
        transformer.push(together("guidance", &[]));
    }
    [
        (TEXT_ENCODER, vec![fixed("input_ids", &[1, clip])]),
        (TEXT_ENCODER_2, vec![fixed("input_ids", &[1, t5])]),
        (TRANSFORMER, transformer),
        (VAE_DECODER, vec![("latent_sample".to_owned(), tiles.map(latent))]),
        (VAE_ENCODER, vec![("sample".to_owned(), sides.map(pixels))]),
    ]
    .map(|(component, inputs)| (component, Profile { inputs }))
    .into()
}

/// Where the engines of the export in `folder` for `gpu` are kept: in `root`, else in the user's
/// cache, by graphs, TensorRT, GPU and driver, which an engine cannot outlive.
pub fn folder(root: Option<&Path>, folder: &Path, gpu: &str, tensorrt: &str) -> PathBuf {
    let root = root.map_or_else(cache, Path::to_owned);
    let driver = fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let mut hasher = DefaultHasher::new();
    for component in [TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER] {
        let graph = folder.join(component).join("model.onnx");
        read_bounded(&graph).unwrap_or_default().hash(&mut hasher);
        let metadata = fs::metadata(graph.with_file_name("model.onnx_data"));
        metadata.map(|metadata| (metadata.len(), metadata.modified().ok())).ok().hash(&mut hasher);
    }
    driver.hash(&mut hasher);
    let gpu: String =
        gpu.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    root.join(format!("{:016x}-{gpu}-tensorrt-{tensorrt}", hasher.finish()))
}

fn cache() -> PathBuf {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    root.unwrap_or_else(env::temp_dir).join("neighbor-grpo/engines")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flux_at_1024_has_its_shapes() {
        let pipeline = Pipeline::known("flux.1-dev").unwrap();
        let profiles = profiles(&pipeline, 1024, [77, 512], 2);
        let text = profiles[TRANSFORMER].text(2);
        assert!(
            text.starts_with("hidden_states:2x4096x64,encoder_hidden_states:2x512x4096,"),
            "{text}"
        );
        assert!(text.ends_with("img_ids:4096x3,txt_ids:512x3,guidance:2"), "{text}");
        let text = profiles[TRANSFORMER].text(0);
        assert!(text.starts_with("hidden_states:1x256x64") && text.contains("img_ids:256x3"));
        assert!(profiles[TRANSFORMER].text(1).starts_with("hidden_states:1x4096x64"));
        assert_eq!(profiles[VAE_DECODER].text(1), "latent_sample:1x16x128x128");
        assert_eq!(profiles[TEXT_ENCODER].text(0), "input_ids:1x77");
    }

    #[test]
    fn another_gpu_has_another_folder() {
        let of = |gpu| folder(Some(Path::new("/r")), Path::new("/m"), gpu, "10.16");
        assert_ne!(of("NVIDIA H100"), of("NVIDIA H200"));
        assert!(of("NVIDIA H100").to_string_lossy().ends_with("-NVIDIA-H100-tensorrt-10.16"));
    }
}
