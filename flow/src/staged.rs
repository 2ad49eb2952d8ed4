//! Folders that appear complete or not at all, and stay so after a power cut.
//!
//! A folder is filled under a hidden name on the same file system. At its end the SHA-256 of its files are
//! listed in it, all of it is brought to disk, it is renamed, and the new name is brought to disk. Dropped
//! before that, it removes itself; what a killed process left is removed by the next that makes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::checkpoint::{CheckpointError, open_for_reading};
use crate::checksums::{Checksums, Sum};
use crate::disk;

type Result<T> = std::result::Result<T, CheckpointError>;

/// A folder that is not there yet.
pub struct Staged {
    work: TempDir,
    /// Says, as long as it is open, that somebody writes.
    _lock: File,
    target: PathBuf,
    /// Sums of files that were carried over from finished folders, or that others have told.
    known: BTreeMap<String, Sum>,
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
        disk::remove_leftovers(home, &disk::hidden(name)).map_err(CheckpointError::io(home))?;
        let (work, lock) = disk::begin_folder(home, name).map_err(CheckpointError::io(home))?;
        Ok(Self { work, _lock: lock, target, known: BTreeMap::new() })
    }

    /// Begins `target` with what an earlier writer of it left when it was stopped, if `fits` says of that folder
    /// that it can be gone on with; else as [`Staged::begin`].
    ///
    /// # Errors
    /// As there.
    pub fn resume(target: &Path, fits: impl Fn(&Path) -> bool) -> Result<Self> {
        let target = std::path::absolute(target).map_err(CheckpointError::io(target))?;
        let name = target.file_name().unwrap_or_default();
        let home = target.ancestors().skip(1).find(|folder| folder.exists());
        let home = home.unwrap_or(Path::new("/"));
        let adopted = disk::adopt(home, name, fits).map_err(CheckpointError::io(home))?;
        match adopted {
            Some((work, lock)) => Ok(Self { work, _lock: lock, target, known: BTreeMap::new() }),
            None => Self::begin(&target),
        }
    }

    /// Leaves the folder under its hidden name, for [`Staged::resume`].
    pub fn leave(self) {
        let _path = self.work.keep();
    }

    /// Takes the sum of the file `file` of the folder from who read it.
    pub fn know(&mut self, file: String, sum: Sum) {
        self.known.insert(file, sum);
    }

    /// Where to put the contents.
    pub fn path(&self) -> &Path {
        self.work.path()
    }

    /// Puts the files `picked` of the finished folder `other` here as well: as other names of the same
    /// files where the file system can, else as copies. Their sums are taken over with them, so that
    /// damage they take there shows here. Returns which they were; none where `other` lists no sums.
    ///
    /// # Errors
    /// When the list of sums cannot be read, or a file not be copied.
    pub fn carry(
        &mut self,
        other: &Path,
        picked: impl Fn(&str) -> bool,
    ) -> Result<BTreeSet<String>> {
        let Some(list) = Checksums::open(other)? else { return Ok(BTreeSet::new()) };
        let files = list.files().filter(|file| picked(file));
        for (file, sum) in files.filter_map(|file| Some((file, list.sum(file)?))) {
            let (from, to) = (other.join(file), self.path().join(file));
            let carry = || {
                fs::create_dir_all(disk::parent(&to))?;
                fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop))
            };
            carry().map_err(CheckpointError::io(&from))?;
            self.known.insert(file.to_owned(), sum);
        }
        Ok(self.known.keys().cloned().collect())
    }

    /// Takes down the sum of a `file` that another process has written here and brought to disk, so that it
    /// is not read once more.
    ///
    /// # Errors
    /// When it is not there.
    pub fn take_down(&mut self, file: &str, sum: Sum) -> Result<()> {
        let path = self.path().join(file);
        open_for_reading(&path)?;
        self.known.insert(file.to_owned(), sum);
        Ok(())
    }

    /// Gives the folder its name; with `replace`, in place of a folder of that name.
    ///
    /// # Errors
    /// When the name is taken, or the file system refuses; nothing changes then.
    pub fn publish(self, replace: bool) -> Result<()> {
        let refused = |reason| CheckpointError::Io { path: self.target.clone(), reason };
        Checksums::write(self.work.path(), &self.known)?;
        disk::sync_tree(self.work.path()).map_err(refused)?;
        let parent = disk::parent(&self.target);
        if replace && self.target.is_dir() {
            exchange(self.work.path(), &self.target).map_err(refused)?;
            return disk::sync_folder(parent).map_err(refused);
        }
        disk::create_folders(parent).map_err(refused)?;
        match renameat_with(CWD, self.work.path(), CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => fs::rename(self.work.path(), &self.target),
            result => result.map_err(Into::into),
        }
        .map_err(refused)?;
        let _renamed = self.work.keep();
        disk::sync_folder(parent)
            .map_err(|reason| CheckpointError::Io { path: self.target, reason })
    }
}

/// Bytes that can still be written where `target` is to be, if the file system says so.
pub fn free_bytes(target: &Path) -> Option<u64> {
    let target = std::path::absolute(target).ok()?;
    let home = target.ancestors().find(|folder| folder.exists())?;
    let found = rustix::fs::statvfs(home).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Removes what killed writers left in `folder`, and returns how many there were; what is still being
/// written, by whomever, stays.
///
/// # Errors
/// When the folder cannot be read or a leftover not be removed.
pub fn remove_leftovers(folder: &Path) -> Result<usize> {
    disk::remove_leftovers(folder, ".").map_err(CheckpointError::io(folder))
}

/// Removes `folder` so that no half of it is ever seen under its name.
///
/// # Errors
/// When it cannot be renamed or removed.
pub fn remove(folder: &Path) -> Result<()> {
    let failed = CheckpointError::io(folder);
    let removed = || {
        let (home, name) = (disk::parent(folder), folder.file_name().unwrap_or_default());
        let (aside, _lock) = disk::begin_folder(home, name)?;
        // Over the empty folder, which is gone with that.
        fs::rename(folder, aside.path())?;
        disk::sync_folder(home)?;
        aside.close()
    };
    removed().map_err(failed)
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
        Checksums::open(&target).unwrap().unwrap().check_all().unwrap();
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

    #[test]
    fn a_folder_lists_its_files() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("new");
        staged(&target, "text").publish(false).unwrap();
        let list = Checksums::open(&target).unwrap().unwrap();
        assert_eq!(list.files().collect::<Vec<_>>(), ["file"]);
        list.check_all().unwrap();
    }

    #[test]
    fn what_did_not_change_is_one_file() {
        use std::os::unix::fs::MetadataExt;
        let home = tempfile::tempdir().unwrap();
        let (old, new) = (home.path().join("old"), home.path().join("new"));
        staged(&old, "weights").publish(false).unwrap();
        let mut next = Staged::begin(&new).unwrap();
        let carried = next.carry(&old, |file| file == "file").unwrap();
        assert_eq!(carried.len(), 1);
        fs::write(next.path().join("own"), "other").unwrap();
        next.publish(false).unwrap();
        let inode = |folder: &Path| fs::metadata(folder.join("file")).unwrap().ino();
        assert_eq!(inode(&old), inode(&new));
        let list = Checksums::open(&new).unwrap().unwrap();
        list.check_all().unwrap();
        // Damage before a file is carried is not listed as if it were right.
        fs::write(old.join("file"), "WEIGHTS").unwrap();
        assert!(list.check_all().is_err());
        let mut third = Staged::begin(&home.path().join("third")).unwrap();
        third.carry(&new, |_| true).unwrap();
        third.publish(false).unwrap();
        let list = Checksums::open(&home.path().join("third")).unwrap().unwrap();
        assert!(list.check_all().is_err());
        remove(&old).unwrap();
        assert!(new.join("file").is_file());
    }

    #[test]
    fn the_next_of_a_name_removes_what_a_killed_one_left() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("new");
        let killed = staged(&target, "half");
        let living = staged(&target, "half, too");
        // What a kill does: the lock is gone, the folder stays.
        let Staged { work, _lock: lock, .. } = killed;
        let left = work.keep();
        drop(lock);
        staged(&target, "whole").publish(false).unwrap();
        assert!(!left.exists());
        assert!(living.path().exists());
        drop(living);
        assert_eq!(entries(home.path()), ["new"]);
    }

    #[test]
    fn what_was_left_is_gone_on_with_where_it_fits() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("new");
        staged(&target, "half").leave();
        let holds = |text: &'static str| {
            move |folder: &Path| fs::read_to_string(folder.join("file")).is_ok_and(|t| t == text)
        };
        let living = Staged::resume(&target, holds("half")).unwrap();
        let other = Staged::resume(&target, holds("half")).unwrap();
        assert!(!other.path().join("file").exists(), "what somebody writes is not taken away");
        drop(other);
        living.publish(false).unwrap();
        assert_eq!(entries(home.path()), ["new"]);
        let target = home.path().join("newer");
        staged(&target, "half").leave();
        drop(Staged::resume(&target, holds("other")).unwrap());
        assert_eq!(entries(home.path()), ["new"], "what does not fit is removed");
    }

    #[test]
    fn several_write_one_folder() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("new");
        let mut first = staged(&target, "first");
        fs::write(first.path().join("second"), "second").unwrap();
        let sum = crate::checksums::sum_of(&first.path().join("second")).unwrap();
        assert!(first.take_down("third", sum).is_err());
        first.take_down("second", sum).unwrap();
        first.publish(false).unwrap();
        let list = Checksums::open(&target).unwrap().unwrap();
        assert_eq!(list.files().collect::<Vec<_>>(), ["file", "second"]);
        list.check_all().unwrap();
    }

    #[test]
    fn a_folder_is_removed_at_once() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("old");
        staged(&target, "text").publish(false).unwrap();
        remove(&target).unwrap();
        assert!(entries(home.path()).is_empty());
        assert!(remove(&target).is_err());
        assert!(entries(home.path()).is_empty());
    }
}
