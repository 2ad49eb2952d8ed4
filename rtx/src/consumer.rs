//! TensorRT for RTX: its library builds for any consumer architecture, on a machine without GPU and driver.
//! What it makes runs on that architecture alone, and never on H100, H800 or H200.

use anyhow::{Result, bail, ensure};
use trtx::{BuilderConfig, ComputeCapability, EngineInvalidityDiagnostics, Logger, Runtime};

/// Library and parser, as PyPI's tensorrt-rtx-cu13-libs has them.
pub(crate) const LIBRARIES: [&str; 2] = ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"];
/// Where they come from.
pub(crate) const PACKAGE: &str = "tensorrt-rtx-cu13-libs==1.7.1.116";
/// How an engine begins.
pub(crate) const MAGIC: &[u8] = b"vtrt";
/// Where in an engine the version of its library stands, four bytes.
const VERSION_AT: usize = 24;

/// What an engine is built for.
pub(crate) type Architecture = ComputeCapability;

/// That of the compute capability `sm`.
pub(crate) fn architecture(sm: u32) -> Result<Architecture> {
    Ok(match sm {
        75 => ComputeCapability::kSM75,
        80 => ComputeCapability::kSM80,
        86 => ComputeCapability::kSM86,
        89 => ComputeCapability::kSM89,
        120 => ComputeCapability::kSM120,
        90 | 100 | 103 => bail!(
            "--architecture {sm}: TensorRT for RTX does not run on data-centre GPUs such as H100, H800, H200 \
             or B200: take `ng-export --target tensorrt` and build there"
        ),
        _ => bail!("--architecture {sm}: unknown: choose 75, 80, 86, 89 or 120"),
    })
}

/// Building needs no driver.
pub(crate) fn check_driver() -> Result<()> {
    Ok(())
}

pub(crate) fn build_for(architecture: Architecture, config: &mut BuilderConfig<'_>) -> Result<()> {
    config.set_nb_compute_capabilities(1)?;
    config.set_compute_capability(architecture, 0)?;
    Ok(())
}

/// Whether the head of `engine` names the right library, and whether the library can read it; it needs no GPU for
/// that, and misses one.
pub(crate) fn check_header(logger: &Logger, engine: &[u8]) -> Result<()> {
    let version: Vec<_> = engine.iter().skip(VERSION_AT).take(4).map(u8::to_string).collect();
    let version = version.join(".");
    ensure!(
        PACKAGE.split("==").last() == Some(&version),
        "the library is version {version}: install {PACKAGE}"
    );
    let runtime = Runtime::new(logger)?;
    let header = &engine[..runtime.engine_header_size().min(engine.len())];
    let (_, amiss) = runtime.engine_validity(header)?;
    let ours = EngineInvalidityDiagnostics::MALFORMED_ENGINE
        | EngineInvalidityDiagnostics::VERSION_MISMATCH;
    ensure!(!amiss.intersects(ours), "its own header is refused: {amiss:?}");
    Ok(())
}
