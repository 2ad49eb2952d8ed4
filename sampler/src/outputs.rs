//! Names of what is written, and whether it can be.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::format::Format;

/// Files that people may expect other formats in.
const OTHER_FORMATS: [&str; 6] = ["gif", "bmp", "tif", "tiff", "avif", "jxl"];
/// Stands for standard input and output.
pub const STANDARD: &str = "-";

/// Where `n_images` images go when `-o` is `output`: `output` itself if it is one file of a picture,
/// that name numbered if there are more, standard output for `-`, else numbered in the folder
/// `output`.
///
/// # Errors
/// When `output` ends like an image format that is not written, or several images would go to
/// standard output.
pub fn image_files(output: &Path, n_images: usize) -> Result<Vec<PathBuf>, String> {
    if output == Path::new(STANDARD) {
        return match n_images {
            1 => Ok(vec![output.to_owned()]),
            n => Err(format!("-o -: {n} images do not fit into standard output; make one")),
        };
    }
    let extension = output.extension().and_then(|it| it.to_str()).unwrap_or_default();
    if OTHER_FORMATS.contains(&extension.to_ascii_lowercase().as_str()) {
        let output = output.display();
        return Err(format!(
            "-o {output}: images are written as PNG, JPEG or WebP; end it in .png, .jpg or .webp, \
             or name a folder"
        ));
    }
    let n_digits = n_images.saturating_sub(1).to_string().len().max(3);
    if Format::of(output).is_none() {
        return Ok((0..n_images).map(|i| output.join(format!("{i:0n_digits$}.png"))).collect());
    }
    if n_images == 1 {
        return Ok(vec![output.to_owned()]);
    }
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    let extension = extension.to_ascii_lowercase();
    let name = |i: usize| format!("{stem}-{i:0n_digits$}.{extension}");
    Ok((0..n_images).map(|i| output.with_file_name(name(i))).collect())
}

/// The folder that `file` is in.
pub fn parent(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes sure that files can be made in `folder`, or in the folder above it that exists.
pub fn check_writable(folder: &Path) -> Result<()> {
    let existing = folder.ancestors().find(|ancestor| ancestor.exists());
    let existing = existing.filter(|ancestor| !ancestor.as_os_str().is_empty());
    let existing = existing.unwrap_or(Path::new("."));
    ensure!(existing.is_dir(), "cannot write into {}: it is not a folder", existing.display());
    tempfile::tempfile_in(existing)
        .with_context(|| format!("cannot write into {}", existing.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_the_help_says() {
        let cases: [(&str, usize, &[&str]); 8] = [
            ("out.png", 1, &["out.png"]),
            ("a/fox.PNG", 2, &["a/fox-000.png", "a/fox-001.png"]),
            ("v1.2", 1, &["v1.2/000.png"]),
            ("folder", 2, &["folder/000.png", "folder/001.png"]),
            ("folder/", 1, &["folder/000.png"]),
            (".", 1, &["./000.png"]),
            ("fox.jpg", 2, &["fox-000.jpg", "fox-001.jpg"]),
            ("-", 1, &["-"]),
        ];
        for (output, n_images, expected) in cases {
            let files = image_files(Path::new(output), n_images).unwrap();
            assert_eq!(files, expected.iter().map(PathBuf::from).collect::<Vec<_>>(), "{output}");
        }
        let many = image_files(Path::new("o.png"), 1001).unwrap();
        assert_eq!(
            (many[0].to_str(), many[1000].to_str()),
            (Some("o-0000.png"), Some("o-1000.png"))
        );
        let gif = image_files(Path::new("o.GIF"), 1).unwrap_err();
        assert!(gif.contains("written as PNG, JPEG or WebP"), "{gif}");
        assert!(image_files(Path::new("-"), 2).unwrap_err().contains("make one"));
    }

    #[test]
    fn a_folder_that_cannot_be_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("file");
        std::fs::write(&file, "")?;
        check_writable(&folder.path().join("new/deeper"))?;
        check_writable(Path::new("relative/new"))?;
        assert!(!folder.path().join("new").exists());
        let message = check_writable(&file.join("below")).unwrap_err().to_string();
        assert!(message.contains("it is not a folder"), "{message}");
        Ok(())
    }
}
