//! Execution providers: what they need on the machine, and their settings.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Error, Result, bail, ensure};
use ort::{
    environment::Environment,
    ep::{self, ArbitrarilyConfigurableExecutionProvider},
    session::builder::SessionBuilder,
};

use crate::{Options, Profile, Provider, cancel::one_line, library, placement};

/// A shared library that a provider cannot do without.
struct Needed {
    file: &'static str,
    /// Where it comes from.
    of: &'static str,
}

const CUDA: [Needed; 6] = [
    Needed { file: "libcuda.so.1", of: "the NVIDIA driver, 580 or newer" },
    Needed { file: "libcudart.so.13", of: "CUDA 13" },
    Needed { file: "libcublasLt.so.13", of: "CUDA 13" },
    Needed { file: "libcublas.so.13", of: "CUDA 13" },
    Needed { file: "libcurand.so.10", of: "CUDA 13" },
    Needed { file: "libcudnn.so.9", of: "cuDNN 9.3 or newer for CUDA 13" },
];
const TENSORRT: [Needed; 2] = [
    Needed { file: "libnvinfer.so.10", of: "TensorRT 10.15 or newer, not 11" },
    Needed { file: "libnvonnxparser.so.10", of: "TensorRT 10.15 or newer, not 11" },
];
const TENSORRT_RTX: [Needed; 2] = [
    Needed { file: "libcuda.so.1", of: "the NVIDIA driver, 580 or newer" },
    Needed { file: "libtensorrt_rtx.so.1", of: "TensorRT-RTX 1.7 or newer" },
];

const CUDA_PROVIDER: &str = "libonnxruntime_providers_cuda.so";
const TENSORRT_PROVIDER: &str = "libonnxruntime_providers_tensorrt.so";
const RTX_PLUGIN: &str = "libonnxruntime_providers_nv_tensorrt_rtx.so";
const RTX_NAME: &str = "NvTensorRTRTXExecutionProvider";

/// TensorRT's builder effort, 0 to 5; its own default.
const BUILDER_LEVEL: u8 = 3;

/// Makes sure that everything `options.provider` needs is on this machine.
///
/// # Errors
/// Names the library that is missing and the version wanted.
pub(crate) fn check(options: &Options) -> Result<()> {
    let (plugins, libraries): (&[&str], Vec<&[Needed]>) = match options.provider {
        Provider::Cpu => return Ok(()),
        Provider::Cuda => (&[CUDA_PROVIDER], vec![&CUDA]),
        Provider::TensorRt => (&[CUDA_PROVIDER, TENSORRT_PROVIDER], vec![&CUDA, &TENSORRT]),
        Provider::TensorRtRtx => (&[RTX_PLUGIN], vec![&TENSORRT_RTX]),
    };
    let provider = options.provider;
    let runtime = library()?;
    let folder = runtime.parent().unwrap_or(Path::new("."));
    for plugin in plugins {
        ensure!(
            folder.join(plugin).is_file(),
            "--provider {provider} needs {plugin} beside {}: {}",
            runtime.display(),
            if provider == Provider::TensorRtRtx {
                "put the one of the Python package onnxruntime-ep-nv-tensorrt-rtx-cu13 there"
            } else {
                "point ORT_DYLIB_PATH at the library of the Python package onnxruntime-gpu 1.31 \
                 (that of onnxruntime is for the CPU)"
            }
        );
    }
    for needed in libraries.into_iter().flatten() {
        load(needed, folder).with_context(|| {
            format!("--provider {provider} needs {} of {}", needed.file, needed.of)
        })?;
    }
    Ok(())
}

/// Version of TensorRT's library, as `10.16.1`, where it is on this machine.
pub fn tensorrt_version() -> Option<String> {
    let name = TENSORRT[0].file;
    // The library's own initialisation runs, as it would for the provider.
    #[expect(unsafe_code, reason = "the function takes nothing and returns a number")]
    let version = unsafe {
        let library = libloading::Library::new(name).ok()?;
        let version: libloading::Symbol<'_, unsafe extern "C" fn() -> i32> =
            library.get(b"getInferLibVersion\0").ok()?;
        let version = version();
        // The provider will use it.
        std::mem::forget(library);
        version
    };
    Some(format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

/// Opens a library by its name, else from where Python packages of NVIDIA put it, and keeps it open
/// for the provider that will ask for it by name.
fn load(needed: &Needed, folder: &Path) -> Result<()> {
    let mut failure = match ort::util::preload_dylib(needed.file) {
        Ok(()) => return Ok(()),
        Err(error) => reason(&error),
    };
    for path in packaged(folder, needed.file) {
        match ort::util::preload_dylib(&path) {
            Ok(()) => return Ok(()),
            Err(error) => failure = reason(&error),
        }
    }
    Err(failure)
}

/// What the system's loader said.
fn reason(error: &dyn std::error::Error) -> Error {
    let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    one_line(&text)
}

/// Where `file` lies in `site-packages/nvidia/*/lib`, or beside, when ONNX Runtime lies in
/// `site-packages/onnxruntime/capi`.
fn packaged(folder: &Path, file: &str) -> Vec<PathBuf> {
    let site_packages = folder.ancestors().nth(2).into_iter();
    let subfolders = site_packages
        .map(|folder| folder.join("nvidia"))
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("lib")));
    let mut found: Vec<PathBuf> = subfolders
        .chain([folder.to_owned()])
        .map(|folder| folder.join(file))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found
}

/// Has `builder` run everything on `options.provider`.
///
/// # Errors
/// When the provider refuses its settings or the machine.
pub(crate) fn register(
    environment: &Environment,
    builder: SessionBuilder,
    options: &Options,
) -> Result<SessionBuilder> {
    let device = i32::try_from(options.device).context("--device is too large")?;
    let registered = match options.provider {
        Provider::Cpu => return Ok(builder),
        Provider::Cuda => {
            builder.with_execution_providers([cuda(device).build().error_on_failure()])
        }
        Provider::TensorRt => {
            let tensorrt = tensorrt(device, options)?.build().error_on_failure();
            builder.with_execution_providers([tensorrt, cuda(device).build().error_on_failure()])
        }
        Provider::TensorRtRtx => return rtx(environment, builder, options),
    };
    remembering(registered.map_err(|error| one_line(error.message()))?)
}

/// What a provider does not take moves to the CPU without a word; see [`placement::check`].
fn remembering(builder: SessionBuilder) -> Result<SessionBuilder> {
    let builder = builder.with_config_entry(placement::RECORD, "1");
    builder.map_err(|error| one_line(error.message()))
}

/// Without TF32, whose 10 bits would make the precision of a graph another than it says, and without
/// trying convolutions out by the clock, which picks other kernels on other days.
fn cuda(device: i32) -> ep::CUDA {
    ep::CUDA::default()
        .with_device_id(device)
        .with_tf32(false)
        .with_conv_algorithm_search(ep::cuda::ConvAlgorithmSearch::Heuristic)
        .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested)
}

/// ### Why no precision flag is set
/// The provider makes a strongly typed network exactly when all are off, and only such a network
/// keeps bf16 and fp8 as the graph has them.
fn tensorrt(device: i32, options: &Options) -> Result<ep::TensorRT> {
    let (profile, folder) = engine(options)?;
    let folder = folder.display().to_string();
    Ok(ep::TensorRT::default()
        .with_device_id(device)
        .with_builder_optimization_level(BUILDER_LEVEL)
        .with_engine_cache(true)
        .with_engine_cache_path(&folder)
        .with_timing_cache(true)
        .with_timing_cache_path(&folder)
        .with_profile_min_shapes(profile.text(0))
        .with_profile_opt_shapes(profile.text(1))
        .with_profile_max_shapes(profile.text(2))
        // Weights above 2 GB stay outside of the message that describes the network.
        .with_arbitrary_config("trt_load_user_initializer", "1"))
}

fn rtx(
    environment: &Environment,
    builder: SessionBuilder,
    options: &Options,
) -> Result<SessionBuilder> {
    let (profile, folder) = engine(options)?;
    let runtime = library()?;
    let plugin = runtime.with_file_name(RTX_PLUGIN);
    let known = environment.devices().any(|device| device.ep().is_ok_and(|name| name == RTX_NAME));
    if !known {
        environment
            .register_ep_library(RTX_NAME, &plugin)
            .map_err(|error| one_line(error.message()))
            .with_context(|| format!("cannot open {}", plugin.display()))?;
    }
    let mut devices =
        environment.devices().filter(|device| device.ep().is_ok_and(|name| name == RTX_NAME));
    let Some(device) = devices.nth(options.device) else {
        bail!("TensorRT-RTX knows no GPU number {} on this machine", options.device);
    };
    let option = |name: &str, value: String| (format!("{RTX_NAME}.{name}"), value);
    let settings = [
        option("nv_profile_min_shapes", profile.text(0)),
        option("nv_profile_opt_shapes", profile.text(1)),
        option("nv_profile_max_shapes", profile.text(2)),
        option("nv_runtime_cache_path", folder.display().to_string()),
    ];
    let builder = builder.with_devices([device], Some(&settings));
    remembering(builder.map_err(|error| one_line(error.message()))?)
}

/// The shapes and the folder of an engine.
fn engine(options: &Options) -> Result<(&Profile, &Path)> {
    let profile = options.profile.as_ref().context("an engine needs the shapes of its inputs")?;
    let folder = options.engines.as_deref().context("an engine needs a folder to be kept in")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok((profile, folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_where_python_packages_have_them() -> Result<()> {
        let site = tempfile::tempdir()?;
        let capi = site.path().join("onnxruntime/capi");
        let library = site.path().join("nvidia/cu13/lib/libcudart.so.13");
        fs::create_dir_all(&capi)?;
        fs::create_dir_all(library.parent().context("a folder")?)?;
        fs::write(&library, "")?;
        assert_eq!(packaged(&capi, "libcudart.so.13"), [library]);
        assert!(packaged(&capi, "libcublas.so.13").is_empty());
        Ok(())
    }

    #[test]
    fn a_missing_library_is_named_with_its_version() {
        let needed = Needed { file: "libno-such-thing.so.7", of: "Nothing 7" };
        let message = load(&needed, Path::new("/")).unwrap_err().to_string();
        assert!(message.contains("libno-such-thing.so.7"), "{message}");
    }
}
