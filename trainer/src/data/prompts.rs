//! Prompt files: those of [`flow::prompts`], and `.parquet`; and folders of them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use flow::checkpoint::open_for_reading;
use flow::log;
use flow::prompts::{self, ANSWER, ENDS, Prompt, Prompts, TEXT_FIELDS};
use flow::tokens::Tokenizers;
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::Value;

/// Columns that are read beside a prompt's text, where they are there.
const MORE: [&str; 4] = ["target", "colour", "color", ANSWER];
const PARQUET: &str = "parquet";
/// Most rows of a file, and bytes in the columns that are read.
const MAX_ROWS: i64 = 20_000_000;
const MAX_BYTES: i64 = 1 << 30;
const MAX_HELD: usize = 256 << 20;

/// Reads the prompt file `path`, or all of the folder `path` in the order of their names, and tells which those are.
///
/// # Errors
/// One line that names the file, and what is wrong with it.
pub(crate) fn read(path: &Path) -> Result<Vec<Prompt>> {
    if !path.is_dir() {
        return file(path);
    }
    let entries = fs::read_dir(path).with_context(|| path.display().to_string())?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_prompts(name)).collect();
    names.sort();
    ensure!(!names.is_empty(), "{}: no prompt file in this folder", path.display());
    log::note(&format!("note: {}: takes {}", path.display(), names.join(", ")));
    let read = names.iter().map(|name| file(&path.join(name)));
    Ok(read.collect::<Result<Vec<_>>>()?.concat())
}

fn is_prompts(name: &str) -> bool {
    let end = Path::new(name).extension().map(std::ffi::OsStr::to_ascii_lowercase);
    let is_known = |end: &str| end == PARQUET || ENDS.contains(&end);
    !name.starts_with('.') && end.is_some_and(|end| end.to_str().is_some_and(is_known))
}

/// Reads a prompt file: `.parquet` with a column `prompt`, `text`, `caption` or `prompt_en` (and maybe
/// `target` and `colour`), else as [`flow::prompts::read`]. Of a parquet file other columns stay on disk. What
/// of its rows is left out is told on standard error.
///
/// # Errors
/// One line that names the file, and what is wrong with it.
fn file(path: &Path) -> Result<Vec<Prompt>> {
    let is_parquet = path.extension().is_some_and(|end| end.eq_ignore_ascii_case(PARQUET));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    ensure!(
        !path.exists() || is_prompts(name.trim_start_matches('.')),
        "{}: a prompt file ends in .{} or .{PARQUET}",
        path.display(),
        ENDS.join(", .")
    );
    let read = if is_parquet {
        let read = parquet(path).and_then(|prompts| prompts.any().map_err(anyhow::Error::msg));
        read.with_context(|| path.display().to_string())?
    } else {
        prompts::read(path)?
    };
    for notice in read.notices() {
        log::note(&format!("note: {}: {notice}", path.display()));
    }
    Ok(read.prompts)
}

/// Says which of `prompts` the encoders of the pipeline in `model` read a part of only.
///
/// # Errors
/// When its tokenizers do not open, or cannot encode a prompt.
pub(crate) fn tell_cut<'a>(model: &Path, prompts: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let cuts = Tokenizers::open(model, None)?.cuts(prompts);
    let cuts = cuts.map_err(|error| anyhow!("{}: cannot tokenise: {error}", model.display()))?;
    for line in cuts {
        log::note(&format!("note: {line}"));
    }
    Ok(())
}

fn parquet(path: &Path) -> Result<Prompts> {
    let reader = SerializedFileReader::new(open_for_reading(path)?)?;
    let columns = columns(reader.metadata())?;
    let (mut prompts, mut n_held) = (Prompts::default(), 0);
    for (at, row) in reader.get_row_iter(Some(columns))?.enumerate() {
        let row = row.with_context(|| format!("row {}", at + 1))?;
        let fields = row.into_columns().into_iter().map(|(name, field)| (name, json(field)));
        let before = prompts.prompts.len();
        prompts.push(format_args!("row {}", at + 1), Ok(&Value::Object(fields.collect())));
        // A dictionary stores a text once, however many rows repeat it.
        n_held += prompts.prompts[before..].iter().map(Prompt::n_bytes).sum::<usize>();
        ensure!(n_held <= MAX_HELD, "row {}: more than {MAX_HELD} bytes of prompts", at + 1);
    }
    Ok(prompts)
}

/// The columns to read, as a schema.
fn columns(file: &ParquetMetaData) -> Result<Type> {
    let schema = file.file_metadata().schema();
    let all = schema.get_fields();
    let find = |name: &&str| all.iter().find(|column| column.name() == *name);
    let Some(prompt) = TEXT_FIELDS.iter().find_map(find) else {
        return Err(anyhow!(prompts::no_column(all.iter().map(|column| column.name()))));
    };
    let columns: Vec<_> =
        [prompt].into_iter().chain(MORE.iter().filter_map(find)).cloned().collect();
    let n_rows = file.file_metadata().num_rows();
    ensure!(n_rows <= MAX_ROWS, "{n_rows} rows, a prompt file has at most {MAX_ROWS}");
    let parts = file.row_groups().iter().flat_map(RowGroupMetaData::columns);
    let read = parts.filter(|part| {
        columns.iter().any(|column| {
            part.column_path().parts().first().is_some_and(|name| name == column.name())
        })
    });
    let n_bytes =
        read.fold(0, |sum: i64, part| sum.saturating_add(part.uncompressed_size().max(0)));
    ensure!(n_bytes <= MAX_BYTES, "{n_bytes} bytes of prompts, a file has at most {MAX_BYTES}");
    Ok(Type::group_type_builder(schema.name()).with_fields(columns).build()?)
}

/// A value of a row; of what a prompt cannot be made of, nothing.
fn json(field: Field) -> Value {
    match field {
        Field::Str(text) => Value::String(text),
        // Old writers do not say that their bytes are text.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Into::into),
        Field::Group(row) => {
            row.into_columns().into_iter().map(|(name, field)| (name, json(field))).collect()
        }
        Field::ListInternal(list) => list.elements().iter().cloned().map(json).collect(),
        Field::Bool(is) => is.into(),
        Field::Int(number) => number.into(),
        Field::Long(number) => number.into(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data/fixtures/prompts").join(name)
    }

    #[test]
    fn files_of_pyarrow_are_read() {
        for name in ["snappy", "zstd", "gzip", "none"] {
            let prompts = read(&fixture(&format!("{name}.parquet"))).unwrap();
            let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
            assert_eq!(texts, ["a cat", "red \"HAT\"", "Zwölf Boxkämpfer 猫", "a cat"], "{name}");
            assert_eq!(prompts[1].target.as_deref(), Some("HAT"));
            assert_eq!(prompts[0].target, None);
        }
        assert_eq!(read(&fixture("caption.parquet")).unwrap()[2].text, "prompt 2");
        assert_eq!(read(&fixture("caption.parquet")).unwrap().len(), 300);
        assert_eq!(read(&fixture("null.parquet")).unwrap().len(), 1);
    }

    /// HPDv2's benchmark is a folder of four lists of strings.
    #[test]
    fn a_folder_is_its_files_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("photo.json", r#"["a hen", "a fox"]"#),
            ("anime.json", r#"["an owl"]"#),
            ("more.TXT", "a fox\n"),
            ("README.md", "no prompt\n"),
            (".left.txt", "no prompt\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let texts = || -> Result<Vec<String>> {
            Ok(read(dir.path())?.into_iter().map(|prompt| prompt.text).collect())
        };
        assert_eq!(texts().unwrap(), ["an owl", "a fox", "a hen", "a fox"]);
        fs::write(dir.path().join("b.json"), "[]").unwrap();
        let error = format!("{:#}", texts().unwrap_err());
        assert!(error.contains("b.json: holds no prompt"), "{error}");
    }

    /// Conversations, as verl's recipes write them.
    #[test]
    fn the_last_word_of_the_user_is_the_prompt() {
        let prompts = read(&fixture("verl.parquet")).unwrap();
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        assert_eq!(texts, ["A sign that reads \"HI\"", "a red fox"]);
        assert_eq!(prompts[0].target.as_deref(), Some("HI"));
        assert_eq!(prompts[1].target, None);
    }

    #[test]
    fn each_fault_is_one_line_with_file_and_place() {
        let dir = tempfile::tempdir().unwrap();
        let cut = dir.path().join("cut.parquet");
        let whole = std::fs::read(fixture("snappy.parquet")).unwrap();
        std::fs::write(&cut, &whole[..whole.len() - 9]).unwrap();
        std::fs::create_dir(dir.path().join("pipe.parquet")).unwrap();
        let text = dir.path().join("text.parquet");
        std::fs::write(&text, "a cat\n").unwrap();
        for (path, says) in [
            (fixture("empty.parquet"), "holds no prompt"),
            (fixture("number.parquet"), "row 1: the prompt is not a string"),
            (
                fixture("columns.parquet"),
                "no column `prompt`, `text`, `caption`, `prompt_en` among image, id",
            ),
            (cut, "Parquet"),
            (text, "Parquet"),
            (fixture("dictionary.parquet"), "more than 268435456 bytes of prompts"),
            (dir.path().join("pipe.parquet"), "no prompt file in this folder"),
            (dir.path().join("absent.parquet"), "No such file"),
        ] {
            let error = format!("{:#}", read(&path).unwrap_err());
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(error.contains(says) && error.contains(name), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
