use proptest::prelude::*;

use super::*;
use crate::ops::shapes::{Manifest, Shapes};
use crate::ops::{Ops, ParamPath};

fn manifest() -> Manifest {
    let shapes = Shapes::new();
    shapes.linear(&ParamPath::root().at("proj"), &vec![1, 2], 2, 3, true);
    shapes.manifest()
}

fn write(dir: &Path, file: &str, entries: &[Entry<'_>]) {
    write_tensors(&dir.join(file), entries, &[("note", "kept".into())]).unwrap();
}

#[test]
fn a_file_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let values = [1.5, -2.0, 3.25, 0.0, 1e-8, 4.0];
    write(
        dir.path(),
        "w.safetensors",
        &[Entry::f32("proj.weight", &[3, 2], &values), Entry::f32("proj.bias", &[3], &[0.0; 3])],
    );
    let weights = Weights::open(dir.path(), "w").unwrap();
    assert_eq!(weights.f32("proj.weight").unwrap(), values);
    assert_eq!(weights.metadata("note"), Some("kept"));
    weights.check(&manifest(), &[]).unwrap();
}

#[test]
fn one_message_lists_every_misfit() {
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "w.safetensors",
        &[Entry::f32("proj.weight", &[2, 3], &[0.0; 6]), Entry::i64("extra", &[1], &[0])],
    );
    let weights = Weights::open(dir.path(), "w").unwrap();
    let message = weights.check(&manifest(), &[]).unwrap_err().to_string();
    for part in [
        "proj.weight has shape [2, 3] instead of [3, 2]",
        "proj.bias [3] is missing",
        "extra is unexpected",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn half_floats_widen() {
    let bytes: Vec<u8> =
        [1.5f32, -0.25].iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
    let view = View { dtype: Dtype::BF16, shape: &[2], bytes: Cow::Owned(bytes) };
    assert_eq!(view.to_f32().unwrap(), [1.5, -0.25]);
    let view = View { dtype: Dtype::I64, shape: &[0], bytes: Cow::Owned(Vec::new()) };
    assert!(view.to_f32().is_err());
}

#[test]
fn broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "w.safetensors", &[Entry::f32("a", &[64], &[1.0; 64])]);
    let whole = fs::read(dir.path().join("w.safetensors")).unwrap();
    for cut in [0, 4, 40, whole.len() - 1] {
        fs::write(dir.path().join("w.safetensors"), &whole[..cut]).unwrap();
        let message = Weights::open(dir.path(), "w").err().expect("truncated").to_string();
        assert!(message.contains("w.safetensors"), "{message}");
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    for (header, length) in [
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,64]}}"#, None),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}"#, None),
        (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#, None),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#, None),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, Some(u64::MAX)),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#, Some(1 << 40)),
        ("[[[[", None),
    ] {
        let length = length.unwrap_or(header.len() as u64);
        let file = [&length.to_le_bytes(), header.as_bytes(), &[0; 16]].concat();
        fs::write(&path, file).unwrap();
        let message = Weights::open_file(&path).err().expect(header).to_string();
        assert!(message.contains("w.safetensors") && !message.contains('\n'), "{message}");
    }
}

#[test]
fn only_regular_files_are_read() {
    let home = tempfile::tempdir().unwrap();
    let pipe = home.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for path in [&*pipe, Path::new("/dev/zero"), home.path()] {
        let read = read_bounded(path).map(drop);
        for refused in [read, Weights::open_file(path).map(drop)] {
            assert!(refused.unwrap_err().to_string().contains("is no regular file"));
        }
    }
}

#[test]
fn pickles_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["pytorch_model.bin", "lora.pt"] {
        fs::write(dir.path().join(file), b"PK").unwrap();
        let message = Weights::open_file(&dir.path().join(file)).err().unwrap().to_string();
        assert!(message.contains(file) && message.contains("ng-train convert"), "{message}");
    }
    let message = Weights::open(dir.path(), "model").err().unwrap().to_string();
    assert!(message.contains("pytorch_model.bin is a pickle"), "{message}");
}

#[test]
fn an_index_stays_in_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    for target in ["../w.safetensors", "/etc/passwd", "absent.safetensors"] {
        let index = format!(r#"{{"weight_map": {{"a": "{target}"}}}}"#);
        fs::write(dir.path().join("w.safetensors.index.json"), index).unwrap();
        assert!(Weights::open(dir.path(), "w").is_err(), "{target}");
    }
}

#[test]
fn shards_are_found_by_the_index() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "w-1.safetensors", &[Entry::f32("a", &[1], &[1.0])]);
    write(dir.path(), "w-2.safetensors", &[Entry::f32("b", &[1], &[2.0])]);
    let index = r#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}"#;
    fs::write(dir.path().join("w.safetensors.index.json"), index).unwrap();
    let weights = Weights::open(dir.path(), "w").unwrap();
    assert_eq!(weights.f32("b").unwrap(), [2.0]);
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
}

/// Packed values of GGUF, each type one tensor, and what the package gguf makes of them.
fn gguf() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf/blocks.gguf")
}

#[test]
fn blocks_of_gguf_are_read_to_the_bit() {
    let found = Weights::open_file(&gguf()).unwrap();
    let expected = Weights::open_file(&gguf().with_extension("safetensors")).unwrap();
    let names: Vec<&str> = expected.names().collect();
    assert_eq!(names.len(), 13);
    assert_eq!(found.names().collect::<Vec<_>>(), names);
    for name in names {
        assert_eq!(found.shape(name), expected.shape(name), "{name}");
        let bits = |weights: &Weights| -> Vec<u32> {
            weights.f32(name).unwrap().into_iter().map(f32::to_bits).collect()
        };
        assert!(bits(&found) == bits(&expected), "{name}");
    }
    assert_eq!(found.metadata("general.architecture"), Some("flux"));
}

#[test]
fn eight_bits_are_widened_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = [0x38, 0x3c, 0x7e, 0x01, 0x08, 0xb8, 0x00, 0x7f];
    write(
        dir.path(),
        "w.safetensors",
        &[
            Entry::raw("e4m3", &[8], Dtype::F8_E4M3, &bytes[..]),
            Entry::raw("e5m2", &[4], Dtype::F8_E5M2, &[0x3c, 0x7b, 0x01, 0xfc][..]),
            Entry::raw("wide", &[1], Dtype::F64, &1.5f64.to_le_bytes()[..]),
        ],
    );
    let weights = Weights::open(dir.path(), "w").unwrap();
    let found = weights.f32("e4m3").unwrap();
    assert_eq!(found[..7], [1.0, 1.5, 448.0, 1.0 / 512.0, 1.0 / 64.0, -1.0, 0.0]);
    assert!(found[7].is_nan());
    let tiny = 2f32.powi(-16);
    assert_eq!(weights.f32("e5m2").unwrap(), [1.0, 57344.0, tiny, f32::NEG_INFINITY]);
    assert_eq!(weights.dtype("e4m3"), Some(Dtype::BF16));
    assert_eq!(weights.f32("wide").unwrap(), [1.5]);
}

/// Every number of both types of eight bits, and what torch makes of it.
#[test]
fn eight_bits_are_those_of_torch() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/fp8/bytes.safetensors");
    let weights = Weights::open_file(&path).unwrap();
    for kind in ["e4m3", "e5m2"] {
        let found = weights.f32(kind).unwrap();
        let expected = weights.f32(&format!("{kind}.f32")).unwrap();
        assert_eq!((found.len(), expected.len()), (256, 256));
        for (byte, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let found = if found.is_nan() { 0.0f32 } else { *found };
            assert_eq!(found.to_bits(), expected.to_bits(), "{kind} {byte:#x}");
        }
    }
}

#[test]
fn a_scale_beside_a_weight_is_multiplied_in() {
    let dir = tempfile::tempdir().unwrap();
    let fp8 = |name: &str| Entry::raw(name, &[2, 2], Dtype::F8_E4M3, &[0x38, 0x40, 0x3c, 0x44][..]);
    write(
        dir.path(),
        "w.safetensors",
        &[
            fp8("a.weight"),
            Entry::f32("a.scale_weight", &[], &[0.3]),
            Entry::f32("a.scale_input", &[], &[9.0]),
            fp8("rows.weight"),
            Entry::f32("rows.weight_scale", &[2, 1], &[0.5, 3.0]),
            fp8("plain.weight"),
            Entry::raw("scaled_fp8", &[0], Dtype::F8_E4M3, &[][..]),
            Entry::raw("a.comfy_quant", &[27], Dtype::U8, &br#"{"format": "float8_e4m3fn"}"#[..]),
        ],
    );
    let weights = Weights::open(dir.path(), "w").unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a.weight", "plain.weight", "rows.weight"]);
    let product = [1.0f32, 2.0, 1.5, 3.0].map(|x| x * 0.3);
    assert_eq!(weights.f32("a.weight").unwrap(), product);
    assert_eq!(weights.f32("rows.weight").unwrap(), [0.5, 1.0, 4.5, 9.0]);
    assert_eq!(weights.f32("plain.weight").unwrap(), [1.0, 2.0, 1.5, 3.0]);
    for (scale, says) in [
        (Entry::f32("a.scale_weight", &[3], &[0.3; 3]), "a.scale_weight has shape [3]"),
        (Entry::raw("a.comfy_quant", &[18], Dtype::U8, &br#"{"format":"nvfp4"}"#[..]), "nvfp4"),
    ] {
        write(dir.path(), "w.safetensors", &[fp8("a.weight"), scale]);
        let message = Weights::open(dir.path(), "w").err().unwrap().to_string();
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn variants_and_other_names_are_read_where_they_are_alone() {
    let one = [Entry::f32("a", &[1], &[1.0])];
    let index = |file: &str| format!(r#"{{"weight_map": {{"a": "{file}"}}}}"#);
    for files in [
        &["w.fp16.safetensors"][..],
        &["w.bf16-00001-of-00001.safetensors", "w.safetensors.index.bf16.json"],
        &["w.bf16-00001-of-00001.safetensors", "w.bf16.safetensors.index.json"],
        &["w-00001-of-00001.bf16.safetensors", "w.safetensors.index.bf16.json"],
        &["flux1-dev.safetensors", "config.json"],
        &["w.safetensors", "w.fp16.safetensors", "else.safetensors", "w.bin"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), files[0], &one);
        for file in &files[1..] {
            fs::write(dir.path().join(file), index(files[0])).unwrap();
        }
        assert_eq!(Weights::open(dir.path(), "w").unwrap().f32("a").unwrap(), [1.0], "{files:?}");
    }
}

#[test]
fn what_is_not_clear_is_refused_by_name() {
    for (files, says) in [
        (&["w.safetensors", "w.safetensors.index.json"][..], "w.safetensors.index.json"),
        (&["w.fp16.safetensors", "w.bf16.safetensors"], "w.bf16.safetensors, w.fp16.safetensors"),
        (&["w-00001-of-00002.safetensors"], "w-00001-of-00002.safetensors without"),
        (&["a.safetensors", "b.gguf"], "a.safetensors, b.gguf"),
        (&["pytorch_model.bin", "optimizer.pt"], "convert pytorch_model.bin w.safetensors"),
        (
            &["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
            "convert pytorch_model.bin.index.json w.safetensors",
        ),
        (&["config.json"], "no w.safetensors"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::write(dir.path().join(file), "{}").unwrap();
        }
        let message = Weights::open(dir.path(), "w").err().expect(says).to_string();
        assert!(message.contains(says) && !message.contains('\n'), "{files:?}: {message}");
    }
}

#[test]
fn stale_shards_are_told_and_the_index_decides() {
    let dir = tempfile::tempdir().unwrap();
    let name = |i: usize| format!("w-0000{i}-of-00003.safetensors");
    write(dir.path(), &name(1), &[Entry::f32("a", &[1], &[1.0]), Entry::f32("c", &[1], &[5.0])]);
    write(dir.path(), &name(2), &[Entry::f32("b", &[1], &[2.0]), Entry::f32("a", &[2], &[9.0; 2])]);
    write(dir.path(), &name(3), &[Entry::f32("a", &[1], &[7.0])]);
    let index = format!(r#"{{"weight_map": {{"a": "{}", "b": "{}"}}}}"#, name(1), name(2));
    fs::write(dir.path().join("w.safetensors.index.json"), index).unwrap();
    let weights = Weights::open(dir.path(), "w").unwrap();
    assert_eq!(weights.f32("a").unwrap(), [1.0]);
    // A tensor that only the shard knows of counts, as in diffusers.
    assert_eq!(weights.f32("c").unwrap(), [5.0]);
    assert!(matches!(weights.notices(), [told] if told.contains(&name(3))));
}

#[test]
fn what_only_looks_like_weights_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.safetensors");
    for (bytes, says) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"[..], "Git LFS"),
        (b"PK\x03\x04rest", "PyTorch pickles"),
        (b"\x80\x02}q\x00(X\x06\x00\x00", "PyTorch pickle"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"GGUF\x03\0\0\0\x01\0\0\0", "cut short"),
        (b"GGUF\0\0\0\x03\x01\0\0\0", "version"),
    ] {
        fs::write(&path, bytes).unwrap();
        let message = Weights::open_file(&path).err().expect(says).to_string();
        assert!(message.contains(says) && message.contains("w.safetensors"), "{message}");
    }
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("../blobs/7c7c", &path).unwrap();
    let message = Weights::open(dir.path(), "w").err().unwrap().to_string();
    assert!(message.contains("a broken link: ../blobs/7c7c"), "{message}");
}

proptest! {
    /// Whatever the bytes, a file is read or refused, and what is read can be looked at.
    #[test]
    fn changed_files_are_read_or_refused(
        gguf_file in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let path = if gguf_file { gguf() } else { gguf().with_extension("safetensors") };
        let mut bytes = fs::read(path).unwrap();
        // Most of what can go wrong is in the header.
        let header = 1400.min(bytes.len());
        for (at, byte) in changes {
            bytes[at.index(header)] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        fs::write(&path, bytes).unwrap();
        if let Ok(weights) = Weights::open_file(&path) {
            for name in weights.names() {
                let view = weights.get(name).expect("it is listed");
                let unit = view.dtype.bitsize();
                let n = view.shape.iter().product::<usize>();
                prop_assert_eq!(view.bytes.len() * 8 / unit.max(1), n);
            }
        }
    }
}
