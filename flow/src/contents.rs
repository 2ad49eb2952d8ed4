//! What belongs to a pipeline folder: the files that its copies and exports take along, and no others.
//!
//! Published folders hold more: the same model a second time in one file, pictures, hidden files. A link
//! is followed to another file of the folder, or to the blobs of the hub's cache that the folder is a
//! snapshot of; what else it may point to is nobody's model.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::{CheckpointError, Weights};
use crate::pipeline::read_json;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Names that licences begin with.
const LICENCES: [&str; 2] = ["LICENSE", "NOTICE"];
/// What configs and tokenizers end in.
const TEXTS: [&str; 4] = [".json", ".txt", ".model", ".jinja"];
/// What files end in that are read as tensors and nothing else.
const TENSORS: [&str; 3] = [".safetensors", ".sft", ".gguf"];
/// The pipeline's own file.
const INDEX: &str = "model_index.json";

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Belonging {
    /// Path in the folder.
    pub path: PathBuf,
    /// Where it is read from.
    pub source: PathBuf,
}

impl Belonging {
    /// Whether it holds weights or says in which files they are.
    pub fn is_weights(&self) -> bool {
        is_tensors(&self.path) || self.path.to_string_lossy().contains(".safetensors.index.")
    }

    /// The component it is of; nothing for those of the whole pipeline.
    pub fn component(&self) -> Option<&str> {
        let parent = self.path.parent()?.to_str()?;
        (!parent.is_empty()).then_some(parent)
    }
}

/// The files of the pipeline in `dir`: its index, licences, and those of the components that its index
/// names, sorted.
///
/// # Errors
/// When the index or a folder cannot be read, or a file is a link to somewhere else.
pub fn of(dir: &Path) -> Result<Vec<Belonging>> {
    let index: Value = read_json(&dir.join(INDEX))?;
    let borders = Borders::of(dir)?;
    let mut found = vec![borders.belonging(Path::new(INDEX))?];
    for name in names(dir)? {
        if LICENCES.iter().any(|licence| name.starts_with(licence)) && dir.join(&name).is_file() {
            found.push(borders.belonging(Path::new(&name))?);
        }
    }
    for component in components(&index) {
        let folder = dir.join(component);
        if !folder.is_dir() {
            continue;
        }
        for name in names(&folder)? {
            let belongs = TEXTS.iter().chain(&TENSORS).any(|ending| name.ends_with(ending))
                || LICENCES.iter().any(|licence| name.starts_with(licence));
            if belongs && !name.starts_with('.') && folder.join(&name).is_file() {
                found.push(borders.belonging(&Path::new(component).join(name))?);
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Folders of the components that an index names: `"vae": ["diffusers", "AutoencoderKL"]`.
fn components(index: &Value) -> impl Iterator<Item = &str> {
    let fields = index.as_object().into_iter().flatten();
    let named = fields.filter(|(_, value)| {
        value.as_array().is_some_and(|names| names.first().is_some_and(Value::is_string))
    });
    let names = named.map(|(name, _)| name.as_str());
    names.filter(|name| {
        let mut parts = Path::new(name).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
    })
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let failed = |reason| CheckpointError::Io { path: folder.to_owned(), reason };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(names)
}

fn is_tensors(path: &Path) -> bool {
    let name = path.to_string_lossy();
    TENSORS.iter().any(|ending| name.ends_with(ending))
}

/// What a file may lie in.
struct Borders {
    dir: PathBuf,
    folders: Vec<PathBuf>,
}

impl Borders {
    fn of(dir: &Path) -> Result<Self> {
        let whole = dir.canonicalize().map_err(CheckpointError::io(dir))?;
        // models--NAME/snapshots/REVISION links to models--NAME/blobs.
        let snapshots = whole.parent().filter(|parent| parent.ends_with("snapshots"));
        let blobs = snapshots.and_then(Path::parent).map(|cache| cache.join("blobs"));
        let folders = [Some(whole), blobs].into_iter().flatten().collect();
        Ok(Self { dir: dir.to_owned(), folders })
    }

    fn belonging(&self, path: &Path) -> Result<Belonging> {
        let source = self.dir.join(path);
        let whole = source.canonicalize().map_err(CheckpointError::io(&source))?;
        let belonging = Belonging { path: path.to_owned(), source };
        let is_inside = self.folders.iter().any(|folder| whole.starts_with(folder));
        // Weights may be kept elsewhere, if they are weights.
        if is_inside || is_tensors(path) && Weights::open_file(&whole).is_ok() {
            return Ok(belonging);
        }
        let why = format!(
            "is a link to {}, outside of its folder: put the file itself there",
            whole.display()
        );
        Err(CheckpointError::malformed(&belonging.source, why))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::checkpoint::{Entry, write_tensors};

    fn folder(at: &Path) {
        fs::create_dir_all(at.join("vae")).unwrap();
        fs::create_dir_all(at.join("other")).unwrap();
        let index = r#"{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"],
                        "../other": ["diffusers", "AutoencoderKL"], "absent": [null, null]}"#;
        fs::write(at.join(INDEX), index).unwrap();
        for file in
            ["LICENSE.md", "flux1-dev.safetensors", "dev.png", ".gitattributes", "vae/config.json"]
        {
            fs::write(at.join(file), "text").unwrap();
        }
        fs::write(at.join("vae/.cache.json"), "").unwrap();
        fs::write(at.join("vae/run.py"), "").unwrap();
        fs::write(at.join("other/config.json"), "").unwrap();
    }

    fn paths(dir: &Path) -> Vec<String> {
        of(dir).unwrap().iter().map(|file| file.path.display().to_string()).collect()
    }

    #[test]
    fn only_what_the_index_names_belongs() {
        let home = tempfile::tempdir().unwrap();
        folder(home.path());
        assert_eq!(paths(home.path()), ["LICENSE.md", "model_index.json", "vae/config.json"]);
    }

    #[test]
    fn links_stay_in_the_folder_or_its_cache() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("models--a--b/snapshots/1");
        folder(&dir);
        let blobs = home.path().join("models--a--b/blobs");
        fs::create_dir(&blobs).unwrap();
        fs::write(blobs.join("4f"), "weights").unwrap();
        let link = dir.join("vae/diffusion_pytorch_model.safetensors");
        symlink("../../../blobs/4f", &link).unwrap();
        symlink("../LICENSE.md", dir.join("vae/LICENSE")).unwrap();
        let found = of(&dir).unwrap();
        assert_eq!(found.len(), 5, "{found:?}");
        assert!(found.iter().any(|file| file.is_weights() && file.component() == Some("vae")));
        let secret = home.path().join("id_ed25519");
        fs::write(&secret, "secret").unwrap();
        for name in ["LICENSE", "vae/notes.txt", "vae/more.safetensors"] {
            symlink(&secret, dir.join(name)).unwrap();
            let said = of(&dir).unwrap_err().to_string();
            assert!(said.contains(name) && said.contains("id_ed25519"), "{said}");
            fs::remove_file(dir.join(name)).unwrap();
        }
        let shared = home.path().join("shared");
        write_tensors(&shared, &[Entry::f32("a", &[1], &[1.0])], &[]).unwrap();
        symlink(&shared, dir.join("vae/more.safetensors")).unwrap();
        assert_eq!(of(&dir).unwrap().len(), 6);
    }
}
