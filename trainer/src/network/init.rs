//! Random weights, for a network that has none yet.

use flow::noise::Noise;
use flow::pipeline::Component;
use tch::{Device, Tensor};

/// Numbers drawn for one tensor; a larger one repeats them, so that billions are quickly there.
const MAX_DRAWN: usize = 1 << 20;

/// The first noise stream of a component's parameters; they are numbered in manifest order.
pub(crate) fn stream_of(component: Component) -> u64 {
    ((component as u64) << 32) + 1
}

/// Initial values for training: [`value`], but zeros where FLUX's adaptive normalisation and outputs start
/// closed.
pub(crate) fn closed_value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let closed = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"];
    if name.starts_with("proj_out.") || closed.iter().any(|part| name.contains(part)) {
        return vec![0.0; shape.iter().product()];
    }
    value(noise, stream, name, shape)
}

/// Values of parameter `name`, drawn from `stream` of the seed's noise: zeros for biases, ones for norms,
/// small normals elsewhere.
pub(crate) fn value(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    let period = drawn(noise, stream, name, shape);
    period.iter().copied().cycle().take(shape.iter().product()).collect()
}

/// [`value`], flat, put together on `device`.
pub(crate) fn value_on(
    device: Device,
    noise: Noise,
    stream: u64,
    name: &str,
    shape: &[usize],
) -> Tensor {
    let n = shape.iter().product::<usize>();
    let period = drawn(noise, stream, name, shape);
    let n_periods = n.div_ceil(period.len()) as i64;
    Tensor::from_slice(&period).to_device(device).repeat([n_periods]).narrow(0, 0, n as i64)
}

/// What a parameter's values repeat.
fn drawn(noise: Noise, stream: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    if name.rsplit('.').next() == Some("bias") {
        return vec![0.0];
    }
    if shape.len() == 1 {
        return vec![1.0];
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
    let n = shape.iter().product::<usize>().min(MAX_DRAWN);
    noise.normal(stream, n).into_iter().map(|x| x * std).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_the_same_wherever_they_are_put_together() {
        let noise = Noise::new(4);
        for (name, shape) in [
            ("x.weight", &[1025, 1030][..]),
            ("x.bias", &[7]),
            ("norm.weight", &[7]),
            ("x.weight", &[2, 3]),
        ] {
            let here = value(noise, 3, name, shape);
            let there = value_on(Device::Cpu, noise, 3, name, shape);
            assert_eq!(here, Vec::<f32>::try_from(&there).unwrap(), "{name} {shape:?}");
        }
    }
}
