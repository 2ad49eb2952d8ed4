//! What a client asked for, and what that means for a model within the server's limits.

use std::{ops::RangeInclusive, sync::Arc};

use flow::{latents::PATCH, solver::DEFAULT_STEPS};

use crate::{
    export::{Export, random_seed},
    request::Request,
};

use super::{drawing::Drawing, encoded::Encoding, refusal::Refusal};

/// Most steps, images and pixels of a request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub steps: usize,
    pub images: usize,
    pub pixels: usize,
}

impl Limits {
    /// Steps that a request may ask for.
    pub fn step_range(self) -> RangeInclusive<i128> {
        1..=self.steps as i128
    }

    /// Steps of a request that asks for no number.
    pub fn default_steps(self) -> usize {
        DEFAULT_STEPS.min(self.steps)
    }

    /// Images that a request may ask for.
    pub fn image_range(self) -> RangeInclusive<i128> {
        1..=self.images as i128
    }
}

/// A model that is served.
#[derive(Clone, Debug)]
pub struct Card {
    /// The name clients ask for it by.
    pub name: String,
    /// Seconds since 1970 at which its folder was made.
    pub created: u64,
    pub export: Arc<Export>,
}

/// What an API calls the fields; refusals use these names.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    pub size: &'static str,
    pub steps: &'static str,
    pub count: &'static str,
    pub guidance: &'static str,
}

/// The wishes of a request.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    pub image: Request,
    /// By default 1.
    pub count: Option<usize>,
    pub encoding: Encoding,
    pub previews: usize,
}

impl Card {
    /// Pixels that a side must be a multiple of.
    pub fn multiple(&self) -> usize {
        PATCH * self.export.pipeline.vae.factor()
    }

    /// Whether the model embeds guidance.
    pub fn guides(&self) -> bool {
        self.export.pipeline.transformer.guidance_embeds
    }

    /// Whether it can take LoRAs at run time.
    pub fn has_slots(&self) -> bool {
        self.export.description.lora_slots.is_some()
    }

    /// The drawing that `ask` means for model number `model`, which this card describes.
    ///
    /// # Errors
    /// Names the field, as `names` has it, that the model or the limits do not allow.
    pub fn drawing(
        &self,
        model: usize,
        ask: Ask,
        limits: Limits,
        names: Names,
    ) -> Result<Drawing, Refusal> {
        let invalid = |field: &str, why: String| {
            Refusal::field(field, "invalid_value", format!("{field}: {why}"))
        };
        let steps = ask.image.steps.unwrap_or(limits.default_steps());
        let count = ask.count.unwrap_or(1);
        for (field, value, most) in
            [(names.steps, steps, limits.steps), (names.count, count, limits.images)]
        {
            if !(1..=most).contains(&value) {
                return Err(invalid(field, format!("{value} is not from 1 to {most}")));
            }
        }
        self.check_size(&ask.image, limits, names.size)?;
        if ask.image.guidance.is_some() && !self.guides() {
            let why = format!("model {} embeds no guidance; leave it out", self.name);
            return Err(invalid(names.guidance, why));
        }
        if !ask.image.loras.is_empty() && !self.has_slots() {
            let why = format!(
                "model {} has no slots for LoRAs; export it with `ng-export --lora-slots`",
                self.name
            );
            return Err(invalid("lora", why));
        }
        let seed = ask.image.seed.unwrap_or_else(random_seed);
        if seed.checked_add(count as u64 - 1).is_none() {
            let why = format!("{seed} with {count} images passes the largest seed");
            return Err(invalid("seed", why));
        }
        let first = self
            .export
            .job(Request { seed: Some(seed), steps: Some(steps), ..ask.image })
            .map_err(|error| {
                let field = match error.field {
                    "size" => names.size,
                    "steps" => names.steps,
                    "guidance" => names.guidance,
                    "loras" => "lora",
                    field => field,
                };
                invalid(field, error.why)
            })?;
        let Ask { encoding, previews, .. } = ask;
        Ok(Drawing { model, first, count, encoding, previews })
    }

    fn check_size(&self, image: &Request, limits: Limits, field: &str) -> Result<(), Refusal> {
        let side = self.export.default_side();
        let (width, height) = (image.width.unwrap_or(side), image.height.unwrap_or(side));
        let invalid =
            |why: String| Err(Refusal::field(field, "invalid_size", format!("{field}: {why}")));
        if width.saturating_mul(height) > limits.pixels {
            let most = limits.pixels;
            return invalid(format!("{width}x{height} is above the limit of {most} pixels"));
        }
        let multiple = self.multiple();
        let near = |side: usize| (side + multiple / 2) / multiple * multiple;
        let [near_width, near_height] = [width, height].map(|side| near(side).max(multiple));
        if (near_width, near_height) != (width, height) {
            return invalid(format!(
                "{width}x{height} is not of multiples of {multiple}; the nearest is \
                 {near_width}x{near_height}"
            ));
        }
        Ok(())
    }
}
