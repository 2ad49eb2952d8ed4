//! Configs of published models: their cost is planned and their layout filled without a download.
//!
//! The JSON files under `known/` have the fields of the repositories `black-forest-labs/FLUX.1-dev` and
//! `FLUX.1-schnell` that describe the networks.

/// A config file's place in a pipeline folder, and its text.
pub type File = (&'static str, &'static str);

macro_rules! files {
    ($($folder:literal / $file:literal),* $(,)?) => {
        &[$(($file, include_str!(concat!("known/", $folder, "/", $file)))),*]
    };
}

/// Name and config files of each model.
pub const MODELS: [(&str, &[File]); 2] = [
    (
        "flux.1-dev",
        files!(
            "flux.1-dev" / "model_index.json",
            "flux.1-dev" / "scheduler/scheduler_config.json",
            "flux.1-dev" / "text_encoder/config.json",
            "flux.1-dev" / "text_encoder_2/config.json",
            "flux.1-dev" / "transformer/config.json",
            "flux.1-dev" / "vae/config.json",
        ),
    ),
    (
        "flux.1-schnell",
        files!(
            "flux.1-dev" / "model_index.json",
            "flux.1-schnell" / "scheduler/scheduler_config.json",
            "flux.1-dev" / "text_encoder/config.json",
            "flux.1-dev" / "text_encoder_2/config.json",
            "flux.1-schnell" / "transformer/config.json",
            "flux.1-dev" / "vae/config.json",
        ),
    ),
];

/// The config files of the model called `name`.
pub fn files(name: &str) -> Option<&'static [File]> {
    MODELS.iter().find(|(known, _)| *known == name).map(|(_, files)| *files)
}
