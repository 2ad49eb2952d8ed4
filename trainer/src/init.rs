//! Random weights for a network that has none yet.

use flow::noise::Noise;

/// The initial values of parameter `name`, drawn from `stream` of the seed's noise: zeros where FLUX's
/// adaptive normalisation and outputs start closed, ones for norms, small normals elsewhere.
pub(crate) fn value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let n = shape.iter().product();
    let closed = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"];
    let is_zero = name.rsplit('.').next() == Some("bias")
        || name.starts_with("proj_out.")
        || closed.iter().any(|part| name.contains(part));
    if is_zero {
        return vec![0.0; n];
    }
    if shape.len() == 1 {
        return vec![1.0; n];
    }
    let fan_in: usize = shape[1..].iter().product();
    let is_table = ["shared", "token_embedding", "position_embedding"];
    let std = if is_table.iter().any(|part| name.contains(part)) {
        0.2
    } else if name.contains("relative_attention_bias") {
        // Heads that look at different distances from the start: letters find their place in a word.
        2.0
    } else if name.contains("SelfAttention.q") {
        // T5 does not scale its scores.
        0.25 / (fan_in as f32).sqrt()
    } else {
        1.0 / (fan_in as f32).sqrt()
    };
    noise.normal(stream, n).into_iter().map(|x| x * std).collect()
}
