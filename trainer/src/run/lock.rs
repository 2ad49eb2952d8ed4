//! One run a folder.

use flow::log;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Its name in the folder.
const FILE: &str = ".lock";

/// A folder that no other run writes into as long as this lives; a killed process lets go of it, too.
pub(crate) struct Lock {
    _file: File,
    path: PathBuf,
}

/// Whether `folder` can be written to, or made; nothing is left there.
///
/// # Errors
/// When it cannot.
pub(crate) fn check(folder: &Path) -> Result<()> {
    let there = folder.ancestors().find(|above| above.exists()).unwrap_or(Path::new("."));
    let failed = || format!("cannot write to {}", folder.display());
    tempfile::tempfile_in(there).map(drop).with_context(failed)
}

impl Lock {
    /// Takes `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// When another run holds it, or nothing can be written there.
    pub(crate) fn hold(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let failed = || format!("cannot write to {}", folder.display());
        loop {
            fs::create_dir_all(folder).with_context(failed)?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let mut file = options.open(&path).with_context(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut process = String::new();
                    file.take(20).read_to_string(&mut process).unwrap_or_default();
                    bail!(
                        "another run (process {}) writes to {}: wait for it, or choose another output",
                        process.trim(),
                        folder.display()
                    );
                }
                Err(TryLockError::Error(error)) => log::warn(&format!(
                    "{} cannot be locked ({error}): see to it that no other run writes there",
                    folder.display()
                )),
            }
            let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
            // Whoever held it may have removed it meanwhile.
            let is_there = fs::metadata(&path)
                .is_ok_and(|there| file.metadata().is_ok_and(|own| id(own) == id(there)));
            if is_there {
                file.set_len(0).with_context(failed)?;
                writeln!(file, "{}", std::process::id()).with_context(failed)?;
                return Ok(Self { _file: file, path });
            }
        }
    }
}

impl Drop for Lock {
    /// Leaves no trace in a folder that nothing else was put into.
    fn drop(&mut self) {
        // A file that stays does no harm: it is not locked.
        let _ = fs::remove_file(&self.path);
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_at_a_time() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("run");
        let first = Lock::hold(&folder).unwrap();
        let said = Lock::hold(&folder).err().unwrap().to_string();
        let process = format!("another run (process {})", std::process::id());
        assert!(said.contains(&process), "{said}");
        drop(first);
        assert!(!folder.exists());
        let second = Lock::hold(&folder).unwrap();
        fs::write(folder.join("file"), "").unwrap();
        drop(second);
        assert!(folder.join("file").is_file() && !folder.join(FILE).exists());
    }
}
