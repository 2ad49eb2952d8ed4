//! Written files read back.

use flow::checkpoint::{Dtype, Entry, write_tensors};
use flow::ops::{Ops, ParamPath};

use super::*;
use crate::element::Float;
use crate::graph::{Builder, Kind};

/// A sum over the parameters, so that each is used.
fn graph(parameters: &[(&str, &[usize])]) -> Graph {
    let ops = Builder::default();
    let mut sum = ops.input("x", Kind::Float(Float::F32), &[]);
    for (name, shape) in parameters {
        sum = ops.add(&sum, &ops.param(&ParamPath::root().at(name), shape));
    }
    ops.finish(&[("y", sum, vec![])])
}

fn output(folder: &Path, placement: Placement) -> Output<'_> {
    Output { folder, name: "sum", placement, metadata: &[], mode: Mode::Written }
}

fn place(tensor: &TensorProto, key: &str) -> usize {
    let entry = tensor.external_data.iter().find(|entry| entry.key.as_deref() == Some(key));
    entry.and_then(|entry| entry.value.as_deref()).unwrap().parse().unwrap()
}

#[test]
fn weights_lie_where_the_model_says() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sizes = [("small", 255), ("medium", 300), ("odd", 257), ("large", 20_000)];
    let value = |i: usize| i as f32 * 0.5 - 3.0;
    let values: Vec<f32> = (0..20_000).map(value).collect();
    let entries = sizes.map(|(name, n)| Entry::f32(name, &[n], &values[..n]));
    write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
    let shapes = sizes.map(|(name, n)| (name, [n]));
    let graph = graph(&shapes.each_ref().map(|(name, shape)| (*name, shape.as_slice())));
    let weights = Weights::open(folder.path(), "w")?;
    let mut n_heard = 0;
    let mut advance = |n| {
        n_heard += n;
        Ok(())
    };
    let written =
        write(&output(folder.path(), Placement::Copied), graph, &weights, &mut advance)?.written;
    assert_eq!(n_heard, 255 + 300 + 257 + 20_000);

    let bytes = std::fs::read(folder.path().join(MODEL_FILE))?;
    let data = std::fs::read(folder.path().join(DATA_FILE))?;
    assert_eq!(written, Written { n_bytes: (bytes.len() + data.len()) as u64, n_linked: 0 });
    let tensors = ModelProto::decode(bytes.as_slice())?.graph.expect("a graph").initializer;
    for (tensor, (_, n)) in tensors.iter().zip(sizes) {
        let written = if let Some(raw) = &tensor.raw_data {
            assert_eq!(n, 255);
            raw.as_slice()
        } else {
            let (offset, length) = (place(tensor, "offset"), place(tensor, "length"));
            assert_eq!(offset % if n == 20_000 { 4096 } else { 64 }, 0);
            &data[offset..offset + length]
        };
        assert_eq!(written, Float::F32.bytes(&values[..n]));
    }
    Ok(())
}

#[test]
fn halves_widen_and_stay_in_their_layout() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (n_out, n_in) = (33, 40);
    let values: Vec<f32> = (0..n_out * n_in).map(|i| (i % 200) as f32).collect();
    let entry = Entry::raw("proj.weight", &[n_out, n_in], Dtype::BF16, Float::Bf16.bytes(&values));
    write_tensors(&folder.path().join("w.safetensors"), &[entry], &[])?;
    let ops = Builder::default();
    let x = ops.input("x", Kind::Float(Float::F32), &[]);
    let y = ops.linear(&ParamPath::root().at("proj"), &x, n_in, n_out, false);
    let graph = ops.finish(&[("y", y, vec![])]);
    let weights = Weights::open(folder.path(), "w")?;
    write(&output(folder.path(), Placement::Linked), graph, &weights, &mut |_| Ok(()))?;
    assert_eq!(std::fs::read(folder.path().join(DATA_FILE))?, Float::F32.bytes(&values));
    Ok(())
}

#[test]
fn weights_of_the_right_type_stay_in_their_file() -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let (from, to) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let values: Vec<f32> = (0..600).map(|i| i as f32).collect();
    let entries = [
        Entry::f32("a", &[600], &values),
        Entry::f32("b", &[2], &values[..2]),
        Entry::f32("unused", &[300], &values[..300]),
    ];
    let file = from.path().join("w.safetensors");
    write_tensors(&file, &entries, &[])?;
    let weights = Weights::open_file(&file)?;
    let graph = graph(&[("a", &[600]), ("b", &[2])]);
    let made = write(&output(to.path(), Placement::Linked), graph, &weights, &mut |_| Ok(()))?;
    let written = made.written;
    let linked = to.path().join("w.safetensors");
    assert_eq!(linked.metadata()?.ino(), file.metadata()?.ino());
    assert!(!to.path().join(DATA_FILE).exists());
    assert_eq!(written.n_linked, 2400);
    let bytes = std::fs::read(to.path().join(MODEL_FILE))?;
    assert_eq!(written.n_bytes, bytes.len() as u64);
    let model = ModelProto::decode(bytes.as_slice())?;
    let tensor = &model.graph.expect("a graph").initializer[0];
    let (offset, length) = (place(tensor, "offset"), place(tensor, "length"));
    assert_eq!(std::fs::read(&linked)?[offset..offset + length], Float::F32.bytes(&values));
    Ok(())
}

#[test]
fn a_file_that_is_hardly_needed_is_not_linked() -> Result<()> {
    let (from, to) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let entries = [Entry::f32("a", &[600], &[1.0; 600]), Entry::f32("b", &[900], &[1.0; 900])];
    let file = from.path().join("w.safetensors");
    write_tensors(&file, &entries, &[])?;
    let weights = Weights::open_file(&file)?;
    let graph = graph(&[("a", &[600])]);
    let made = write(&output(to.path(), Placement::Linked), graph, &weights, &mut |_| Ok(()))?;
    assert_eq!(made.written.n_linked, 0);
    assert!(to.path().join(DATA_FILE).exists() && !to.path().join("w.safetensors").exists());
    Ok(())
}

/// Sums of linked files are those of the whole file, and what is not finite in a tensor is found there.
#[test]
fn linked_files_are_read_once_and_looked_at() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("w.safetensors");
    for broken in [None::<usize>, Some(599)] {
        let mut values = vec![1.0; 600];
        if let Some(at) = broken {
            values[at] = f32::NAN;
        }
        let entries = [Entry::f32("a", &[600], &values), Entry::f32("b", &[2], &[f32::NAN; 2])];
        write_tensors(&file, &entries, &[])?;
        let (weights, to) = (Weights::open_file(&file)?, tempfile::tempdir()?);
        let graph = graph(&[("a", &[600])]);
        let made = write(&output(to.path(), Placement::Linked), graph, &weights, &mut |_| Ok(()))?;
        let found = scan(&[&made.linked[0]], &|_| Ok(()));
        if broken.is_none() {
            let mut sum = flow::checksums::Summing::default();
            sum.update(&std::fs::read(&file)?);
            assert_eq!(found?, [sum.finish()]);
        } else {
            let message = found.unwrap_err().to_string();
            assert!(message.contains("w.safetensors: a holds NaN at 599"), "{message}");
        }
    }
    Ok(())
}

/// Stopped in the middle and gone on with, the file is the one that was never stopped, and what is counted is
/// what is written.
#[test]
fn what_was_written_before_a_stop_is_kept() -> Result<()> {
    let from = tempfile::tempdir()?;
    let sizes = [("a", 70_000), ("b", 5_000), ("c", 200), ("d", 70_000)];
    let values: Vec<f32> = (0..70_000).map(|i| i as f32).collect();
    let entries = sizes.map(|(name, n)| Entry::f32(name, &[n], &values[..n]));
    write_tensors(&from.path().join("w.safetensors"), &entries, &[])?;
    let weights = Weights::open(from.path(), "w")?;
    let shapes = sizes.map(|(name, n)| (name, [n]));
    let graph = graph(&shapes.each_ref().map(|(name, shape)| (*name, shape.as_slice())));
    let run = |folder: &Path, mode: Mode, limit: usize| {
        let mut left = limit;
        let output = Output { mode, ..output(folder, Placement::Copied) };
        write(&output, graph.clone(), &weights, &mut |n| {
            left = left.checked_sub(n).context("stopped")?;
            Ok(())
        })
    };
    let (whole, stopped) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let expected = run(whole.path(), Mode::Written, usize::MAX)?;
    assert!(run(stopped.path(), Mode::Resumed, 80_000).is_err());
    assert!(stopped.path().join(DATA_FILE).metadata()?.len() > 70_000 * 4);
    let made = run(stopped.path(), Mode::Resumed, usize::MAX)?;
    assert_eq!((made.written, made.data), (expected.written, expected.data));
    for file in [MODEL_FILE, DATA_FILE] {
        assert_eq!(
            std::fs::read(stopped.path().join(file))?,
            std::fs::read(whole.path().join(file))?
        );
    }
    let nowhere = whole.path().join("nowhere");
    assert_eq!(run(&nowhere, Mode::Counted, usize::MAX)?.written, expected.written);
    assert!(!nowhere.exists());
    Ok(())
}

#[test]
fn a_tensor_that_does_not_fit_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let entries = [Entry::f32("a", &[3], &[0.0; 3]), Entry::i64("b", &[2], &[0, 0])];
    write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
    let weights = Weights::open(folder.path(), "w")?;
    for (name, shape, part) in [
        ("a", 2, "a has shape [3] instead of [2]"),
        ("b", 2, "b has type I64"),
        ("c", 2, "no tensor c"),
    ] {
        let graph = graph(&[(name, &[shape])]);
        let output = output(folder.path(), Placement::Copied);
        let error = write(&output, graph, &weights, &mut |_| Ok(()));
        let message = error.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    Ok(())
}
