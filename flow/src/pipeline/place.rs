//! What stands at a path where a pipeline's folder was expected.

use std::fs;
use std::path::Path;

use super::names::bfl_prefix;
use crate::checkpoint::Weights;

/// The file that makes a folder a pipeline.
const INDEX: &str = "model_index.json";
/// Extensions of checkpoints in one file.
const SINGLE: [&str; 3] = ["safetensors", "sft", "gguf"];
/// Where one of these belongs.
const LORA: &str = "a LoRA, which goes on a model: give the model's folder here, and the LoRA by --lora (of align: \
                    --set lora.from=FILE; of eval: a --model behind that of its model)";
/// What a hub's cache calls the folder of a model, before its name.
const CACHE: &str = "models--";

/// Why no pipeline can be read at `path`; nothing if one may be.
pub(super) fn no_pipeline(path: &Path) -> Option<String> {
    if path.is_file() {
        return Some(single_file(path));
    }
    if !path.is_dir() {
        let link = fs::read_link(path).ok();
        let link = link.map(|to| format!("a broken link to {}", to.display()));
        let why = link.or_else(|| fetched(path)).map(|why| format!(": {why}"));
        return Some(format!("no such folder{}", why.unwrap_or_default()));
    }
    // A broken link is told when it is read.
    if path.join(INDEX).symlink_metadata().is_ok() {
        return None;
    }
    let why = format!("not a pipeline folder: it has no {INDEX}");
    let is_cache = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(CACHE));
    if is_cache && path.join("snapshots").is_dir() {
        return Some(format!("{why}; a hub's cache: give one of the folders in its snapshots"));
    }
    let single = single_files(path).into_iter().next();
    let single = single.map(|file| format!(", but {file}: {}", single_file(&path.join(&file))));
    Some(why + &single.unwrap_or_default())
}

/// Names of checkpoints in one file that lie in `dir`.
fn single_files(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_single(Path::new(name))).collect();
    names.sort();
    names
}

fn is_single(file: &Path) -> bool {
    file.extension().is_some_and(|extension| SINGLE.iter().any(|known| extension == *known))
}

/// What a file is, and what to do with it.
fn single_file(path: &Path) -> String {
    let make = "a diffusers folder is needed; `ng-train convert FILE DIR --like FOLDER` makes one";
    if path.extension().is_some_and(|extension| extension == "gguf") {
        return format!("a GGUF checkpoint, one network in a file: {make}");
    }
    match Weights::open_file(path) {
        Ok(weights) if bfl_prefix(&weights).is_some() => {
            format!("a single-file checkpoint in BFL's names, as ComfyUI has them: {make}")
        }
        Ok(weights) if weights.names().any(is_factor) => LORA.to_owned(),
        Ok(_) => format!("a file of weights alone: {make}"),
        Err(error) => format!("a file, not a pipeline folder ({error})"),
    }
}

/// Whether a tensor called `name` is a part of adapters.
fn is_factor(name: &str) -> bool {
    [".lora_A.", ".lora_down.", ".lora_B.", ".lora_up."].iter().any(|part| name.contains(part))
}

/// What gets the model that `path` may be the name of on a hub.
pub fn fetched(path: &Path) -> Option<String> {
    let id = hub_id(path)?;
    Some(format!(
        "if it is the name of a model on a hub, `hf download {id} --local-dir {id}` fetches it"
    ))
}

/// `path` if it looks like owner/name.
fn hub_id(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let (owner, name) = text.split_once('/')?;
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (is_part(owner) && is_part(name)).then_some(text)
}
