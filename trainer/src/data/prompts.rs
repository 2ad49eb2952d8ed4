//! Prompt files: those of [`flow::prompts`], and `.parquet`.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flow::prompts::{self, Prompt, from_json};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

/// Columns of a prompt's text, the first that is there counts.
const TEXT: [&str; 3] = ["prompt", "text", "caption"];
/// Columns that are read with it, where they are there.
const MORE: [&str; 3] = ["target", "colour", "color"];
/// Most rows of a file, bytes in the columns that are read, and bytes of memory for their prompts.
const MAX_ROWS: i64 = 20_000_000;
const MAX_BYTES: i64 = 1 << 30;
const MAX_HELD: usize = 256 << 20;

/// Reads a prompt file: `.parquet` with a column `prompt`, `text` or `caption` (and maybe `target`
/// and `colour`), its other columns left on disk; else as [`flow::prompts::read`].
///
/// # Errors
/// One line that names the file, and the row or column at fault.
pub(crate) fn read(path: &Path) -> Result<Vec<Prompt>> {
    let extension = path.extension().unwrap_or_default();
    if extension.eq_ignore_ascii_case("parquet") {
        parquet(path).with_context(|| path.display().to_string())
    } else {
        Ok(prompts::read(path)?)
    }
}

fn parquet(path: &Path) -> Result<Vec<Prompt>> {
    ensure!(std::fs::metadata(path)?.is_file(), "is no regular file");
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let columns = columns(reader.metadata())?;
    let (mut prompts, mut n_held) = (Vec::new(), 0);
    for (at, row) in reader.get_row_iter(Some(columns))?.enumerate() {
        let fields = row.map_err(anyhow::Error::from).and_then(|row| {
            let fields = row.into_columns().into_iter();
            fields.map(|(name, field)| Ok((name, text(field)?))).collect::<Result<Map<_, _>>>()
        });
        let prompt =
            fields.and_then(|fields| from_json(&Value::Object(fields)).map_err(anyhow::Error::msg));
        let prompt = prompt.with_context(|| format!("row {}", at + 1))?;
        // A dictionary stores a text once, however many rows repeat it.
        n_held += prompt.n_bytes();
        ensure!(n_held <= MAX_HELD, "row {}: more than {MAX_HELD} bytes of prompts", at + 1);
        prompts.push(prompt);
    }
    ensure!(!prompts.is_empty(), "holds no prompt");
    Ok(prompts)
}

/// The columns to read, as a schema.
fn columns(file: &ParquetMetaData) -> Result<Type> {
    let schema = file.file_metadata().schema();
    let all = schema.get_fields();
    let find = |name: &&str| all.iter().find(|column| column.name() == *name);
    let Some(prompt) = TEXT.iter().find_map(find) else {
        let names: Vec<&str> = all.iter().map(|column| column.name()).take(20).collect();
        bail!("no column `prompt`, `text` or `caption` among {}", names.join(", "));
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

fn text(field: Field) -> Result<Value> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Str(text) => Value::String(text),
        other => bail!("{other} is not a string"),
    })
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
            (fixture("null.parquet"), "row 2: the prompt is not a string"),
            (fixture("number.parquet"), "row 1: 7 is not a string"),
            (fixture("columns.parquet"), "no column `prompt`, `text` or `caption` among image, id"),
            (cut, "Parquet"),
            (text, "Parquet"),
            (fixture("dictionary.parquet"), "more than 268435456 bytes of prompts"),
            (dir.path().to_owned().join("pipe.parquet"), "no regular file"),
            (dir.path().join("absent.parquet"), "No such file"),
        ] {
            let error = format!("{:#}", read(&path).unwrap_err());
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(error.contains(says) && error.contains(name), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
