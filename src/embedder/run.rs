//! The batches of a call that waits as work for the scheduler, and what came of each.

use crate::executor::Backend;
use crate::pooling::check_finite;
use crate::scheduler::{Left, Work};
use crate::tokens::{BatchSize, TokenBatch};
use crate::{Error, Result, trace};
use std::any::Any;
use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// How a batch ended.
pub(super) enum BatchEnd {
    /// `[rows, dim]`, in the batch's row order.
    Vectors(Vec<f32>),
    /// The executor's failure; a panic of the executor is one.
    Failed(Error),
    /// It was never begun.
    NotBegun,
}

/// See the module.
pub(super) struct Run {
    backend: Arc<dyn Backend>,
    dim: usize,
    batches: Vec<TokenBatch>,
    /// `None` for batches that have not ended.
    ends: Mutex<Vec<Option<BatchEnd>>>,
    ended: Condvar,
}

impl Run {
    /// Vectors have `dim` values.
    pub fn new(backend: Arc<dyn Backend>, dim: usize, batches: Vec<TokenBatch>) -> Self {
        let ends = batches.iter().map(|_| None).collect();
        Self { backend, dim, batches, ends: Mutex::new(ends), ended: Condvar::new() }
    }

    /// The batches, in the order of their ends.
    pub fn token_batches(&self) -> &[TokenBatch] {
        &self.batches
    }

    /// Waits until `batch` has ended. Its end is given once.
    pub fn wait(&self, batch: usize) -> BatchEnd {
        let ends = self.lock();
        let mut ends = self.ended.wait_while(ends, |ends| ends[batch].is_none()).unwrap_or_else(PoisonError::into_inner);
        ends[batch].replace(BatchEnd::NotBegun).unwrap_or(BatchEnd::NotBegun)
    }

    fn encode(&self, batch: &TokenBatch) -> Result<Vec<f32>> {
        let mut vectors = vec![0.0; batch.batch() * self.dim];
        {
            let _range = trace::range("encode batch");
            self.backend.encode(batch, &mut vectors)?;
        }
        let _range = trace::range("finite check");
        check_finite(&vectors, self.dim, batch.rows())?;
        Ok(vectors)
    }

    /// Takes down how the batches of a range ended, and wakes who waits.
    fn end(&self, batches: Range<usize>, mut how: impl FnMut() -> BatchEnd) {
        for end in &mut self.lock()[batches] {
            *end = Some(how());
        }
        self.ended.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<BatchEnd>>> {
        // Nothing panics while it is locked.
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work for Run {
    fn batches(&self) -> usize {
        self.batches.len()
    }

    fn size(&self, batch: usize) -> BatchSize {
        self.batches[batch].size()
    }

    fn run(&self, batch: usize) -> ControlFlow<()> {
        let encoded = guarded(&*self.backend, || self.encode(&self.batches[batch]));
        let mut end = Some(encoded.map_or_else(BatchEnd::Failed, BatchEnd::Vectors));
        let breaks = matches!(end, Some(BatchEnd::Failed(_)));
        self.end(batch..batch + 1, || end.take().unwrap_or(BatchEnd::NotBegun));
        if breaks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn leave(&self, batches: Range<usize>, _: Left) {
        self.end(batches, || BatchEnd::NotBegun);
    }
}

/// What `work` gives on `backend`, of which a panic is a failure like any other.
pub(super) fn guarded<T>(backend: &dyn Backend, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let reason = format!("it panicked: {}", message_of(&*panic));
        Err(Error::Backend { backend: backend.name(), reason })
    })
}

/// What a panic says.
pub(super) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
