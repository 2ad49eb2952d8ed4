//! Small networks recorded, written and run by ONNX Runtime, against loops in f64.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use flow::checkpoint::{Entry, Weights, write_tensors};
use flow::nn;
use flow::noise::Noise;
use flow::ops::{Conv, Dim, Gelu, Mask, Ops, ParamPath};
use onnx::{Model, Options, Tensor};
use prost::Message;

use super::{Builder, Kind, Size, Value};
use crate::element::Float;
use crate::external::{self, MODEL_FILE, Mode, Output, Placement};
use crate::part::Part;
use crate::precision::Choice;
use crate::proto::ModelProto;
use crate::target::Target;

/// A shape and its values, row-major.
type Array = (Vec<usize>, Vec<f32>);

fn random(stream: u64, shape: &[usize]) -> Array {
    (shape.to_vec(), Noise::new(7).normal(stream, shape.iter().product()))
}

/// A graph whose inputs are `x0`, `x1`, … and whose outputs are `y0`, `y1`, …, and its weights.
struct Case {
    builder: Builder,
    fed: Vec<(String, Tensor)>,
    weights: Vec<(String, Array)>,
}

impl Case {
    fn new() -> Self {
        Self::of(&Choice::default())
    }

    fn of(choice: &Choice) -> Self {
        let dialect = choice.dialect(Part::Transformer).expect("a choice that is possible");
        Self { builder: Builder::new(dialect), fed: Vec::new(), weights: Vec::new() }
    }

    /// In f32 for each target.
    fn each() -> impl Iterator<Item = Self> {
        let targets = Target::value_variants().iter();
        targets.map(|&target| Self::of(&Choice { target, ..Choice::default() }))
    }

    fn floats(&mut self, array: &Array) -> Value {
        self.feed(Kind::Float(Float::F32), Tensor::f32(array.0.clone(), array.1.clone()).unwrap())
    }

    fn integers(&mut self, shape: &[usize], values: &[i64]) -> Value {
        self.feed(Kind::Integer, Tensor::i64(shape, values.to_vec()).unwrap())
    }

    fn feed(&mut self, kind: Kind, tensor: Tensor) -> Value {
        let name = format!("x{}", self.fed.len());
        let open: Vec<_> =
            (0..tensor.shape.len()).map(|axis| Size::Open(format!("{name}_{axis}"))).collect();
        let value = self.builder.input(&name, kind, &open);
        self.fed.push((name, tensor));
        value
    }

    fn weight(&mut self, name: &str, stream: u64, shape: &[usize]) -> Vec<f32> {
        let array = random(stream, shape);
        self.weights.push((name.to_owned(), array.clone()));
        array.1
    }

    fn run(self, outputs: &[Value]) -> Result<Vec<Tensor>> {
        let folder = tempfile::tempdir()?;
        let entries: Vec<_> = self
            .weights
            .iter()
            .map(|(name, (shape, values))| Entry::f32(name, shape, values))
            .collect();
        write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
        let weights = Weights::open(folder.path(), "w")?;
        let names: Vec<_> = (0..outputs.len()).map(|i| format!("y{i}")).collect();
        // The rank of an output is left to the runtime: its shape is part of what is tested.
        let outputs = names.iter().zip(outputs).map(|(n, v)| (n.as_str(), *v, vec![]));
        let mut graph = self.builder.finish(&outputs.collect::<Vec<_>>());
        for port in &mut graph.outputs {
            let tensor = port.r#type.as_mut().and_then(|kind| kind.tensor_type.as_mut());
            tensor.expect("a tensor").shape = None;
        }
        external::write(&output(folder.path(), &[]), graph, &weights, &mut |_| Ok(()))?;
        let mut model = Model::open(folder.path().join(MODEL_FILE), &Options::default())?;
        let fed: Vec<_> = self.fed.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        model.run(&fed, &names.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn output<'a>(folder: &'a Path, metadata: &'a [(&'a str, String)]) -> Output<'a> {
    Output { folder, name: "case", placement: Placement::Copied, metadata, mode: Mode::Written }
}

#[track_caller]
fn assert_close(tensor: &Tensor, shape: &[usize], expected: &[f64]) {
    assert_eq!(tensor.shape, shape);
    let found = tensor.as_f32().unwrap();
    let scale = expected.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - b).abs() <= 1e-5 * scale, "element {i} of {shape:?}: {a} for {b}");
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

fn path(name: &str) -> ParamPath {
    ParamPath::root().at(name)
}

#[test]
fn linear_layers_multiply_by_the_transposed_weight() -> Result<()> {
    for target in [Target::Cpu, Target::TensorRt] {
        products_of(target)?;
    }
    Ok(())
}

fn products_of(target: Target) -> Result<()> {
    // One weight inside the graph's file, one beside it; neither size fills a tile.
    for (n_in, n_out, bias) in [(5, 7, true), (45, 70, false)] {
        let mut case = Case::of(&Choice { target, ..Choice::default() });
        let x = random(1, &[2, 3, n_in]);
        let weight = wide(&case.weight("layer.weight", 2, &[n_out, n_in]));
        let b = if bias { wide(&case.weight("layer.bias", 3, &[n_out])) } else { vec![0.0; n_out] };
        let input = case.floats(&x);
        let y = case.builder.linear(&path("layer"), &input, n_in, n_out, bias);
        let x = wide(&x.1);
        let expected: Vec<f64> = x
            .chunks(n_in)
            .flat_map(|row| {
                weight.chunks(n_in).zip(&b).map(|(w, b)| b + dot(row, w)).collect::<Vec<_>>()
            })
            .collect();
        assert_close(&case.run(&[y])?[0], &[2, 3, n_out], &expected);
    }
    Ok(())
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Tokens whose heads are `[B, H, S, D]`.
fn heads(case: &mut Case, array: &Array) -> Value {
    let (h, d) = (array.0[1], array.0[3]);
    let x = case.floats(array);
    let ops = &case.builder;
    let tokens =
        ops.reshape(&ops.permute(&x, &[0, 2, 1, 3]), &[Dim::Keep, Dim::Keep, Dim::Is(h * d)]);
    nn::split_heads(ops, &tokens, h, d)
}

#[test]
fn attention_sees_what_its_mask_allows() -> Result<()> {
    for case in Case::each() {
        attention_of(case)?;
    }
    Ok(())
}

fn attention_of(mut case: Case) -> Result<()> {
    let (b, h, s, d, scale) = (2, 3, 5, 4, 0.7);
    let [q, k, v] = [1, 2, 3].map(|stream| random(stream, &[b, h, s, d]));
    let bias = random(4, &[1, h, s, s]);
    let inputs = [&q, &k, &v].map(|array| heads(&mut case, array));
    let added = case.floats(&bias);
    let masks = [Mask::None, Mask::Causal, Mask::Bias(&added)];
    let outputs =
        masks.map(|mask| case.builder.attention(&inputs[0], &inputs[1], &inputs[2], scale, mask));
    let results = case.run(&outputs)?;
    let (q, k, v, bias) = (wide(&q.1), wide(&k.1), wide(&v.1), wide(&bias.1));
    for (kind, result) in results.iter().enumerate() {
        let mut expected = Vec::new();
        for (row, query) in q.chunks(d).enumerate() {
            let (head, i) = (row / s, row % s);
            let seen = if kind == 1 { i + 1 } else { s };
            let weight = |j: usize| {
                let score = scale * dot(query, &k[(head * s + j) * d..][..d]);
                (score + if kind == 2 { bias[(head % h * s + i) * s + j] } else { 0.0 }).exp()
            };
            let total: f64 = (0..seen).map(weight).sum();
            expected.extend((0..d).map(|c| {
                (0..seen).map(|j| weight(j) * v[(head * s + j) * d + c]).sum::<f64>() / total
            }));
        }
        assert_close(result, &[b, h, s, d], &expected);
    }
    Ok(())
}

#[test]
fn rotary_embedding_turns_neighbouring_pairs() -> Result<()> {
    for case in Case::each() {
        rotation_of(case)?;
    }
    Ok(())
}

fn rotation_of(mut case: Case) -> Result<()> {
    let (b, h, s, axes, theta) = (2, 3, 4, [4, 2, 6], 10_000.0f64);
    let d: usize = axes.iter().sum();
    let x = random(1, &[b, h, s, d]);
    let ids: Array = (vec![s, 3], (0..s * 3).map(|i| (i * i % 61) as f32).collect());
    let (input, positions) = (heads(&mut case, &x), case.floats(&ids));
    let table = case.builder.rope_table(&positions, &axes, theta, &input);
    let turned = case.builder.rope(&input, &table);
    let lying = case.builder.rope(&case.builder.straight(input), &table);
    let results = case.run(&[turned, table.cos, lying])?;
    let angles: Vec<f64> = (0..s)
        .flat_map(|row| {
            let ids = &ids.1;
            axes.into_iter().enumerate().flat_map(move |(axis, dim)| {
                (0..dim / 2).map(move |i| {
                    f64::from(ids[row * 3 + axis]) * theta.powf(-((2 * i) as f64) / dim as f64)
                })
            })
        })
        .collect();
    let expected: Vec<f64> =
        x.1.chunks(2)
            .enumerate()
            .flat_map(|(pair, x)| {
                let (sin, cos) = angles[pair % (s * d / 2)].sin_cos();
                let (x0, x1) = (f64::from(x[0]), f64::from(x[1]));
                [x0 * cos - x1 * sin, x0 * sin + x1 * cos]
            })
            .collect();
    assert_close(&results[0], &[b, h, s, d], &expected);
    assert_close(&results[2], &[b, h, s, d], &expected);
    let cosines: Vec<f64> = angles.iter().cycle().take(b * angles.len()).map(|a| a.cos()).collect();
    assert_close(&results[1], &[b, s, d / 2], &cosines);
    Ok(())
}

/// (x − mean)/√(var + eps) of each chunk of `n`, or without the mean.
fn normalised(x: &[f64], n: usize, centred: bool, eps: f64) -> Vec<f64> {
    x.chunks(n)
        .flat_map(|row| {
            let mean = if centred { row.iter().sum::<f64>() / n as f64 } else { 0.0 };
            let power = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
            row.iter().map(|x| (x - mean) / (power + eps).sqrt()).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn normalisations_use_their_own_axes() -> Result<()> {
    for case in Case::each() {
        normalisations_of(case)?;
    }
    Ok(())
}

fn normalisations_of(mut case: Case) -> Result<()> {
    let (width, eps) = (6, 1e-3);
    let x = random(1, &[2, width, 4, width]);
    let mut weight = |name, stream| wide(&case.weight(name, stream, &[width])).into_iter().cycle();
    let (rms_weight, layer_weight, layer_bias, group_weight, group_bias) = (
        weight("rms.weight", 2),
        weight("layer.weight", 3),
        weight("layer.bias", 4),
        weight("group.weight", 5),
        weight("group.bias", 6),
    );
    let input = case.floats(&x);
    let outputs = [
        case.builder.rms_norm(&path("rms"), &input, width, eps),
        case.builder.layer_norm(&input, width, Some(&path("layer")), eps),
        case.builder.layer_norm(&input, width, None, eps),
        case.builder.group_norm(&path("group"), &input, 2, width, eps),
    ];
    let results = case.run(&outputs)?;
    let (shape, x) = (x.0, wide(&x.1));
    let rms = normalised(&x, width, false, eps).into_iter().zip(rms_weight).map(|(x, w)| x * w);
    assert_close(&results[0], &shape, &rms.collect::<Vec<_>>());
    let plain = normalised(&x, width, true, eps);
    let layer = plain.iter().zip(layer_weight.zip(layer_bias)).map(|(x, (w, b))| x * w + b);
    assert_close(&results[1], &shape, &layer.collect::<Vec<_>>());
    assert_close(&results[2], &shape, &plain);
    let cells = 4 * width;
    let repeated = group_weight.zip(group_bias).flat_map(|pair| vec![pair; cells]);
    let group = normalised(&x, width / 2 * cells, true, eps);
    let group: Vec<_> = group.into_iter().zip(repeated).map(|(x, (w, b))| x * w + b).collect();
    assert_close(&results[3], &shape, &group);
    Ok(())
}

#[test]
fn convolution_pads_each_side_on_its_own() -> Result<()> {
    let (c_in, c_out, n) = (2, 3, 4);
    let x = random(1, &[1, c_in, n, n]);
    let mut case = Case::new();
    let weight = wide(&case.weight("conv.weight", 2, &[c_out, c_in, 3, 3]));
    let bias = wide(&case.weight("conv.bias", 3, &[c_out]));
    let input = case.floats(&x);
    let conv = Conv { c_in, c_out, kernel: 3, stride: 2, padding: [0, 0, 1, 1], bias: true };
    let outputs = [conv, Conv { bias: false, ..conv }]
        .map(|conv| case.builder.conv2d(&path("conv"), &input, conv));
    let x = wide(&x.1);
    let (mut expected, mut unbiased) = (Vec::new(), Vec::new());
    for out in 0..c_out {
        for (row, column) in [(0, 0), (0, 2), (2, 0), (2, 2)] {
            let mut sum = 0.0;
            for (i, w) in weight[out * c_in * 9..][..c_in * 9].iter().enumerate() {
                let (channel, y, x_at) = (i / 9, row + i % 9 / 3, column + i % 3);
                if y < n && x_at < n {
                    sum += w * x[(channel * n + y) * n + x_at];
                }
            }
            expected.push(sum + bias[out]);
            unbiased.push(sum);
        }
    }
    let results = case.run(&outputs)?;
    assert_close(&results[0], &[1, c_out, 2, 2], &expected);
    assert_close(&results[1], &[1, c_out, 2, 2], &unbiased);
    Ok(())
}

#[test]
fn elementwise_functions() -> Result<()> {
    let x: Array = (vec![9], (-4..=4).map(|i| i as f32 * 0.75).collect());
    let mut case = Case::new();
    let input = case.floats(&x);
    let ops = &case.builder;
    let outputs = [
        ops.gelu(&input, Gelu::Exact),
        ops.gelu(&input, Gelu::Tanh),
        ops.silu(&input),
        ops.affine(&input, 3.0, -2.0),
        ops.cos(&input),
        ops.sin(&input),
    ];
    let results = case.run(&outputs)?;
    let tanh_gelu = |x: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
        0.5 * x * (1.0 + inner.tanh())
    };
    let functions: [&dyn Fn(f64) -> f64; 6] = [
        &|x| x * normal_cdf(x),
        &tanh_gelu,
        &|x| x / (1.0 + (-x).exp()),
        &|x| 3.0 * x - 2.0,
        &f64::cos,
        &f64::sin,
    ];
    for (result, function) in results.iter().zip(functions) {
        let expected: Vec<_> = wide(&x.1).into_iter().map(function).collect();
        assert_close(result, &[9], &expected);
    }
    Ok(())
}

/// Φ(x) by the midpoint rule on its density.
fn normal_cdf(x: f64) -> f64 {
    let n = 20_000;
    let dx = x / f64::from(n);
    let density = |i: i32| (-0.5 * ((f64::from(i) + 0.5) * dx).powi(2)).exp();
    0.5 + (0..n).map(density).sum::<f64>() * dx / (2.0 * std::f64::consts::PI).sqrt()
}

#[test]
fn shapes_follow_the_input() -> Result<()> {
    let x: Array = (vec![1, 2, 2, 3], (0..12).map(|i| i as f32).collect());
    let short: Array = (vec![9, 1], vec![0.0; 9]);
    let mut case = Case::new();
    let (input, short) = (case.floats(&x), case.floats(&short));
    let ops = &case.builder;
    let flat = ops.reshape(&input, &[Dim::Keep, Dim::Infer]);
    let parts = ops.split(&input, 2, 2);
    let joined = ops.concat(&[&parts[1], &parts[0]], 2);
    let (head, tail) = ops.split_after(&flat, &ops.permute(&short, &[1, 0]), 1);
    let turned = ops.permute(&input, &[0, 3, 1, 2]);
    let restored = ops.reshape_like(&ops.affine(&flat, -1.0, 0.0), &input);
    let added = ops.unsqueeze(&tail, 1);
    let doubled = ops.upsample2(&parts[0]);
    let results = case.run(&[flat, joined, head, tail, turned, restored, added, doubled])?;
    let expected: [(&[usize], &[f64]); 8] = [
        (&[1, 12], &[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]),
        (&[1, 2, 2, 3], &[3., 4., 5., 0., 1., 2., 9., 10., 11., 6., 7., 8.]),
        (&[1, 9], &[0., 1., 2., 3., 4., 5., 6., 7., 8.]),
        (&[1, 3], &[9., 10., 11.]),
        (&[1, 3, 2, 2], &[0., 3., 6., 9., 1., 4., 7., 10., 2., 5., 8., 11.]),
        (&[1, 2, 2, 3], &[0., -1., -2., -3., -4., -5., -6., -7., -8., -9., -10., -11.]),
        (&[1, 1, 3], &[9., 10., 11.]),
        (
            &[1, 2, 2, 6],
            &[
                0., 0., 1., 1., 2., 2., 0., 0., 1., 1., 2., 2., 6., 6., 7., 7., 8., 8., 6., 6., 7.,
                7., 8., 8.,
            ],
        ),
    ];
    for (result, (shape, values)) in results.iter().zip(expected) {
        assert_close(result, shape, values);
    }
    Ok(())
}

#[test]
fn integers_index() -> Result<()> {
    let mut case = Case::new();
    let ids = case.integers(&[3, 4], &[5, 9, 2, 9, 0, 1, 2, 3, 7, 7, 7, 7]);
    let table: Array = (vec![10, 2], (0..20).map(|i| i as f32).collect());
    let (rows, x) = (case.floats(&table), case.floats(&random(1, &[3, 4, 2])));
    let ops = &case.builder;
    let limited = ops.clamp(&ids, 2, 7);
    let found = ops.first_match(&ids, 2);
    let picked = ops.select_rows(&ops.gather(&rows, &ids), &found);
    let shifted = ops.add(&limited, &ops.integers(&[1], &[1]));
    let distance = ops.sub(&shifted, &ids);
    let positions = ops.positions(&x, 1);
    let outputs = [limited, ops.argmax(&ids), found, distance, positions, picked];
    let results = case.run(&outputs)?;
    assert_eq!(results[0].as_i64()?, [5, 7, 2, 7, 2, 2, 2, 3, 7, 7, 7, 7]);
    assert_eq!(results[1].as_i64()?, [1, 3, 0], "the first of equal maxima");
    assert_eq!(results[2].as_i64()?, [2, 2, 0], "0 where there is none");
    assert_eq!(results[3].as_i64()?, [1, -1, 1, -1, 3, 2, 1, 1, 1, 1, 1, 1]);
    assert_eq!(results[4].as_i64()?, [0, 1, 2, 3]);
    assert_close(&results[5], &[3, 2], &[4., 5., 4., 5., 14., 15.]);
    Ok(())
}

#[test]
fn a_graph_holds_what_its_outputs_need_once_and_named_by_path() {
    let ops = Builder::default();
    let x = ops.input("x", Kind::Float(Float::F32), &["batch".into(), 4.into()]);
    let once = ops.silu(&x);
    assert_eq!(ops.silu(&x), once);
    let y = ops.linear(&path("block.0.proj"), &once, 4, 4, true);
    ops.linear(&path("unused"), &x, 4, 4, true);
    let twice = [ops.affine(&y, 2.0, 0.5), ops.affine(&once, 2.0, 0.5)];
    let sum = ops.add(&twice[0], &twice[1]);
    let graph = ops.finish(&[("y", sum, vec!["batch".into(), 4.into()])]);
    let names: Vec<_> = graph.nodes.iter().filter_map(|node| node.name.as_deref()).collect();
    assert_eq!(&names[..4], ["Sigmoid_1", "Mul_1", "Reshape_1", "block.0.proj/Gemm"]);
    assert_eq!(names.len(), 12, "{names:?}");
    assert_eq!(graph.constants.len(), 4, "2 and 0.5, shapes of rows and of the width");
    let parameters: Vec<_> = graph.parameters.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(parameters, ["block.0.proj.bias", "block.0.proj.weight"]);
    assert_eq!(graph.nodes.last().map(|node| node.output.clone()), Some(vec!["y".to_owned()]));
}

#[test]
fn a_written_model_decodes_to_what_was_recorded() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let entries = [Entry::f32("table", &[2], &[1.0, 2.0])];
    write_tensors(&folder.path().join("w.safetensors"), &entries, &[])?;
    let ops = Builder::default();
    let x = ops.input("x", Kind::Float(Float::F32), &["batch".into(), 2.into()]);
    let kept = ops.permute(&ops.add(&x, &ops.param(&path("table"), &[2])), &[0, 1]);
    let graph = ops.finish(&[("y", kept, vec!["batch".into(), 2.into()])]);
    let weights = Weights::open(folder.path(), "w")?;
    let metadata = [("component", "sum".to_owned())];
    let output = output(folder.path(), &metadata);
    external::write(&output, graph.clone(), &weights, &mut |_| Ok(()))?;
    let model = ModelProto::decode(std::fs::read(folder.path().join(MODEL_FILE))?.as_slice())?;
    assert_eq!((model.ir_version, model.opset_import[0].version), (Some(11), Some(23)));
    assert_eq!(model.metadata_props[0].key.as_deref(), Some("component"));
    let decoded = model.graph.expect("a graph");
    assert_eq!(decoded.node, graph.nodes);
    assert_eq!((decoded.input, decoded.output), (graph.inputs, graph.outputs));
    assert_eq!(decoded.initializer[0].raw_data, Some([1f32, 2.0].map(f32::to_le_bytes).concat()));
    let perm = &decoded.node[1].attribute[0];
    assert_eq!((perm.r#type, perm.ints.as_slice()), (Some(7), [0, 1].as_slice()));
    Ok(())
}
