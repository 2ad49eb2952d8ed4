//! The shim's functions, each safe to call: stores, Gloo groups and operations under way as values that
//! close what they hold, failures as text.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::ptr;
use std::slice;
use std::time::Duration;

use tch::Tensor;

use crate::call::Reduce;

/// Text of an exception, in one line.
pub(crate) type Failure = String;

/// As the shim numbers them.
#[derive(Clone, Copy)]
#[repr(i32)]
pub(crate) enum Operation {
    AllReduce = 0,
    Broadcast = 1,
    /// Rank r's part number s becomes part number r on rank s.
    AllToAll = 2,
}

/// Client of a `c10d::TCPStore`; the object locks itself.
pub(crate) struct Store(*mut ffi::Store);

unsafe impl Send for Store {}
unsafe impl Sync for Store {}

impl Store {
    /// Connects to the store at `host`:`port`, all of whose keys get `prefix`. `listening` makes this
    /// process its server.
    pub(crate) fn open(
        host: &str,
        port: u16,
        listening: Option<OwnedFd>,
        timeout: Duration,
        prefix: &str,
    ) -> Result<Self, Failure> {
        let (host, prefix) = (text(host), text(prefix));
        let listening = listening.map_or(-1, IntoRawFd::into_raw_fd);
        let mut opened = ptr::null_mut();
        outcome(|error| unsafe {
            let timeout = milliseconds(timeout);
            let (host, prefix) = (host.as_ptr(), prefix.as_ptr());
            ffi::c10d_store_open(host, port, listening, timeout, prefix, &raw mut opened, error)
        })?;
        Ok(Self(opened))
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Result<(), Failure> {
        let key = text(key);
        outcome(|error| unsafe {
            ffi::c10d_store_set(self.0, key.as_ptr(), value.as_ptr(), value.len(), error)
        })?;
        Ok(())
    }

    /// Gives the key this value if it has none; what it has then.
    pub(crate) fn set_first(&self, key: &str, value: &str) -> Result<String, Failure> {
        let key = text(key);
        let (mut found, mut length) = (ptr::null_mut(), 0);
        outcome(|error| unsafe {
            let (value, bytes) = (value.as_ptr(), value.len());
            let (found, length) = (&raw mut found, &raw mut length);
            ffi::c10d_store_set_first(self.0, key.as_ptr(), value, bytes, found, length, error)
        })?;
        Ok(taken(found, length))
    }

    /// The value of a key that has one; waits for it otherwise.
    pub(crate) fn get(&self, key: &str) -> Result<String, Failure> {
        let key = text(key);
        let (mut found, mut length) = (ptr::null_mut(), 0);
        outcome(|error| unsafe {
            let (found, length) = (&raw mut found, &raw mut length);
            ffi::c10d_store_get(self.0, key.as_ptr(), found, length, error)
        })?;
        Ok(taken(found, length))
    }

    pub(crate) fn has(&self, key: &str) -> Result<bool, Failure> {
        let key = text(key);
        outcome(|error| unsafe { ffi::c10d_store_has(self.0, key.as_ptr(), error) })
    }

    /// Adds to the key's number; the sum.
    pub(crate) fn add(&self, key: &str, amount: i64) -> Result<i64, Failure> {
        let (key, mut sum) = (text(key), 0);
        outcome(|error| unsafe {
            ffi::c10d_store_add(self.0, key.as_ptr(), amount, &raw mut sum, error)
        })?;
        Ok(sum)
    }

    pub(crate) fn append(&self, key: &str, value: &str) -> Result<(), Failure> {
        let key = text(key);
        outcome(|error| unsafe {
            ffi::c10d_store_append(self.0, key.as_ptr(), value.as_ptr(), value.len(), error)
        })?;
        Ok(())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        unsafe { ffi::c10d_store_close(self.0) }
    }
}

/// A `c10d::ProcessGroupGloo`.
pub(crate) struct Gloo {
    group: *mut ffi::Gloo,
    is_aborted: Cell<bool>,
}

/// What connections between ranks are made through.
pub(crate) enum Through {
    Address(String),
    Interface(String),
}

impl Gloo {
    pub(crate) fn open(
        store: &Store,
        rank: usize,
        world: usize,
        through: &Through,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let (name, is_interface) = match through {
            Through::Address(name) => (text(name), 0),
            Through::Interface(name) => (text(name), 1),
        };
        let mut opened = ptr::null_mut();
        outcome(|error| unsafe {
            let (rank, world) = (rank as c_int, world as c_int);
            let timeout = milliseconds(timeout);
            let (name, opened) = (name.as_ptr(), &raw mut opened);
            ffi::c10d_gloo_open(store.0, rank, world, name, is_interface, timeout, opened, error)
        })?;
        Ok(Self { group: opened, is_aborted: Cell::new(false) })
    }

    /// Starts an operation; `argument` is a [`Reduce`] or the rank that broadcasts. c10d keeps the tensors
    /// until it has ended.
    pub(crate) fn start(
        &self,
        operation: Operation,
        argument: i32,
        output: &Tensor,
        input: &Tensor,
    ) -> Result<Work, Failure> {
        let mut started = ptr::null_mut();
        outcome(|error| unsafe {
            let (output, input) =
                (output.as_ptr().cast_mut().cast(), input.as_ptr().cast_mut().cast());
            let started = &raw mut started;
            ffi::c10d_gloo_start(
                self.group,
                operation as i32,
                argument,
                output,
                input,
                started,
                error,
            )
        })?;
        Ok(Work(started))
    }

    /// Closes the connections: whoever waits for one of them on another rank gets an error.
    pub(crate) fn abort(&self) -> Result<(), Failure> {
        self.is_aborted.set(true);
        outcome(|error| unsafe { ffi::c10d_gloo_abort(self.group, error) }).map(|_| ())
    }
}

impl Drop for Gloo {
    fn drop(&mut self) {
        // Where two ranks close at once, neither sees the other's end, and closing would wait for a thread that
        // waits until the operation's time is over: it is left to the end of the process.
        if !self.is_aborted.get() {
            unsafe { ffi::c10d_gloo_close(self.group) }
        }
    }
}

/// An operation under way.
pub(crate) struct Work(*mut ffi::Work);

impl Work {
    /// Waits at most so long: whether it has ended.
    pub(crate) fn wait(&self, slice: Duration) -> Result<bool, Failure> {
        outcome(|error| unsafe { ffi::c10d_work_wait(self.0, milliseconds(slice), error) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        unsafe { ffi::c10d_work_free(self.0) }
    }
}

impl Reduce {
    /// c10d's number.
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Sum => 0,
            Self::Min => 3,
            Self::Max => 4,
        }
    }
}

/// Whether the call has done its work (`false`: not yet).
fn outcome(call: impl FnOnce(*mut *mut c_char) -> c_int) -> Result<bool, Failure> {
    let mut error = ptr::null_mut();
    match call(&raw mut error) {
        0 => Ok(true),
        1 => Ok(false),
        _ => Err(one_line(error)),
    }
}

/// Takes the text and frees it.
fn one_line(error: *mut c_char) -> String {
    if error.is_null() {
        return "no reason given".to_owned();
    }
    let message = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
    unsafe { ffi::c10d_text_free(error.cast()) };
    let words: Vec<&str> = message.split_whitespace().collect();
    words.join(" ")
}

fn taken(data: *mut u8, length: usize) -> String {
    let value = unsafe { slice::from_raw_parts(data, length) };
    let value = String::from_utf8_lossy(value).into_owned();
    unsafe { ffi::c10d_text_free(data.cast()) };
    value
}

fn text(value: &str) -> CString {
    CString::new(value.replace('\0', "?")).unwrap_or_default()
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

mod ffi {
    use std::ffi::{c_char, c_int, c_void};

    pub(super) enum Store {}
    pub(super) enum Gloo {}
    pub(super) enum Work {}

    type Error = *mut *mut c_char;

    unsafe extern "C" {
        pub(super) fn c10d_text_free(data: *mut c_void);
        pub(super) fn c10d_store_open(
            host: *const c_char,
            port: u16,
            listening: c_int,
            timeout_ms: i64,
            prefix: *const c_char,
            opened: *mut *mut Store,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_close(store: *mut Store);
        pub(super) fn c10d_store_set(
            store: *mut Store,
            key: *const c_char,
            data: *const u8,
            length: usize,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_set_first(
            store: *mut Store,
            key: *const c_char,
            data: *const u8,
            length: usize,
            value: *mut *mut u8,
            value_length: *mut usize,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_get(
            store: *mut Store,
            key: *const c_char,
            value: *mut *mut u8,
            length: *mut usize,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_add(
            store: *mut Store,
            key: *const c_char,
            amount: i64,
            sum: *mut i64,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_append(
            store: *mut Store,
            key: *const c_char,
            data: *const u8,
            length: usize,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_store_has(store: *mut Store, key: *const c_char, error: Error) -> c_int;
        pub(super) fn c10d_gloo_open(
            store: *mut Store,
            rank: c_int,
            world: c_int,
            host: *const c_char,
            is_interface: c_int,
            timeout_ms: i64,
            opened: *mut *mut Gloo,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_gloo_abort(group: *mut Gloo, error: Error) -> c_int;
        pub(super) fn c10d_gloo_close(group: *mut Gloo);
        pub(super) fn c10d_gloo_start(
            group: *mut Gloo,
            operation: c_int,
            argument: c_int,
            output: *mut c_void,
            input: *mut c_void,
            started: *mut *mut Work,
            error: Error,
        ) -> c_int;
        pub(super) fn c10d_work_wait(work: *mut Work, slice_ms: i64, error: Error) -> c_int;
        pub(super) fn c10d_work_free(work: *mut Work);
    }
}
