//! The networks of an export, in ONNX Runtime.
//!
//! `S` image tokens, `L` text tokens, `C` channels of a packed latent, `Z` latent channels. File,
//! input and output names are Optimum's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use flow::{
    latents::LatentSize, models::vae::VaeConfig, pipeline::Pipeline, tiles, tokens::Tokenizers,
};
use onnx::{Model, Options, Tensor};

use crate::{picture::Picture, sample::Denoiser};

const TEXT_ENCODER: &str = "text_encoder";
const TEXT_ENCODER_2: &str = "text_encoder_2";
const TRANSFORMER: &str = "transformer";
const VAE_DECODER: &str = "vae_decoder";

/// Makes sure that every graph is there.
///
/// # Errors
/// Names the first that is not.
pub fn check_files(folder: &Path) -> Result<()> {
    for component in [TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER] {
        let file = graph_file(folder, component);
        ensure!(
            file.is_file(),
            "{} is missing; make an export with `ng-export CHECKPOINT --out DIR`",
            file.display()
        );
    }
    Ok(())
}

/// What the transformer is told about the image.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// Pooled CLIP vector `[1, D]`.
    pooled: Tensor,
    /// T5 tokens `[1, L, D]`.
    tokens: Tensor,
}

/// Tokenizers and both text encoders.
pub struct TextEncoders {
    tokenizers: Tokenizers,
    /// Rows of CLIP's position table.
    n_positions: usize,
    clip: Model,
    t5: Model,
}

impl TextEncoders {
    /// T5 rows have `text_tokens` tokens, by default the tokenizer's limit.
    pub fn open(pipeline: &Pipeline, text_tokens: Option<usize>, options: Options) -> Result<Self> {
        Ok(Self {
            tokenizers: Tokenizers::open(&pipeline.dir, text_tokens)?,
            n_positions: pipeline.text_encoder.max_position_embeddings,
            clip: open(pipeline, TEXT_ENCODER, options)?,
            t5: open(pipeline, TEXT_ENCODER_2, options)?,
        })
    }

    /// Both encoders' view of `prompt`.
    pub fn encode(&mut self, prompt: &str) -> Result<Condition> {
        let ids = self
            .tokenizers
            .encode(prompt)
            .map_err(|error| anyhow!("cannot tokenise the prompt {prompt:?}: {error}"))?;
        ensure!(
            ids.clip.len() <= self.n_positions,
            "tokenizer/tokenizer_config.json pads to {} tokens, but text_encoder/config.json has {} \
             positions",
            ids.clip.len(),
            self.n_positions
        );
        let row = |ids: Vec<i64>| Tensor::i64([1, ids.len()], ids);
        Ok(Condition {
            pooled: run(&mut self.clip, &[("input_ids", &row(ids.clip)?)], "pooler_output")?,
            tokens: run(&mut self.t5, &[("input_ids", &row(ids.t5)?)], "last_hidden_state")?,
        })
    }
}

/// The velocity network for images of one size.
pub struct Transformer {
    model: Model,
    /// `[1, S, C]`.
    shape: [usize; 3],
    /// `[S, 3]`: 0, row, column.
    img_ids: Tensor,
    /// `[1]`, exactly when the model embeds guidance.
    guidance: Option<Tensor>,
}

impl Transformer {
    pub fn open(
        pipeline: &Pipeline,
        size: &LatentSize,
        guidance: Option<f32>,
        options: Options,
    ) -> Result<Self> {
        Ok(Self {
            model: open(pipeline, TRANSFORMER, options)?,
            shape: [1, size.tokens(), size.token_width()],
            img_ids: img_ids(size)?,
            guidance: guidance.map(|scale| Tensor::f32([1], vec![scale])).transpose()?,
        })
    }

    /// This network with a prompt.
    pub fn conditioned<'a>(&'a mut self, condition: &'a Condition) -> Result<Conditioned<'a>> {
        let n_text = condition.tokens.shape[1];
        let txt_ids = Tensor::f32([n_text, 3], vec![0.0; 3 * n_text])?;
        Ok(Conditioned { transformer: self, condition, txt_ids })
    }
}

/// A [`Transformer`] with a prompt; its states are packed latents `[S, C]` of one image.
pub struct Conditioned<'a> {
    transformer: &'a mut Transformer,
    condition: &'a Condition,
    /// `[L, 3]`, all 0.
    txt_ids: Tensor,
}

impl Denoiser for Conditioned<'_> {
    fn velocity(&mut self, x_t: &[f32], t: f64) -> Result<Vec<f32>> {
        let Transformer { model, shape, img_ids, guidance } = &mut *self.transformer;
        let hidden_states = Tensor::f32(*shape, x_t.to_vec())?;
        let timestep = Tensor::f32([1], vec![t as f32])?;
        let mut inputs = vec![
            ("hidden_states", &hidden_states),
            ("encoder_hidden_states", &self.condition.tokens),
            ("pooled_projections", &self.condition.pooled),
            ("timestep", &timestep),
            ("img_ids", &*img_ids),
            ("txt_ids", &self.txt_ids),
        ];
        inputs.extend(guidance.as_ref().map(|scale| ("guidance", scale)));
        run(model, &inputs, "out_hidden_states")?.into_f32()
    }
}

/// The autoencoder's second half.
pub struct Decoder {
    model: Model,
    config: VaeConfig,
}

impl Decoder {
    pub fn open(pipeline: &Pipeline, options: Options) -> Result<Self> {
        Ok(Self { model: open(pipeline, VAE_DECODER, options)?, config: pipeline.vae.clone() })
    }

    /// The image of `latents` `[Z, h, w]` as the flow has them: scaled and shifted. A large one is
    /// decoded in tiles.
    pub fn decode(&mut self, latents: &[f32], size: &LatentSize) -> Result<Picture> {
        let factor = self.config.factor();
        let pixels = tiles::decode(latents, size, factor, |part, size| self.pixels(part, size))?;
        Picture::from_sample(&pixels, size.width * factor, size.height * factor)
    }

    /// Pixels `[3, f·h, f·w]` of a part.
    fn pixels(&mut self, latents: &[f32], size: &LatentSize) -> Result<Vec<f32>> {
        let unscale = |z: &f32| self.config.unscaled(f64::from(*z)) as f32;
        let unscaled = latents.iter().map(unscale).collect();
        let latent_sample = Tensor::f32([1, size.channels, size.height, size.width], unscaled)?;
        let sample = run(&mut self.model, &[("latent_sample", &latent_sample)], "sample")?;
        let factor = self.config.factor();
        let (width, height) = (size.width * factor, size.height * factor);
        ensure!(
            sample.shape == [1, 3, height, width],
            "{}: the image has shape {:?}, not [1, 3, {height}, {width}]",
            self.model.path().display(),
            sample.shape
        );
        sample.into_f32()
    }
}

fn graph_file(folder: &Path, component: &str) -> PathBuf {
    folder.join(component).join("model.onnx")
}

fn open(pipeline: &Pipeline, component: &str, options: Options) -> Result<Model> {
    Model::open(graph_file(&pipeline.dir, component), &options)
}

/// One output of one run, checked to be finite.
fn run(model: &mut Model, inputs: &[(&str, &Tensor)], output: &str) -> Result<Tensor> {
    let tensor = model.run(inputs, &[output])?.pop().context("the run has no output")?;
    ensure!(
        tensor.as_f32()?.iter().all(|value| value.is_finite()),
        "{}: output {output} is not finite",
        model.path().display()
    );
    Ok(tensor)
}

fn img_ids(size: &LatentSize) -> Result<Tensor> {
    let place = |row| (0..size.columns()).flat_map(move |column| [0.0, row as f32, column as f32]);
    Tensor::f32([size.tokens(), 3], (0..size.rows()).flat_map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_tokens_are_placed_row_by_row() -> Result<()> {
        let ids = img_ids(&LatentSize { channels: 16, height: 4, width: 6 })?;
        assert_eq!(ids.shape, [6, 3]);
        let places: Vec<&[f32]> = ids.as_f32()?.chunks(3).collect();
        assert_eq!(places[..4], [[0., 0., 0.], [0., 0., 1.], [0., 0., 2.], [0., 1., 0.]]);
        Ok(())
    }

    #[test]
    fn the_first_missing_graph_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for component in [TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER] {
            std::fs::create_dir(folder.path().join(component))?;
            std::fs::write(graph_file(folder.path(), component), "")?;
        }
        let message = check_files(folder.path()).unwrap_err().to_string();
        assert!(message.contains("vae_decoder/model.onnx is missing"), "{message}");
        assert!(message.contains("ng-export"), "{message}");
        Ok(())
    }
}
