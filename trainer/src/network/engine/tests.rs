//! Gradients of passes against each other and against difference quotients.

use cluster::Group;
use flow::models::transformer::image_ids;
use flow::noise::Noise;
use tch::{Device, Kind};

use super::*;
use crate::tensor::device::Compute;
use crate::tensor::parameters::{Gradient, Mesh, Storage};

fn config(depth: usize) -> TransformerConfig {
    let mut config = TransformerConfig::default();
    config.in_channels = 8;
    config.num_layers = depth;
    config.num_single_layers = 2 * depth;
    config.attention_head_dim = 8;
    config.num_attention_heads = 2;
    config.joint_attention_dim = 6;
    config.pooled_projection_dim = 5;
    config.guidance_embeds = true;
    config.axes_dims_rope = vec![2, 2, 4];
    config
}

fn normal(stream: u64, shape: &[i64]) -> Tensor {
    let n = shape.iter().product::<i64>() as usize;
    Tensor::from_slice(&Noise::new(2).normal(stream, n)).reshape(shape)
}

fn engine(depth: usize) -> Engine {
    engine_in(depth, Storage::Trainable(Group::alone()))
}

fn engine_in(depth: usize, storage: Storage) -> Engine {
    let config = config(depth);
    let mut stream = 100;
    let mut parameters =
        Parameters::build(&segments(&config), Compute::CPU, storage, |_, shape| {
            stream += 1;
            let n = shape.iter().product();
            Ok(Tensor::from_slice(&Noise::new(5).normal(stream, n)) * 0.2)
        })
        .unwrap();
    parameters.train();
    Engine::new(config, parameters)
}

fn condition() -> Condition {
    Condition {
        text: normal(1, &[3, 5, 6]),
        pooled: normal(2, &[3, 5]),
        guidance: Tensor::full([3], 3.5, (Kind::Float, Device::Cpu)),
        img_ids: Tensor::from_slice(&image_ids(2, 3)).reshape([-1, 3]),
    }
}

/// One flat gradient a segment.
fn taken(engine: &Engine) -> Vec<Tensor> {
    let flat = |parts: &Vec<Gradient>| {
        Tensor::cat(&parts.iter().map(|part| &part.values).collect::<Vec<&Tensor>>(), 0)
    };
    engine.trained().take_gradients().unwrap().iter().map(flat).collect()
}

fn gradients_of(engine: &mut Engine, recompute: bool) -> Vec<Tensor> {
    engine.recompute = recompute;
    let (x_t, t) = (normal(3, &[3, 6, 8]), Tensor::from_slice(&[0.2f32, 0.5, 0.9]));
    let gradient = |v: &Tensor| Ok(v * 2.0 + normal(4, &[3, 6, 8]));
    engine.forward_backward(&x_t, &t, &condition(), gradient).unwrap();
    taken(engine)
}

#[test]
fn segments_hold_every_parameter_once() {
    let config = config(2);
    let whole: usize = segments(&config).iter().map(Manifest::n_elements).sum();
    let dry = Shapes::new();
    let scalar = vec![1];
    config.forward(
        &dry,
        &Inputs {
            hidden_states: &vec![1, 2, 8],
            encoder_hidden_states: &vec![1, 3, 6],
            pooled_projections: &vec![1, 5],
            timestep: &scalar,
            img_ids: &vec![2, 3],
            txt_ids: &vec![3, 3],
            guidance: Some(&scalar),
        },
    );
    assert_eq!(whole, dry.manifest().n_elements());
    assert_eq!(segments(&config).len(), 2 + config.n_blocks());
}

#[test]
fn blockwise_gradients_are_the_plain_ones() {
    let mut held = engine(2);
    let plain = gradients_of(&mut held, false);
    let blockwise = gradients_of(&mut held, true);
    let mesh = Mesh::flat(&Group::alone());
    let mut divided = engine_in(2, Storage::Divided { mesh, trains: true });
    // Sums over passes: twice the same.
    let once = gradients_of(&mut divided, false);
    let (x_t, t) = (normal(3, &[3, 6, 8]), Tensor::from_slice(&[0.2f32, 0.5, 0.9]));
    for _ in 0..2 {
        let gradient = |v: &Tensor| Ok(v * 2.0 + normal(4, &[3, 6, 8]));
        divided.forward_backward(&x_t, &t, &condition(), gradient).unwrap();
    }
    let twice: Vec<Tensor> = taken(&divided).into_iter().map(|sum| sum / 2.0).collect();
    for (how, found) in [("blockwise", blockwise), ("divided", once), ("twice", twice)] {
        for (segment, (a, b)) in plain.iter().zip(&found).enumerate() {
            let scale = a.abs().max().double_value(&[]);
            let difference = (a - b).abs().max().double_value(&[]);
            assert!(scale > 0.0, "segment {segment} has no gradient");
            assert!(
                difference <= 1e-6 * scale,
                "{how}, segment {segment}: {difference:e} of {scale:e}"
            );
        }
    }
}

/// Exchanged with others and back, as an average is that is looked at.
#[test]
fn divided_weights_are_exchanged() {
    let mesh = Mesh::flat(&Group::alone());
    let divided = engine_in(1, Storage::Divided { mesh, trains: true });
    let (x_t, t) = (normal(3, &[3, 6, 8]), Tensor::from_slice(&[0.2f32, 0.5, 0.9]));
    let velocity = || divided.velocity(&x_t, &t, &condition()).unwrap();
    let before = velocity();
    let trained = divided.trained();
    let halves = trained.others(trained.masters().map(|master| master * 0.5).collect());
    trained.exchange(&halves);
    let other = velocity();
    trained.exchange(&halves);
    assert!(velocity().equal(&before) && !other.equal(&before));
    let held = engine(1);
    held.trained().assign(&halves.flats).unwrap();
    let expected = no_grad(|| held.forward(&x_t, &t, &condition()).unwrap());
    assert!(other.allclose(&expected, 1e-6, 1e-7, false));
}

#[test]
fn a_gradient_agrees_with_a_difference_quotient() {
    let mut engine = engine(1);
    let (x_t, t) = (normal(3, &[3, 6, 8]), Tensor::from_slice(&[0.2f32, 0.5, 0.9]));
    let condition = condition();
    let value = |engine: &Engine| {
        let v = engine.velocity(&x_t, &t, &condition).unwrap().to_kind(Kind::Double);
        (v.square().sum(Kind::Double) * 0.5).double_value(&[])
    };
    engine.recompute = true;
    engine.forward_backward(&x_t, &t, &condition, |v| Ok(v.shallow_clone())).unwrap();
    let gradients = taken(&engine);
    for (segment, gradient) in gradients.iter().enumerate() {
        let master = engine.trained().segments[segment].master.shallow_clone();
        let direction = gradient / gradient.norm();
        let slope = gradient.norm().double_value(&[]);
        let h = 1e-2 / slope.max(1.0);
        let moved = |by: f64| {
            no_grad(|| {
                let _ = master.shallow_clone().g_add_(&(&direction * by));
            });
            engine.trained().refresh().unwrap();
            value(&engine)
        };
        let (ahead, behind) = (moved(h), moved(-2.0 * h));
        moved(h);
        let quotient = (ahead - behind) / (2.0 * h);
        assert!((quotient - slope).abs() < 0.02 * slope, "segment {segment}: {quotient} {slope}");
    }
}

#[test]
fn samples_of_a_batch_do_not_mix() {
    let engine = engine(1);
    let (x_t, t) = (normal(3, &[3, 6, 8]), Tensor::from_slice(&[0.2f32, 0.5, 0.9]));
    let condition = condition();
    let together = engine.velocity(&x_t, &t, &condition).unwrap();
    let second = Tensor::from_slice(&[1i64]);
    let alone = engine.velocity(
        &x_t.index_select(0, &second),
        &t.index_select(0, &second),
        &condition.rows(&second),
    );
    let alone = alone.unwrap();
    let difference = (together.get(1) - alone.get(0)).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "{difference:e}");
}
