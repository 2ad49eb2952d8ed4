//! Folders that appear complete or not at all.
//!
//! A folder is filled under a hidden name on the same file system and renamed at the end; dropped
//! before that, it removes itself.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::external::MODEL_FILE;

/// A folder that is not there yet.
pub(crate) struct Staged {
    work: TempDir,
    target: PathBuf,
    replace: bool,
}

impl Staged {
    /// Begins `target`. With `replace` an earlier export there stays until the new one is complete.
    ///
    /// # Errors
    /// When `target` exists and must not be replaced, or nothing can be written beside it.
    pub(crate) fn begin(target: &Path, replace: bool) -> Result<Self> {
        let target = std::path::absolute(target)
            .with_context(|| format!("cannot resolve {}", target.display()))?;
        check_target(&target, replace)?;
        let name = target.file_name().context("the output needs a folder name")?;
        let home = target
            .ancestors()
            .skip(1)
            .find(|folder| folder.exists())
            .context("the output has no parent folder")?;
        let work = tempfile::Builder::new()
            .prefix(&format!(".{}.partial-", name.display()))
            .permissions(open_permissions())
            .tempdir_in(home)
            .with_context(|| format!("cannot write in {}", home.display()))?;
        Ok(Self { work, target, replace })
    }

    /// Where to put the contents.
    pub(crate) fn path(&self) -> &Path {
        self.work.path()
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// When the name was taken meanwhile, or the file system refuses; nothing changes then.
    pub(crate) fn publish(self) -> Result<()> {
        check_target(&self.target, self.replace)?;
        let refused = || format!("cannot move the export to {}", self.target.display());
        if self.target.exists() {
            return exchange(self.work.path(), &self.target).with_context(refused);
        }
        if let Some(parent) = self.target.parent() {
            fs::create_dir_all(parent).with_context(refused)?;
        }
        match renameat_with(CWD, self.work.path(), CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS) => fs::rename(self.work.path(), &self.target),
            result => result.map_err(Into::into),
        }
        .with_context(refused)?;
        let _renamed = self.work.keep();
        Ok(())
    }
}

/// Swaps two folders: in one step where the file system can, else in three that undo themselves.
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

fn check_target(target: &Path, replace: bool) -> Result<()> {
    let shown = target.display();
    let Ok(found) = target.symlink_metadata() else { return Ok(()) };
    ensure!(replace, "{shown} exists: choose another --out, or replace it with --force");
    ensure!(found.is_dir(), "{shown} is not a folder: choose another --out");
    let is_export = Path::new("transformer").join(MODEL_FILE);
    let is_empty = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    ensure!(
        is_empty || target.join(&is_export).is_file(),
        "{shown} is not replaced: it is no earlier export (no {}): choose another --out",
        is_export.display()
    );
    Ok(())
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
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn fill(staged: &Staged, content: &str) {
        fs::create_dir(staged.path().join("transformer")).unwrap();
        fs::write(staged.path().join("transformer").join(MODEL_FILE), content).unwrap();
    }

    fn content(target: &Path) -> String {
        fs::read_to_string(target.join("transformer").join(MODEL_FILE)).unwrap()
    }

    #[test]
    fn a_dropped_folder_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let staged = Staged::begin(&home.path().join("a/b/export"), false).unwrap();
        fill(&staged, "half");
        assert_eq!(entries(home.path()).len(), 1, "staged in the nearest folder that exists");
        drop(staged);
        assert!(entries(home.path()).is_empty());
    }

    #[test]
    fn a_published_folder_is_whole_and_alone() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("a/export");
        let staged = Staged::begin(&target, false).unwrap();
        fill(&staged, "new");
        staged.publish().unwrap();
        assert_eq!(content(&target), "new");
        assert_eq!(entries(home.path()), ["a"]);
        assert_eq!(entries(&home.path().join("a")), ["export"]);
    }

    #[test]
    fn an_earlier_export_is_replaced_on_request_only() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("export");
        for (replace, text) in [(false, "old"), (true, "new")] {
            let staged = Staged::begin(&target, replace).unwrap();
            fill(&staged, text);
            staged.publish().unwrap();
        }
        assert_eq!(content(&target), "new");
        assert_eq!(entries(home.path()), ["export"]);
        let message = Staged::begin(&target, false).err().unwrap().to_string();
        assert!(message.contains("--force"), "{message}");
        assert_eq!(content(&target), "new");
    }

    #[test]
    fn a_name_taken_meanwhile_is_respected() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("export");
        let staged = Staged::begin(&target, false).unwrap();
        fill(&staged, "late");
        fs::write(&target, "somebody else's").unwrap();
        assert!(staged.publish().is_err());
        assert_eq!(fs::read_to_string(&target).unwrap(), "somebody else's");
        assert_eq!(entries(home.path()), ["export"]);
    }

    #[test]
    fn only_an_export_is_ever_replaced() {
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("photos");
        fs::create_dir(&target).unwrap();
        Staged::begin(&target, true).unwrap();
        fs::write(target.join("cat.png"), "").unwrap();
        let message = Staged::begin(&target, true).err().unwrap().to_string();
        assert!(message.contains("no earlier export"), "{message}");
    }
}
