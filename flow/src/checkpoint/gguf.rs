//! The header of a GGUF file: where its tensors lie, and in which type.
//!
//! Source: the specification of GGUF 3 (`docs/gguf.md` of ggml). Sizes are checked against the file before
//! anything is made of them.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::Dtype;

use super::blocks::Blocks;
use super::stored::{Coding, Stored};

/// First bytes of a file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Most axes of a tensor.
const MAX_AXES: u32 = 8;
/// Arrays within arrays.
const MAX_DEPTH: usize = 4;
/// Where data starts is a multiple of this, if the file does not say otherwise.
const ALIGNMENT: usize = 32;

type Parsed<T> = Result<T, String>;

/// Tensors by their names, and the texts among the file's entries.
pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, Stored>,
    pub(super) texts: BTreeMap<String, String>,
}

/// Reads the header of the file that `bytes` are.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn parse(bytes: &[u8]) -> Parsed<Header> {
    let mut reader = Reader { bytes, at: MAGIC.len() };
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF of version {version}, only little-endian 2 and 3 are read"));
    }
    let (n_tensors, n_entries) = (reader.size()?, reader.size()?);
    let (mut texts, mut alignment) = (BTreeMap::new(), ALIGNMENT);
    for _ in 0..n_entries {
        let key = reader.text()?;
        match reader.value()? {
            Value::Text(text) => _ = texts.insert(key, text),
            Value::Number(n) if key == "general.alignment" => alignment = n as usize,
            Value::Number(n) if key == "split.count" && n > 1 => {
                return Err(format!("one part of {n} of a GGUF: merge them with gguf-split"));
            }
            _ => {}
        }
    }
    if !alignment.is_power_of_two() || alignment > 1 << 20 {
        return Err(format!("invalid general.alignment {alignment}"));
    }
    let mut found = Vec::new();
    for _ in 0..n_tensors {
        found.push((reader.text()?, reader.tensor()?));
    }
    let start = reader.at.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, (coding, shape, range)) in found {
        let of_file = |at: usize| at.checked_add(start).filter(|&at| at <= bytes.len());
        let (Some(from), Some(to)) = (of_file(range.start), of_file(range.end)) else {
            return Err(format!("tensor {name} ends after the file: it is cut short"));
        };
        let stored = Stored { coding, shape, range: from..to };
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(format!("names tensor {name} twice"));
        }
    }
    Ok(Header { tensors, texts })
}

enum Value {
    Text(String),
    Number(u64),
    Other,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Parsed<&'a [u8]> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or("the file ends in its header: it is cut short")?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn number<const N: usize>(&mut self) -> Parsed<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as asked for"))
    }

    fn u32(&mut self) -> Parsed<u32> {
        Ok(u32::from_le_bytes(self.number()?))
    }

    fn size(&mut self) -> Parsed<usize> {
        let size = u64::from_le_bytes(self.number()?);
        usize::try_from(size).map_err(|_| format!("a size of {size} in its header"))
    }

    fn text(&mut self) -> Parsed<String> {
        let n = self.size()?;
        let text = self.take(n)?;
        String::from_utf8(text.to_vec()).map_err(|_| "a text of its header is not UTF-8".into())
    }

    fn value(&mut self) -> Parsed<Value> {
        let kind = self.u32()?;
        self.of_kind(kind, 0)
    }

    fn of_kind(&mut self, kind: u32, depth: usize) -> Parsed<Value> {
        Ok(match kind {
            0 => Value::Number(u64::from(self.number::<1>()?[0])),
            2 => Value::Number(u64::from(u16::from_le_bytes(self.number()?))),
            4 => Value::Number(u64::from(self.u32()?)),
            10 => Value::Number(u64::from_le_bytes(self.number()?)),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let (kind, n) = (self.u32()?, self.size()?);
                match width(kind) {
                    Some(width) => _ = self.take(n.saturating_mul(width))?,
                    None => {
                        for _ in 0..n {
                            self.of_kind(kind, depth + 1)?;
                        }
                    }
                }
                Value::Other
            }
            _ => match width(kind) {
                Some(width) => {
                    self.take(width)?;
                    Value::Other
                }
                None => return Err(format!("an entry of type {kind} in its header")),
            },
        })
    }

    /// Type, shape and place after the start of the data.
    fn tensor(&mut self) -> Parsed<(Coding, Vec<usize>, Range<usize>)> {
        let n_axes = self.u32()?;
        if n_axes > MAX_AXES {
            return Err(format!("a tensor of {n_axes} axes in its header"));
        }
        let mut shape = (0..n_axes).map(|_| self.size()).collect::<Parsed<Vec<usize>>>()?;
        let coding = coding(self.u32()?)?;
        let (len, n_bytes) = coding.unit();
        let innermost = shape.first().copied().unwrap_or(1);
        if !innermost.is_multiple_of(len) {
            return Err(format!("rows of {innermost} numbers in blocks of {len}"));
        }
        // The innermost axis comes first in the file.
        shape.reverse();
        let n = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let n_bytes = n.and_then(|n| (n / len).checked_mul(n_bytes));
        let from = self.size()?;
        let to = n_bytes.and_then(|n| from.checked_add(n));
        let to = to.ok_or("a tensor larger than any file in its header")?;
        Ok((coding, shape, from..to))
    }
}

/// Bytes of a value of fixed size.
fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn coding(kind: u32) -> Parsed<Coding> {
    Ok(match kind {
        0 => Coding::Plain(Dtype::F32),
        1 => Coding::Plain(Dtype::F16),
        2 => Coding::Blocks(Blocks::Q4_0),
        3 => Coding::Blocks(Blocks::Q4_1),
        6 => Coding::Blocks(Blocks::Q5_0),
        7 => Coding::Blocks(Blocks::Q5_1),
        8 => Coding::Blocks(Blocks::Q8_0),
        10 => Coding::Blocks(Blocks::Q2K),
        11 => Coding::Blocks(Blocks::Q3K),
        12 => Coding::Blocks(Blocks::Q4K),
        13 => Coding::Blocks(Blocks::Q5K),
        14 => Coding::Blocks(Blocks::Q6K),
        24 => Coding::Plain(Dtype::I8),
        25 => Coding::Plain(Dtype::I16),
        26 => Coding::Plain(Dtype::I32),
        27 => Coding::Plain(Dtype::I64),
        28 => Coding::Plain(Dtype::F64),
        30 => Coding::Plain(Dtype::BF16),
        16..=23 | 29 => {
            return Err(format!(
                "GGUF's type {kind} (an IQ type) is not read: take Q8_0, Q6_K, Q5_K, Q4_K or Q4_0"
            ));
        }
        other => return Err(format!("GGUF's type {other} is not read")),
    })
}
