//! A LoRA file of any spelling, for the networks of FLUX.1-dev.
#![no_main]

use flow::lora::{Layers, Lora};
use flow::pipeline::Pipeline;
use fuzz::File;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = File::of("pytorch_lora_weights.safetensors", data);
    let pipeline = Pipeline::known("flux.1-dev").expect("shipped");
    let _ = Lora::open(file.path(), 1.0, &Layers::of(&pipeline));
});
