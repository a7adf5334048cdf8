//! A call's batches as work for the scheduler, and what came of each.

use crate::executor::Backend;
use crate::pooling::check_finite;
use crate::scheduler::{Class, Left, Work};
use crate::tokens::{BatchSize, TokenBatch};
use crate::{Error, Result, trace};
use std::any::Any;
use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

/// What a failure means for the other batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// The first one ends the call; a vector that is not finite is one.
    EndCall,
    /// Each batch stands for itself. Whether vectors are finite is seen where they are read.
    GoOn,
}

/// How a batch ended.
pub(super) enum BatchEnd {
    /// It ran.
    Vectors {
        /// `[rows, dim]`, in the batch's row order.
        vectors: Vec<f32>,
        /// When it was begun.
        begun: Instant,
        /// Its time in the executor.
        ran: Duration,
    },
    /// The executor's failure; a panic of the executor is one.
    Failed(Error),
    /// It was never begun.
    Left(Left),
}

/// Called with the end of each batch, once all have ended.
pub(super) type Callback = Box<dyn FnOnce(&Run, Vec<BatchEnd>) + Send>;

/// See the module.
pub(super) struct Run {
    backend: Arc<dyn Backend>,
    dim: usize,
    batches: Vec<TokenBatch>,
    class: Option<Class>,
    on_failure: OnFailure,
    outcome: Mutex<Outcome>,
    done: Condvar,
}

struct Outcome {
    ends: Vec<BatchEnd>,
    /// Batches that have not ended.
    open: usize,
    then: Then,
}

/// Who is told when all batches have ended, besides those that wait.
enum Then {
    Nobody,
    Wake(Waker),
    Call(Callback),
}

impl Run {
    /// Vectors have `dim` values; `class` is that of submitted texts.
    pub fn new(
        backend: Arc<dyn Backend>,
        dim: usize,
        batches: Vec<TokenBatch>,
        class: Option<Class>,
        on_failure: OnFailure,
    ) -> Self {
        let open = batches.len();
        let ends = batches.iter().map(|_| BatchEnd::Left(Left::Cancelled)).collect();
        let outcome = Mutex::new(Outcome { ends, open, then: Then::Nobody });
        Self { backend, dim, batches, class, on_failure, outcome, done: Condvar::new() }
    }

    /// The batches, in the order of their ends.
    pub fn token_batches(&self) -> &[TokenBatch] {
        &self.batches
    }

    /// Whether all batches have ended.
    pub fn is_done(&self) -> bool {
        self.lock().open == 0
    }

    /// Waits until all batches have ended. The ends are given once.
    pub fn wait(&self) -> Vec<BatchEnd> {
        let mut outcome = self.lock();
        while outcome.open > 0 {
            outcome = self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut outcome.ends)
    }

    /// The ends, where all batches have ended; else `waker` is woken when they have.
    pub fn poll(&self, waker: &Waker) -> Option<Vec<BatchEnd>> {
        let mut outcome = self.lock();
        if outcome.open == 0 {
            return Some(std::mem::take(&mut outcome.ends));
        }
        match &mut outcome.then {
            Then::Wake(known) => known.clone_from(waker),
            then => *then = Then::Wake(waker.clone()),
        }
        None
    }

    /// Calls `callback` when all batches have ended, on the thread that ends the last of them; at once where they have.
    pub fn then(&self, callback: Callback) {
        let mut outcome = self.lock();
        if outcome.open > 0 {
            outcome.then = Then::Call(callback);
            return;
        }
        let ends = std::mem::take(&mut outcome.ends);
        drop(outcome);
        callback(self, ends);
    }

    fn encode(&self, batch: &TokenBatch) -> Result<Vec<f32>> {
        let mut vectors = vec![0.0; batch.batch() * self.dim];
        {
            let _range = trace::range("encode batch");
            self.backend.encode(batch, &mut vectors)?;
        }
        if self.on_failure == OnFailure::EndCall {
            let _range = trace::range("finite check");
            check_finite(&vectors, self.dim, batch.rows())?;
        }
        Ok(vectors)
    }

    /// Takes down how the batches of a range ended, and tells who waits when they were the last.
    fn end(&self, batches: Range<usize>, mut how: impl FnMut() -> BatchEnd) {
        let mut outcome = self.lock();
        for end in &mut outcome.ends[batches.clone()] {
            *end = how();
        }
        outcome.open -= batches.len();
        if outcome.open > 0 {
            return;
        }
        let then = std::mem::replace(&mut outcome.then, Then::Nobody);
        let ends = if matches!(then, Then::Call(_)) { std::mem::take(&mut outcome.ends) } else { Vec::new() };
        drop(outcome);
        self.done.notify_all();
        // This may be anybody's thread: what is called here must not unwind into it.
        let told = catch_unwind(AssertUnwindSafe(|| match then {
            Then::Nobody => {}
            Then::Wake(waker) => waker.wake(),
            Then::Call(callback) => callback(self, ends),
        }));
        if let Err(panic) = told {
            log::error!("a submission's callback panicked: {}", message_of(&*panic));
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

    fn class(&self) -> Option<Class> {
        self.class
    }

    fn size(&self, batch: usize) -> BatchSize {
        self.batches[batch].size()
    }

    fn run(&self, batch: usize) -> ControlFlow<()> {
        let begun = Instant::now();
        let encoded = catch_unwind(AssertUnwindSafe(|| self.encode(&self.batches[batch])));
        let mut end = match encoded {
            Ok(Ok(vectors)) => Some(BatchEnd::Vectors { vectors, begun, ran: begun.elapsed() }),
            Ok(Err(error)) => Some(BatchEnd::Failed(error)),
            Err(panic) => {
                let reason = format!("it panicked: {}", message_of(&*panic));
                Some(BatchEnd::Failed(Error::Backend { backend: self.backend.name(), reason }))
            }
        };
        let breaks = self.on_failure == OnFailure::EndCall && matches!(end, Some(BatchEnd::Failed(_)));
        self.end(batch..batch + 1, || end.take().unwrap_or(BatchEnd::Left(Left::Broken)));
        if breaks { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn leave(&self, batches: Range<usize>, reason: Left) {
        self.end(batches, || BatchEnd::Left(reason));
    }
}

/// What a panic says.
fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
