//! What must be done so that files and their names outlive a power cut, and what a killed writer leaves
//! does not.
//!
//! Whatever is unfinished lies under a hidden name and is locked by its writer. The lock dies with the
//! process, which tells what a killed one left from what a living one still writes.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use tempfile::{Builder, NamedTempFile, TempDir};

/// In every hidden name, between the name to be and what makes it unique.
const PARTIAL: &str = ".partial-";
/// Characters of the name to be in a hidden one; file systems take 255 bytes.
const NAME_CHARS: usize = 50;

/// A new folder in `home` that will be called `name`, and the lock that says it is being written.
pub(crate) fn begin_folder(home: &Path, name: &OsStr) -> io::Result<(TempDir, File)> {
    let prefix = hidden(name);
    loop {
        let mode = Permissions::from_mode(0o777);
        let folder = Builder::new().prefix(&prefix).permissions(mode).tempdir_in(home)?;
        let lock = File::open(folder.path());
        if let Some(lock) = lock.ok().filter(|lock| claim(lock, folder.path())) {
            return Ok((folder, lock));
        }
    }
}

/// A new file in `home` that will be called `name`; it is locked while it is open.
pub(crate) fn begin_file(home: &Path, name: &OsStr) -> io::Result<NamedTempFile> {
    let prefix = hidden(name);
    loop {
        let mode = Permissions::from_mode(0o666);
        let file = Builder::new().prefix(&prefix).permissions(mode).tempfile_in(home)?;
        if claim(file.as_file(), file.path()) {
            return Ok(file);
        }
    }
}

/// Refuses `path` where something lies that no file may take the place of: a folder, a device, a pipe.
pub(crate) fn check_replaceable(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Ok(found) if found.is_file() => Ok(()),
        Ok(found) if found.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Ok(_) => Err(io::Error::other("it is a device or a pipe, and only files are written")),
        Err(error) => Err(error),
    }
}

/// What the hidden names of something that will be called `name` begin with.
pub(crate) fn hidden(name: &OsStr) -> String {
    let name: String = name.to_string_lossy().chars().take(NAME_CHARS).collect();
    format!(".{name}{PARTIAL}")
}

/// Locks what was just made at `path`; not so when somebody took it for a leftover in between.
fn claim(file: &File, path: &Path) -> bool {
    if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
        return false;
    }
    // A file system without locks has no leftovers removed either.
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let own = file.metadata().map(id);
    own.is_ok_and(|own| fs::metadata(path).map(id).is_ok_and(|there| there == own))
}

/// A folder that a writer left in `home` when it was to be called `name`, and its lock: the first that `fits`.
pub(crate) fn adopt(
    home: &Path,
    name: &OsStr,
    fits: impl Fn(&Path) -> bool,
) -> io::Result<Option<(TempDir, File)>> {
    let prefix = hidden(name);
    for entry in fs::read_dir(home)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(&prefix)
            || !entry.file_type()?.is_dir()
            || !fits(&entry.path())
        {
            continue;
        }
        let left = entry.path();
        if let Some(lock) = File::open(&left).ok().filter(|lock| claim(lock, &left)) {
            let (work, _lock_of_nothing) = begin_folder(home, name)?;
            // Over the empty folder, which is gone with that.
            fs::rename(left, work.path())?;
            return Ok(Some((work, lock)));
        }
    }
    Ok(None)
}

/// Removes what killed writers left in `folder` under hidden names that begin with `prefix`, and returns
/// how many there were. What is still being written stays.
pub(crate) fn remove_leftovers(folder: &Path, prefix: &str) -> io::Result<usize> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut n_removed = 0;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with(prefix) || !name.starts_with('.') || !name.contains(PARTIAL) {
            continue;
        }
        let path = entry.path();
        let is_folder = entry.file_type()?.is_dir();
        // Gone, or nobody's to open: another writer is at it.
        let Ok(lock) = File::open(&path) else { continue };
        if lock.try_lock().is_err() {
            continue;
        }
        let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            removed => {
                removed?;
                n_removed += 1;
            }
        }
    }
    Ok(n_removed)
}

/// Brings every file and folder below `folder`, and `folder` itself, to disk.
pub(crate) fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_folder(folder)
}

/// Brings the names in `folder` to disk.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some file systems know no such thing for folders.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}

/// Makes `folder` and those above it that are missing, and brings their names to disk.
pub(crate) fn create_folders(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let parent = parent(folder);
    create_folders(parent)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        result => result.and_then(|()| sync_folder(parent)),
    }
}

/// The folder that `path` lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn only_what_nobody_writes_any_more_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let (folder, lock) = begin_folder(home.path(), OsStr::new("iteration-000002")).unwrap();
        let file = begin_file(home.path(), OsStr::new("sheet.png")).unwrap();
        fs::write(folder.path().join("weights"), "half").unwrap();
        for mine in [".env", ".hidden", "a.partial-b", "result"] {
            fs::write(home.path().join(mine), "somebody's").unwrap();
        }
        assert_eq!(remove_leftovers(home.path(), "").unwrap(), 0);
        assert_eq!(entries(home.path()), 6);
        // As a killed process leaves them: the names stay, the locks are gone.
        let (folder, file) = (folder.keep(), file.keep().unwrap());
        drop((file, lock));
        assert_eq!(remove_leftovers(home.path(), &hidden(OsStr::new("other"))).unwrap(), 0);
        assert_eq!(remove_leftovers(home.path(), "").unwrap(), 2);
        assert!(!folder.exists());
        assert_eq!(entries(home.path()), 4);
        assert_eq!(remove_leftovers(&home.path().join("absent"), "").unwrap(), 0);
    }

    #[test]
    fn only_files_are_replaced() {
        let home = tempfile::tempdir().unwrap();
        let (file, link) = (home.path().join("file"), home.path().join("link"));
        fs::write(&file, "before").unwrap();
        check_replaceable(&file).unwrap();
        check_replaceable(&home.path().join("absent")).unwrap();
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        for other in [home.path(), &link, Path::new("/dev/null")] {
            check_replaceable(other).unwrap_err();
        }
    }

    #[test]
    fn long_names_have_hidden_names() {
        let home = tempfile::tempdir().unwrap();
        begin_file(home.path(), OsStr::new(&"ü".repeat(120))).unwrap();
    }
}
