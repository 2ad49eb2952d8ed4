//! Image files as clients want them.

use anyhow::{Result, bail};

use crate::picture::Picture;

/// Format of an image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    #[default]
    Png,
    /// Quality 1 to 100.
    Jpeg(u8),
    /// Without loss.
    WebP,
}

impl Encoding {
    /// Its name in the OpenAI API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg(_) => "jpeg",
            Self::WebP => "webp",
        }
    }

    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg(_) => "image/jpeg",
            Self::WebP => "image/webp",
        }
    }

    /// The file of `picture`, with `parameters` in it where they are given.
    pub fn file(self, picture: &Picture, parameters: Option<&str>) -> Result<Vec<u8>> {
        match self {
            Self::Png => picture.png(parameters),
            _ => bail!("only PNG is written yet"),
        }
    }
}
