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
    outcome: Mutex<Outcome>,
    done: Condvar,
}

struct Outcome {
    ends: Vec<BatchEnd>,
    /// Batches that have not ended.
    open: usize,
}

impl Run {
    /// Vectors have `dim` values.
    pub fn new(backend: Arc<dyn Backend>, dim: usize, batches: Vec<TokenBatch>) -> Self {
        let open = batches.len();
        let ends = batches.iter().map(|_| BatchEnd::NotBegun).collect();
        Self { backend, dim, batches, outcome: Mutex::new(Outcome { ends, open }), done: Condvar::new() }
    }

    /// The batches, in the order of their ends.
    pub fn token_batches(&self) -> &[TokenBatch] {
        &self.batches
    }

    /// Waits until all batches have ended. The ends are given once.
    pub fn wait(&self) -> Vec<BatchEnd> {
        let mut outcome = self.lock();
        while outcome.open > 0 {
            outcome = self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut outcome.ends)
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

    /// Takes down how the batches of a range ended, and wakes who waits when they were the last.
    fn end(&self, batches: Range<usize>, mut how: impl FnMut() -> BatchEnd) {
        let mut outcome = self.lock();
        for end in &mut outcome.ends[batches.clone()] {
            *end = how();
        }
        outcome.open -= batches.len();
        if outcome.open == 0 {
            drop(outcome);
            self.done.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Outcome> {
        // Nothing panics while it is locked.
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
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
        let encoded = catch_unwind(AssertUnwindSafe(|| self.encode(&self.batches[batch])));
        let mut end = Some(match encoded {
            Ok(Ok(vectors)) => BatchEnd::Vectors(vectors),
            Ok(Err(error)) => BatchEnd::Failed(error),
            Err(panic) => {
                let reason = format!("it panicked: {}", message_of(&*panic));
                BatchEnd::Failed(Error::Backend { backend: self.backend.name(), reason })
            }
        });
        let breaks = matches!(end, Some(BatchEnd::Failed(_)));
        self.end(batch..batch + 1, || end.take().unwrap_or(BatchEnd::NotBegun));
        if breaks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn leave(&self, batches: Range<usize>, _: Left) {
        self.end(batches, || BatchEnd::NotBegun);
    }
}

/// What a panic says.
pub(super) fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
