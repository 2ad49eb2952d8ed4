//! Precisions: rules from a layer's name and shape to how its weights are stored.

use flow::usage::Usage;

use crate::element::Float;
use crate::part::Part;
use crate::target::{Attention, Table, Target};

/// How the weights of an export are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// 32-bit floats
    #[default]
    F32,
    /// 16-bit floats with 11 bits of precision, up to 65504
    F16,
    /// 16-bit floats with 8 bits of precision; target cpu, without kernels for it, computes in f32
    Bf16,
    /// 8-bit integers and a scale a block
    Int8,
    /// 4-bit integers and a scale a block: lossy
    Int4,
    /// 8-bit floats (E4M3) and a scale a matrix, or a block with --block-size
    Fp8,
}

/// How a quantised export stores its modulation layers, 27 % of FLUX's parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Modulation {
    /// As floats
    #[default]
    High,
    /// As 8-bit integers
    Int8,
    /// As the other layers
    Same,
}

/// What was chosen for a whole export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// What it is for.
    pub target: Target,
    /// How weights are stored.
    pub precision: Precision,
    /// Numbers that share a scale; 32 for integers and a whole matrix for fp8 unless chosen.
    pub block: Option<usize>,
    /// How modulation layers are stored.
    pub modulation: Modulation,
    /// Type of activations, by default the target's.
    pub activations: Option<Float>,
    /// Type of the autoencoder.
    pub vae: Option<Float>,
    /// Another attention than the target's.
    pub attention: Option<Attention>,
    /// Whether the transformer's layers get slots for adapters.
    pub slots: bool,
}

/// How numbers of a quantised matrix are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
    /// 8-bit floats, four of exponent and three of mantissa, without infinities.
    E4m3,
}

/// How one matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// Numbers of one type.
    Plain(Float),
    /// Codes, `block` of which share a scale; all of a matrix where there is no block.
    Coded {
        /// What they are.
        code: Code,
        /// How many share a scale along the inputs.
        block: Option<usize>,
    },
}

/// The language one part's graph is written in: operators of the target, types of the precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialect {
    /// Operators.
    pub table: Table,
    /// Type that arithmetic is done in.
    pub arithmetic: Float,
    /// Type that what is not quantised is stored in.
    pub stored: Float,
    /// How matrices of the body are stored.
    body: Storage,
    /// How modulation layers are stored.
    modulation: Storage,
    /// Whether layers get slots for adapters.
    pub slots: bool,
    part: Part,
}

/// Numbers that share a scale unless chosen.
pub const BLOCK: usize = 32;
/// What `MatMulNBits` can do, powers of two.
pub const BLOCKS: std::ops::RangeInclusive<usize> = 16..=256;
/// Types of the autoencoder: in bf16 images show bands, and Resize has no such kernel.
pub const VAE: [Float; 2] = [Float::F16, Float::F32];

impl Choice {
    /// What was chosen and changes none of `parts`, but others, by its name on the command line.
    pub fn idle(&self, parts: &[Part]) -> Vec<&'static str> {
        let chosen = || self.clone();
        let without = [
            (
                "--precision",
                Self {
                    precision: Precision::F32,
                    block: None,
                    modulation: Modulation::High,
                    ..chosen()
                },
            ),
            ("--block-size", Self { block: None, ..chosen() }),
            ("--modulation", Self { modulation: Modulation::High, ..chosen() }),
            ("--activations", Self { activations: None, ..chosen() }),
            ("--vae", Self { vae: None, ..chosen() }),
            ("--attention", Self { attention: None, ..chosen() }),
            ("--lora-slots", Self { slots: false, ..chosen() }),
        ];
        let mut idle = Vec::new();
        for (name, without) in without {
            let is_same = |&part: &Part| self.dialect(part).ok() == without.dialect(part).ok();
            if parts.iter().all(is_same) && !Part::ALL.iter().all(is_same) {
                idle.push(name);
            }
        }
        idle
    }

    /// The dialect of `part`.
    ///
    /// # Errors
    /// When the target cannot do what was chosen.
    pub fn dialect(&self, part: Part) -> Result<Dialect, Usage> {
        let mut table = self.table()?;
        let (arithmetic, stored) = self.floats(part, &table)?;
        if arithmetic == Float::F32 {
            table.attention = self.attention.unwrap_or(table.attention_f32);
        }
        let plain = Storage::Plain(stored);
        let coded = |code| Storage::Coded { code, block: self.block.or(Some(BLOCK)) };
        let (body, text) = match self.precision {
            Precision::F32 | Precision::F16 | Precision::Bf16 => (plain, plain),
            Precision::Int8 => (coded(Code::Int8), coded(Code::Int8)),
            // Text encoders lose more by four bits than they weigh.
            Precision::Int4 => (coded(Code::Int4), coded(Code::Int8)),
            Precision::Fp8 => (Storage::Coded { code: Code::E4m3, block: self.block }, plain),
        };
        let body = match part {
            Part::Transformer => body,
            Part::TextEncoder2 => text,
            Part::TextEncoder | Part::VaeDecoder | Part::VaeEncoder => plain,
        };
        let modulation = match (self.modulation, body) {
            _ if part != Part::Transformer => plain,
            (Modulation::High, _) | (_, Storage::Plain(_)) => plain,
            (Modulation::Int8, _) => coded(Code::Int8),
            (Modulation::Same, _) => body,
        };
        let slots = self.slots && part == Part::Transformer;
        Ok(Dialect { table, arithmetic, stored, body, modulation, slots, part })
    }

    fn table(&self) -> Result<Table, Usage> {
        let mut table = self.target.table();
        let target = self.target.name();
        let is_coded = matches!(self.precision, Precision::Int8 | Precision::Int4 | Precision::Fp8);
        if let Some(attention) = self.attention {
            need(table.has_extensions || attention != Attention::MultiHead, || {
                format!(
                    "--attention multi-head: target {target} has standard operators only: choose \
                     standard or decomposed"
                )
            })?;
            need(table.opset >= 23 || attention == Attention::Decomposed, || {
                format!(
                    "--attention {}: target {target} keeps to opset {}: leave the option out",
                    attention.name(),
                    table.opset
                )
            })?;
            table.attention = attention;
        }
        if let Some(block) = self.block {
            need(is_coded, || "--block-size is for int8, int4 and fp8: leave it out".into())?;
            need(block.is_power_of_two() && BLOCKS.contains(&block), || {
                format!(
                    "--block-size {block}: a power of two from {} to {} is needed",
                    BLOCKS.start(),
                    BLOCKS.end()
                )
            })?;
        }
        need(is_coded || self.modulation == Modulation::High, || {
            "--modulation is for int8, int4 and fp8: leave it out".into()
        })?;
        need(self.precision != Precision::Fp8 || table.has_fp8, || {
            format!(
                "--precision fp8: target {target} has no kernel for it: choose int8, or target cuda, \
                 tensorrt or tensorrt-rtx"
            )
        })?;
        if is_coded && table.opset < 21 {
            // The first with blocks and 4-bit types, and its format.
            (table.opset, table.ir) = (21, 10);
        }
        Ok(table)
    }

    /// Types of arithmetic and of stored floats.
    fn floats(&self, part: Part, table: &Table) -> Result<(Float, Float), Usage> {
        let target = self.target.name();
        if matches!(part, Part::VaeDecoder | Part::VaeEncoder) {
            let vae = self.vae.unwrap_or(Float::F32);
            need(VAE.contains(&vae), || {
                format!("--vae {} is not supported: choose f32 or f16", vae.name())
            })?;
            return Ok((vae, vae));
        }
        let wanted = match self.precision {
            Precision::F32 => Float::F32,
            Precision::F16 => Float::F16,
            Precision::Bf16 => Float::Bf16,
            Precision::Int8 | Precision::Int4 | Precision::Fp8 => {
                let arithmetic = self.activations.unwrap_or(table.arithmetic[0]);
                let is_taken = self.precision != Precision::Fp8
                    || arithmetic != Float::F32
                    || !table.has_extensions;
                need(is_taken, || "--activations f32: the kernel of fp8 takes f16 or bf16".into())?;
                arithmetic
            }
        };
        if let Some(activations) = self.activations {
            let is_fixed =
                matches!(self.precision, Precision::F32 | Precision::F16 | Precision::Bf16);
            need(!is_fixed || activations == wanted, || {
                format!(
                    "--activations {}: --precision {} says it already",
                    activations.name(),
                    wanted.name()
                )
            })?;
        }
        if table.arithmetic.contains(&wanted) {
            return Ok((wanted, wanted));
        }
        need(self.activations.is_none(), || {
            format!("--activations {}: target {target} has no kernels for it", wanted.name())
        })?;
        Ok((Float::F32, wanted))
    }
}

/// A choice that cannot be is a mistake in what was typed.
fn need(is_met: bool, otherwise: impl FnOnce() -> String) -> Result<(), Usage> {
    if is_met { Ok(()) } else { Err(Usage(otherwise())) }
}

impl Dialect {
    /// How the matrix `[n_out, n_in]` of the layer at `path` is stored.
    pub fn layer(&self, path: &str, n_out: usize) -> Storage {
        let storage = match self.part {
            Part::Transformer => self.transformer_layer(path),
            _ => self.body,
        };
        match storage {
            // Two to a byte: rows of odd length would share bytes.
            Storage::Coded { code: Code::Int4, .. } if n_out % 2 == 1 => {
                Storage::Plain(self.stored)
            }
            storage => storage,
        }
    }

    /// Largest error, as a share of the largest value, that passes verification: that of a precision which stores
    /// the matrices of a body so.
    pub fn max_error(&self) -> f32 {
        let precision = match self.body {
            Storage::Plain(Float::F32) => Precision::F32,
            Storage::Plain(Float::F16) => Precision::F16,
            Storage::Plain(Float::Bf16) => Precision::Bf16,
            Storage::Coded { code: Code::Int8, .. } => Precision::Int8,
            Storage::Coded { code: Code::Int4, .. } => Precision::Int4,
            Storage::Coded { code: Code::E4m3, .. } => Precision::Fp8,
        };
        precision.max_error()
    }

    /// Type that the product at `path` is computed in. T5's second matrix of a block overflows f16
    /// (transformers keeps it in f32, too); what it adds to then is f32.
    pub fn product(&self, path: &str) -> Float {
        if self.part == Part::TextEncoder2
            && path.rsplit('.').next() == Some("wo")
            && self.arithmetic == Float::F16
        {
            Float::F32
        } else {
            self.arithmetic
        }
    }

    fn transformer_layer(&self, path: &str) -> Storage {
        if !path.contains("transformer_blocks.") {
            return Storage::Plain(self.stored);
        }
        let is_modulation = ["norm.linear", "norm1.linear", "norm1_context.linear"]
            .iter()
            .any(|end| path.strip_suffix(end).is_some_and(|rest| rest.ends_with('.')));
        if is_modulation { self.modulation } else { self.body }
    }
}

impl Precision {
    /// Largest error, as a share of the largest value, that passes verification: for f32 that of rounding over
    /// a deep network, else about twice what random networks of small width show.
    pub fn max_error(self) -> f32 {
        match self {
            Self::F32 => 1e-5,
            Self::F16 => 1e-2,
            Self::Bf16 => 4e-2,
            Self::Int8 | Self::Fp8 => 0.1,
            Self::Int4 => 0.25,
        }
    }

    /// As people type it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp8 => "fp8",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;

    #[test]
    fn what_a_target_or_precision_has_not_is_wrong_usage() {
        for (typed, says) in [
            ("--precision fp8", "choose int8"),
            ("--block-size 64", "leave it out"),
            ("--precision int8 --block-size 48", "a power of two"),
            ("--modulation int8", "leave it out"),
            ("--activations bf16", "says it already"),
            ("--precision int8 --activations bf16", "no kernels"),
            ("--target cuda --precision fp8 --activations f32", "takes f16 or bf16"),
            ("--target tensorrt --attention multi-head", "standard or decomposed"),
            ("--target portable --attention standard", "opset 18"),
        ] {
            let words = ["ng-export", "/absent", "--out", "/absent/out"].into_iter();
            let request = Args::parse_from(words.chain(typed.split(' '))).request();
            let error = crate::export::plan::plan(&request).err().expect(typed);
            assert!(error.is::<Usage>() && error.to_string().contains(says), "{typed}: {error:#}");
        }
        let choice = Choice { vae: Some(Float::Bf16), ..Choice::default() };
        assert!(choice.dialect(Part::VaeDecoder).is_err());
    }
}
