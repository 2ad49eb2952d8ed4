//! Where a LoRA is: what people type, and which file of a folder is meant.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;

/// The file that `FluxPipeline.load_lora_weights` looks for in a folder.
pub const FILE: &str = "pytorch_lora_weights.safetensors";
/// PEFT's.
pub const PEFT: &str = "adapter_model.safetensors";

/// `FILE` or `FILE:SCALE`, as people type a LoRA and its scale (1 if not given). A colon begins a scale
/// where what stands before it exists, or where nothing does and a number follows.
///
/// # Errors
/// When the scale is no finite number.
pub fn scaled_path(text: &str) -> Result<(PathBuf, f64), String> {
    let whole = || Ok((text.into(), 1.0));
    let Some((path, scale)) = text.rsplit_once(':').filter(|(path, _)| !path.is_empty()) else {
        return whole();
    };
    if Path::new(text).exists() {
        return whole();
    }
    match scale.parse() {
        Ok(scale) if f64::is_finite(scale) => Ok((path.into(), scale)),
        Ok(_) => Err(no_scale(scale)),
        Err(_) if Path::new(path).exists() => Err(no_scale(scale)),
        Err(_) => whole(),
    }
}

fn no_scale(scale: &str) -> String {
    format!("{scale:?} is no scale: FILE or FILE:SCALE is needed, such as FILE:0.8")
}

/// The weights of the LoRA at `path`: the file itself, or the one of the folder that is meant.
///
/// # Errors
/// When there is none, or several and none has a usual name.
pub fn file(path: &Path) -> Result<PathBuf, CheckpointError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    if let Some(usual) = [FILE, PEFT].map(|name| path.join(name)).into_iter().find(|f| f.is_file())
    {
        return Ok(usual);
    }
    let malformed = |why: String| Err(CheckpointError::malformed(path, why));
    if path.join("model_index.json").is_file() {
        return malformed("a pipeline's folder, no LoRA".into());
    }
    let names = files(path, "safetensors").map_err(CheckpointError::io(path))?;
    match names.as_slice() {
        [one] => Ok(path.join(one)),
        [] => malformed(nothing_in(path)),
        several => malformed(format!("which LoRA of it? Give one of {}", several.join(", "))),
    }
}

/// Whether the settings in the folder of the LoRA `file` are its own: it has a usual name, or is alone.
pub(super) fn owns_settings(file: &Path) -> bool {
    let is_usual = file.file_name().is_some_and(|name| name == FILE || name == PEFT);
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    is_usual || files(folder.unwrap_or(Path::new(".")), "safetensors").is_ok_and(|f| f.len() == 1)
}

/// Whether `file` is named as PEFT names its own.
pub(super) fn is_peft(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name == PEFT)
}

/// Why the folder `path` holds no LoRA, and where there may be one.
fn nothing_in(path: &Path) -> String {
    let pickles = ["bin", "pt", "pth", "ckpt"].map(|kind| files(path, kind).unwrap_or_default());
    if let Some(pickle) = pickles.concat().first() {
        let stem = pickle.rsplit_once('.').map_or("", |(stem, _)| stem);
        return format!(
            "no .safetensors in it; {pickle} is a pickle: `ng-train convert {pickle} {stem}.safetensors` \
             reads it without running it"
        );
    }
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let has_file = |folder: &PathBuf| files(folder, "safetensors").is_ok_and(|f| !f.is_empty());
    match below.filter(has_file).min() {
        Some(folder) => format!("no .safetensors in it; is {} meant?", folder.display()),
        None => "no .safetensors in it".into(),
    }
}

/// Names of the files of one kind in `folder`, sorted.
fn files(folder: &Path, extension: &str) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file()
            && path.extension().is_some_and(|e| e == extension)
            && !name.starts_with('.')
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
