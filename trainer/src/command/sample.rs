//! Images straight from a checkpoint, through libtorch: for looking, and for comparing with other
//! programs on the same noise.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::{Weights, write_tensors};
use flow::latents::check_pixels;
use flow::log;
use flow::pipeline::Pipeline;
use flow::usage::Usage;

use crate::data::prompts;
use crate::group::experience::solve_in_batches;
use crate::group::rollout::RolloutConfig;
use crate::network::model::{Loading, Model, unpack};
use crate::picture;
use crate::tensor::device::Compute;
use crate::tensor::stored::entry;

/// What to sample.
pub struct Options<'a> {
    /// Pipeline folder.
    pub model: &'a Path,
    /// One prompt for all images.
    pub prompt: &'a str,
    /// Images.
    pub n: usize,
    /// Image i starts from the noise of `seed` + i.
    pub seed: u64,
    /// Solver, steps, shift, guidance and size.
    pub rollout: RolloutConfig,
    /// Initial noise instead: safetensors, tensor `latents` `[n, Z, h, w]`.
    pub noise: Option<&'a Path>,
    /// Where to store the final latents, the same layout.
    pub latents_out: Option<&'a Path>,
    /// PNG file; several images get a number before the extension.
    pub out: &'a Path,
    /// Adapters and their scales, summed.
    pub loras: &'a [(PathBuf, f64)],
    /// Whether weights stay on disk and are read block by block.
    pub stream: bool,
    /// Where tensors live.
    pub compute: Compute,
}

/// Samples and writes the images.
///
/// # Errors
/// When the model or the noise does not fit, or a file cannot be written.
pub fn run(options: &Options<'_>) -> Result<()> {
    check(options)?;
    let guidance = options.rollout.guidance(&Pipeline::open(options.model)?)?;
    prompts::tell_cut(options.model, [options.prompt])?;
    let loading = Loading::to_sample(options.compute, options.stream);
    let mut model = Model::load(options.model, loading)?;
    model.add_loras(options.loras)?;
    let size =
        model.latent_size(options.rollout.size).map_err(|error| match options.rollout.size {
            Some(_) => Usage(format!("{error:#}")).into(),
            None => error,
        })?;
    let plan = options.rollout.plan(&model.pipeline.scheduler, &size);
    let plan = plan.map_err(|error| match options.rollout.shift {
        Some(shift) => Usage(format!("--shift {shift:?}: {error:#}")).into(),
        None => error,
    })?;
    let rows: Vec<Vec<f32>> = match options.noise {
        None => (options.seed..).take(options.n).map(|seed| size.noise(seed)).collect(),
        Some(path) => {
            let file = Weights::open_file(path)?;
            let shape = file.get("latents").map(|view| view.shape.to_vec());
            let wanted = vec![options.n, size.channels, size.height, size.width];
            ensure!(
                shape.as_ref() == Some(&wanted),
                "{}: tensor latents of shape {wanted:?} is needed, found {shape:?}",
                path.display()
            );
            file.f32("latents")?.chunks(size.len()).map(<[f32]>::to_vec).collect()
        }
    };
    let condition = model.encode(&vec![options.prompt; options.n], guidance, &size)?;
    let eps = model.pack(&rows, &size);
    let x0 = solve_in_batches(&model, &plan, eps, &condition, options.rollout.batch)?.x0;
    ensure!(
        x0.isfinite().all().int64_value(&[]) == 1,
        "the latents are not finite: {} holds a NaN or an infinity",
        options.model.display()
    );
    let images = model.decode(&x0, &size)?;
    if let Some(path) = options.latents_out {
        write_tensors(path, &[entry("latents", &unpack(&x0, &size)?)?], &[])?;
    }
    for (index, image) in images.iter().enumerate() {
        let path = numbered(options.out, index, options.n);
        if path.exists() {
            log::note(&format!("note: {} was there and is replaced", path.display()));
        }
        picture::save(&path, image).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// Refuses a size or a name of a file that no image can have.
fn check(options: &Options<'_>) -> Result<()> {
    ensure!(
        options.out.extension().is_some_and(|end| end.eq_ignore_ascii_case("png")),
        Usage(format!("{}: images are PNG files: the name ends in .png", options.out.display()))
    );
    if let Some([width, height]) = options.rollout.size {
        check_pixels(width, height).map_err(|error| Usage(error.to_string()))?;
    }
    let images = (0..options.n).map(|index| numbered(options.out, index, options.n));
    let files: Vec<PathBuf> = images.chain(options.latents_out.map(Path::to_path_buf)).collect();
    for (index, file) in files.iter().enumerate() {
        let is_first = !files[..index].contains(file);
        ensure!(is_first, Usage(format!("{} would be written twice", file.display())));
        ensure!(!file.is_dir(), Usage(format!("{} is a folder: name a file", file.display())));
    }
    Ok(())
}

fn numbered(path: &Path, index: usize, n: usize) -> PathBuf {
    if n == 1 {
        return path.to_owned();
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{index:03}.png"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_image_can_be_is_refused_before_anything_is_read() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("a-001.png");
        std::fs::create_dir(&folder).unwrap();
        let out = home.path().join("a.png");
        let refused = |n: usize, out: &Path, size: Option<[usize; 2]>| {
            let rollout = serde_json::from_value(serde_json::json!({ "size": size })).unwrap();
            let options = Options {
                model: Path::new("absent"),
                prompt: "a",
                n,
                seed: 0,
                rollout,
                noise: None,
                latents_out: None,
                out,
                loras: &[],
                stream: false,
                compute: Compute::CPU,
            };
            run(&options).unwrap_err()
        };
        for (n, out, size, says) in [
            (1, &folder, None, "a-001.png is a folder"),
            (2, &out, None, "a-001.png is a folder"),
            (1, &out, Some([1_000_000; 2]), "1000000x1000000 is above the limit"),
        ] {
            let error = refused(n, out, size);
            assert!(error.is::<Usage>() && error.to_string().contains(says), "{error}");
        }
        assert!(!refused(1, &out, None).is::<Usage>());
    }
}
