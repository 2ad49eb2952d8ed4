//! Pickles of TorchScript archives, whose modules are objects of classes that only the archive defines.
//!
//! An object's attributes are a dictionary that is given to it; left alone, the dictionary is all that weights
//! need. Source: `torch/csrc/jit/serialization/pickler.cpp`, and the table of opcodes in Python's `pickletools`.

use anyhow::{Context, Result, bail, ensure};

/// How the names of classes begin that the archive defines.
const OWN: &[u8] = b"__torch__";

/// Whether an archive's pickle has objects of its own classes.
pub(super) fn is_script(pickle: &[u8]) -> bool {
    pickle.windows(1 + OWN.len()).any(|part| part[0] == b'c' && part[1..] == *OWN)
}

/// The pickle with a dictionary in place of each object.
///
/// # Errors
/// When it is cut short, or has what PyTorch does not write there.
pub(super) fn as_dictionaries(pickle: &[u8]) -> Result<Vec<u8>> {
    let (mut plain, mut classes) = (Vec::with_capacity(pickle.len()), Vec::new());
    let (mut rest, mut after) = (pickle, After::Other);
    while !rest.is_empty() {
        let length = length(rest)?;
        let whole = rest.split_at_checked(length).context("its pickle is cut short")?;
        let (code, tail) = whole;
        rest = tail;
        after = match (after, code[0]) {
            (After::Other, b'c') if code[1..].starts_with(OWN) => After::Class,
            (After::Other, b'h' | b'j') if classes.contains(&code[1..].to_vec()) => After::Class,
            // The class is kept under a number to be used again.
            (After::Class, b'q' | b'r') => {
                classes.push(code[1..].to_vec());
                After::Class
            }
            (After::Class, b')') => After::Arguments,
            (After::Arguments, 0x81) => After::Object,
            (After::Class | After::Arguments, other) => {
                bail!("its pickle has {other:#x} where an object begins")
            }
            (After::Object, b'q' | b'r') => bail!("its modules share parts, which is not read"),
            // What gives the object its attributes.
            (_, b'b') => After::Other,
            (After::Other | After::Object, _) => {
                plain.extend_from_slice(code);
                After::Other
            }
        };
    }
    ensure!(plain.last() == Some(&b'.'), "its pickle is cut short");
    Ok(plain)
}

/// What the last opcode was.
#[derive(Clone, Copy)]
enum After {
    Class,
    Arguments,
    Object,
    Other,
}

/// Bytes of the opcode that `rest` begins with, arguments included.
fn length(rest: &[u8]) -> Result<usize> {
    let short = || "its pickle is cut short";
    let of_lines = |n: usize| {
        let ends =
            rest.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
        ends.take(n).last().with_context(short)
    };
    let byte = || rest.get(1).map(|n| 2 + usize::from(*n)).with_context(short);
    let four = || {
        let bytes = rest.get(1..5).with_context(short)?;
        let n = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        Ok::<_, anyhow::Error>(5 + n as usize)
    };
    Ok(match rest[0] {
        b'('
        | b')'
        | b']'
        | b'}'
        | b't'
        | b'e'
        | b'u'
        | b's'
        | b'a'
        | b'R'
        | b'b'
        | b'Q'
        | b'N'
        | b'.'
        | b'0'
        | b'1'
        | b'2'
        | b'l'
        | b'd'
        | 0x81
        | 0x85..=0x89 => 1,
        0x80 | b'K' | b'q' | b'h' => 2,
        b'M' => 3,
        b'J' | b'j' | b'r' => 5,
        b'G' => 9,
        b'U' | 0x8a | 0x8c => byte()?,
        b'T' | b'X' | b'B' => four()?,
        b'c' => of_lines(2)?,
        other => bail!("its pickle has the opcode {other:#x}, which PyTorch does not write there"),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn objects_become_their_attributes() {
        // {"a": X(n=1), "b": X()}, where X is a class of the archive.
        let pickle = b"\x80\x02}(X\x01\0\0\0ac__torch__.m\nX\nq\x05)\x81}(X\x01\0\0\0nK\x01ubX\x01\0\0\0bh\x05)\x81}bu.";
        let plain = b"\x80\x02}(X\x01\0\0\0a}(X\x01\0\0\0nK\x01uX\x01\0\0\0b}u.";
        assert!(is_script(pickle) && !is_script(plain));
        assert_eq!(as_dictionaries(pickle).unwrap(), plain);
        for cut in [3, 8, 20, 30, pickle.len() - 1] {
            assert!(as_dictionaries(&pickle[..cut]).is_err(), "{cut}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_rewritten_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(plain) = as_dictionaries(&bytes) {
                prop_assert!(plain.len() <= bytes.len());
            }
        }
    }
}
