//! Texts that were submitted, as the scheduler has them run: batches of the texts of many submissions, and what came of each text.

use super::run::{guarded, message_of};
use super::submission::Embedding;
use crate::executor::Backend;
use crate::pooling::check_finite;
use crate::scheduler::{self, Left, Part};
use crate::tokens::{Row, TokenBatch};
use crate::{Error, Result, trace};
use std::cmp::Reverse;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

/// Called with the result of each text, in their order, once all have one.
pub(super) type Callback = Box<dyn FnOnce(Vec<Result<Embedding>>) + Send>;

/// The texts of one submission.
pub(super) struct Texts {
    backend: Arc<dyn Backend>,
    job: Job,
    /// Those that run.
    rows: Vec<Row>,
    /// Their places in the caller's order.
    places: Vec<usize>,
    outcome: Mutex<Outcome>,
    done: Condvar,
}

/// What texts that are submitted together share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    /// Values of one vector.
    pub dim: usize,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
    /// See [`TokenBatch::skip`].
    pub skip: u32,
    /// When they were submitted.
    pub came: Instant,
    /// From submitting to the deadline.
    pub patience: Duration,
}

struct Outcome {
    results: Vec<Result<Embedding>>,
    /// Texts without a result.
    open: usize,
    /// Whether a thread waits.
    waited_for: bool,
    then: Then,
}

/// Who is told when each text has its result, besides those that wait.
enum Then {
    Nobody,
    Wake(Waker),
    Call(Callback),
}

impl Texts {
    /// `rows` in the caller's order, or why one does not run.
    pub fn new(backend: Arc<dyn Backend>, job: Job, rows: Vec<Result<Row>>) -> Self {
        let (mut results, mut whole, mut places) = (Vec::with_capacity(rows.len()), Vec::new(), Vec::new());
        for (text, row) in rows.into_iter().enumerate() {
            // Every text that runs is told how it ended; this stands for nothing but that.
            results.push(row.and_then(|row| {
                whole.push(row);
                places.push(text);
                Err(cancelled())
            }));
        }
        let outcome = Mutex::new(Outcome { results, open: whole.len(), waited_for: false, then: Then::Nobody });
        Self { backend, job, rows: whole, places, outcome, done: Condvar::new() }
    }

    /// What is common to all of them.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Tokens of each of those that run.
    pub fn lengths(&self) -> Vec<u32> {
        self.rows.iter().map(|row| row.ids.len() as u32).collect()
    }

    /// Whether each text has its result.
    pub fn is_done(&self) -> bool {
        self.lock().open == 0
    }

    /// Waits until each text has its result. They are given once.
    pub fn wait(&self) -> Vec<Result<Embedding>> {
        let mut outcome = self.lock();
        outcome.waited_for = true;
        while outcome.open > 0 {
            outcome = self.done.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut outcome.results)
    }

    /// The results, where each text has one; else `waker` is woken when they have.
    pub fn poll(&self, waker: &Waker) -> Option<Vec<Result<Embedding>>> {
        let mut outcome = self.lock();
        if outcome.open == 0 {
            return Some(std::mem::take(&mut outcome.results));
        }
        match &mut outcome.then {
            Then::Wake(known) => known.clone_from(waker),
            then => *then = Then::Wake(waker.clone()),
        }
        None
    }

    /// Calls `callback` when each text has its result, on the thread that ends the last of them; at once where they have.
    pub fn then(&self, callback: Callback) {
        let mut outcome = self.lock();
        if outcome.open > 0 {
            outcome.then = Then::Call(callback);
            return;
        }
        let results = std::mem::take(&mut outcome.results);
        drop(outcome);
        callback(results);
    }

    /// How many texts there are.
    pub fn len(&self) -> usize {
        self.lock().results.len()
    }

    /// Takes down the results of some of the texts that run, and tells who waits when they were the last.
    fn end(&self, ends: impl IntoIterator<Item = (u32, Result<Embedding>)>) {
        let mut outcome = self.lock();
        for (text, result) in ends {
            outcome.results[self.places[text as usize]] = result;
            outcome.open -= 1;
        }
        if outcome.open > 0 {
            return;
        }
        let then = std::mem::replace(&mut outcome.then, Then::Nobody);
        let results = if matches!(then, Then::Call(_)) { std::mem::take(&mut outcome.results) } else { Vec::new() };
        let waited_for = outcome.waited_for;
        drop(outcome);
        if waited_for {
            self.done.notify_all();
        }
        // This may be anybody's thread: what is called here must not unwind into it.
        let told = catch_unwind(AssertUnwindSafe(|| match then {
            Then::Nobody => {}
            Then::Wake(waker) => waker.wake(),
            Then::Call(callback) => callback(results),
        }));
        if let Err(panic) = told {
            log::error!("a submission's callback panicked: {}", message_of(&*panic));
        }
    }

    /// The result of text `text`, whose vector this is.
    fn whole(&self, text: u32, vector: &[f32], begun: Instant, ran: Duration) -> Result<Embedding> {
        let row = &self.rows[text as usize];
        check_finite(vector, self.job.dim, &[self.places[text as usize]])?;
        Ok(Embedding {
            values: vector.to_vec(),
            tokens: row.ids.len() as u32,
            truncated: row.truncated,
            queued: begun.saturating_duration_since(self.job.came),
            ran,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Outcome> {
        // Nothing panics while it is locked.
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl scheduler::Texts for Texts {
    fn run(pack: Vec<Part<Arc<Self>>>) {
        // All submissions of a scheduler are of one executor, and those of a batch of one `skip`.
        let Some(any) = pack.first().map(|part| part.owner.clone()) else { return };
        // Part and text of each row, longest first.
        let numbered = pack.iter().enumerate();
        let mut order: Vec<(usize, u32)> =
            numbered.flat_map(|(part, texts)| texts.texts.iter().map(move |&text| (part, text))).collect();
        order.sort_by_key(|&(part, text)| Reverse(pack[part].owner.rows[text as usize].ids.len()));
        let begun = Instant::now();
        let encoded = guarded(&*any.backend, || {
            let rows: Vec<&[u32]> = order.iter().map(|&(part, text)| &*pack[part].owner.rows[text as usize].ids).collect();
            let mut batch = TokenBatch::default();
            batch.refill(&rows, any.job.vocab_size, any.job.skip)?;
            let mut vectors = vec![0.0; rows.len() * any.job.dim];
            let _range = trace::range("encode batch");
            any.backend.encode(&batch, &mut vectors)?;
            Ok(vectors)
        });
        let ran = begun.elapsed();
        match encoded {
            Ok(vectors) => {
                let mut ends: Vec<Vec<(u32, Result<Embedding>)>> = pack.iter().map(|_| Vec::new()).collect();
                for (&(part, text), vector) in order.iter().zip(vectors.chunks_exact(any.job.dim.max(1))) {
                    ends[part].push((text, pack[part].owner.whole(text, vector, begun, ran)));
                }
                pack.iter().zip(ends).for_each(|(part, ends)| part.owner.end(ends));
            }
            Err(error) => {
                let source = Arc::new(error);
                for part in &pack {
                    let failure = || Error::Batch { texts: order.len(), source: source.clone() };
                    part.owner.end(part.texts.iter().map(|&text| (text, Err(failure()))));
                }
            }
        }
    }

    fn leave(&self, texts: &[u32], reason: Left) {
        let error = || match reason {
            Left::Expired => Error::DeadlineExceeded { patience: self.job.patience },
            Left::Cancelled | Left::Broken => cancelled(),
        };
        self.end(texts.iter().map(|&text| (text, Err(error()))));
    }
}

fn cancelled() -> Error {
    Error::Cancelled { what: "embedding the text" }
}
