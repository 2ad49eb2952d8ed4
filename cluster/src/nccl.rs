//! NVIDIA's NCCL: operations on tensors of a GPU, through its C interface.
//!
//! ### Why not c10d's ProcessGroupNCCL, nor the crate cudarc
//! c10d's class lies in libtorch_cuda and needs CUDA's headers and all of torch wherever it is compiled; its
//! watchdog ends the process where an operation fails, or leaves that to a variable of the environment.
//! cudarc looks for `libnccl.so`, which the package that torch brings does not have (its file is
//! `libnccl.so.2`), and panics where it finds none. What is left is a dozen functions of C that have not
//! changed for years: they are looked up when a GPU is asked for, so that one program serves machines with
//! and without CUDA, and every failure is a value that names ranks.
//!
//! ### Streams
//! Operations have a stream of their own, so that libtorch computes beside them on the device's default one. Each
//! waits for what was enqueued there before it, which made its tensors or used their memory before, and whoever reads
//! what it makes waits, on the processor, until it has ended; its tensors are kept as long. So nothing has to be said
//! to libtorch's allocator.

mod event;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use libloading::os::unix::{Library, RTLD_LAZY, RTLD_LOCAL};
use tch::{Device, Kind, Tensor};

use self::event::{Event, did};
use crate::c10d::Failure;
use crate::call::{Operation, Reduce};

/// The library's file.
const FILE: &str = "libnccl.so.2";
/// Longest pause between two looks at an operation.
const PAUSE: Duration = Duration::from_millis(1);
/// `ncclSuccess` and `cudaSuccess`; `ncclInProgress`.
const DONE: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `cudaStreamNonBlocking`.
const NON_BLOCKING: u32 = 1;

/// What tells ranks of one communicator from those of others: `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Id([u8; 128]);

/// `ncclConfig_t` as of 2.17; later libraries take it as it is.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

type Comm = *mut c_void;
type Stream = *mut c_void;
type RawEvent = *mut c_void;

/// The functions of a library, of which the first named is the field's.
macro_rules! functions {
    ($name:ident { $($field:ident: $symbol:literal, fn($($argument:ty),*) -> $result:ty;)* }) => {
        #[derive(Clone, Copy)]
        struct $name {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl $name {
            fn of(library: &Library) -> Result<Self, Failure> {
                // SAFETY: the symbols have these signatures in the libraries' headers.
                Ok(Self { $($field: unsafe {
                    *library
                        .get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol.as_bytes())
                        .map_err(|error| error.to_string())?
                },)* })
            }
        }
    };
}

functions!(Functions {
    version: "ncclGetVersion", fn(*mut c_int) -> c_int;
    unique_id: "ncclGetUniqueId", fn(*mut Id) -> c_int;
    init: "ncclCommInitRankConfig", fn(*mut Comm, c_int, Id, c_int, *mut Config) -> c_int;
    async_error: "ncclCommGetAsyncError", fn(Comm, *mut c_int) -> c_int;
    abort: "ncclCommAbort", fn(Comm) -> c_int;
    error_text: "ncclGetErrorString", fn(c_int) -> *const c_char;
    last_error: "ncclGetLastError", fn(Comm) -> *const c_char;
    all_gather: "ncclAllGather",
        fn(*const c_void, *mut c_void, usize, c_int, Comm, Stream) -> c_int;
    reduce_scatter: "ncclReduceScatter",
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    all_reduce: "ncclAllReduce",
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
    broadcast: "ncclBroadcast",
        fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> c_int;
});

functions!(Runtime {
    set_device: "cudaSetDevice", fn(c_int) -> c_int;
    new_stream: "cudaStreamCreateWithFlags", fn(*mut Stream, u32) -> c_int;
    drop_stream: "cudaStreamDestroy", fn(Stream) -> c_int;
    wait_event: "cudaStreamWaitEvent", fn(Stream, RawEvent, u32) -> c_int;
    new_event: "cudaEventCreateWithFlags", fn(*mut RawEvent, u32) -> c_int;
    record: "cudaEventRecord", fn(RawEvent, Stream) -> c_int;
    query: "cudaEventQuery", fn(RawEvent) -> c_int;
    drop_event: "cudaEventDestroy", fn(RawEvent) -> c_int;
    forget: "cudaGetLastError", fn() -> c_int;
    error_text: "cudaGetErrorString", fn(c_int) -> *const c_char;
});

/// NCCL where it is installed, opened once and for the rest of the process.
pub(crate) struct Nccl {
    functions: Functions,
    /// Where it was found.
    place: String,
}

impl Nccl {
    /// # Errors
    /// One line that names the library and where it was looked for.
    pub(crate) fn open() -> Result<&'static Self, Failure> {
        static OPENED: OnceLock<Result<Nccl, Failure>> = OnceLock::new();
        OPENED.get_or_init(|| Self::in_places(&places())).as_ref().map_err(Clone::clone)
    }

    /// The first that opens, by its name alone first, so that it is the one libtorch itself uses.
    fn in_places(folders: &[PathBuf]) -> Result<Self, Failure> {
        let files = folders.iter().map(|folder| folder.join(FILE));
        for path in std::iter::once(PathBuf::from(FILE)).chain(files) {
            // SAFETY: opening a library runs its initialisers; these are NVIDIA's own.
            let Ok(library) = (unsafe { Library::open(Some(&path), RTLD_LAZY | RTLD_LOCAL) })
            else {
                continue;
            };
            let functions = Functions::of(&library)?;
            std::mem::forget(library);
            return Ok(Self { functions, place: path.display().to_string() });
        }
        let folders: Vec<String> =
            folders.iter().map(|folder| folder.display().to_string()).collect();
        Err(format!(
            "{FILE} is not there: neither the system's loader (LD_LIBRARY_PATH) nor {} has it; it comes with \
             torch for CUDA, as the Python package nvidia-nccl-cu13",
            folders.join(" or ")
        ))
    }

    /// Where it was found, and its version, as `22809` for 2.28.9.
    pub(crate) fn about(&self) -> Result<(&str, i32), Failure> {
        let mut version = 0;
        // SAFETY: the place outlives the call.
        self.checked(unsafe { (self.functions.version)(&raw mut version) })?;
        Ok((&self.place, version))
    }

    pub(crate) fn unique_id(&self) -> Result<Id, Failure> {
        let mut id = Id([0; 128]);
        // SAFETY: the place outlives the call.
        self.checked(unsafe { (self.functions.unique_id)(&raw mut id) })?;
        Ok(id)
    }

    fn checked(&self, code: c_int) -> Result<(), Failure> {
        if code == DONE || code == IN_PROGRESS {
            Ok(())
        } else {
            Err(self.why(code, ptr::null_mut()))
        }
    }

    fn why(&self, code: c_int, comm: Comm) -> Failure {
        // SAFETY: both give texts of the library, the second of the last failure in this process.
        let [kind, last] = unsafe {
            [(self.functions.error_text)(code), (self.functions.last_error)(comm)].map(line)
        };
        let last = if last.is_empty() { String::new() } else { format!(": {last}") };
        format!("NCCL: {kind}{last}")
    }
}

/// What NCCL says of itself where it is installed: version and place. Needs no GPU.
///
/// # Errors
/// One line that names the library and where it was looked for, or what it cannot do.
pub fn about_nccl() -> Result<String, String> {
    let nccl = Nccl::open()?;
    let (place, version) = nccl.about()?;
    let id = nccl.unique_id()?;
    if Id::from_text(&id.to_text()).is_none_or(|back| back.0 != id.0) {
        return Err(format!("{place}: an id does not arrive whole"));
    }
    let [major, minor, patch] = [version / 10000, version / 100 % 100, version % 100];
    Ok(format!("nccl {major}.{minor}.{patch} ({place})"))
}

/// Folders that have the library where libtorch lies as its Python package lays it out.
fn places() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let torch = maps
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .find(|path| path.ends_with("/libtorch_cpu.so"))
        .and_then(|path| Path::new(path).parent());
    torch.map_or_else(Vec::new, |lib| vec![lib.to_owned(), lib.join("../../nvidia/nccl/lib")])
}

impl Id {
    pub(crate) fn to_text(self) -> String {
        self.0.map(|byte| format!("{byte:02x}")).concat()
    }

    /// What [`Id::to_text`] gave.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut bytes = [0; 128];
        if text.len() != 2 * bytes.len() || !text.is_ascii() {
            return None;
        }
        for (byte, index) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[index..index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// The GPUs of all ranks.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    runtime: Runtime,
    /// None after it was ended.
    comm: Cell<Comm>,
    /// What operations are enqueued on.
    stream: Stream,
    device: usize,
    timeout: Duration,
}

impl Communicator {
    /// Meets the other ranks, which all call it with one `id`, each with a GPU of its own. `look` says
    /// meanwhile whether one of them has failed.
    ///
    /// # Errors
    /// What NCCL or CUDA say, or what `look` does.
    pub(crate) fn open(
        id: Id,
        rank: usize,
        world: usize,
        device: usize,
        timeout: Duration,
        look: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let nccl = Nccl::open()?;
        let runtime = Runtime::of(&Library::this())?;
        let comm = Cell::new(ptr::null_mut());
        let mut opened = Self { nccl, runtime, comm, stream: ptr::null_mut(), device, timeout };
        opened.select()?;
        let mut stream = ptr::null_mut();
        // SAFETY: the place outlives the call.
        did(&runtime, device, unsafe { (runtime.new_stream)(&raw mut stream, NON_BLOCKING) })?;
        opened.stream = stream;
        let unset = c_int::MIN;
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21700,
            // Calls return at once, so that a rank that never comes can be given up.
            blocking: 0,
            cga_cluster_size: unset,
            min_ctas: unset,
            max_ctas: unset,
            net_name: ptr::null(),
            split_share: unset,
        };
        let (world, rank) = (world as c_int, rank as c_int);
        let mut made = ptr::null_mut();
        // SAFETY: both places outlive the call; the library copies the configuration.
        let code =
            unsafe { (nccl.functions.init)(&raw mut made, world, id, rank, &raw mut config) };
        opened.comm.set(made);
        opened.settle(code, look)?;
        Ok(opened)
    }

    /// Enqueues an operation. `output` and `input` are contiguous, on this rank's GPU, of the sizes that the
    /// operation wants, and live until it has ended.
    pub(crate) fn start(
        &self,
        operation: Operation,
        output: &Tensor,
        input: &Tensor,
    ) -> Result<Started, Failure> {
        let functions = self.nccl.functions;
        let kind = data_type(input.kind())
            .ok_or_else(|| format!("NCCL has no type for {:?}", input.kind()))?;
        let comm = self.comm.get();
        if comm.is_null() {
            return Err("NCCL: the communicator has ended".to_owned());
        }
        self.select()?;
        let (from, to) = (input.data_ptr().cast_const(), output.data_ptr());
        let [given, made] = [input.numel(), output.numel()];
        let stream = self.stream;
        Event::on(ptr::null_mut(), self.runtime, self.device)?.hold_up(stream)?;
        // SAFETY: both tensors are contiguous and as large as the operation takes them for, which `Group`
        // has seen to, and its work keeps them.
        let code = unsafe {
            match operation {
                Operation::AllGather => (functions.all_gather)(from, to, given, kind, comm, stream),
                Operation::ReduceScatter(how) => {
                    (functions.reduce_scatter)(from, to, made, kind, code(how), comm, stream)
                }
                Operation::AllReduce(how) => {
                    (functions.all_reduce)(from, to, given, kind, code(how), comm, stream)
                }
                Operation::Broadcast(root) => {
                    (functions.broadcast)(from, to, given, kind, root as c_int, comm, stream)
                }
            }
        };
        self.settle(code, &|| Ok(()))?;
        let end = Event::on(stream, self.runtime, self.device)?;
        Ok(Started { since: Instant::now(), end })
    }

    /// Waits at most so long: whether an operation has ended, and with it all that was started before.
    pub(crate) fn wait(&self, started: &Started, slice: Duration) -> Result<bool, Failure> {
        let mut pauses = Pauses::begin();
        loop {
            let state = self.state()?;
            if state != DONE && state != IN_PROGRESS {
                return Err(self.nccl.why(state, self.comm.get()));
            }
            if started.end.is_past()? {
                return Ok(true);
            }
            if started.since.elapsed() > self.timeout {
                return Err("NCCL: timed out".to_owned());
            }
            if pauses.since() > slice {
                return Ok(false);
            }
            pauses.pause();
        }
    }

    /// Ends what is under way, here and in the end everywhere; nothing can be started any more.
    pub(crate) fn abort(&self) {
        let comm = self.comm.replace(ptr::null_mut());
        if !comm.is_null() && self.select().is_ok() {
            // SAFETY: the communicator was made by the library and is not used afterwards. What it says is of
            // no use any more.
            unsafe { (self.nccl.functions.abort)(comm) };
        }
    }

    /// Waits until a call that has returned has been carried out.
    fn settle(
        &self,
        mut code: c_int,
        look: &dyn Fn() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut pauses = Pauses::begin();
        while code == IN_PROGRESS {
            if pauses.since() > self.timeout {
                return Err("NCCL: timed out".to_owned());
            }
            look()?;
            pauses.pause();
            code = self.state()?;
        }
        if code == DONE { Ok(()) } else { Err(self.nccl.why(code, self.comm.get())) }
    }

    /// How the communicator is.
    fn state(&self) -> Result<c_int, Failure> {
        let mut state = DONE;
        let comm = self.comm.get();
        if comm.is_null() {
            return Err("NCCL: the communicator has ended".to_owned());
        }
        // SAFETY: the place outlives the call, the communicator has not ended.
        let code = unsafe { (self.nccl.functions.async_error)(comm, &raw mut state) };
        self.nccl.checked(code)?;
        Ok(state)
    }

    /// Makes this rank's GPU the thread's.
    fn select(&self) -> Result<(), Failure> {
        // SAFETY: a function of numbers.
        did(&self.runtime, self.device, unsafe { (self.runtime.set_device)(self.device as c_int) })
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
        if !self.stream.is_null() && self.select().is_ok() {
            // SAFETY: the stream was made by `open`; what is enqueued on it still ends.
            unsafe { (self.runtime.drop_stream)(self.stream) };
        }
    }
}

/// An operation that was started: when, and its end.
pub(crate) struct Started {
    since: Instant,
    end: Event,
}

/// Pauses that grow.
struct Pauses {
    began: Instant,
    next: Duration,
}

impl Pauses {
    fn begin() -> Self {
        Self { began: Instant::now(), next: Duration::from_micros(10) }
    }

    fn since(&self) -> Duration {
        self.began.elapsed()
    }

    fn pause(&mut self) {
        thread::sleep(self.next);
        self.next = (self.next * 2).min(PAUSE);
    }
}

/// `ncclDataType_t`.
fn data_type(kind: Kind) -> Option<c_int> {
    Some(match kind {
        Kind::Int8 => 0,
        Kind::Uint8 => 1,
        Kind::Int => 2,
        Kind::Int64 => 4,
        Kind::Half => 6,
        Kind::Float => 7,
        Kind::Double => 8,
        Kind::BFloat16 => 9,
        _ => return None,
    })
}

/// `ncclRedOp_t`.
fn code(how: Reduce) -> c_int {
    match how {
        Reduce::Sum => 0,
        Reduce::Max => 2,
        Reduce::Min => 3,
    }
}

/// The number of a GPU.
pub(crate) fn index(device: Device) -> Option<usize> {
    match device {
        Device::Cuda(index) => Some(index),
        _ => None,
    }
}

fn line(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: a library's text ends with a zero.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<&str>>().join(" ")
}
