//! The seam between the pipeline and what runs an encoder.

#[cfg(any(feature = "cpu", feature = "cuda"))]
pub(crate) mod permits;

use crate::Result;
use crate::tokens::{ShapeCosts, TokenBatch};
use std::sync::Arc;

/// Runs token batches through an encoder. One value serves many threads at once.
pub trait Backend: Send + Sync {
    /// `cpu` or `tensorrt`.
    fn name(&self) -> &'static str;

    /// Encodes and pools `batch` into `out`, `[batch, embedding]`, in the batch's row order.
    /// Dense modules, the cut and normalisation are included.
    ///
    /// # Errors
    /// [`Error::TokenId`](crate::Error::TokenId) for an id outside the embedding table,
    /// [`Error::OutputLength`](crate::Error::OutputLength); a batch outside [`Backend::limits`]; an executor's failure.
    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()>;

    /// Hidden states of `batch` into `out`, `[tokens, hidden]`: those of its rows side by side, without padding.
    ///
    /// # Errors
    /// As [`Backend::encode`].
    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()>;

    /// What a batch may be.
    fn limits(&self) -> Limits;

    /// Measured times of the executor's shapes, where it has fixed ones: rows are then cut into batches by them.
    fn costs(&self) -> Option<Arc<ShapeCosts>> {
        None
    }
}

/// What a batch may be, and how many are worth running at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Rows of one batch.
    pub max_batch: usize,
    /// Tokens of one row.
    pub max_seq: usize,
    /// Tokens of one batch, those of padding included where it is run, beyond which larger batches gain nothing.
    pub batch_tokens: usize,
    /// Batches worth running at once from different threads.
    pub parallelism: usize,
}
