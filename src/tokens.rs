//! Tokens: texts to ids, sorted by length and cut into batches.

/// A rectangle of token ids, padded on the right, and where each row belongs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct TokenBatch {
    /// `[batch, seq]`, row-major; padding is the model's pad id.
    pub ids: Vec<i32>,
    /// Real tokens of each row, `[batch]`. The attention mask follows from it.
    pub lengths: Vec<u32>,
    /// Width of the rectangle: the longest row.
    pub seq: usize,
    /// Place of each row in the caller's order, `[batch]`.
    pub rows: Vec<usize>,
    /// Leading tokens that pooling leaves out (the prompt's, when the model says `include_prompt: false`), else 0.
    pub skip: u32,
}

impl TokenBatch {
    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }
}
