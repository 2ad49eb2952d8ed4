//! TensorRT of data centres: it builds for the GPU at hand alone, and ends the process where there is no driver.
//!
//! Its library is not in public registries. This is compiled wherever engines are, and has run nowhere.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use trtx::{BuilderConfig, Logger};

/// Library and parser.
pub(crate) const LIBRARIES: [&str; 2] = ["libnvinfer.so.11", "libnvonnxparser.so.11"];
/// Where they come from.
pub(crate) const PACKAGE: &str = "TensorRT 11.4";
/// How an engine begins.
pub(crate) const MAGIC: &[u8] = b"ftrt";
/// Has an entry for each GPU that the driver drives.
const GPUS: &str = "/proc/driver/nvidia/gpus";

/// What an engine is built for: the GPU at hand.
#[derive(Clone, Copy)]
pub(crate) struct Architecture;

/// That of the compute capability `sm`, which names the engine.
pub(crate) fn architecture(sm: u32) -> Result<Architecture> {
    ensure!(
        [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121].contains(&sm),
        "--architecture {sm}: unknown: give that of the GPU here, 90 for H100, H800 and H200"
    );
    Ok(Architecture)
}

/// Whether there is a GPU with a driver.
pub(crate) fn check_driver() -> Result<()> {
    driver_at(Path::new(GPUS))
}

fn driver_at(gpus: &Path) -> Result<()> {
    let is_there = fs::read_dir(gpus).is_ok_and(|mut gpus| gpus.next().is_some());
    ensure!(
        is_there,
        "{} lists no GPU: {PACKAGE} builds on the GPU that runs the engine, with its driver; TensorRT for RTX \
         builds without",
        gpus.display()
    );
    Ok(())
}

#[expect(clippy::unnecessary_wraps, reason = "the other library can refuse")]
pub(crate) fn build_for(_: Architecture, _: &mut BuilderConfig<'_>) -> Result<()> {
    Ok(())
}

/// The library has no function that reads it.
#[expect(clippy::unnecessary_wraps, reason = "the other library can refuse")]
pub(crate) fn check_header(_: &Logger, _: &[u8]) -> Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_said() {
        let message = driver_at(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(message.starts_with("/nowhere lists no GPU: TensorRT 11.4 builds"), "{message}");
        driver_at(Path::new("/proc/self")).unwrap();
    }
}
