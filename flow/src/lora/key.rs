//! Names of tensors in LoRA files, taken apart: the layer's path and what the tensor is to it.

/// What a tensor is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Slot {
    /// A `[r, n_in]`.
    Down,
    /// B `[n_out, r]`.
    Up,
    /// A bias that B adds, `[n_out]`.
    UpBias,
    /// α.
    Alpha,
    /// DoRA's norms: one a row, or one a column.
    Magnitude,
    /// LoKr's first factor: whole, or the two it is the product of.
    Lokr1,
    Lokr1A,
    Lokr1B,
    /// LoKr's second factor.
    Lokr2,
    Lokr2A,
    Lokr2B,
    /// LoHa's two products.
    Hada1A,
    Hada1B,
    Hada2A,
    Hada2B,
    /// What is added to the weight, whole.
    Diff,
    /// What is added to the bias, whole.
    DiffBias,
}

/// Last parts of a tensor's name before `.weight`, and what they mean: of PEFT, diffusers in three
/// spellings, kohya, ai-toolkit, LyCORIS, ComfyUI and XLabs.
const ENDINGS: [(&str, Slot); 28] = [
    ("lora_A", Slot::Down),
    ("lora_B", Slot::Up),
    ("lora_down", Slot::Down),
    ("lora_up", Slot::Up),
    ("lora.down", Slot::Down),
    ("lora.up", Slot::Up),
    ("lora_linear_layer.down", Slot::Down),
    ("lora_linear_layer.up", Slot::Up),
    ("alpha", Slot::Alpha),
    ("lora_magnitude_vector", Slot::Magnitude),
    ("magnitude", Slot::Magnitude),
    ("dora_scale", Slot::Magnitude),
    ("lokr_w1", Slot::Lokr1),
    ("lokr_w1_a", Slot::Lokr1A),
    ("lokr_w1_b", Slot::Lokr1B),
    ("lokr_w2", Slot::Lokr2),
    ("lokr_w2_a", Slot::Lokr2A),
    ("lokr_w2_b", Slot::Lokr2B),
    ("hada_w1_a", Slot::Hada1A),
    ("hada_w1_b", Slot::Hada1B),
    ("hada_w2_a", Slot::Hada2A),
    ("hada_w2_b", Slot::Hada2B),
    ("diff", Slot::Diff),
    ("diff_b", Slot::DiffBias),
    ("w_norm", Slot::Diff),
    ("b_norm", Slot::DiffBias),
    ("down", Slot::Down),
    ("up", Slot::Up),
];

/// What wrappers of PyTorch leave in a path.
const WRAPPERS: [&str; 5] = [
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "base_layer.",
    "_forward_module.",
];

/// Parts of names that tell what a tensor is that cannot be read, and what that is called.
const OTHERS: [(&str, &str); 18] = [
    ("boft", "BOFT"),
    ("oft_", "OFT"),
    ("lora_mid", "LoCon with a middle factor"),
    ("lokr_t2", "LoKr of a convolution"),
    ("hada_t", "LoHa of a convolution"),
    ("glora", "GLoRA"),
    (".a1.weight", "GLoRA"),
    (".a2.weight", "GLoRA"),
    (".b1.weight", "GLoRA"),
    (".b2.weight", "GLoRA"),
    ("ia3", "IA3"),
    (".on_input", "IA3"),
    ("lora_E", "AdaLoRA"),
    ("vera_lambda", "VeRA"),
    ("lora_embedding_", "a LoRA of an embedding"),
    (".set_weight", "a whole weight"),
    ("ip_adapter", "an IP-Adapter"),
    ("controlnet", "a ControlNet"),
];

/// A tensor's name, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// The layer, prefixes included.
    pub(super) path: String,
    pub(super) slot: Slot,
    /// PEFT's name of the adapter, where it stands in the tensor's.
    pub(super) adapter: Option<String>,
}

impl Key {
    /// The parts of `name`; nothing when it is no tensor of a kind that is read.
    pub(super) fn of(name: &str) -> Option<Self> {
        let (stem, is_bias) = match name.strip_suffix(".bias") {
            Some(stem) => (stem, true),
            None => (name.strip_suffix(".weight").unwrap_or(name), false),
        };
        let (path, slot, adapter) = ending(stem).or_else(|| {
            let (stem, adapter) = stem.rsplit_once('.')?;
            let (path, slot, _) = ending(stem)?;
            Some((path, slot, Some(adapter)))
        })?;
        let slot = match (slot, is_bias) {
            (Slot::Up, true) => Slot::UpBias,
            (_, true) => return None,
            (slot, false) => slot,
        };
        let mut path = path.to_owned();
        for wrapper in WRAPPERS {
            path = path.replace(wrapper, "");
        }
        let mut adapter = adapter.map(str::to_owned);
        // sd-scripts numbers the parts of a matrix that it splits.
        let is_split = stem.contains("lora_down.") || stem.contains("lora_up.");
        let is_part = |name: &mut String| is_split && name.bytes().all(|b| b.is_ascii_digit());
        if let Some(part) = adapter.take_if(is_part) {
            path = format!("{path}.{part}");
        }
        Some(Self { path, slot, adapter })
    }
}

/// What kind of file a tensor that cannot be read belongs to.
pub(super) fn other_kind(name: &str) -> Option<&'static str> {
    OTHERS.iter().find(|(part, _)| name.contains(part)).map(|(_, kind)| *kind)
}

/// Whether `name` is a token's embedding, which trainers put beside the adapters.
pub(super) fn is_embedding(name: &str) -> bool {
    name.starts_with("bundle_emb.")
        || name.starts_with("emb_params")
        || ["clip_l", "clip_g", "t5", "t5xxl"].contains(&name)
}

fn ending(stem: &str) -> Option<(&str, Slot, Option<&str>)> {
    ENDINGS.iter().find_map(|(ending, slot)| {
        let path = stem.strip_suffix(ending)?.strip_suffix('.')?;
        // XLabs' endings are words of other networks' paths.
        let is_plain = ["down", "up"].contains(ending);
        let is_xlabs = ["_lora", "_lora1", "_lora2"].iter().any(|end| path.ends_with(end));
        (!path.is_empty() && (!is_plain || is_xlabs)).then_some((path, *slot, None))
    })
}
