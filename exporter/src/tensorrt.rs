//! TensorRT as it is: what builds engines of a graph, and an engine as an ONNX file.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flow::checkpoint::{open_for_reading, read_bounded};
use flow::pipeline::Pipeline;
use flow::usage::Usage;
use prost::Message;

use crate::external::{MODEL_FILE, write_model};
use crate::graph::EXTENSIONS;
use crate::part::Part;
use crate::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto,
};

/// How engines of TensorRT for data centres begin.
const MAGIC: [&[u8]; 2] = [b"ftrt", b"ptrt"];
/// How engines of TensorRT for RTX begin.
const RTX_MAGIC: &[u8] = b"vtrt";
/// The providers of ONNX Runtime that read wrapped engines, of data centres and of TensorRT for RTX; any other
/// source is skipped by them.
const SOURCE: &str = "TensorrtExecutionProvider";
const RTX_SOURCE: &str = "NvTensorRTRTXExecutionProvider";
/// Compute capabilities of data-centre GPUs, on which TensorRT for RTX does not run.
const DATA_CENTRE: [u32; 3] = [90, 100, 103];
/// Side in pixels of the smallest image of a profile.
const SMALLEST: usize = 256;
/// Text tokens of every profile.
const TEXT: usize = 512;

/// The command that builds an engine of the transformer in `folder` on the machine that will run it: images
/// from [`SMALLEST`] pixels to `side`, `batch` at most at once.
pub fn build_command(folder: &Path, pipeline: &Pipeline, side: usize, batch: usize) -> String {
    let config = &pipeline.transformer;
    let tokens = |side: usize| (side / (2 * pipeline.vae.factor()).max(1)).pow(2).max(1);
    let shapes = |batch: usize, side: usize| {
        let s = tokens(side);
        let mut shapes = vec![
            format!("hidden_states:{batch}x{s}x{}", config.in_channels),
            format!("encoder_hidden_states:{batch}x{TEXT}x{}", config.joint_attention_dim),
            format!("pooled_projections:{batch}x{}", config.pooled_projection_dim),
            format!("timestep:{batch}"),
            format!("txt_ids:{TEXT}x3"),
            format!("img_ids:{s}x3"),
        ];
        if config.guidance_embeds {
            shapes.push(format!("guidance:{batch}"));
        }
        shapes.join(",")
    };
    let graph = folder.join(Part::Transformer.folder()).join(MODEL_FILE);
    format!(
        "trtexec --onnx={} --stronglyTyped --minShapes={} --optShapes={} --maxShapes={} --saveEngine={}",
        graph.display(),
        shapes(1, SMALLEST.min(side)),
        shapes(1, side),
        shapes(batch, side),
        graph.with_extension("plan").display()
    )
}

/// Writes `target`, an ONNX model that is the engine `plan`: inputs and outputs of `graph`, from which it
/// was built for GPUs of compute capability `architecture` (90 is Hopper).
///
/// # Errors
/// When the plan is no engine, does not lie beside or below the target, is of TensorRT for RTX but the architecture
/// is not, or a file cannot be read or written.
pub fn wrap(plan: &Path, graph: &Path, architecture: u32, target: &Path) -> Result<()> {
    let read = |path: &Path| format!("cannot read {}", path.display());
    let is_rtx = is_rtx(plan)?;
    ensure!(
        !is_rtx || !DATA_CENTRE.contains(&architecture),
        Usage(format!(
            "{} is an engine of TensorRT for RTX: it runs on consumer GPUs, never on H100, H800 or H200: give its \
             own --architecture",
            plan.display()
        ))
    );
    let home = target.parent().filter(|home| !home.as_os_str().is_empty());
    let home = home.unwrap_or(Path::new(".")).canonicalize().with_context(|| read(target))?;
    let whole = plan.canonicalize().with_context(|| read(plan))?;
    let Ok(relative) = whole.strip_prefix(&home) else {
        bail!(Usage(format!(
            "{} does not lie beside or below {}: the model names it by a path that may not leave its folder",
            plan.display(),
            target.display()
        )));
    };
    ensure!(!target.exists(), "{} exists: choose another --out", target.display());
    let bytes = read_bounded(graph).with_context(|| read(graph))?;
    let model = ModelProto::decode(bytes.as_slice()).with_context(|| read(graph))?;
    let built = model.graph.with_context(|| format!("{} holds no graph", graph.display()))?;
    let is_weight = |port: &ValueInfoProto| built.initializer.iter().any(|t| t.name == port.name);
    let input: Vec<_> = built.input.iter().filter(|port| !is_weight(port)).cloned().collect();
    let names = |ports: &[ValueInfoProto]| ports.iter().filter_map(|p| p.name.clone()).collect();
    let node = NodeProto {
        input: names(&input),
        output: names(&built.output),
        name: Some("engine".into()),
        op_type: Some("EPContext".into()),
        attribute: vec![
            AttributeProto::int("main_context", 1),
            AttributeProto::int("embed_mode", 0),
            AttributeProto::text("ep_cache_context", &relative.to_string_lossy()),
            AttributeProto::text("hardware_architecture", &architecture.to_string()),
            AttributeProto::text("source", if is_rtx { RTX_SOURCE } else { SOURCE }),
        ],
        domain: Some(EXTENSIONS.into()),
    };
    let wrapped = ModelProto {
        graph: Some(GraphProto {
            node: vec![node],
            name: built.name,
            initializer: Vec::new(),
            input,
            output: built.output,
        }),
        opset_import: vec![OperatorSetIdProto::new("", 23), OperatorSetIdProto::new(EXTENSIONS, 1)],
        functions: Vec::new(),
        ..model
    };
    write_model(target, &wrapped)?;
    Ok(())
}

/// Whether the engine `plan` is of TensorRT for RTX.
fn is_rtx(plan: &Path) -> Result<bool> {
    let read = || format!("cannot read {}", plan.display());
    let mut start = Vec::new();
    let file = open_for_reading(plan).with_context(read)?;
    file.take(RTX_MAGIC.len() as u64).read_to_end(&mut start).with_context(read)?;
    let is_rtx = start == RTX_MAGIC;
    ensure!(
        is_rtx || MAGIC.contains(&start.as_slice()),
        "{} is no engine: those of TensorRT begin with ftrt, those of TensorRT for RTX with vtrt: give the file \
         that trtexec or ng-engine saved",
        plan.display()
    );
    Ok(is_rtx)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::proto::TensorProto;

    fn port(name: &str) -> ValueInfoProto {
        ValueInfoProto { name: Some(name.into()), ..ValueInfoProto::default() }
    }

    #[test]
    fn an_engine_becomes_one_node() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        let graph = GraphProto {
            initializer: vec![TensorProto { name: Some("w".into()), ..TensorProto::default() }],
            input: vec![port("x"), port("w")],
            output: vec![port("y")],
            ..GraphProto::default()
        };
        write_model(&at("model.onnx"), &ModelProto { graph: Some(graph), ..Default::default() })
            .unwrap();
        fs::create_dir(at("engines")).unwrap();
        fs::write(at("engines/a.plan"), b"ftrt and the rest").unwrap();
        let wrapped = at("model_ctx.onnx");
        wrap(&at("engines/a.plan"), &at("model.onnx"), 90, &wrapped).unwrap();
        let model = ModelProto::decode(fs::read(&wrapped).unwrap().as_slice()).unwrap();
        let node = model.graph.unwrap().node.remove(0);
        assert_eq!((node.input, node.output), (vec!["x".into()], vec!["y".to_owned()]));
        let text = |name: &str| {
            let found = node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
            String::from_utf8(found.unwrap().s.clone().unwrap()).unwrap()
        };
        assert_eq!(text("ep_cache_context"), "engines/a.plan");
        assert_eq!(text("hardware_architecture"), "90");

        let again = wrap(&at("engines/a.plan"), &at("model.onnx"), 90, &wrapped);
        assert!(again.unwrap_err().to_string().contains("exists"));
        let outside = wrap(&at("engines/a.plan"), &at("model.onnx"), 90, &at("engines/b/c.onnx"));
        assert!(outside.is_err());
        fs::create_dir(at("engines/b")).unwrap();
        let outside = wrap(&at("engines/a.plan"), &at("model.onnx"), 90, &at("engines/b/c.onnx"));
        let outside = outside.unwrap_err();
        assert!(outside.is::<Usage>() && outside.to_string().contains("beside or below"));
        fs::write(at("rtx.plan"), b"vtrt and the rest").unwrap();
        let rtx = wrap(&at("rtx.plan"), &at("model.onnx"), 90, &at("rtx.onnx")).unwrap_err();
        assert!(rtx.is::<Usage>() && rtx.to_string().contains("TensorRT for RTX"), "{rtx}");
        wrap(&at("rtx.plan"), &at("model.onnx"), 89, &at("rtx.onnx")).unwrap();
        let bytes = fs::read(at("rtx.onnx")).unwrap();
        assert!(bytes.windows(RTX_SOURCE.len()).any(|part| part == RTX_SOURCE.as_bytes()));
    }

    #[test]
    fn what_is_no_engine_is_not_wrapped() {
        let home = tempfile::tempdir().unwrap();
        let [plan, graph, target] = ["a.plan", "a.onnx", "b.onnx"].map(|n| home.path().join(n));
        write_model(
            &graph,
            &ModelProto { graph: Some(GraphProto::default()), ..Default::default() },
        )
        .unwrap();
        for start in [&b"\x89PNG\r\n\x1a\n"[..], b"PK\x03\x04", b"", b"ftr", b"\x08\x0b\x12\x09"] {
            fs::write(&plan, start).unwrap();
            let error = wrap(&plan, &graph, 89, &target).unwrap_err().to_string();
            assert!(error.contains("is no engine") && !target.exists(), "{error}");
        }
    }

    #[test]
    fn profiles_hold_every_input() {
        let pipeline = Pipeline::known("flux.1-dev").unwrap();
        let line = build_command(Path::new("onnx"), &pipeline, 1024, 2);
        for part in [
            "--minShapes=hidden_states:1x256x64,",
            "--optShapes=hidden_states:1x4096x64,encoder_hidden_states:1x512x4096,",
            "--maxShapes=hidden_states:2x4096x64,",
            "img_ids:4096x3,guidance:2",
            "--stronglyTyped",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
}
