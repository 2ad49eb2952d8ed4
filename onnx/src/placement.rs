//! Which provider got which nodes of a graph.

use std::{ffi::CStr, ptr, slice};

use anyhow::{Result, ensure};
use ort::{AsPointer, ortsys, session::Session};

use crate::{Provider, cancel::one_line};

/// Has a session remember its placement, without which [`check`] finds nothing.
pub(crate) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// Operators that cost time. What else a graph has computes shapes and positions, which providers leave
/// to the CPU on purpose.
const HEAVY: [&str; 26] = [
    "Attention",
    "BiasGelu",
    "Conv",
    "Erf",
    "FastGelu",
    "FusedConv",
    "FusedMatMul",
    "Gelu",
    "Gemm",
    "GroupNorm",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
    "MatMulInteger",
    "MatMulNBits",
    "MultiHeadAttention",
    "QLinearMatMul",
    "RMSNormalization",
    "Resize",
    "RotaryEmbedding",
    "Sigmoid",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "Softmax",
    "Swish",
];

/// A node's operator and the name of its provider.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    operator: String,
    on: String,
}

/// Makes sure that everything in `session` that costs time runs on `provider`.
///
/// # Errors
/// Names the operators that do not, and where they went; also when ONNX Runtime does not tell.
pub(crate) fn check(session: &Session, provider: Provider) -> Result<()> {
    let wanted = match provider {
        Provider::Cpu => return Ok(()),
        Provider::Cuda => "CUDAExecutionProvider",
        Provider::TensorRt => "TensorrtExecutionProvider",
        Provider::TensorRtRtx => "NvTensorRTRTXExecutionProvider",
    };
    let placed = placed(session).map_err(|error| one_line(error.message()))?;
    ensure!(!placed.is_empty(), "ONNX Runtime does not tell where the nodes of the graph run");
    let astray = astray(&placed, wanted);
    ensure!(
        astray.is_empty(),
        "{provider} does not take all of the graph, and nothing is moved elsewhere without a word: {}; \
         export it for this provider with `ng-export --target`",
        astray.join(", ")
    );
    Ok(())
}

/// `2 Conv on CPUExecutionProvider`, for each operator that costs time and is not on `wanted`.
fn astray(placed: &[Placed], wanted: &str) -> Vec<String> {
    let astray = |node: &&Placed| HEAVY.contains(&&*node.operator) && node.on != wanted;
    let mut counts: Vec<(&Placed, usize)> = Vec::new();
    for node in placed.iter().filter(astray) {
        match counts.iter_mut().find(|(known, _)| *known == node) {
            Some((_, n)) => *n += 1,
            None => counts.push((node, 1)),
        }
    }
    counts.iter().map(|(node, n)| format!("{n} {} on {}", node.operator, node.on)).collect()
}

fn placed(session: &Session) -> ort::Result<Vec<Placed>> {
    let mut placed = Vec::new();
    let (mut subgraphs, mut n) = (ptr::null(), 0);
    #[expect(unsafe_code, reason = "both are written before they are read")]
    let subgraphs = {
        ortsys![unsafe Session_GetEpGraphAssignmentInfo(session.ptr(), &raw mut subgraphs, &raw mut n)?];
        unsafe { pointers(subgraphs, n) }
    };
    for &subgraph in subgraphs {
        let (mut name, mut nodes, mut n) = (ptr::null(), ptr::null(), 0);
        #[expect(unsafe_code, reason = "the session owns all of it and outlives this function")]
        let (name, nodes) = {
            ortsys![unsafe EpAssignedSubgraph_GetEpName(subgraph, &raw mut name)?];
            ortsys![unsafe EpAssignedSubgraph_GetNodes(subgraph, &raw mut nodes, &raw mut n)?];
            unsafe { (text(name), pointers(nodes, n)) }
        };
        for &node in nodes {
            let mut operator = ptr::null();
            #[expect(unsafe_code, reason = "as above")]
            let operator = {
                ortsys![unsafe EpAssignedNode_GetOperatorType(node, &raw mut operator)?];
                unsafe { text(operator) }
            };
            placed.push(Placed { operator, on: name.clone() });
        }
    }
    Ok(placed)
}

/// `n` pointers at `first`, which may be null for none.
#[expect(unsafe_code, reason = "ONNX Runtime gives arrays this way")]
unsafe fn pointers<'a, T>(first: *const *const T, n: usize) -> &'a [*const T] {
    if first.is_null() { &[] } else { unsafe { slice::from_raw_parts(first, n) } }
}

/// A C string, empty for null.
#[expect(unsafe_code, reason = "ONNX Runtime gives names this way")]
unsafe fn text(name: *const std::ffi::c_char) -> String {
    if name.is_null() {
        return String::new();
    }
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ort::session::builder::SessionBuilder;

    use super::*;
    use crate::library::environment;

    #[test]
    fn onnx_runtime_tells_where_nodes_run() -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/affine.onnx");
        let open = |record: &str| -> ort::Result<Session> {
            let builder = SessionBuilder::new(&environment().expect("installed"))?;
            builder.with_config_entry(RECORD, record)?.commit_from_file(&path)
        };
        let session = open("1")?;
        let placed = placed(&session)?;
        let operators: Vec<&str> = placed.iter().map(|node| &*node.operator).collect();
        assert!(operators.contains(&"Mul") && operators.contains(&"Add"), "{operators:?}");
        assert!(placed.iter().all(|node| node.on == "CPUExecutionProvider"), "{placed:?}");
        // None of them is heavy, so a GPU's session may look like this.
        check(&session, Provider::Cuda)?;
        let silent = check(&open("0")?, Provider::Cuda).unwrap_err().to_string();
        assert!(silent.contains("graph assignment information"), "{silent}");
        Ok(())
    }

    #[test]
    fn what_went_elsewhere_is_counted() {
        let node = |operator: &str, on: &str| Placed { operator: operator.into(), on: on.into() };
        let placed = [
            node("MatMul", "CUDAExecutionProvider"),
            node("Conv", "CPUExecutionProvider"),
            node("Shape", "CPUExecutionProvider"),
            node("Conv", "CPUExecutionProvider"),
        ];
        assert_eq!(astray(&placed, "CUDAExecutionProvider"), ["2 Conv on CPUExecutionProvider"]);
        assert_eq!(astray(&placed[..1], "TensorrtExecutionProvider").len(), 1);
    }
}
