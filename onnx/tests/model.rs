//! Opens and runs the graphs of `fixtures/make.py` in the installed ONNX Runtime.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use onnx::{ElementType, Model, Options, Provider, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open(name: &str) -> Result<Model> {
    Model::open(fixture(name), &Options::default())
}

#[test]
fn ports_and_metadata() -> Result<()> {
    let model = open("affine.onnx")?;
    let names: Vec<_> = model.inputs().iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["x", "ids"]);
    assert_eq!(model.inputs()[0].shape, [None, Some(3)]);
    assert_eq!(model.inputs()[1].element, ElementType::I64);
    assert_eq!(model.outputs()[1].to_string(), "`next` i64 [?]");
    assert_eq!(model.metadata("character").as_deref(), Some("a\nb"));
    assert_eq!(model.metadata("absent"), None);
    Ok(())
}

#[test]
fn outputs_come_in_the_order_asked() -> Result<()> {
    let mut model = open("affine.onnx")?;
    let x = Tensor::f32([2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0])?;
    let ids = Tensor::i64([2], vec![10, -1])?;
    let outputs = model.run(&[("ids", &ids), ("x", &x)], &["next", "y"])?;
    assert_eq!(outputs[0], Tensor::i64([2], vec![11, 0])?);
    assert_eq!(outputs[1], Tensor::f32([2, 3], vec![1.0, 3.0, 5.0, 7.0, 9.0, 11.0])?);
    let y = model.run(&[("x", &x), ("ids", &ids)], &["y"])?;
    assert_eq!(y, outputs[1..]);
    Ok(())
}

#[test]
fn narrow_types_are_converted() -> Result<()> {
    let mut model = open("narrow.onnx")?;
    let x = Tensor::f32([2], vec![0.25, -3.0])?;
    let n = Tensor::i64([2], vec![4, -5])?;
    let outputs = model.run(&[("x", &x), ("n", &n)], &["y", "twice"])?;
    assert_eq!(outputs[0].as_f32()?, [0.5, -6.0]);
    assert_eq!(outputs[1].as_i64()?, [8, -10]);
    let error = format!("{:#}", model.run(&[("x", &x), ("n", &n)], &["negative"]).unwrap_err());
    assert!(error.contains("`negative`") && error.contains("not supported"), "{error}");
    Ok(())
}

#[test]
fn wrong_calls_are_explained() -> Result<()> {
    let mut model = open("affine.onnx")?;
    let x = Tensor::f32([2, 3], vec![0.0; 6])?;
    let wide = Tensor::f32([2, 4], vec![0.0; 8])?;
    let ids = Tensor::i64([2], vec![0; 2])?;
    let mut expect = |inputs: &[(&str, &Tensor)], outputs: &[&str], parts: &[&str]| {
        let error = format!("{:#}", model.run(inputs, outputs).unwrap_err());
        for part in parts.iter().chain(&["affine.onnx"]) {
            assert!(error.contains(part), "{part} is not in: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    };
    expect(&[("x", &x)], &["y"], &["missing input `ids` i64 [?]"]);
    expect(&[("x", &x), ("z", &ids)], &["y"], &["no input `z`", "`x` f32 [?, 3], `ids`"]);
    expect(&[("x", &x), ("x", &x), ("ids", &ids)], &["y"], &["`x` is given twice"]);
    expect(&[("x", &wide), ("ids", &ids)], &["y"], &["`x` takes shape [?, 3], not [2, 4]"]);
    expect(&[("x", &ids), ("ids", &ids)], &["y"], &["`x` takes f32, not i64"]);
    expect(&[("x", &x), ("ids", &ids)], &["z"], &["no output `z`", "`y`"]);
    expect(&[("x", &x), ("ids", &ids)], &[], &["no output asked for"]);
    Ok(())
}

#[test]
fn bad_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.onnx");
    fs::write(&text, "this is not a model").unwrap();
    let bytes = fs::read(fixture("affine.onnx")).unwrap();
    let cut = folder.path().join("cut.onnx");
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    for path in [text, cut, folder.path().join("absent.onnx"), folder.path().to_owned()] {
        let error = format!("{:#}", Model::open(&path, &Options::default()).unwrap_err());
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

/// The ONNX Runtime of the tests is the one for the CPU.
#[test]
fn a_provider_that_is_not_there_is_refused_in_one_line() {
    for (provider, parts) in [
        (Provider::Cuda, ["providers_cuda.so", "onnxruntime-gpu 1.31"]),
        (Provider::TensorRt, ["providers_cuda.so", "onnxruntime-gpu 1.31"]),
        (Provider::TensorRtRtx, ["nv_tensorrt_rtx.so", "onnxruntime-ep-nv-tensorrt-rtx-cu13"]),
    ] {
        let options = Options { provider, ..Options::default() };
        let error = format!("{:#}", Model::open(fixture("affine.onnx"), &options).unwrap_err());
        let named = error.starts_with(&format!("--provider {provider} needs"));
        assert!(named && parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

/// Run by `broken_libraries_are_errors` in a process of its own.
#[test]
fn open_affine() {
    if let Err(error) = open("affine.onnx") {
        println!("refused: {error:#}");
        assert!(env::var_os("ORT_DYLIB_PATH").is_some(), "{error:#}");
    }
}

#[test]
fn broken_libraries_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("libonnxruntime.so");
    fs::write(&text, "not a library").unwrap();
    for (library, reason) in [(text, "cannot load"), (folder.path().join("none.so"), "not a file")]
    {
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "open_affine", "--nocapture"])
            .env("ORT_DYLIB_PATH", &library)
            .output()
            .unwrap();
        let stdout = String::from_utf8_lossy(&child.stdout);
        let line = stdout.lines().find(|line| line.contains("refused: ")).expect("an error");
        assert!(line.contains(&*library.to_string_lossy()) && line.contains(reason), "{line}");
        assert!(line.contains("ORT_DYLIB_PATH"), "{line}");
        assert!(child.status.success() && child.stderr.is_empty(), "{child:?}");
    }
}
