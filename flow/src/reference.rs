//! The file of reference tensors in a pipeline folder: `ng-train reference` writes it, `ng-export --verify`
//! holds its graphs against it.

/// Its name.
pub const FILE: &str = "reference.safetensors";

/// Its metadata key for what the networks computed in: `bf16` or `f32`.
pub const PRECISION: &str = "precision";
