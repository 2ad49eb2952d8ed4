//! `TensorBoard` event files: `TFRecord` frames around `Event` messages.
//!
//! Field numbers are those of `tensorboard/compat/proto/{event,summary,tensor,tensor_shape}.proto`; only what is
//! written here is declared.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use image::RgbImage;
use prost::{Message, Oneof};

use crate::picture;

/// The version that readers expect in the first record.
const FILE_VERSION: &str = "brain.Event:2";
/// `SessionLog.SessionStatus.START`.
const SESSION_START: i32 = 1;
/// `DataType.DT_STRING`.
const STRING: i32 = 7;
/// `Summary.Image.colorspace` of RGB.
const RGB: i32 = 3;

/// One event file, written record by record without a buffer.
#[derive(Debug)]
pub(super) struct Events {
    file: File,
    path: PathBuf,
}

impl Events {
    /// Starts a new file in `dir`.
    ///
    /// Readers forget what earlier files in the folder say about `first_step` and later steps.
    pub(super) fn create(dir: &Path, first_step: u64) -> Result<Self> {
        let now = since_epoch();
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{}.ng-train",
            now.as_secs(),
            now.subsec_nanos(),
            std::process::id()
        );
        let path = dir.join(name);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("creating {}", path.display()))?;
        let mut events = Self { file, path };
        events.write(0, What::FileVersion(FILE_VERSION.to_owned()))?;
        events.write(first_step, What::SessionLog(SessionLog { status: SESSION_START }))?;
        Ok(events)
    }

    /// Appends one scalar per name.
    pub(super) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let value = values.iter().map(|&(tag, value)| SummaryValue {
            tag: tag.to_owned(),
            value: Some(Content::SimpleValue(value as f32)),
            metadata: None,
        });
        self.write(step, What::Summary(Summary { value: value.collect() }))
    }

    /// Appends one picture.
    pub(super) fn image(&mut self, step: u64, tag: &str, image: &RgbImage) -> Result<()> {
        let content = Image {
            height: image.height() as i32,
            width: image.width() as i32,
            colorspace: RGB,
            encoded_image_string: picture::png(image)?,
        };
        let value = Some(Content::Image(content));
        let value = SummaryValue { tag: tag.to_owned(), value, metadata: None };
        self.write(step, What::Summary(Summary { value: vec![value] }))
    }

    /// Appends one text, which is shown as Markdown.
    pub(super) fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<()> {
        let shape = Shape { dim: vec![Dim { size: 1 }] };
        let string_val = vec![text.as_bytes().to_vec()];
        let content = Text { dtype: STRING, tensor_shape: Some(shape), string_val };
        let plugin = Plugin { plugin_name: "text".to_owned() };
        let value = SummaryValue {
            tag: format!("{tag}/text_summary"),
            value: Some(Content::Tensor(content)),
            metadata: Some(Metadata { plugin_data: Some(plugin) }),
        };
        self.write(step, What::Summary(Summary { value: vec![value] }))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let wall_time = since_epoch().as_secs_f64();
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        self.file
            .write_all(&framed(&event.encode_to_vec()))
            .with_context(|| format!("writing {}", self.path.display()))
    }
}

/// A `TFRecord`: length (u64), masked checksum of the length, content, masked checksum of the content;
/// all little-endian.
fn framed(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(content.len() + 16);
    record.extend(length);
    record.extend(masked_crc(&length).to_le_bytes());
    record.extend(content);
    record.extend(masked_crc(content).to_le_bytes());
    record
}

/// CRC-32C, rotated by 15 bits to the right, plus a constant.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn since_epoch() -> std::time::Duration {
    // A clock before 1970 only spoils the dates that readers show.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(oneof = "Content", tags = "2, 4, 8")]
    value: Option<Content>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "4")]
    Image(Image),
    #[prost(message, tag = "8")]
    Tensor(Text),
}

/// A `TensorProto` of strings.
#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Shape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// `SummaryMetadata`: which plug-in shows a value.
#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<Plugin>,
}

#[derive(Clone, PartialEq, Message)]
struct Plugin {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(int32, tag = "1")]
    height: i32,
    #[prost(int32, tag = "2")]
    width: i32,
    #[prost(int32, tag = "3")]
    colorspace: i32,
    #[prost(bytes = "vec", tag = "4")]
    encoded_image_string: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The events of a file, every checksum verified.
    fn read(bytes: &[u8]) -> Vec<Event> {
        let mut rest = bytes;
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let content = &rest[12..12 + length];
            assert_eq!(rest[8..12], masked_crc(&rest[..8]).to_le_bytes());
            assert_eq!(rest[12 + length..16 + length], masked_crc(content).to_le_bytes());
            events.push(Event::decode(content).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn a_frame_is_the_one_tensorflow_writes() {
        // The first record of a file written by tensorboard 2.21.0 at wall time 1.0.
        let expected = [
            24, 0, 0, 0, 0, 0, 0, 0, 163, 127, 75, 34, 9, 0, 0, 0, 0, 0, 0, 240, 63, 26, 13, 98,
            114, 97, 105, 110, 46, 69, 118, 101, 110, 116, 58, 50, 134, 191, 87, 122,
        ];
        let what = Some(What::FileVersion(FILE_VERSION.to_owned()));
        let event = Event { wall_time: 1.0, step: 0, what };
        assert_eq!(framed(&event.encode_to_vec()), expected);
    }

    #[test]
    fn scalars_and_pictures_are_stored_with_their_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::create(dir.path(), 3).unwrap();
        events.scalars(3, &[("reward/ocr", 0.25), ("loss", -1.5)]).unwrap();
        events.image(4, "grid", &RgbImage::new(5, 2)).unwrap();
        events.text(4, "settings", "a = 1").unwrap();
        let read = read(&fs::read(&events.path).unwrap());
        assert_eq!(read.len(), 5);
        assert_eq!(read[0].what, Some(What::FileVersion(FILE_VERSION.to_owned())));
        assert_eq!(read[1].step, 3);
        assert_eq!(read[1].what, Some(What::SessionLog(SessionLog { status: 1 })));
        let Some(What::Summary(summary)) = &read[2].what else { panic!("{:?}", read[2]) };
        assert_eq!(summary.value[1].tag, "loss");
        assert_eq!(summary.value[1].value, Some(Content::SimpleValue(-1.5)));
        let Some(What::Summary(summary)) = &read[3].what else { panic!("{:?}", read[3]) };
        let Some(Content::Image(image)) = &summary.value[0].value else { panic!("{summary:?}") };
        assert_eq!((read[3].step, image.width, image.height), (4, 5, 2));
        assert!(image.encoded_image_string.starts_with(b"\x89PNG"));
        let Some(What::Summary(summary)) = &read[4].what else { panic!("{:?}", read[4]) };
        let Some(Content::Tensor(text)) = &summary.value[0].value else { panic!("{summary:?}") };
        assert_eq!(text.string_val, [b"a = 1"]);
    }
}
