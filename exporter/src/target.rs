//! Targets: what runs an export, and which operators it is therefore made of.
//!
//! A target is one [`Table`]; targets differ in nothing else.

use crate::element::Float;

/// What an export is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Target {
    /// ONNX Runtime on a processor
    #[default]
    Cpu,
    /// ONNX Runtime's CUDA provider
    Cuda,
    /// TensorRT 10.15 or later on a data-centre GPU (or ONNX Runtime's provider of it)
    #[value(name = "tensorrt")]
    TensorRt,
    /// TensorRT for RTX: consumer GPUs (Ampere, Ada, Blackwell), not H100, H800 or H200
    #[value(name = "tensorrt-rtx")]
    TensorRtRtx,
    /// Any runtime: plain operators of opset 18
    Portable,
}

/// How attention is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Attention {
    /// `com.microsoft.MultiHeadAttention`
    MultiHead,
    /// `Attention` of opset 23
    Standard,
    /// Products and a softmax
    Decomposed,
}

/// How an operator that newer opsets have is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One node.
    Single,
    /// Nodes of older opsets.
    Decomposed,
}

/// How a product with a float matrix `[n_out, n_in]`, as checkpoints hold it, is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// `Gemm` with `transB` on rows of tokens.
    Gemm,
    /// `MatMul` with a `Transpose` that the runtime folds when it builds.
    MatMul,
}

/// How a product with a quantised matrix is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantised {
    /// `com.microsoft.MatMulNBits` and `MatMulBlockQuantizedFp8Weight` on `[n_out, n_in]`.
    Fused,
    /// `DequantizeLinear` on `[n_in, n_out]`, blocks along axis 0, and `MatMul`.
    Dequantised,
}

/// What a target's graphs are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Version of the standard operators.
    pub opset: i64,
    /// Version of the file format.
    pub ir: i64,
    /// Attention.
    pub attention: Attention,
    /// Attention on f32.
    pub attention_f32: Attention,
    /// Products with float matrices.
    pub product: Product,
    /// Products with quantised matrices.
    pub quantised: Quantised,
    /// RMS and group normalisation, rotary embedding, GELU.
    pub form: Form,
    /// Arithmetic the target has kernels for; the first is its default.
    pub arithmetic: &'static [Float],
    /// Whether it has fp8 weights.
    pub has_fp8: bool,
    /// Whether scales of blocks must be positive.
    pub positive_scales: bool,
    /// Rank of an empty LoRA slot.
    pub empty_rank: usize,
    /// Whether operators of other domains than the standard's are understood.
    pub has_extensions: bool,
}

impl Target {
    /// Its table. Each choice has its reason beside it.
    pub fn table(self) -> Table {
        use Float::{Bf16, F16, F32};
        let modern = Table {
            // The first with Attention, RMSNormalization and RotaryEmbedding, and the format of its time:
            // the newest versions that onnx writes by default are beyond what runtimes load.
            opset: 23,
            ir: 11,
            attention: Attention::Standard,
            attention_f32: Attention::Standard,
            product: Product::MatMul,
            quantised: Quantised::Dequantised,
            form: Form::Single,
            arithmetic: &[F32, F16],
            has_fp8: true,
            positive_scales: true,
            empty_rank: 0,
            has_extensions: false,
        };
        match self {
            Self::Cpu => Table {
                // The processor's kernel of the standard operator holds S×S scores; this one does not.
                attention: Attention::MultiHead,
                attention_f32: Attention::MultiHead,
                // A Transpose would be folded into a copy of every weight when a session opens.
                product: Product::Gemm,
                quantised: Quantised::Fused,
                // No bf16 kernels at all, and nothing for fp8 but its dequantisation.
                has_fp8: false,
                positive_scales: false,
                has_extensions: true,
                ..modern
            },
            Self::Cuda => Table {
                // Reaches cuDNN's kernel on Hopper; whether the standard operator does is not measured.
                attention: Attention::MultiHead,
                attention_f32: Attention::MultiHead,
                product: Product::Gemm,
                quantised: Quantised::Fused,
                arithmetic: &[Bf16, F16, F32],
                positive_scales: false,
                // Products over zero columns are not verified on CUDA: one column of zeros is exact, too.
                empty_rank: 1,
                has_extensions: true,
                ..modern
            },
            Self::TensorRt | Self::TensorRtRtx => Table {
                arithmetic: &[Bf16, F16, F32],
                // TensorRT's attention takes 16-bit types only, and is never decomposed by itself.
                attention_f32: Attention::Decomposed,
                empty_rank: 1,
                ..modern
            },
            Self::Portable => Table {
                opset: 18,
                ir: 8,
                attention: Attention::Decomposed,
                attention_f32: Attention::Decomposed,
                form: Form::Decomposed,
                arithmetic: &[F32, F16, Bf16],
                ..modern
            },
        }
    }

    /// As people type it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::TensorRt => "tensorrt",
            Self::TensorRtRtx => "tensorrt-rtx",
            Self::Portable => "portable",
        }
    }
}

impl Attention {
    /// As people type it.
    pub fn name(self) -> &'static str {
        match self {
            Self::MultiHead => "multi-head",
            Self::Standard => "standard",
            Self::Decomposed => "decomposed",
        }
    }
}
