//! What an export says of itself: `export.json` in its folder, and the metadata of each graph.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flow::checkpoint::write_atomically;
use flow::pipeline::{Pipeline, read_json};
use serde::{Deserialize, Serialize};

use crate::external::Written;
use crate::graph::{Graph, Slot};
use crate::part::Part;
use crate::precision::Choice;

/// Its file.
pub const FILE: &str = "export.json";

/// An export as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// What runs it, as `--target` takes it.
    pub target: String,
    /// How weights are stored, as `--precision` takes it.
    pub precision: String,
    /// Adapters that are merged: file name and scale.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merged: Vec<(String, f64)>,
    /// Graphs by their folder.
    pub components: BTreeMap<String, Component>,
    /// Slots for adapters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_slots: Option<Slots>,
}

/// One graph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Component {
    /// Version of the standard operators.
    pub opset: i64,
    /// Version of the file format.
    pub ir: i64,
    /// Type that arithmetic is done in.
    pub arithmetic: String,
    /// Largest relative error that passes verification.
    pub max_error: f32,
    /// Elements of all weights.
    pub parameters: usize,
    /// How often each operator is used; those of ONNX Runtime with their domain.
    pub operators: BTreeMap<String, usize>,
    /// Bytes of the graph and of weights that were written for it.
    pub bytes: u64,
    /// Bytes of weights in the checkpoint's own files.
    pub linked_bytes: u64,
}

/// Inputs that the transformer may be given, or not: for a layer `[n_out, n_in]` at path LAYER,
/// `LAYER.lora_A.weight` `[r, n_in]` and `LAYER.lora_B.weight` `[n_out, r]`, f32, r ≥ 1 the same for both,
/// any r in any layer. To the layer's output B·A·x is added; scale and α/r belong into B. These are the
/// names and layouts of a diffusers LoRA file without its prefix `transformer.`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// What follows a layer's path in the name of A.
    pub a: String,
    /// What follows a layer's path in the name of B.
    pub b: String,
    /// `[n_out, n_in]` of each layer, by its path.
    pub layers: BTreeMap<String, [usize; 2]>,
}

impl Description {
    /// Of an export of `choice` with `loras` merged.
    pub fn new(choice: &Choice, loras: &[(PathBuf, f64)]) -> Self {
        Self {
            target: choice.target.name().into(),
            precision: choice.precision.name().into(),
            merged: merged(loras),
            ..Self::default()
        }
    }

    /// Adds the graph of `part`.
    pub fn add(&mut self, part: Part, graph: &Graph) {
        let mut operators = BTreeMap::new();
        for node in &graph.nodes {
            let op = node.op_type.clone().unwrap_or_default();
            let domain = node.domain.as_ref().map_or(String::new(), |domain| format!("{domain}."));
            *operators.entry(format!("{domain}{op}")).or_default() += 1;
        }
        let component = Component {
            opset: graph.dialect.table.opset,
            ir: graph.dialect.table.ir,
            arithmetic: graph.dialect.arithmetic.name().into(),
            max_error: graph.dialect.max_error(),
            parameters: graph.n_parameters(),
            operators,
            ..Component::default()
        };
        self.components.insert(part.folder().into(), component);
        if !graph.slots.is_empty() {
            let size = |slot: &Slot| (slot.layer.clone(), [slot.n_out, slot.n_in]);
            self.lora_slots = Some(Slots {
                a: flow::lora::A.into(),
                b: flow::lora::B.into(),
                layers: graph.slots.iter().map(size).collect(),
            });
        }
    }

    /// Adds what was written for `part`.
    pub fn written(&mut self, part: Part, written: Written) {
        if let Some(component) = self.components.get_mut(part.folder()) {
            (component.bytes, component.linked_bytes) = (written.n_bytes, written.n_linked);
        }
    }

    /// Writes it into `folder`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).context("cannot describe the export")?;
        text.push(b'\n');
        Ok(write_atomically(&folder.join(FILE), &text)?)
    }

    /// That of the export in `folder`.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        ensure!(folder.is_dir(), "{shown}: no such folder");
        ensure!(
            folder.join(FILE).exists(),
            "{shown}: no {FILE} in it: give a folder that ng-export wrote"
        );
        Ok(read_json(&folder.join(FILE))?)
    }
}

/// Adapters by file name and scale.
pub fn merged(loras: &[(PathBuf, f64)]) -> Vec<(String, f64)> {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    loras.iter().map(|(path, scale)| (name(path), *scale)).collect()
}

/// What the graph of `part` carries in its file.
///
/// # Errors
/// Never in practice: seams are names.
pub fn metadata(
    part: Part,
    choice: &Choice,
    graph: &Graph,
    pipeline: &Pipeline,
) -> Result<Vec<(&'static str, String)>> {
    let mut metadata = vec![
        ("component", part.folder().to_owned()),
        ("target", choice.target.name().to_owned()),
        ("precision", choice.precision.name().to_owned()),
        ("time", "timestep is the flow time: 1 is noise, 0 is data".into()),
        ("vae.scaling_factor", pipeline.vae.scaling_factor.to_string()),
        ("vae.shift_factor", pipeline.vae.shift().to_string()),
    ];
    if !graph.seams.is_empty() {
        let seams = serde_json::to_string(&graph.seams).context("cannot describe the blocks")?;
        metadata.push((SEAMS, seams));
    }
    Ok(metadata)
}

/// Key of the values between blocks: `[[name, [[value, type], …]], …]`.
pub const SEAMS: &str = "seams";
