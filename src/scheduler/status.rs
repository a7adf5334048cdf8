//! What the line of an executor looks like at a moment: what waits, what runs, and counters since the start.

/// Whom a submitted text serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Class {
    /// Somebody waits for it, as for the vector of a query.
    #[default]
    Interactive,
    /// Nobody waits for the single text, as when an index is built.
    Bulk,
}

/// The line for an executor at one moment, and what has happened since the executor was opened: see
/// [`Embedder::queue`](crate::Embedder::queue). Of what is submitted and of synchronous calls alike, unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueStatus {
    /// What was submitted as [`Class::Interactive`] and waits. Synchronous calls wait too and are not counted.
    pub interactive: Waiting,
    /// What was submitted as [`Class::Bulk`] and waits.
    pub bulk: Waiting,
    /// Most tokens that may wait, where [`EmbedderBuilder::queue_tokens`](crate::EmbedderBuilder::queue_tokens) says so.
    pub limit: Option<usize>,
    /// Batches that run.
    pub running: usize,
    /// Batches that were begun.
    pub batches: u64,
    /// Texts of these batches.
    pub texts: u64,
    /// Tokens of these texts, special tokens and prompts included.
    pub tokens: u64,
    /// Tokens that the executor ran for them, those of padding included: `tokens / run_tokens` is how well batches were packed.
    pub run_tokens: u64,
    /// Submitted texts that were refused with [`Error::Overloaded`](crate::Error::Overloaded).
    pub rejected: u64,
    /// Submitted texts that were never begun because their deadline had passed.
    pub expired: u64,
    /// Submitted texts that were never begun because they were given up.
    pub cancelled: u64,
    /// Batches of interactive texts, those of synchronous calls included, that were begun while bulk texts waited.
    pub overtakings: u64,
}

/// Submitted texts that wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Waiting {
    /// How many.
    pub texts: usize,
    /// Their tokens, special tokens and prompts included.
    pub tokens: usize,
}

impl QueueStatus {
    /// Tokens of both classes that wait.
    pub fn waiting_tokens(&self) -> usize {
        self.interactive.tokens.saturating_add(self.bulk.tokens)
    }

    pub(super) fn comes(&mut self, class: Class, texts: usize, tokens: usize) {
        let waiting = self.waiting_mut(class);
        waiting.texts += texts;
        waiting.tokens += tokens;
    }

    pub(super) fn no_longer_waits(&mut self, class: Class, texts: usize, tokens: usize) {
        let waiting = self.waiting_mut(class);
        waiting.texts -= texts;
        waiting.tokens -= tokens;
    }

    pub(super) fn waiting(&self, class: Class) -> Waiting {
        match class {
            Class::Interactive => self.interactive,
            Class::Bulk => self.bulk,
        }
    }

    fn waiting_mut(&mut self, class: Class) -> &mut Waiting {
        match class {
            Class::Interactive => &mut self.interactive,
            Class::Bulk => &mut self.bulk,
        }
    }
}
