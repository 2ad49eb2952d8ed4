//! The user comment of EXIF, where JPEG and WebP carry an image's parameters.
//!
//! A TIFF header, a directory that points to the EXIF directory, and in that one entry: the comment,
//! its character code first. Source: Exif 2.32, and what AUTOMATIC1111's web UI writes.

const EXIF_DIRECTORY: u16 = 0x8769;
const USER_COMMENT: u16 = 0x9286;
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;
/// Character code of a comment in UTF-16, of the file's byte order.
const UNICODE: &[u8; 8] = b"UNICODE\0";
const ASCII: &[u8; 8] = b"ASCII\0\0\0";
/// Bytes of an entry.
const ENTRY: usize = 12;

/// EXIF data that hold `text` alone.
pub fn with_user_comment(text: &str) -> Vec<u8> {
    let mut comment = UNICODE.to_vec();
    comment.extend(text.encode_utf16().flat_map(u16::to_be_bytes));
    let directory = |tag: u16, kind: u16, count: usize, value: usize| {
        let mut bytes = 1u16.to_be_bytes().to_vec();
        bytes.extend(tag.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend((count as u32).to_be_bytes());
        bytes.extend((value as u32).to_be_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    // The header has 8 bytes, a directory of one entry 18.
    let mut exif = b"MM\0*\0\0\0\x08".to_vec();
    exif.extend(directory(EXIF_DIRECTORY, LONG, 1, 8 + 18));
    exif.extend(directory(USER_COMMENT, UNDEFINED, comment.len(), 8 + 2 * 18));
    exif.extend(comment);
    exif
}

/// The user comment of EXIF data, if there is one that can be read.
pub fn user_comment(exif: &[u8]) -> Option<String> {
    let tiff = Tiff::new(exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))?;
    let root = tiff.u32(4)? as usize;
    let directory = tiff.u32(tiff.entry(root, EXIF_DIRECTORY)? + 8)? as usize;
    let entry = tiff.entry(directory, USER_COMMENT)?;
    let (count, at) = (tiff.u32(entry + 4)? as usize, tiff.u32(entry + 8)? as usize);
    let comment = tiff.bytes.get(at..at.checked_add(count)?)?;
    let (code, text) = comment.split_at_checked(8)?;
    let text = match code.try_into().ok()? {
        UNICODE => {
            let units: Vec<[u8; 2]> = text.as_chunks().0.to_vec();
            // Writers differ in whether the byte order of the file holds for the comment too.
            let big = tiff.is_big || units.first().is_some_and(|unit| unit[0] == 0);
            let of = |unit| if big { u16::from_be_bytes(unit) } else { u16::from_le_bytes(unit) };
            String::from_utf16_lossy(&units.into_iter().map(of).collect::<Vec<u16>>())
        }
        ASCII | [0, 0, 0, 0, 0, 0, 0, 0] => String::from_utf8_lossy(text).into_owned(),
        _ => return None,
    };
    let text = text.trim_end_matches('\0');
    (!text.is_empty()).then(|| text.to_owned())
}

struct Tiff<'a> {
    bytes: &'a [u8],
    is_big: bool,
}

impl<'a> Tiff<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        match bytes.get(..4)? {
            b"MM\0*" => Some(Self { bytes, is_big: true }),
            b"II*\0" => Some(Self { bytes, is_big: false }),
            _ => None,
        }
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if self.is_big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(if self.is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    /// Where the entry `tag` of the directory at `at` is.
    fn entry(&self, at: usize, tag: u16) -> Option<usize> {
        let count = usize::from(self.u16(at)?);
        (0..count).map(|i| at + 2 + ENTRY * i).find(|&entry| self.u16(entry) == Some(tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_comes_back() {
        for text in ["a fox", "雪 🦊\nSteps: 8"] {
            assert_eq!(user_comment(&with_user_comment(text)).as_deref(), Some(text));
        }
    }

    #[test]
    fn damaged_data_hold_nothing() {
        let whole = with_user_comment("a fox");
        for n in 0..whole.len() {
            assert_eq!(user_comment(&whole[..n]), None, "{n} bytes");
        }
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] = 0xff;
            let _ = user_comment(&broken);
        }
        assert_eq!(user_comment(b""), None);
    }
}
