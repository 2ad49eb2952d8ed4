//! Folders that appear complete or not at all.
//!
//! A folder is filled under a hidden name on the same file system and renamed at the end; dropped
//! before that, it removes itself.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::checkpoint::CheckpointError;

type Result<T> = std::result::Result<T, CheckpointError>;

/// A folder that is not there yet.
pub struct Staged {
    work: TempDir,
    target: PathBuf,
}

impl Staged {
    /// Begins `target`; what is there stays until the new folder is complete.
    ///
    /// # Errors
    /// When nothing can be written beside it.
    pub fn begin(target: &Path) -> Result<Self> {
        let target = std::path::absolute(target).map_err(CheckpointError::io(target))?;
        let no_parent = || CheckpointError::malformed(&target, "is no name for a new folder");
        let name = target.file_name().ok_or_else(no_parent)?;
        let mut homes = target.ancestors().skip(1);
        let home = homes.find(|folder| folder.exists()).ok_or_else(no_parent)?;
        let work = tempfile::Builder::new()
            .prefix(&format!(".{}.partial-", name.display()))
            .permissions(open_permissions())
            .tempdir_in(home)
            .map_err(CheckpointError::io(home))?;
        Ok(Self { work, target })
    }

    /// Where to put the contents.
    pub fn path(&self) -> &Path {
        self.work.path()
    }

    /// Gives the folder its name; with `replace`, in place of a folder of that name.
    ///
    /// # Errors
    /// When the name is taken, or the file system refuses; nothing changes then.
    pub fn publish(self, replace: bool) -> Result<()> {
        let refused = |reason| CheckpointError::Io { path: self.target.clone(), reason };
        if replace && self.target.is_dir() {
            return exchange(self.work.path(), &self.target).map_err(refused);
        }
        if let Some(parent) = self.target.parent() {
            fs::create_dir_all(parent).map_err(refused)?;
        }
        match renameat_with(CWD, self.work.path(), CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => fs::rename(self.work.path(), &self.target),
            result => result.map_err(Into::into),
        }
        .map_err(refused)?;
        let _renamed = self.work.keep();
        Ok(())
    }
}

/// Swaps two folders: in one step where the file system can, else in three that undo themselves. The
/// old contents end in `new`, which its owner removes.
fn exchange(new: &Path, target: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS) => {}
        result => return result.map_err(Into::into),
    }
    let aside = new.with_extension("replaced");
    fs::rename(target, &aside)?;
    if let Err(error) = fs::rename(new, target) {
        fs::rename(&aside, target)?;
        return Err(error);
    }
    fs::rename(&aside, new)
}

/// What `mkdir` gives a folder, before the user's mask.
fn open_permissions() -> fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    fs::Permissions::from_mode(0o777)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn staged(target: &Path, text: &str) -> Staged {
        let staged = Staged::begin(target).unwrap();
        fs::write(staged.path().join("file"), text).unwrap();
        staged
    }

    #[test]
    fn a_dropped_folder_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let staged = staged(&home.path().join("a/b/new"), "half");
        assert_eq!(entries(home.path()).len(), 1, "staged in the nearest folder that exists");
        drop(staged);
        assert!(entries(home.path()).is_empty());
    }

    #[test]
    fn a_published_folder_is_whole_and_alone() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("a/new");
        staged(&target, "first").publish(false).unwrap();
        staged(&target, "second").publish(true).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "second");
        assert_eq!(entries(&home.path().join("a")), ["new"]);
        assert_eq!(entries(home.path()), ["a"]);
    }

    #[test]
    fn a_name_taken_meanwhile_is_respected() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("new");
        let late = staged(&target, "late");
        fs::write(&target, "somebody else's").unwrap();
        assert!(late.publish(true).is_err());
        assert_eq!(fs::read_to_string(&target).unwrap(), "somebody else's");
        assert_eq!(entries(home.path()), ["new"]);
    }
}
