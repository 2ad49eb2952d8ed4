//! The text about an image that viewers and other programs of this field read.

use flow::solver::Solver;

use crate::request::{Job, Rng};

/// What the text says of an image.
#[derive(Clone, Debug)]
pub struct Parameters<'a> {
    pub prompt: &'a str,
    pub steps: usize,
    pub solver: Solver,
    /// Of a model that embeds guidance.
    pub guidance: Option<f32>,
    /// Where the initial noise came from.
    pub origin: Origin<'a>,
    pub width: usize,
    pub height: usize,
    /// Name of the model's folder.
    pub model: &'a str,
    /// Factor s of the schedule's shift, 1 for none.
    pub shift: f64,
    /// Of an image that started from another.
    pub strength: Option<f64>,
    /// Whether velocities were forecast.
    pub skip: bool,
    pub rng: Rng,
    /// LoRAs and their scales.
    pub loras: Vec<(&'a str, f64)>,
}

/// Where initial noise comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// Drawn from this seed.
    Seed(u64),
    /// Read from the file of this name.
    File(&'a str),
}

impl<'a> Parameters<'a> {
    /// Those of `job`, made with the model in the folder `model`.
    pub fn of(job: &'a Job, model: &'a str) -> Self {
        Self {
            prompt: &job.prompt,
            steps: job.steps,
            solver: job.solver,
            guidance: job.guidance,
            origin: match &job.noise {
                Some(noise) => Origin::File(&noise.name),
                None => Origin::Seed(job.seed),
            },
            width: job.width,
            height: job.height,
            model,
            shift: job.shift,
            strength: job.init.is_some().then_some(job.strength),
            skip: job.skip,
            rng: job.rng,
            loras: job.loras.iter().map(|(lora, scale)| (&*lora.name, *scale)).collect(),
        }
    }

    /// The prompt, then one line of `Name: value, …`; a value with a comma, colon, quote or line
    /// break is written as a JSON string. The names are those of AUTOMATIC1111's web UI, and
    /// Forge's for embedded guidance.
    pub fn text(&self) -> String {
        let mut fields = vec![
            ("Steps", self.steps.to_string()),
            ("Sampler", sampler_name(self.solver).to_owned()),
            ("Schedule shift", rounded(self.shift)),
            // No second pass without the prompt is made.
            ("CFG scale", "1".to_owned()),
        ];
        if let Some(guidance) = self.guidance {
            fields.push(("Distilled CFG Scale", guidance.to_string()));
        }
        fields.push(match self.origin {
            Origin::Seed(seed) => ("Seed", seed.to_string()),
            Origin::File(name) => ("Noise", quoted(name)),
        });
        fields.push(("Size", format!("{}x{}", self.width, self.height)));
        fields.push(("Model", quoted(self.model)));
        if let Some(strength) = self.strength {
            fields.push(("Denoising strength", rounded(strength)));
        }
        if !self.loras.is_empty() {
            let loras = self.loras.iter().map(|(name, scale)| format!("{name}:{scale}"));
            fields.push(("LoRA", quoted(&loras.collect::<Vec<_>>().join(", "))));
        }
        if self.rng == Rng::Torch {
            fields.push(("RNG", "CPU".to_owned()));
        }
        if self.skip {
            fields.push(("Skip", "alternate".to_owned()));
        }
        fields.push(("Version", concat!("ng-sample ", env!("CARGO_PKG_VERSION")).to_owned()));
        let fields: Vec<String> =
            fields.into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        format!("{}\n{}", self.prompt, fields.join(", "))
    }
}

/// The name that other programs of this field use.
pub fn sampler_name(solver: Solver) -> &'static str {
    match solver {
        Solver::Dpmpp2m => "DPM++ 2M",
        Solver::Dpmpp2mK => "DPM++ 2M k-diffusion",
        Solver::Euler => "Euler",
        Solver::Heun => "Heun",
        Solver::UniPc => "UniPC",
    }
}

/// At most four decimals.
fn rounded(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn quoted(value: &str) -> String {
    if value.contains([',', ':', '"', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(prompt: &str) -> Parameters<'_> {
        Parameters {
            prompt,
            steps: 8,
            solver: Solver::Dpmpp2m,
            guidance: Some(3.5),
            origin: Origin::Seed(7),
            width: 32,
            height: 16,
            model: "signs",
            shift: 1.15f64.exp(),
            strength: None,
            skip: false,
            rng: Rng::Own,
            loras: Vec::new(),
        }
    }

    #[test]
    fn text_is_what_viewers_parse() {
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            parameters("red \"HAT\", bold").text(),
            format!(
                "red \"HAT\", bold\nSteps: 8, Sampler: DPM++ 2M, Schedule shift: 3.1582, \
                 CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, Size: 32x16, Model: signs, \
                 Version: ng-sample {version}"
            )
        );
        let from_file = Parameters {
            guidance: None,
            origin: Origin::File("a, b.safetensors"),
            shift: 3.0,
            strength: Some(0.6),
            ..parameters("")
        };
        let text = from_file.text();
        assert!(text.contains("CFG scale: 1, Noise: \"a, b.safetensors\", Size"), "{text}");
        assert!(text.contains("Model: signs, Denoising strength: 0.6, Version"), "{text}");
    }
}
