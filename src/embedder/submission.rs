//! Texts that were submitted: waiting for them, being told when they are done, giving them up.

use super::run::{BatchEnd, Run};
use crate::pooling::check_finite;
use crate::scheduler::{Class, Left, Submitted};
use crate::{Error, Result};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How texts are submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SubmitSettings {
    /// Batches whose turn has not come by then are never begun: their texts give [`Error::DeadlineExceeded`]. None waits as long as it
    /// takes. A batch that has begun ends, however late. Texts are told of their deadline when the next batch ends.
    pub deadline: Option<Instant>,
    /// Whom the texts serve: interactive ones go before bulk.
    pub class: Class,
}

impl SubmitSettings {
    /// With a deadline.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Of a class.
    #[must_use]
    pub fn with_class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }
}

/// The vector of one text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embedding {
    /// `[dim]`.
    pub values: Vec<f32>,
    /// Tokens as run, special tokens and prompt included, after cutting.
    pub tokens: u32,
    /// Whether the text was longer than [`Info::max_tokens`](crate::Info::max_tokens) and was cut.
    pub truncated: bool,
    /// From submitting the text to the begin of its batch.
    pub queued: Duration,
    /// The time of its batch in the executor, however many texts shared it.
    pub ran: Duration,
}

/// Texts under way, made by [`Embedder::submit`](crate::Embedder::submit). It gives one result for each of them, in their order, once:
/// to [`Submission::wait`], to who awaits it (it is a [`Future`] for any runtime), or to the callback of [`Submission::on_done`].
///
/// A text fails alone: one that cannot be tokenised ([`Error::Text`], [`Error::TokenId`]) or whose vector is not finite
/// ([`Error::NotFinite`]) does not fail the others. Where the executor fails on a batch, every text of that batch fails with
/// [`Error::Batch`]; a panic of the executor is such a failure.
///
/// Dropping it gives up the batches that have not begun, and so does dropping the last [`Embedder`](crate::Embedder) of the executor, which
/// waits for those that have.
#[must_use = "dropping it gives the texts up"]
pub struct Submission {
    run: Arc<Run>,
    /// None once the results are given.
    texts: Option<Texts>,
    /// None where nothing needs to run, and where nobody can give it up any more.
    submitted: Option<Submitted>,
}

/// What is known of the texts before they run.
pub(super) struct Texts {
    /// One for each text in the caller's order: its tokens and whether it was cut, or why it does not run.
    pub each: Vec<Result<(u32, bool)>>,
    /// Place of the rows that run in the caller's order.
    pub places: Vec<usize>,
    /// Values of one vector.
    pub dim: usize,
    /// When they were submitted.
    pub came: Instant,
    /// From submitting to the deadline.
    pub patience: Duration,
}

impl Submission {
    pub(super) fn new(run: Arc<Run>, texts: Texts, submitted: Option<Submitted>) -> Self {
        Self { run, texts: Some(texts), submitted }
    }

    /// Waits until each text has its result, and gives them in the caller's order.
    ///
    /// # Errors
    /// Those of the texts: see [`Submission`]; [`Error::DeadlineExceeded`]; [`Error::Cancelled`].
    pub fn wait(mut self) -> Vec<Result<Embedding>> {
        let ends = self.run.wait();
        self.give(ends)
    }

    /// Whether each text has its result: then [`Submission::wait`] does not wait.
    pub fn is_done(&self) -> bool {
        self.run.is_done()
    }

    /// Gives up the batches that have not begun: their texts give [`Error::Cancelled`]. Those that run end as they would.
    pub fn cancel(&self) {
        if let Some(submitted) = &self.submitted {
            submitted.cancel();
        }
    }

    /// Passes the results to `callback` when each text has one: on the thread that ends the last batch, which should not be held up; at once
    /// and here where all have ended. Nothing can give the texts up any more, but for dropping the embedder.
    ///
    /// ```
    /// # let embedder = trt_embed::Embedder::builder("tests/fixtures/bert").build()?;
    /// let (sender, receiver) = std::sync::mpsc::channel();
    /// let submission = embedder.submit(&["A sentence."], Default::default())?;
    /// submission.on_done(move |results| drop(sender.send(results)));
    /// let results = receiver.recv().expect("the embedder lives");
    /// assert!(results[0].is_ok());
    /// # Ok::<(), trt_embed::Error>(())
    /// ```
    pub fn on_done(mut self, callback: impl FnOnce(Vec<Result<Embedding>>) + Send + 'static) {
        self.submitted = None;
        if let Some(texts) = self.texts.take() {
            self.run.then(Box::new(move |run, ends| callback(texts.results(run, ends))));
        }
    }

    fn give(&mut self, ends: Vec<BatchEnd>) -> Vec<Result<Embedding>> {
        self.submitted = None;
        self.texts.take().map_or_else(Vec::new, |texts| texts.results(&self.run, ends))
    }
}

/// Gives the results as [`Submission::wait`] does. Polled again after that it gives none.
impl Future for Submission {
    type Output = Vec<Result<Embedding>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        match this.run.poll(context.waker()) {
            Some(ends) => Poll::Ready(this.give(ends)),
            None => Poll::Pending,
        }
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self.texts.as_ref().map_or(0, |texts| texts.each.len());
        f.debug_struct("Submission").field("texts", &texts).field("done", &self.is_done()).finish_non_exhaustive()
    }
}

impl Texts {
    /// Each text's result, in the caller's order.
    fn results(self, run: &Run, ends: Vec<BatchEnd>) -> Vec<Result<Embedding>> {
        let Self { each, places, dim, came, patience } = self;
        let (queued, ran) = (Duration::ZERO, Duration::ZERO);
        let begun = |known: Result<(u32, bool)>| {
            known.map(|(tokens, truncated)| Embedding { values: Vec::new(), tokens, truncated, queued, ran })
        };
        let mut results: Vec<Result<Embedding>> = each.into_iter().map(begun).collect();
        for (batch, end) in run.token_batches().iter().zip(ends) {
            let texts = batch.rows().iter().map(|&row| places[row]);
            match end {
                BatchEnd::Vectors { vectors, begun, ran } => {
                    let queued = begun.saturating_duration_since(came);
                    for (text, vector) in texts.zip(vectors.chunks_exact(dim.max(1))) {
                        let whole = check_finite(vector, dim, &[text]).map(|()| vector.to_vec());
                        let result = std::mem::replace(&mut results[text], Err(cancelled()));
                        results[text] = result.and_then(|known| Ok(Embedding { values: whole?, queued, ran, ..known }));
                    }
                }
                BatchEnd::Failed(source) => {
                    let (count, source) = (batch.rows().len(), Arc::new(source));
                    texts.for_each(|text| results[text] = Err(Error::Batch { texts: count, source: source.clone() }));
                }
                BatchEnd::Left(Left::Expired) => {
                    texts.for_each(|text| results[text] = Err(Error::DeadlineExceeded { patience }));
                }
                BatchEnd::Left(Left::Cancelled | Left::Broken) => texts.for_each(|text| results[text] = Err(cancelled())),
            }
        }
        results
    }
}

fn cancelled() -> Error {
    Error::Cancelled { what: "embedding the text" }
}
