//! What computes, in words.

use std::{fs, path::Path};

use flow::checkpoint::read_bounded;
use onnx::Provider;

/// Name of the processor or of GPU number `index`, as the system has it; empty where it does not say.
pub fn name(provider: Provider, index: usize) -> String {
    if provider == Provider::Cpu {
        return value(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default(), "model name");
    }
    let gpus = fs::read_dir(Path::new("/proc/driver/nvidia/gpus")).into_iter().flatten();
    let mut files: Vec<_> =
        gpus.filter_map(|entry| Some(entry.ok()?.path().join("information"))).collect();
    files.sort();
    let bytes = files.get(index).and_then(|file| read_bounded(file).ok());
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    value(&text.unwrap_or_default(), "Model")
}

/// What follows `name :` on the first line that begins so.
fn value(text: &str, name: &str) -> String {
    let of_line = |line: &str| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    text.lines().find_map(of_line).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn the_first_of_several_is_taken() {
        let text = "processor\t: 0\nmodel name\t: Fast  CPU @ 2 GHz: x\n\nmodel name\t: other\n";
        assert_eq!(value(text, "model name"), "Fast CPU @ 2 GHz: x");
        assert_eq!(value(text, "Model"), "");
    }
}
