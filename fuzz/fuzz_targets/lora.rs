//! A LoRA file of any spelling, for the networks of FLUX.1-dev.
#![no_main]

use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use fuzz::File;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static LAYERS: Layers = Layers::of(&Pipeline::known("flux.1-dev").expect("shipped"));
}

fuzz_target!(|data: &[u8]| {
    let file = File::of("pytorch_lora_weights.safetensors", data);
    let _ = LAYERS.with(|layers| Lora::open(file.path(), 1.0, layers));
});
