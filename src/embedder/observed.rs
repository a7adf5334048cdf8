//! An executor that tells of each batch that it has run, for the server's metrics.

use crate::Result;
use crate::executor::{Backend, Limits};
use crate::tokens::{BatchSize, ShapeCosts, TokenBatch};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Told of each batch and the time that the executor took for it, also where it failed, but not where it panicked. Called by the thread that ran
/// the batch, before anybody is told of the vectors and without a lock held; it holds the executor's place meanwhile.
pub(crate) type Observer = Box<dyn Fn(BatchSize, Duration) + Send + Sync>;

/// See the module.
pub(super) struct Observed {
    pub backend: Arc<dyn Backend>,
    pub observer: Observer,
}

impl Observed {
    fn run(&self, batch: &TokenBatch, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let begun = Instant::now();
        let ended = run();
        (self.observer)(batch.size(), begun.elapsed());
        ended
    }
}

impl Backend for Observed {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn encode(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(batch, || self.backend.encode(batch, out))
    }

    fn hidden(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        self.run(batch, || self.backend.hidden(batch, out))
    }

    fn limits(&self) -> Limits {
        self.backend.limits()
    }

    fn costs(&self) -> Option<Arc<ShapeCosts>> {
        self.backend.costs()
    }
}
