//! Starting the ranks of one machine: each is this program again, told where it stands by torchrun's names.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::store::{Served, serve};
use crate::topology::Node;
use crate::watch::Fault;

/// How long ranks may take to end after one has failed, or after they were asked to.
const GRACE: Duration = Duration::from_mins(1);
/// Between two looks at the ranks.
const PAUSE: Duration = Duration::from_millis(20);

/// The ranks of a machine, under way.
pub struct Ranks {
    children: Vec<Option<Child>>,
    /// Rank of the first.
    first: usize,
    store: Option<Served>,
}

/// A rank that did not end well.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    pub rank: usize,
    pub status: ExitStatus,
}

impl Ended {
    /// What a launcher ends with when one of its ranks ends so.
    pub fn code(&self) -> u8 {
        let signal = self.status.signal().map(|signal| 128 + signal);
        self.status.code().or(signal).map_or(1, |code| code as u8)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.status.signal() {
            Some(signal) => write!(f, "rank {} was killed by signal {signal}", self.rank),
            None => write!(f, "rank {} ended with code {}", self.rank, self.code()),
        }
    }
}

impl Ranks {
    /// Starts `n` ranks of `node` with `arguments`; machine 0 serves the store, on loopback where it is the
    /// only one.
    ///
    /// # Errors
    /// When the store's port is taken or a process cannot be started.
    pub fn start(node: &Node, n: usize, arguments: &[OsString]) -> Result<Self, Error> {
        let alone = node.count == 1;
        let store = match node.index {
            0 => Some(serve((!alone).then_some(node.port))?),
            _ => None,
        };
        let port = store.as_ref().map_or(node.port, Served::port);
        let failed = |error: std::io::Error| Error::Environment {
            variable: "this program".to_owned(),
            what: format!("cannot be started again: {error}"),
        };
        let program = std::env::current_exe().map_err(failed)?;
        let first = node.index * n;
        let mut ranks = Self { children: Vec::with_capacity(n), first, store };
        for local in 0..n {
            let mut command = Command::new(&program);
            command.args(arguments).env("MASTER_ADDR", &node.host);
            for (name, value) in [
                ("RANK", first + local),
                ("LOCAL_RANK", local),
                ("GROUP_RANK", node.index),
                ("WORLD_SIZE", node.count * n),
                ("LOCAL_WORLD_SIZE", n),
                ("MASTER_PORT", usize::from(port)),
            ] {
                command.env(name, value.to_string());
            }
            command.env("TORCHELASTIC_USE_AGENT_STORE", "True");
            ranks.children.push(Some(command.spawn().map_err(failed)?));
        }
        Ok(ranks)
    }

    /// Waits until all have ended: the first that did not end well, if any. `asked` says whether this
    /// process was asked to stop, which the ranks are then told once; those that outlive their grace are
    /// killed.
    pub fn wait(mut self, asked: impl Fn() -> bool) -> Option<Ended> {
        let (mut first, mut told, mut deadline) = (None, false, None);
        loop {
            for (local, slot) in self.children.iter_mut().enumerate() {
                let Some(child) = slot else { continue };
                let Ok(Some(status)) = child.try_wait() else { continue };
                *slot = None;
                if status.success() {
                    continue;
                }
                let rank = self.first + local;
                if let (Some(_), Some(served)) = (status.signal(), &self.store) {
                    Fault::tell_of_end(served.store(), rank);
                }
                first.get_or_insert(Ended { rank, status });
            }
            if self.children.iter().all(Option::is_none) {
                return first;
            }
            if asked() && !told {
                told = true;
                self.ask_to_stop();
            }
            // A rank that was asked to stop first ends its iteration: only a failure sets a limit.
            if first.is_some() && deadline.is_none() {
                deadline = Some(Instant::now() + GRACE);
            }
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return first;
            }
            thread::sleep(PAUSE);
        }
    }

    fn ask_to_stop(&self) {
        self.children.iter().flatten().for_each(ask_to_stop);
    }
}

/// Sends `child`, which has not been waited for, SIGTERM.
pub fn ask_to_stop(child: &Child) {
    // SAFETY: where it was not waited for, its number is still its own.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            _ = child.kill();
            _ = child.wait();
        }
    }
}
