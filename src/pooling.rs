//! Pooling: what sentence-transformers' Pooling module does to hidden states, and the CPU implementation (the kernels' oracle).

/// One way to make a vector of a text's hidden states. The order of the variants is sentence-transformers' concatenation order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum PoolingMode {
    /// The first token (the first after the prompt when prompts are left out, as sentence-transformers does).
    Cls,
    /// The largest value of each component.
    Max,
    /// The mean.
    Mean,
    /// The sum over the square root of the number of tokens.
    MeanSqrtLen,
    /// The mean weighted by position (1, 2, 3, …).
    WeightedMean,
    /// The last token.
    LastToken,
}

/// The Pooling module: one or several modes, concatenated in [`PoolingMode`]'s order.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pooling {
    /// Sorted, without repeats, never empty.
    pub modes: Vec<PoolingMode>,
    /// Whether the prompt's tokens count (`include_prompt`, true where absent).
    pub include_prompt: bool,
}

impl Pooling {
    /// Width of the pooled vector for hidden states of `hidden_size`.
    pub fn width(&self, hidden_size: usize) -> usize {
        self.modes.len() * hidden_size
    }
}
