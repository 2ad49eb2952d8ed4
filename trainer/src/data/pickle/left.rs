//! What a pickled file holds beside the tensors that are taken from it.

use std::collections::BTreeMap;
use std::path::Path;

use pytorch_reader::{PickleValue, PytorchReader};

use super::WRAPPERS;

/// What the type of a tensor is called.
const TENSOR: &str = "torch.Tensor";

/// Keys of what stays behind when the tensors of the file at `path` are taken, sorted, with the key that the
/// tensors are under, where there is one. Nothing is known of files that hold no dictionary.
pub(super) fn of(path: &Path) -> (Option<&'static str>, Vec<String>) {
    let Ok(PickleValue::Dict(root)) = PytorchReader::read_pickle_data(path, None) else {
        return (None, Vec::new());
    };
    let mut root: BTreeMap<String, PickleValue> = root.into_iter().collect();
    let wrapper =
        WRAPPERS.into_iter().find(|key| matches!(root.get(*key), Some(PickleValue::Dict(_))));
    let mut left = Vec::new();
    if let Some(weights) = wrapper.and_then(|key| root.remove(key)) {
        left.extend(root.into_keys());
        others("", &weights, &mut left);
    } else {
        for (key, value) in &root {
            others(key, value, &mut left);
        }
    }
    left.sort();
    (wrapper, left)
}

/// Keys below `key` of what is no tensor.
fn others(key: &str, value: &PickleValue, found: &mut Vec<String>) {
    match value {
        PickleValue::Dict(inner) => {
            for (name, value) in inner {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                others(&key, value, found);
            }
        }
        PickleValue::Unsupported(name) if name == TENSOR => {}
        _ => found.push(key.to_owned()),
    }
}
