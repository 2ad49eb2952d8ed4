//! Choosing where tensors live.

use anyhow::{Result, bail};
use tch::{Cuda, Device};

use crate::usage::Usage;

/// Libraries of a CUDA build of libtorch, opened when a GPU is asked for; one binary serves both.
const CUDA_LIBRARIES: [&str; 2] = ["libc10_cuda.so", "libtorch_cuda.so"];

/// The device called `name`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// When the name is unknown, or a GPU is asked for and none can be used.
pub fn open(name: &str) -> Result<Device> {
    let ordinal = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" | "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let Some(ordinal) = ordinal else {
        bail!(Usage(format!("unknown device {name:?}: auto, cpu, cuda or cuda:N are possible")));
    };
    let opened = CUDA_LIBRARIES.iter().all(|library| open_library(library));
    let n_devices = if opened { Cuda::device_count() } else { 0 };
    if (ordinal as i64) < n_devices {
        return Ok(Device::Cuda(ordinal));
    }
    match name {
        "auto" => Ok(Device::Cpu),
        _ if !opened => {
            bail!("no {name}: libtorch_cuda.so cannot be opened (is the full torch installed?)")
        }
        _ => bail!("no {name}: {n_devices} GPUs are visible"),
    }
}

/// Opens a library for the rest of the process, its symbols visible to libtorch's registry.
fn open_library(name: &str) -> bool {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY};
    #[expect(
        unsafe_code,
        reason = "opening a library runs its initialisers; these are libtorch's own"
    )]
    // SAFETY: libtorch's CUDA libraries are made to be opened into a process that runs libtorch_cpu.
    let library = unsafe { Library::open(Some(name), RTLD_LAZY | RTLD_GLOBAL) };
    library.map(std::mem::forget).is_ok()
}
