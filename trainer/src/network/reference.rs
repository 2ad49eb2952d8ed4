//! Reference tensors that travel with a checkpoint: inputs and outputs of every network, computed here,
//! against which `ng-export --verify` holds what it wrote.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Result, ensure};
use flow::checkpoint::{Entry, write_tensors};
use flow::latents::LatentSize;
use flow::models::transformer::GUIDANCE;
use flow::noise::Noise;
use flow::reference::{FILE, PRECISION};
use tch::{Kind, Tensor, no_grad};

use crate::network::model::Model;
use crate::tensor::device::precision_name;
use crate::tensor::stored::entry;

/// Prompts of the text encoders; their rows also condition the velocity.
const PROMPTS: [&str; 2] = ["red \"CAT\"", "A blue sign that says \"42\", on a white wall"];
/// Tokens of the reference latents in each direction: not square, so that no axis is mistaken.
const TOKENS: [usize; 2] = [3, 4];
/// Flow times of the two rows.
const TIMES: [f32; 2] = [0.93, 0.27];

/// Writes [`FILE`] into `folder`. Tensors are called `component.name` with the names of the exported
/// graphs' inputs and outputs.
///
/// # Errors
/// When a network answers with what is not finite, or the folder cannot be written.
pub(crate) fn write(model: &Model, folder: &Path) -> Result<()> {
    let entries = no_grad(|| tensors(model))?;
    let metadata = [(PRECISION, precision_name(model.engine.kind()).to_owned())];
    Ok(write_tensors(&folder.join(FILE), &entries, &metadata)?)
}

fn tensors(model: &Model) -> Result<Vec<Entry<'static>>> {
    let pipeline = &model.pipeline;
    let size = LatentSize {
        channels: pipeline.vae.latent_channels,
        height: 2 * TOKENS[0],
        width: 2 * TOKENS[1],
    };
    let ids = model.tokenise(&PROMPTS)?;
    let wide = |x: &Tensor| x.to_kind(Kind::Float);
    let condition = model.condition(&ids, GUIDANCE, &size)?;
    let ops = model.text_encoder.segment(0)?;
    let clip = pipeline.text_encoder.forward(&ops, &Rc::new(ids[0].shallow_clone()));
    let noise = Noise::new(0);
    let rows = [noise.normal(0, size.len()), noise.normal(1, size.len())];
    let x_t = model.pack(&rows, &size);
    let t = Tensor::from_slice(&TIMES).to_device(model.device());
    let velocity = model.engine.velocity(&x_t, &t, &condition)?;
    let latents = Tensor::from_slice(&rows.concat()).to_device(model.device());
    let latents = latents.reshape([2, size.channels as i64, size.height as i64, size.width as i64]);
    let decoded = pipeline.vae.decode(&model.vae.ops(), &Rc::new(latents.shallow_clone()));
    let pixels = decoded.clamp(-1.0, 1.0);
    let parameters = model.encode_pixels(&pixels);
    let n_text = condition.text.size()[1];
    let txt_ids = Tensor::zeros([n_text, 3], (Kind::Float, model.device()));
    let answers: [(&str, &Tensor); 6] = [
        ("text_encoder", &clip.last_hidden_state),
        ("text_encoder", &clip.pooler_output),
        ("text_encoder_2", &condition.text),
        ("transformer", &velocity),
        ("vae", &decoded),
        ("vae", &parameters),
    ];
    for (component, values) in answers {
        ensure!(
            values.isfinite().all().int64_value(&[]) == 1,
            "{}: answers with numbers that are not finite",
            pipeline.dir.join(component).display()
        );
    }
    let mut entries = vec![
        integers("text_encoder.input_ids", &ids[0])?,
        entry("text_encoder.last_hidden_state", &wide(&clip.last_hidden_state))?,
        entry("text_encoder.pooler_output", &wide(&clip.pooler_output))?,
        integers("text_encoder_2.input_ids", &ids[1])?,
        entry("text_encoder_2.last_hidden_state", &wide(&condition.text))?,
        entry("transformer.hidden_states", &x_t)?,
        entry("transformer.encoder_hidden_states", &wide(&condition.text))?,
        entry("transformer.pooled_projections", &wide(&condition.pooled))?,
        entry("transformer.timestep", &t)?,
        entry("transformer.img_ids", &condition.img_ids)?,
        entry("transformer.txt_ids", &txt_ids)?,
        entry("transformer.out_hidden_states", &velocity)?,
        entry("vae_decoder.latent_sample", &latents)?,
        entry("vae_decoder.sample", &decoded)?,
        entry("vae_encoder.sample", &pixels)?,
        entry("vae_encoder.latent_parameters", &parameters)?,
    ];
    if pipeline.transformer.guidance_embeds {
        entries.push(entry("transformer.guidance", &condition.guidance)?);
    }
    Ok(entries)
}

fn integers(name: &str, tensor: &Tensor) -> Result<Entry<'static>> {
    let shape: Vec<usize> = tensor.size().iter().map(|&n| n as usize).collect();
    let flat = tensor.to_device(tch::Device::Cpu).reshape([-1]);
    Ok(Entry::i64(name, &shape, &Vec::<i64>::try_from(&flat)?))
}
