//! Places in the streams of a GPU, by which one waits for another.

use std::ffi::c_int;
use std::ptr;

use super::{DONE, RawEvent, Runtime, Stream, line};
use crate::c10d::Failure;

/// `cudaErrorNotReady`.
const NOT_READY: c_int = 600;
/// `cudaEventDisableTiming`.
const NO_TIMING: u32 = 2;

/// A place in a stream of a GPU.
pub(super) struct Event {
    raw: RawEvent,
    runtime: Runtime,
    device: usize,
}

impl Event {
    /// After everything that is enqueued on `stream` now, of GPU `device`, which is the thread's.
    pub(super) fn on(stream: Stream, runtime: Runtime, device: usize) -> Result<Self, Failure> {
        let mut event = Self { raw: ptr::null_mut(), runtime, device };
        // SAFETY: the place outlives the call; the stream is there.
        unsafe {
            let code = (runtime.new_event)(&raw mut event.raw, NO_TIMING);
            event.did(code)?;
            event.did((runtime.record)(event.raw, stream))?;
        }
        Ok(event)
    }

    /// Lets what is enqueued on `stream` from now on come after it.
    pub(super) fn hold_up(&self, stream: Stream) -> Result<(), Failure> {
        // SAFETY: the event has been recorded, the stream is of the same device.
        self.did(unsafe { (self.runtime.wait_event)(stream, self.raw, 0) })
    }

    /// Whether everything before it has ended.
    pub(super) fn is_past(&self) -> Result<bool, Failure> {
        // SAFETY: the event has been recorded.
        match unsafe { (self.runtime.query)(self.raw) } {
            DONE => Ok(true),
            NOT_READY => {
                // It is no failure, and must not look like one to whoever asks for the last.
                unsafe { (self.runtime.forget)() };
                Ok(false)
            }
            code => self.did(code).map(|()| true),
        }
    }

    fn did(&self, code: c_int) -> Result<(), Failure> {
        did(&self.runtime, self.device, code)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: the event was made by the library, which keeps it as long as a stream waits for it.
            unsafe { (self.runtime.drop_event)(self.raw) };
        }
    }
}

/// What CUDA says of a call that has failed.
pub(super) fn did(runtime: &Runtime, device: usize, code: c_int) -> Result<(), Failure> {
    match code {
        DONE => Ok(()),
        // SAFETY: the text is the library's and never freed.
        code => Err(format!("cuda:{device}: {}", line(unsafe { (runtime.error_text)(code) }))),
    }
}
