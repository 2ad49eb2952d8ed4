//! A LoRA file of any spelling, for the networks of FLUX.1-dev.
#![no_main]

use std::sync::LazyLock;

use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use fuzz::File;
use libfuzzer_sys::fuzz_target;

static LAYERS: LazyLock<Layers> =
    LazyLock::new(|| Layers::of(&Pipeline::known("flux.1-dev").expect("shipped")));

fuzz_target!(|data: &[u8]| {
    let file = File::of("pytorch_lora_weights.safetensors", data);
    let _ = Lora::open(file.path(), 1.0, &LAYERS);
});
