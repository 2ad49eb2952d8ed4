//! What the velocity network is told beside state and time.

use tch::Tensor;

/// What conditions a velocity, one row a sample.
pub(crate) struct Condition {
    /// T5 tokens, `[B, L, D]`.
    pub(crate) text: Tensor,
    /// CLIP vector, `[B, P]`.
    pub(crate) pooled: Tensor,
    /// Guidance scale `[B]`; ignored by a network that embeds none.
    pub(crate) guidance: Tensor,
    /// Position ids of image tokens, `[S, 3]`.
    pub(crate) img_ids: Tensor,
}

impl Condition {
    /// Rows `index` (integers `[M]`).
    pub(crate) fn rows(&self, index: &Tensor) -> Self {
        Self {
            text: self.text.index_select(0, index),
            pooled: self.pooled.index_select(0, index),
            guidance: self.guidance.index_select(0, index),
            img_ids: self.img_ids.shallow_clone(),
        }
    }
}
