//! Texts that were submitted: waiting for them, being told when they are done, giving them up.

use super::texts::Texts;
use crate::Result;
use crate::scheduler::{Class, Submitted};
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
    /// Texts whose turn has not come by then are never begun: they give [`Error::DeadlineExceeded`](crate::Error::DeadlineExceeded). None waits as long as it
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
/// A text fails alone: one that cannot be tokenised ([`Error::Text`](crate::Error::Text), [`Error::TokenId`](crate::Error::TokenId)) or whose vector is not finite
/// ([`Error::NotFinite`](crate::Error::NotFinite)) does not fail the others. Texts of other submissions share its batches. Where the executor fails on a batch, every text of that batch fails with
/// [`Error::Batch`](crate::Error::Batch); a panic of the executor is such a failure.
///
/// Dropping it gives up the texts that have not begun, and so does dropping the last [`Embedder`](crate::Embedder) of the executor, which
/// waits for those that have.
#[must_use = "dropping it gives the texts up"]
pub struct Submission {
    texts: Arc<Texts>,
    /// None where nothing needs to run, and where nobody can give it up any more.
    submitted: Option<Submitted<Texts>>,
}

impl Submission {
    pub(super) fn new(texts: Arc<Texts>, submitted: Option<Submitted<Texts>>) -> Self {
        Self { texts, submitted }
    }

    /// Waits until each text has its result, and gives them in the caller's order.
    ///
    /// # Errors
    /// Those of the texts: see [`Submission`]; [`Error::DeadlineExceeded`](crate::Error::DeadlineExceeded); [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn wait(mut self) -> Vec<Result<Embedding>> {
        let results = self.texts.wait();
        self.submitted = None;
        results
    }

    /// Whether each text has its result: then [`Submission::wait`] does not wait.
    pub fn is_done(&self) -> bool {
        self.texts.is_done()
    }

    /// Gives up the texts that have not begun: they give [`Error::Cancelled`](crate::Error::Cancelled). Those that run end as they would.
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
        self.texts.then(Box::new(callback));
    }
}

/// Gives the results as [`Submission::wait`] does. Polled again after that it gives none.
impl Future for Submission {
    type Output = Vec<Result<Embedding>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Some(results) = this.texts.poll(context.waker()) else { return Poll::Pending };
        this.submitted = None;
        Poll::Ready(results)
    }
}

impl Drop for Submission {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission").field("texts", &self.texts.len()).field("done", &self.is_done()).finish_non_exhaustive()
    }
}
