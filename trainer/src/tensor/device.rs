//! Choosing where tensors live and what networks compute in.

use std::path::Path;

use anyhow::{Result, bail};
use flow::checkpoint::read_bounded;
use flow::usage::Usage;
use tch::{Cuda, Device, Kind};

/// Libraries of a CUDA build of libtorch, opened when a GPU is asked for; one binary serves both.
const CUDA_LIBRARIES: [&str; 2] = ["libc10_cuda.so", "libtorch_cuda.so"];

/// Where tensors live, and what networks compute in.
#[derive(Clone, Copy, Debug)]
pub struct Compute {
    /// Where tensors live.
    pub device: Device,
    /// Type of activations.
    pub kind: Kind,
}

impl Compute {
    /// f32 on the CPU.
    pub const CPU: Self = Self { device: Device::Cpu, kind: Kind::Float };

    /// Whether it is [`Self::CPU`].
    pub(crate) fn is_plain(self) -> bool {
        self.device == Device::Cpu && self.kind == Kind::Float
    }
}

/// Names of [`Compute::kind`]; `auto` is bf16 on a GPU and f32 on the CPU.
pub const PRECISIONS: [&str; 3] = ["auto", "f32", "bf16"];

/// The one of [`PRECISIONS`] that stands for `kind`.
pub(crate) fn precision_name(kind: Kind) -> &'static str {
    if kind == Kind::BFloat16 { "bf16" } else { "f32" }
}

/// As `--device` names it.
pub(crate) fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// The device called `device` computing in one of [`PRECISIONS`].
///
/// # Errors
/// When a name is unknown, or a GPU is asked for and none can be used.
pub fn compute(device: &str, precision: &str) -> Result<Compute> {
    let device = open(device)?;
    let kind = match precision {
        "bf16" => Kind::BFloat16,
        "auto" if device.is_cuda() => Kind::BFloat16,
        "f32" | "auto" => Kind::Float,
        other => {
            bail!(Usage(format!(
                "unknown precision {other:?}: {} are possible",
                PRECISIONS.join(", ")
            )))
        }
    };
    Ok(Compute { device, kind })
}

/// The device called `name`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// When the name is unknown, or a GPU is asked for and none can be used.
fn open(name: &str) -> Result<Device> {
    let ordinal = match name {
        "cpu" => return Ok(Device::Cpu),
        "auto" | "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|n| n.parse::<usize>().ok()),
    };
    let Some(ordinal) = ordinal else {
        bail!(Usage(format!("unknown device {name:?}: auto, cpu, cuda or cuda:N are possible")));
    };
    match (name, n_gpus()) {
        (_, Some(n)) if ordinal < n => Ok(Device::Cuda(ordinal)),
        ("auto", _) => Ok(Device::Cpu),
        (_, None) => {
            bail!("no {name}: libtorch_cuda.so cannot be opened (is the full torch installed?)")
        }
        (_, Some(n)) => bail!("no {name}: {n} GPUs are visible"),
    }
}

/// GPUs that this process sees; none where libtorch's CUDA libraries cannot be opened.
///
/// libtorch keeps what it is first told for the rest of the process, which before they are open is that there are none:
/// nothing else may ask it.
pub(crate) fn n_gpus() -> Option<usize> {
    let opened = CUDA_LIBRARIES.iter().all(|library| open_library(library));
    opened.then(|| Cuda::device_count().max(0) as usize)
}

/// The device of process `number` of several on this machine, where `name` leaves the choice.
pub(crate) fn of_process(name: &str, number: usize) -> String {
    if ["auto", "cuda"].contains(&name) {
        own_gpu(name, number, n_gpus().unwrap_or(0))
    } else {
        name.to_owned()
    }
}

/// Of `n` GPUs that are seen; a launcher may have left each process one of its own.
fn own_gpu(name: &str, number: usize, n: usize) -> String {
    match n {
        0 => name.to_owned(),
        1 => "cuda:0".to_owned(),
        _ => format!("cuda:{number}"),
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

/// Lets everything that was asked of `device` finish.
pub(crate) fn synchronise(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

/// Most bytes in use since [`forget_peak`]: of the GPU's memory as a whole, else of this process.
pub(crate) fn peak_bytes(device: Device) -> Option<f64> {
    if let Device::Cuda(index) = device {
        // libtorch keeps what it once took.
        let [free, total] = cuda_memory(index)?;
        return Some((total - free) as f64);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(1024.0 * kilobytes)
}

/// The memory that one of `local` processes of this machine has: a GPU's own, or its share of what the machine or the
/// container has.
pub(crate) fn memory_bytes(device: Device, local: usize) -> Option<f64> {
    if let Device::Cuda(index) = device {
        let [_, total] = cuda_memory(index)?;
        return Some(total as f64);
    }
    let number = |text: &str| text.trim().trim_end_matches(" kB").trim().parse::<f64>().ok();
    let told = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = 1024.0 * number(told.lines().find_map(|line| line.strip_prefix("MemTotal:"))?)?;
    let container = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit = |path: &&str| String::from_utf8(read_bounded(Path::new(path)).ok()?).ok();
    let limits = container.iter().filter_map(|path| number(&limit(path)?));
    Some(limits.fold(machine, f64::min) / local as f64)
}

/// Takes what is in use now for the peak, where the system lets a process do so.
pub(crate) fn forget_peak() {
    // Where it may not, peaks are those of the whole run.
    drop(std::fs::write("/proc/self/clear_refs", "5"));
}

/// Free and total bytes of GPU `index`.
fn cuda_memory(index: usize) -> Option<[usize; 2]> {
    use libloading::os::unix::Library;
    type SetDevice = unsafe extern "C" fn(i32) -> i32;
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> i32;
    let (mut free, mut total) = (0, 0);
    #[expect(unsafe_code, reason = "libtorch's bindings do not tell")]
    // SAFETY: the symbols are the CUDA runtime's, opened above with these signatures; both places outlive
    // the call.
    let codes = unsafe {
        let choose = Library::this().get::<SetDevice>(b"cudaSetDevice\0").ok()?;
        let call = Library::this().get::<MemGetInfo>(b"cudaMemGetInfo\0").ok()?;
        [choose(index as i32), call(&raw mut free, &raw mut total)]
    };
    (codes == [0, 0]).then_some([free, total])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_takes_the_gpu_of_its_number_or_the_one_it_was_left() {
        assert_eq!(own_gpu("auto", 3, 8), "cuda:3");
        assert_eq!(own_gpu("cuda", 3, 1), "cuda:0");
        assert_eq!(own_gpu("auto", 3, 0), "auto");
        assert_eq!(of_process("cpu", 3), "cpu");
        assert_eq!(of_process("cuda:1", 3), "cuda:1");
    }
}
