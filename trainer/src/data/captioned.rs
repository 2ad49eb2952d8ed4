//! Reading captioned pictures: a folder with `metadata.jsonl` and the pictures it names.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Component, Path},
};

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::open_for_reading;
use image::RgbImage;
use serde::Deserialize;

use crate::picture;

/// The file that lists pictures and captions, one JSON object a line.
pub const METADATA: &str = "metadata.jsonl";

/// Longest accepted line of the list, in bytes.
const MAX_LINE: u64 = 64 * 1024;
/// Largest accepted edge of a picture, in pixels.
const MAX_EDGE: u32 = 8192;

#[derive(Deserialize)]
struct Row {
    file_name: String,
    #[serde(alias = "caption", alias = "prompt")]
    text: String,
}

/// Every picture of an image folder with its caption, in the order of `metadata.jsonl`.
///
/// The caption is the field `text` (or `caption`, or `prompt`); other fields are ignored. Pictures
/// are PNG or JPEG and become RGB.
///
/// # Errors
/// One line naming the file (and line) that is missing, unreadable, outside the folder, or a picture
/// of another size than the first; also when the list is empty.
pub fn read_captioned(dir: &Path) -> Result<Vec<(RgbImage, String)>> {
    let list = dir.join(METADATA);
    let file = open_for_reading(&list).with_context(|| {
        format!("opening {}: a captioned folder lists its pictures there", list.display())
    })?;
    let mut reader = BufReader::new(file);
    let mut pairs: Vec<(RgbImage, String)> = Vec::new();
    for number in 1.. {
        let at = || format!("{}, line {number}", list.display());
        let mut line = Vec::new();
        reader.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line).with_context(at)?;
        if line.is_empty() {
            break;
        }
        ensure!(line.len() as u64 <= MAX_LINE, "{}: longer than {MAX_LINE} bytes", at());
        if line.trim_ascii().is_empty() {
            continue;
        }
        let row: Row = serde_json::from_slice(&line).with_context(at)?;
        let image = picture(dir, &row.file_name).with_context(at)?;
        if let Some((first, _)) = pairs.first() {
            ensure!(
                image.dimensions() == first.dimensions(),
                "{}: {} is {} by {} pixels, the pictures before it {} by {}: make all one size",
                at(),
                row.file_name,
                image.width(),
                image.height(),
                first.width(),
                first.height(),
            );
        }
        pairs.push((image, row.text));
    }
    ensure!(!pairs.is_empty(), "{} lists no picture", list.display());
    Ok(pairs)
}

fn picture(dir: &Path, name: &str) -> Result<RgbImage> {
    let inside = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if !inside || name.is_empty() {
        bail!("file_name `{name}` is not a path inside the folder");
    }
    picture::open(&dir.join(name), MAX_EDGE)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(rows: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        RgbImage::from_pixel(4, 4, image::Rgb([1, 2, 3])).save(dir.path().join("a.png")).unwrap();
        RgbImage::new(4, 5).save(dir.path().join("tall.png")).unwrap();
        fs::write(dir.path().join("torn.png"), b"\x89PNG\r\n\x1a\n").unwrap();
        fs::write(dir.path().join(METADATA), rows).unwrap();
        dir
    }

    #[test]
    fn reads_any_of_the_usual_caption_fields() {
        let dir = folder(
            "{\"file_name\":\"a.png\",\"text\":\"one\",\"id\":7}\n\n{\"file_name\":\"a.png\",\"caption\":\"two\"}",
        );
        let pairs = read_captioned(dir.path()).unwrap();
        let captions: Vec<&str> = pairs.iter().map(|(_, caption)| caption.as_str()).collect();
        assert_eq!(captions, ["one", "two"]);
        assert_eq!(pairs[1].0.get_pixel(3, 3).0, [1, 2, 3]);
    }

    #[test]
    fn each_fault_names_its_file_and_line() {
        let good = "{\"file_name\":\"a.png\",\"text\":\"x\"}\n";
        for (row, expected) in [
            ("{\"file_name\":\"none.png\",\"text\":\"x\"}", "none.png"),
            ("{\"file_name\":\"tall.png\",\"text\":\"x\"}", "4 by 5 pixels"),
            ("{\"file_name\":\"torn.png\",\"text\":\"x\"}", "torn.png"),
            ("{\"file_name\":\"../a.png\",\"text\":\"x\"}", "inside the folder"),
            ("{\"file_name\":\"a.png\"}", "missing field `text`"),
            ("{\"file_name\":", "EOF"),
        ] {
            let dir = folder(&format!("{good}{row}\n"));
            let error = format!("{:#}", read_captioned(dir.path()).unwrap_err());
            assert!(error.contains(expected) && error.contains("line 2"), "{row}: {error}");
        }
    }

    #[test]
    fn an_empty_list_an_endless_line_and_no_list_are_errors() {
        let empty = format!("{:#}", read_captioned(folder("\n").path()).unwrap_err());
        assert!(empty.contains("lists no picture"), "{empty}");
        let long = format!("{:#}", read_captioned(folder(&"x".repeat(70_000)).path()).unwrap_err());
        assert!(long.contains("longer than"), "{long}");
        let none = tempfile::tempdir().unwrap();
        let error = format!("{:#}", read_captioned(none.path()).unwrap_err());
        assert!(error.contains(METADATA), "{error}");
    }
}
