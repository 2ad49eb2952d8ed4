//! The three programs as a person runs them.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use crate::fixture::root;

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `ng-train`, on the CPU.
    Train,
    /// `ng-export`.
    Export,
    /// `ng-sample`.
    Sample,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Export, Self::Sample];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "ng-train",
            Self::Export => "ng-export",
            Self::Sample => "ng-sample",
        }
    }

    /// The built program: of the profile under test, else of the release profile.
    ///
    /// # Panics
    /// When it has not been built.
    pub fn path(self) -> PathBuf {
        let test = env::current_exe().expect("a test knows its own path");
        let profile = test.ancestors().nth(2).expect("tests lie in a folder of their profile");
        [profile.to_owned(), profile.with_file_name("release")]
            .into_iter()
            .map(|folder| folder.join(self.name()))
            .find(|path| path.is_file())
            .unwrap_or_else(|| panic!("no {}: run `make build` first", self.name()))
    }

    /// The file that does the work: `ng-train` starts another.
    ///
    /// # Panics
    /// When it has not been built.
    pub fn proper(self) -> PathBuf {
        let path = self.path();
        if self == Self::Train { path.with_file_name("ng-train-libtorch") } else { path }
    }

    /// It with `arguments`, in the repository's folder and on one thread.
    pub fn command<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Command {
        self.command_on(1, arguments)
    }

    /// The same on `threads` threads.
    pub fn command_on<S: AsRef<OsStr>>(
        self,
        threads: usize,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = Command::new(self.path());
        command.current_dir(root()).env_remove("ORT_DYLIB_PATH").args(arguments);
        command.args(["--threads", &threads.to_string()]);
        if self == Self::Train && command.get_args().all(|argument| argument != "--device") {
            command.args(["--device", "cpu"]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Runs it with `arguments` to its end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn run<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Ended {
        Ended::after(&mut self.command(arguments))
    }
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("programs write UTF-8");
        Self { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ended {
    /// Runs `command` to its end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn after(command: &mut Command) -> Self {
        Self::from(command.output().expect("a program can be started"))
    }

    /// Waits for a child whose outputs are pipes.
    ///
    /// # Panics
    /// When it cannot be waited for.
    pub fn of(child: Child) -> Self {
        Self::from(child.wait_with_output().expect("a child can be waited for"))
    }

    /// Its standard output, after it succeeded.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn succeeded(self) -> String {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
        self.stdout
    }
}

/// A path as an argument.
///
/// # Panics
/// When it is not UTF-8.
pub fn typed(path: &Path) -> String {
    path.to_str().expect("test paths are UTF-8").to_owned()
}
