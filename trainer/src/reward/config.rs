//! The `[[rewards]]` tables of a preset.
//!
//! ```toml
//! [[rewards]]
//! kind = "ocr"
//! name = "spelling"
//! weight = 1.0
//! model = ".runtime/models/ocr-v6.onnx"
//! measure = "log_prob"
//!
//! [[rewards]]
//! kind = "colour"
//! name = "colour"
//! weight = 0.2
//! required = false
//! ```

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ChatConfig, DetectorConfig, MAX_PATIENCE, MAX_RETRIES, ServerConfig};

/// One reward of a run. Unknown keys are refused, those of [`RewardKind`] included.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
pub struct RewardConfig {
    /// Name in logs and metrics, unique in a run: letters, digits, -, _ and . of them.
    pub name: String,
    /// Factor on this reward's advantages, finite. 0 scores it without training on it.
    pub weight: f64,
    /// A group whose scores spread (standard deviation) less than this gets no advantages from this
    /// reward: below it, differences are noise.
    #[serde(default = "default_std_floor")]
    pub std_floor: f64,
    /// Whether a failure that outlives the retries ends the run. If not, the reward is left out
    /// of that group's sum of advantages.
    #[serde(default = "default_required")]
    pub required: bool,
    /// Further attempts after a failed one.
    #[serde(default = "default_retries")]
    pub retries: u32,
    /// Minutes that a required reward's server may be away (not reached, status 5xx or 429) before the run
    /// saves and ends.
    #[serde(default = "default_patience")]
    pub patience: f64,
    #[serde(flatten)]
    pub kind: RewardKind,
}

impl RewardConfig {
    /// Refuses settings out of their range, in the list of that `name`.
    pub(crate) fn validate_all(rewards: &[Self], name: &str) -> Result<()> {
        rewards.iter().enumerate().try_for_each(|(index, reward)| {
            reward.validate().map_err(|error| anyhow!("{name}.{index}.{error:#}"))
        })
    }

    /// Refuses what every kind of reward must not have.
    pub(super) fn validate(&self) -> Result<()> {
        let Self { name, weight, std_floor, retries, patience, .. } = self;
        let is_letter = |letter: char| letter.is_alphanumeric() || "-_.".contains(letter);
        ensure!(
            !name.is_empty() && name.chars().all(is_letter),
            "name = {name:?}: letters, digits, -, _ and ., at least one"
        );
        ensure!(weight.is_finite(), "weight = {weight}: a finite number, of reward {name:?}");
        ensure!(
            std_floor.is_finite() && *std_floor >= 0.0,
            "std_floor = {std_floor}: at least 0, of reward {name:?}"
        );
        ensure!(
            *retries <= MAX_RETRIES,
            "retries = {retries}: at most {MAX_RETRIES}, of reward {name:?}"
        );
        ensure!(
            (0.0..=MAX_PATIENCE).contains(patience),
            "patience = {patience}: from 0 to {MAX_PATIENCE} minutes, of reward {name:?}"
        );
        Ok(())
    }
}

/// What a reward measures; `kind` in the table.
#[derive(Clone, Debug, Deserialize, JsonSchema, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardKind {
    /// Human Preference Score 2.1 (or 2.0): the raw cosine, −1 to 1, about 0.2 to 0.4. Images are
    /// resized in floats until they fit and padded black, as the package hpsv2 does.
    Hpsv2 {
        /// `HPS_v2.1_compressed.pt`, CLIP ViT-H/14 in open_clip's names. Another architecture needs
        /// `open_clip_config.json` beside it.
        weights: PathBuf,
        /// Folder of CLIP's tokenizer: `tokenizer.json`, or `vocab.json` and `merges.txt`.
        tokenizer: PathBuf,
    },
    /// PickScore: the cosine, −1 to 1, about 0.18 to 0.24; the logit of its paper is 100 times this.
    /// Images are resized by Pillow and cropped, as the CLIPProcessor of transformers does.
    Pickscore {
        /// `model.safetensors` of PickScore_v1, `config.json` beside it.
        weights: PathBuf,
        /// Folder of CLIP's tokenizer, as above.
        tokenizer: PathBuf,
    },
    /// CLIP score: the cosine, −1 to 1, of any CLIP ViT. Images and prompts are prepared by
    /// transformers' rules or open_clip's, after the names of its tensors.
    Clip {
        /// Weights with `config.json` (transformers) or `open_clip_config.json` beside them.
        weights: PathBuf,
        /// Folder of CLIP's tokenizer, as above.
        tokenizer: PathBuf,
    },
    /// ImageReward: the raw reward, about −2.5 to 2.5. Images are resized by Pillow and cropped.
    #[serde(rename = "image-reward")]
    ImageReward {
        /// `ImageReward.pt`, `med_config.json` beside it.
        weights: PathBuf,
        /// Folder of bert-base-uncased's `tokenizer.json`.
        tokenizer: PathBuf,
    },
    /// LAION's aesthetic predictor, about 1 to 10; the prompt is not looked at. Images are resized by
    /// Pillow and cropped.
    Aesthetic {
        /// `sac+logos+ava1-l14-linearMSE.pth`.
        weights: PathBuf,
        /// Weights of OpenAI's CLIP ViT-L/14 with `config.json` or `open_clip_config.json` beside them.
        clip: PathBuf,
    },
    /// How well the image reads as the prompt's target text.
    Ocr {
        /// Recognition model, `.onnx`: an image [N, 3, H, W] of one line of text to probabilities
        /// [N, frames, classes], blank first, as PP-OCR's models and those trained like them.
        model: PathBuf,
        /// Characters of the classes after the blank, one a line, where the model's metadata has no
        /// `character`: PaddleOCR's dictionary file.
        #[serde(default)]
        characters: Option<PathBuf>,
        /// Finds lines of text first; without, the whole image is one line.
        #[serde(default)]
        detector: Option<DetectorConfig>,
        /// What of a reading counts.
        #[serde(default)]
        measure: Measure,
    },
    /// Size of the image as a JPEG file, in kB: DDPO's compressibility and incompressibility.
    Jpeg {
        /// JPEG quality, 1 to 100.
        #[serde(default = "default_quality")]
        quality: u8,
        /// Which size is better.
        prefer: JpegSize,
    },
    /// How much an image repeats itself with the network's patches, in dB below 0: a detector of grid artefacts.
    Grid {
        /// Pixels of a patch, 2 to 64: two latents, of eight pixels in FLUX.
        #[serde(default = "default_period")]
        period: u32,
    },
    /// Share of the drawn pixels that have the prompt's colour, 0 to 1.
    Colour {},
    /// A number that any ONNX model computes from the image alone.
    Onnx {
        /// `.onnx` with one f32 input [1, 3, height, width].
        model: PathBuf,
        /// Width and height the image is resized to, in pixels.
        size: [u32; 2],
        /// Per channel (red, green, blue), subtracted from values in 0 to 1.
        mean: [f32; 3],
        /// Per channel, the divisor after the mean is subtracted.
        std: [f32; 3],
        /// Which number of the first output is the score.
        #[serde(default)]
        index: usize,
    },
    /// Scores of a server of one's own.
    Server(ServerConfig),
    /// The number that a vision-language model gives the image.
    Chat(ChatConfig),
    /// Share of the group's other images that the image beats, 0 to 1.
    Pairwise {
        /// Who compares two images: a `chat` model that sees both, or the higher score of another
        /// kind.
        judge: Box<RewardKind>,
    },
    /// The same value for every image: a control that must not train anything.
    Constant {
        /// That value.
        value: f64,
    },
}

impl RewardKind {
    /// Whether opening it reads little: nothing, or a small model.
    pub(crate) fn is_light(&self) -> bool {
        match self {
            Self::Pairwise { judge } => judge.is_light(),
            other => !other.is_network(),
        }
    }

    /// Seconds until a server's answer must be there, where one is asked.
    pub(crate) fn timeout(&self) -> Option<f64> {
        match self {
            Self::Server(config) => Some(config.endpoint.timeout),
            Self::Chat(config) => Some(config.endpoint.timeout),
            Self::Pairwise { judge } => judge.timeout(),
            _ => None,
        }
    }

    /// Whether it is a network on libtorch, whose scores have gradients.
    pub(crate) fn is_network(&self) -> bool {
        matches!(
            self,
            Self::Hpsv2 { .. }
                | Self::Pickscore { .. }
                | Self::Clip { .. }
                | Self::ImageReward { .. }
                | Self::Aesthetic { .. }
        )
    }
}

/// How an OCR reading is turned into a reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Log-probability of the target a character, at most 0: dense, the one to train on.
    #[default]
    LogProb,
    /// 1 if the image reads exactly as the target, else 0: the one to report.
    Exact,
    /// 1 less the edit distance relative to the target's length, 0 to 1.
    Similarity,
}

/// The direction of a JPEG-size reward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JpegSize {
    /// Compressible images score higher (the score is minus the size).
    Small,
    /// Incompressible images score higher (the score is the size).
    Large,
}

fn default_std_floor() -> f64 {
    1e-6
}

fn default_required() -> bool {
    true
}

fn default_retries() -> u32 {
    2
}

fn default_patience() -> f64 {
    10.0
}

fn default_period() -> u32 {
    16
}

fn default_quality() -> u8 {
    95
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(table: &str) -> std::result::Result<RewardConfig, toml::de::Error> {
        toml::from_str(table)
    }

    #[test]
    fn tables_with_defaults() {
        let ocr = parse("kind = 'ocr'\nname = 'a'\nweight = 1.0\nmodel = 'm.onnx'").unwrap();
        assert!(ocr.required);
        assert_eq!(ocr.retries, 2);
        assert!(matches!(ocr.kind, RewardKind::Ocr { measure: Measure::LogProb, .. }));
        let colour = parse("kind = 'colour'\nname = 'c'\nweight = 0.5\nrequired = false").unwrap();
        assert!(!colour.required);
        let jpeg = parse("kind = 'jpeg'\nname = 'j'\nweight = 1\nprefer = 'small'").unwrap();
        let RewardKind::Jpeg { quality: 95, prefer: JpegSize::Small } = jpeg.kind else {
            panic!("{jpeg:?}");
        };
        let written = toml::to_string(&jpeg).unwrap();
        assert_eq!(toml::to_string(&parse(&written).unwrap()).unwrap(), written);
    }

    #[test]
    fn unknown_keys_and_values_are_refused() {
        let cases = [
            ("kind = 'colour'\nname = 'c'\nweight = 1\nretry = 3", "retry"),
            ("kind = 'jpeg'\nname = 'j'\nweight = 1\nprefer = 'small'\nqualty = 3", "qualty"),
            ("kind = 'jpeg'\nname = 'j'\nweight = 1\nprefer = 'tiny'", "tiny"),
            ("kind = 'clap'\nname = 'j'\nweight = 1", "clap"),
            ("kind = 'colour'\nname = 'c'", "weight"),
            ("name = 'c'\nweight = 1", "kind"),
        ];
        for (table, culprit) in cases {
            let error = parse(table).unwrap_err().to_string();
            assert!(error.contains(culprit), "{culprit} is not in: {error}");
        }
    }
}
