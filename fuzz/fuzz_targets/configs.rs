//! The configs of a pipeline, one after the other with a blank line between.
#![no_main]

use fuzz::{Folder, parts};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let folder = Folder::new();
    let names = ["model_index.json", "transformer/config.json", "vae/config.json",
        "text_encoder/config.json", "text_encoder_2/config.json", "scheduler/scheduler_config.json"];
    for (name, text) in names.iter().zip(parts(data)) {
        folder.write(name, text);
    }
    if let Ok(pipeline) = flow::pipeline::Pipeline::open(folder.path()) {
        let _ = pipeline.latent_size(pipeline.default_size(), pipeline.default_size());
    }
});
