//! What the files of a folder were when it was finished: SHA-256 of each, in the format of `sha256sum`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use sha2::{Digest, Sha256};

use crate::checkpoint::{CheckpointError, open_for_reading, read_bounded, write_atomically};

type Result<T> = std::result::Result<T, CheckpointError>;
/// SHA-256 of a file.
pub type Sum = [u8; 32];

/// Name of the list in its folder; `sha256sum -c` reads it, too.
pub const FILE: &str = "SHA256SUMS";
/// Bytes hashed at a time.
const CHUNK: usize = 1 << 20;

/// The sum of bytes that come piece by piece.
#[derive(Clone, Default)]
pub struct Summing(Sha256);

impl Summing {
    /// These follow.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The sum of all.
    pub fn finish(self) -> Sum {
        self.0.finalize().into()
    }
}

/// The list of one folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksums {
    folder: PathBuf,
    /// By path in the folder.
    sums: BTreeMap<String, Sum>,
}

impl Checksums {
    /// The list of `folder`, or nothing where it has none.
    ///
    /// # Errors
    /// When it cannot be read or is no such list.
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = read_bounded(&path)?;
        let text = String::from_utf8_lossy(&text);
        let mut sums = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let (file, sum) = parse(line).ok_or_else(|| {
                let why = format!("line {} is not \"SHA-256  file\"", index + 1);
                CheckpointError::malformed(&path, why)
            })?;
            sums.insert(file.to_owned(), sum);
        }
        Ok(Some(Self { folder: folder.to_owned(), sums }))
    }

    /// Reads every file below `folder` and writes the list into it, to the disk's cache only.
    /// `known` files were hashed before.
    ///
    /// # Errors
    /// When a file cannot be read or is not there, the list not be written, or a name not be listed.
    pub(crate) fn write(folder: &Path, known: &BTreeMap<String, Sum>) -> Result<()> {
        let mut files = Vec::new();
        list(folder, "", &mut files)?;
        for path in known.keys().map(|file| folder.join(file)) {
            open_for_reading(&path)?;
        }
        files.retain(|file| !known.contains_key(file));
        let found = sums_of(folder, &files)?;
        let mut sums = known.clone();
        sums.extend(files.into_iter().zip(found));
        fs::write(folder.join(FILE), text(&sums)).map_err(CheckpointError::io(&folder.join(FILE)))
    }

    /// Lists `file` of `folder` as it is now, where the folder has a list.
    ///
    /// # Errors
    /// As [`Checksums::open`] and for the file.
    pub fn renew(folder: &Path, file: &str) -> Result<()> {
        let Some(mut list) = Self::open(folder)? else { return Ok(()) };
        let path = folder.join(file);
        let sum = sum_of(&path)?;
        list.sums.insert(file.to_owned(), sum);
        write_atomically(&folder.join(FILE), text(&list.sums).as_bytes())
    }

    /// Paths in the folder, sorted.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.sums.keys().map(String::as_str)
    }

    /// The listed sum of `file`.
    pub fn sum(&self, file: &str) -> Option<Sum> {
        self.sums.get(file).copied()
    }

    /// Reads every listed file and compares it: about 1.3 GB a second and core where the processor computes
    /// SHA-256 itself.
    ///
    /// # Errors
    /// Names the first that is missing or differs.
    pub fn check_all(&self) -> Result<()> {
        self.check_where(|_| true)
    }

    /// Reads those listed files that `picked` picks, and compares them.
    ///
    /// # Errors
    /// Names the first that is missing or differs.
    pub fn check_where(&self, picked: impl Fn(&str) -> bool) -> Result<()> {
        let files: Vec<String> =
            self.files().filter(|file| picked(file)).map(ToOwned::to_owned).collect();
        if let Some(missing) = files.iter().find(|file| !self.folder.join(file).is_file()) {
            let why = format!("missing, but listed in {FILE}");
            return Err(CheckpointError::malformed(&self.folder.join(missing), why));
        }
        let sums = sums_of(&self.folder, &files)?;
        files.iter().zip(sums).try_for_each(|(file, sum)| self.compare(file, sum))
    }

    /// Configurations that are there and are not what was listed.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(crate) fn edited(&self) -> Result<Vec<&str>> {
        let is_there = |file: &&str| is_config(file) && self.folder.join(file).is_file();
        let mut edited: Vec<&str> = self.files().filter(is_there).collect();
        let files: Vec<String> = edited.iter().map(|&file| file.to_owned()).collect();
        let mut sums = sums_of(&self.folder, &files)?.into_iter();
        edited.retain(|file| self.sum(file) != sums.next());
        Ok(edited)
    }

    /// Compares `file`, whose sum is `found`; one that is not listed passes.
    ///
    /// # Errors
    /// When it differs.
    pub fn compare(&self, file: &str, found: Sum) -> Result<()> {
        if self.sum(file).is_none_or(|listed| listed == found) {
            return Ok(());
        }
        let why = format!(
            "damaged: its SHA-256 is not the one in {FILE} (if it was changed on purpose, delete {FILE})"
        );
        Err(CheckpointError::malformed(&self.folder.join(file), why))
    }
}

/// Whether `file` is configuration, which people edit by hand: readers say that it differs and go on.
pub fn is_config(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.ends_with("config.json") || name == "model_index.json"
}

/// File and sum of a line of `sha256sum`.
fn parse(line: &str) -> Option<(&str, Sum)> {
    let (hex, file) = line.split_once("  ").or_else(|| line.split_once(" *"))?;
    let mut sum = Sum::default();
    if hex.len() != 2 * sum.len() || !hex.is_ascii() || file.is_empty() {
        return None;
    }
    for (byte, at) in sum.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    // Nothing outside the folder is anybody's business.
    let is_inside = !file.starts_with('/') && !file.split('/').any(|part| part == "..");
    is_inside.then_some((file, sum))
}

fn text(sums: &BTreeMap<String, Sum>) -> String {
    let mut text = String::new();
    for (file, sum) in sums {
        for byte in sum {
            let _ = write!(text, "{byte:02x}");
        }
        let _ = writeln!(text, "  {file}");
    }
    text
}

/// Files below `folder`, by their paths from where the search began, without lists of sums.
fn list(folder: &Path, above: &str, files: &mut Vec<String>) -> Result<()> {
    let failed = |reason| CheckpointError::Io { path: folder.to_owned(), reason };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let name = name.to_str().filter(|name| !name.contains(['\n', '\\'])).ok_or_else(|| {
            CheckpointError::malformed(&entry.path(), "such a name cannot be in a list of files")
        })?;
        let path = format!("{above}{name}");
        if entry.file_type().map_err(failed)?.is_dir() {
            list(&entry.path(), &format!("{path}/"), files)?;
        } else if path != FILE {
            files.push(path);
        }
    }
    Ok(())
}

/// Sums of `files`, several at a time.
fn sums_of(folder: &Path, files: &[String]) -> Result<Vec<Sum>> {
    let next = AtomicUsize::new(0);
    let n_threads = thread::available_parallelism().map_or(1, usize::from).min(files.len());
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(file) = files.get(index) else { return Ok(done) };
            let path = folder.join(file);
            done.push((index, sum_of(&path)?));
        }
    };
    let mut sums = vec![Sum::default(); files.len()];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let done = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            for (index, sum) in done? {
                sums[index] = sum;
            }
        }
        Ok(sums)
    })
}

/// SHA-256 of the file `path`.
///
/// # Errors
/// When it is no regular file or cannot be read.
pub fn sum_of(path: &Path) -> Result<Sum> {
    let mut file = open_for_reading(path)?;
    let mut sha = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk).map_err(CheckpointError::io(path))? {
            0 => return Ok(sha.finalize().into()),
            n => sha.update(&chunk[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir(home.path().join("vae")).unwrap();
        fs::write(home.path().join("vae/config.json"), "{}").unwrap();
        fs::write(home.path().join("empty"), "").unwrap();
        Checksums::write(home.path(), &BTreeMap::new()).unwrap();
        home
    }

    /// The two sums are those of `printf '{}' | sha256sum` and `sha256sum < /dev/null`.
    #[test]
    fn the_list_is_what_sha256sum_writes() {
        let home = folder();
        let text = fs::read_to_string(home.path().join(FILE)).unwrap();
        assert_eq!(
            text,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  empty\n\
             44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a  vae/config.json\n"
        );
        Checksums::open(home.path()).unwrap().unwrap().check_all().unwrap();
        fs::remove_file(home.path().join(FILE)).unwrap();
        assert_eq!(Checksums::open(home.path()).unwrap(), None);
    }

    #[test]
    fn damage_and_loss_are_named() {
        let home = folder();
        let list = Checksums::open(home.path()).unwrap().unwrap();
        let config = home.path().join("vae/config.json");
        assert_eq!(list.edited().unwrap(), [""; 0]);
        fs::write(&config, "{ }").unwrap();
        assert_eq!(list.edited().unwrap(), ["vae/config.json"]);
        let message = list.check_all().unwrap_err().to_string();
        assert!(message.contains("vae/config.json: damaged"), "{message}");
        list.check_where(|file| !file.starts_with("vae/")).unwrap();
        Checksums::renew(home.path(), "vae/config.json").unwrap();
        Checksums::open(home.path()).unwrap().unwrap().check_all().unwrap();
        fs::remove_file(&config).unwrap();
        let message = list.check_all().unwrap_err().to_string();
        assert!(message.contains("vae/config.json: missing"), "{message}");
    }

    #[test]
    fn a_damaged_list_is_named() {
        let home = folder();
        let sum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for line in
            ["", "12  a", &format!("{sum}  ../a"), &format!("{sum}  /a"), &format!("{sum}x  a")]
        {
            fs::write(home.path().join(FILE), format!("{sum}  a\n{line}\n")).unwrap();
            let message = Checksums::open(home.path()).unwrap_err().to_string();
            assert!(message.contains("SHA256SUMS: line 2"), "{message}");
        }
    }
}
