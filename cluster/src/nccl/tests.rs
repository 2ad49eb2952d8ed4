use super::*;

#[test]
fn a_library_that_is_missing_is_named_with_every_place() {
    let folders = [PathBuf::from("/no/such/folder"), PathBuf::from("/nor/this")];
    let Err(failure) = Nccl::in_places(&folders) else {
        // The system's own loader has one: then it is that.
        return;
    };
    for part in ["libnccl.so.2", "LD_LIBRARY_PATH", "/no/such/folder or /nor/this", "nvidia-nccl"] {
        assert!(failure.contains(part), "{part} is not in: {failure}");
    }
    assert_eq!(failure.lines().count(), 1);
}

#[test]
fn an_id_arrives_whole() {
    let mut bytes = [0; 128];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = (index * 37) as u8;
    }
    let back = Id::from_text(&Id(bytes).to_text()).unwrap();
    assert_eq!(back.0, bytes);
    for broken in ["", "00", &"0".repeat(255), &"g".repeat(256)] {
        assert!(Id::from_text(broken).is_none(), "{broken}");
    }
}

#[test]
fn every_kind_that_gloo_takes_has_a_type() {
    for kind in [Kind::Int8, Kind::Uint8, Kind::Int, Kind::Int64, Kind::Half, Kind::BFloat16] {
        assert!(data_type(kind).is_some(), "{kind:?}");
    }
    assert_eq!(data_type(Kind::ComplexFloat), None);
}
