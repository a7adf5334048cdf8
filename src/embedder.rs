//! The pipeline and the crate's one public door: texts to vectors.

mod auto;
mod builder;
mod choice;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "serve")]
mod observed;
mod run;
mod submission;
#[cfg(feature = "tensorrt")]
mod tensorrt;
mod texts;
#[cfg(feature = "cuda")]
mod widening;

pub use builder::EmbedderBuilder;
pub use choice::{BackendChoice, ChosenBackend};
#[cfg(feature = "serve")]
pub(crate) use observed::Observer;
pub use submission::{Embedding, Submission, SubmitSettings};

use crate::executor::{Backend, Limits};
use crate::model::{EncoderConfig, Prompts};
use crate::pooling::{Pooling, check_finite, check_output};
use crate::scheduler::{Flow, Full, NewTexts, QueueStatus, Refused, Scheduler};
#[cfg(feature = "serve")]
use crate::tokens::batches_from_ids;
use crate::tokens::{BatchPlan, Row, TokenBatch, Tokenized, Tokenizer, without_tokens};
use crate::trace;
use crate::{Error, Result, Similarity};
use run::{BatchEnd, Run};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use texts::{Job, Texts};

thread_local! {
    /// The batch of single rows of ids, refilled at every call. Taken, not borrowed: reading a row may run a call of its own.
    static ROW: Cell<TokenBatch> = Cell::default();
}

/// Whether vectors are scaled to unit length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Normalize {
    /// As the model folder says (a Normalize module).
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

/// Texts to vectors. `Send + Sync`: share one behind an `Arc`, call it from many threads. Their batches run in turn, so that a call of one short
/// text beside any number of calls of many thousands waits for the batches that run and at most one more. The first failure ends a call;
/// [`Embedder::submit`] gives each text a result of its own, without waiting.
///
/// ```no_run
/// let embedder = trt_embed::Embedder::builder("models/all-MiniLM-L6-v2").build()?;
/// let vectors = embedder.embed(&["A sentence.", "Another one."])?;
/// for vector in vectors.rows() {
///     println!("{} values, the first is {}", vector.len(), vector[0]);
/// }
/// # Ok::<(), trt_embed::Error>(())
/// ```
pub struct Embedder {
    info: Info,
    tokenizer: Tokenizer,
    prompts: Prompts,
    backend: Arc<dyn Backend>,
    /// The executor itself, where `backend` is one that tells of its batches: probes are not told of.
    #[cfg(feature = "serve")]
    bare: Option<Arc<dyn Backend>>,
    /// One for all embedders of the executor.
    scheduler: Arc<Scheduler<Texts>>,
    #[cfg(feature = "cuda")]
    gpu: Option<Gpu>,
    /// [`Embedder::info`] from the moment on when values overflowed fp16.
    #[cfg(feature = "cuda")]
    widened: std::sync::OnceLock<Info>,
    plan: BatchPlan,
}

/// A model on a GPU.
#[cfg(feature = "cuda")]
#[derive(Clone)]
enum Gpu {
    Fixed(Arc<crate::gpu::GpuBackend>),
    Widening(Arc<widening::Widening<crate::gpu::GpuBackend>>),
}

/// Vectors of some texts, `[texts, dim]`, in input order.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embeddings {
    /// `[texts, dim]`, row-major.
    pub values: Vec<f32>,
    /// Values of one vector.
    pub dim: usize,
    /// Tokens of each text as run, special tokens and prompt included, after cutting.
    pub tokens: Vec<u32>,
    /// How many texts were longer than [`Info::max_tokens`] and were cut.
    pub truncated: usize,
}

/// Hidden states of one text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HiddenStates {
    /// `[tokens, hidden]`, row-major; no padding.
    pub values: Vec<f32>,
    /// Number of tokens.
    pub tokens: usize,
    /// Width of a hidden state.
    pub hidden_size: usize,
}

/// What an [`Embedder`] is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Info {
    /// The model as it was named.
    pub model: String,
    /// The folder that it was read from.
    pub folder: PathBuf,
    /// config.json.
    pub config: EncoderConfig,
    /// Pooling in force.
    pub pooling: Pooling,
    /// Whether vectors are scaled to unit length.
    pub normalize: bool,
    /// Values of one vector.
    pub dim: usize,
    /// How the model's vectors are compared.
    pub similarity: Similarity,
    /// Longest text in tokens; longer ones are cut.
    pub max_tokens: usize,
    /// `cpu`, `cuda` or `tensorrt`.
    pub backend: &'static str,
    /// Why [`BackendChoice::Auto`] did not take a better one, or a wider precision than fp16. Values may overflow in the middle of the work: what
    /// [`Embedder::info`] gives from then on says so.
    pub backend_reason: Option<String>,
    /// Where the engine came from, where one runs the model.
    pub engine: Option<PathBuf>,
    /// The executor's limits.
    pub limits: Limits,
    /// Prompt put before every text, if any.
    pub prompt: Option<String>,
}

impl Embedder {
    /// Starts with `model`: a folder, or a hub id `org/name[@revision]`.
    pub fn builder(model: impl Into<String>) -> EmbedderBuilder {
        EmbedderBuilder::new(model.into())
    }

    /// Encodes `texts` into rows `[texts.len(), dim]`, in input order. No texts give no rows.
    ///
    /// Longer texts are cut at [`Info::max_tokens`] tokens and counted in [`Embeddings::truncated`].
    ///
    /// # Errors
    /// [`Error::TokenId`] when the tokenizer gives an id beyond the embedding table, [`Error::NotFinite`] when a vector is not
    /// finite, [`Error::Tokenizer`], [`Error::Backend`].
    pub fn embed<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Embeddings> {
        self.embed_tokens(self.tokenize(texts)?)
    }

    /// As [`Embedder::embed`], into `out` of `texts.len() * dim` values.
    ///
    /// # Errors
    /// [`Error::OutputLength`] when `out` has another length; see [`Embedder::embed`].
    pub fn embed_into<T: AsRef<str> + Sync>(&self, texts: &[T], out: &mut [f32]) -> Result<()> {
        check_output(out, texts.len(), self.info.dim)?;
        self.encode_batches(self.tokenize(texts)?.batches, out)
    }

    /// As [`Embedder::embed`] for texts that are token ids already, special tokens included.
    ///
    /// # Errors
    /// [`Error::Setting`] for a row that is empty or longer than [`Info::max_tokens`]; see [`Embedder::embed`].
    pub fn embed_ids<R: AsRef<[u32]>>(&self, rows: &[R]) -> Result<Embeddings> {
        self.embed_tokens(self.tokenizer.batches_from_ids(rows, &self.plan)?)
    }

    /// As [`Embedder::embed_ids`], into `out` of `rows.len() * dim` values. One row on a GPU allocates nothing.
    ///
    /// # Errors
    /// [`Error::OutputLength`] when `out` has another length; see [`Embedder::embed_ids`].
    pub fn embed_ids_into<R: AsRef<[u32]>>(&self, rows: &[R], out: &mut [f32]) -> Result<()> {
        check_output(out, rows.len(), self.info.dim)?;
        if let [_] = rows {
            let mut batch = ROW.take();
            let filled = self.tokenizer.refill_from_ids(rows, &mut batch);
            let done = filled.and_then(|()| self.encode_in_turn(&batch, &mut Flow::default(), out));
            ROW.set(batch);
            return done;
        }
        self.encode_batches(self.tokenizer.batches_from_ids(rows, &self.plan)?.batches, out)
    }

    /// Submits `texts` without waiting for their vectors: the [`Submission`] is waited for or awaited, or tells a callback. Tokenises on this
    /// thread, and over [`EmbedderBuilder::threads`] where there is enough to do.
    ///
    /// ```
    /// # let embedder = trt_embed::Embedder::builder("tests/fixtures/bert").build()?;
    /// use std::time::{Duration, Instant};
    /// use trt_embed::SubmitSettings;
    ///
    /// let settings = SubmitSettings::default().with_deadline(Instant::now() + Duration::from_secs(10));
    /// let submission = embedder.submit(&["A sentence.", "Another one."], settings)?;
    /// for result in submission.wait() {
    ///     match result {
    ///         Ok(embedding) => println!("{} values of {} tokens", embedding.values.len(), embedding.tokens),
    ///         Err(error) => eprintln!("{error}"),
    ///     }
    /// }
    /// # Ok::<(), trt_embed::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Overloaded`], at once, where with these texts more tokens would wait than [`EmbedderBuilder::queue_tokens`];
    /// [`Error::Backend`] where the system gives no thread to run them. What is wrong with a text is that text's result.
    pub fn submit<T: AsRef<str> + Sync>(&self, texts: &[T], settings: SubmitSettings) -> Result<Submission> {
        let rows = {
            let _range = trace::range("tokenise");
            self.tokenizer.rows(texts)
        };
        self.submit_rows(rows, self.tokenizer.skip(), settings)
    }

    /// As [`Embedder::submit`] for texts that are token ids already, special tokens included.
    ///
    /// # Errors
    /// As [`Embedder::submit`]; a row that [`Embedder::embed_ids`] would refuse is that row's failure.
    pub fn submit_ids<R: AsRef<[u32]>>(&self, rows: &[R], settings: SubmitSettings) -> Result<Submission> {
        let rows = rows.iter().enumerate().map(|(index, row)| self.tokenizer.row_of_ids(index, row.as_ref())).collect();
        self.submit_rows(rows, 0, settings)
    }

    /// Cuts, sorts and batches `texts` without running them: [`Tokenized::batches`] is what [`Embedder::embed`] would run.
    ///
    /// # Errors
    /// [`Error::TokenId`]; [`Error::Text`], also for a text without any token, of which there is no vector.
    pub fn tokenize<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Tokenized> {
        let _range = trace::range("tokenise");
        let tokenized = self.tokenizer.encode(texts, &self.plan)?;
        match tokenized.tokens.iter().position(|&tokens| tokens == 0) {
            Some(text) => Err(without_tokens(text)),
            None => Ok(tokenized),
        }
    }

    /// Hidden states of each text, in input order.
    ///
    /// # Errors
    /// See [`Embedder::embed`].
    pub fn hidden_states<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<HiddenStates>> {
        self.hidden_of(&self.tokenize(texts)?.batches, texts.len())
    }

    /// Hidden states of the `texts` texts that `batches` are made of, in the caller's order.
    fn hidden_of(&self, batches: &[TokenBatch], texts: usize) -> Result<Vec<HiddenStates>> {
        let hidden_size = self.info.config.hidden_size;
        let mut states = vec![HiddenStates { values: Vec::new(), tokens: 0, hidden_size }; texts];
        let (mut hidden, mut flow) = (Vec::new(), Flow::default());
        for batch in batches {
            hidden.resize(batch.ids().len() * hidden_size, 0.0);
            {
                let _turn = self.scheduler.turn(&mut flow, batch.size());
                self.backend.hidden(batch, &mut hidden)?;
            }
            let ends = batch.starts().windows(2);
            for (row, &text) in ends.zip(batch.rows()) {
                let (start, end) = (row[0] as usize, row[1] as usize);
                let (length, values) = (end - start, &hidden[start * hidden_size..end * hidden_size]);
                check_finite(values, values.len(), &[text])?;
                states[text] = HiddenStates { values: values.to_vec(), tokens: length, hidden_size };
            }
        }
        Ok(states)
    }

    /// The same model with the prompt of this name before every text; empty for none. Both share the executor and its memory.
    ///
    /// # Errors
    /// [`Error::Setting`] for a name that the model does not have; [`Error::Tokenizer`].
    pub fn with_prompt_name(&self, name: &str) -> Result<Self> {
        let prompt = self.prompt_named(name)?;
        Ok(Self {
            tokenizer: self.tokenizer.with_prompt(prompt.clone())?,
            info: Info { prompt, ..self.info.clone() },
            prompts: self.prompts.clone(),
            backend: self.backend.clone(),
            #[cfg(feature = "serve")]
            bare: self.bare.clone(),
            scheduler: self.scheduler.clone(),
            #[cfg(feature = "cuda")]
            gpu: self.gpu.clone(),
            #[cfg(feature = "cuda")]
            widened: std::sync::OnceLock::new(),
            plan: self.plan.clone(),
        })
    }

    /// The prompt of this name; none where the name is empty.
    ///
    /// # Errors
    /// [`Error::Setting`] for a name that the model does not have.
    pub(crate) fn prompt_named(&self, name: &str) -> Result<Option<String>> {
        if name.is_empty() { Ok(None) } else { builder::prompt_by_name(&self.prompts, name) }
    }

    /// As [`Embedder::hidden_states`] for rows that a tokenizer of this model gave.
    #[cfg(feature = "serve")]
    pub(crate) fn hidden_states_of_rows(&self, rows: &[Row]) -> Result<Vec<HiddenStates>> {
        self.hidden_of(&batches_from_ids(rows, self.info.config.vocab_size, 0, &self.plan)?, rows.len())
    }

    /// Runs a text of one token on the executor at once, beside whatever waits for a turn: whether the executor still works.
    ///
    /// # Errors
    /// The executor's.
    #[cfg(feature = "serve")]
    pub(crate) fn probe(&self) -> Result<()> {
        let row = Row { ids: vec![self.tokenizer.probe_id()], truncated: false };
        let mut vector = vec![0.0; self.info.dim];
        for batch in batches_from_ids(&[row], self.info.config.vocab_size, 0, &self.plan)? {
            self.bare.as_ref().unwrap_or(&self.backend).encode(&batch, &mut vector)?;
            check_finite(&vector, self.info.dim, batch.rows())?;
        }
        Ok(())
    }

    /// The tokenizer, with the prompt in force.
    #[cfg(feature = "serve")]
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The same model, which tells `observer` of each batch from now on, but for those of [`Embedder::probe`].
    #[cfg(feature = "serve")]
    pub(crate) fn observed(self, observer: Observer) -> Self {
        let backend = Arc::new(observed::Observed { backend: self.backend.clone(), observer });
        Self { bare: Some(self.backend), backend, ..self }
    }

    /// The same model on another executor.
    #[cfg(all(test, feature = "serve"))]
    pub(crate) fn on(self, backend: Arc<dyn Backend>) -> Self {
        Self { backend, ..self }
    }

    /// What waits for the executor and what runs at this moment, and counters since it was opened: those of all embedders that share it (see
    /// [`Embedder::with_prompt_name`]).
    pub fn queue(&self) -> QueueStatus {
        self.scheduler.status()
    }

    /// What this embedder is made of.
    pub fn info(&self) -> &Info {
        #[cfg(feature = "cuda")]
        if let Some(Gpu::Widening(backend)) = &self.gpu
            && let Some(reason) = backend.reason()
        {
            return self.widened.get_or_init(|| Info { backend_reason: Some(reason.to_owned()), ..self.info.clone() });
        }
        &self.info
    }

    /// The GPU backend, where the model runs on one: its shapes, memory and times. Of a model that overflowed fp16 the one in bf16 (see
    /// [`Info::backend_reason`]), from then on.
    #[cfg(feature = "cuda")]
    pub fn gpu(&self) -> Option<Arc<crate::gpu::GpuBackend>> {
        self.gpu.as_ref().map(|gpu| match gpu {
            Gpu::Fixed(backend) => backend.clone(),
            Gpu::Widening(backend) => backend.current(),
        })
    }

    fn embed_tokens(&self, tokenized: Tokenized) -> Result<Embeddings> {
        let dim = self.info.dim;
        let mut values = vec![0.0; tokenized.tokens.len() * dim];
        self.encode_batches(tokenized.batches, &mut values)?;
        Ok(Embeddings { values, dim, tokens: tokenized.tokens, truncated: tokenized.truncated })
    }

    /// Runs `batches` and puts each vector at its text's place in `out`, `[texts, dim]`. The first failure ends the call; of several it is the
    /// first batch's, always the same one: batches are begun in their order, so that all before it have run.
    fn encode_batches(&self, batches: Vec<TokenBatch>, out: &mut [f32]) -> Result<()> {
        let dim = self.info.dim;
        // One batch runs here. One text, or several that came sorted: no copy.
        if let [batch] = batches.as_slice() {
            if batch.rows().iter().enumerate().all(|(row, &text)| row == text) {
                return self.encode_in_turn(batch, &mut Flow::default(), out);
            }
            let mut vectors = vec![0.0; batch.batch() * dim];
            self.encode_in_turn(batch, &mut Flow::default(), &mut vectors)?;
            put_in_order(batch, &vectors, dim, out);
            return Ok(());
        }
        let run = Arc::new(Run::new(self.backend.clone(), self.info.dim, batches));
        if !run.token_batches().is_empty() {
            self.scheduler.run(run.clone()).map_err(|error| self.no_thread(&error))?;
        }
        let mut failure = None;
        // The vectors of one batch are put in order while later ones run.
        for (place, batch) in run.token_batches().iter().enumerate() {
            match run.wait(place) {
                BatchEnd::Vectors(vectors) => put_in_order(batch, &vectors, dim, out),
                BatchEnd::Failed(error) => failure = failure.or(Some(error)),
                // Behind the one that failed.
                BatchEnd::NotBegun => {}
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Runs `batch` on this thread when its turn has come, into `out`, `[batch, dim]`, in the batch's row order.
    fn encode_in_turn(&self, batch: &TokenBatch, flow: &mut Flow, out: &mut [f32]) -> Result<()> {
        {
            let _turn = self.scheduler.turn(flow, batch.size());
            let _range = trace::range("encode batch");
            self.backend.encode(batch, out)?;
        }
        let _range = trace::range("finite check");
        check_finite(out, self.info.dim, batch.rows())
    }

    /// As [`Embedder::submit`] for rows that a tokenizer of this model gave; pooling leaves out the first `skip` tokens of each.
    pub(crate) fn submit_rows(&self, rows: Vec<Result<Row>>, skip: u32, settings: SubmitSettings) -> Result<Submission> {
        let SubmitSettings { deadline, class } = settings;
        let texts = self.texts_of(rows, skip, deadline);
        if texts.is_done() {
            return Ok(Submission::new(texts, None));
        }
        let Job { came, .. } = *texts.job();
        let new = NewTexts { owner: texts.clone(), class, group: skip, came, deadline, lengths: texts.lengths().into() };
        let submitted = self.scheduler.submit(new).map_err(|refused| match refused {
            Refused::NoThread(error) => self.no_thread(&error),
            Refused::Full(Full { waiting, limit, texts, tokens }) => Error::Overloaded { waiting, limit, texts, tokens },
        })?;
        Ok(Submission::new(texts, Some(submitted)))
    }

    /// As [`Embedder::submit_rows`] for a single row, run on this thread before this returns.
    ///
    /// # Errors
    /// The row, where it would have to wait.
    #[cfg(any(all(test, feature = "cpu"), feature = "serve"))]
    pub(crate) fn run_row_at_once(&self, row: Row, skip: u32) -> std::result::Result<Submission, Row> {
        use crate::scheduler::{Part, Texts as _};
        let size = crate::tokens::BatchSize::padded(1, row.ids.len());
        let Some(_turn) = self.scheduler.turn_at_once(size) else { return Err(row) };
        let texts = self.texts_of(vec![Ok(row)], skip, None);
        Texts::run(vec![Part { owner: texts.clone(), texts: vec![0] }]);
        Ok(Submission::new(texts, None))
    }

    /// Whether [`Embedder::run_row_at_once`] would run a row now.
    #[cfg(feature = "serve")]
    pub(crate) fn is_free(&self) -> bool {
        let queue = self.queue();
        queue.running < self.info.limits.parallelism && queue.waiting_tokens() == 0
    }

    fn texts_of(&self, rows: Vec<Result<Row>>, skip: u32, deadline: Option<Instant>) -> Arc<Texts> {
        let came = Instant::now();
        let patience = deadline.map_or(Duration::ZERO, |deadline| deadline.saturating_duration_since(came));
        let job = Job { dim: self.info.dim, vocab_size: self.info.config.vocab_size, skip, came, patience };
        Arc::new(Texts::new(self.backend.clone(), job, rows))
    }

    fn no_thread(&self, error: &std::io::Error) -> Error {
        let reason = format!("the system gives no thread to run batches on: {error}");
        Error::Backend { backend: self.info.backend, reason }
    }
}

/// Puts the vectors of `batch`, in its row order, at their texts' places in `out`, `[texts, dim]`.
fn put_in_order(batch: &TokenBatch, vectors: &[f32], dim: usize, out: &mut [f32]) {
    for (vector, &text) in vectors.chunks_exact(dim).zip(batch.rows()) {
        out[text * dim..(text + 1) * dim].copy_from_slice(vector);
    }
}

impl std::fmt::Debug for Embedder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedder").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Embeddings {
    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The vectors in input order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.dim.max(1))
    }
}

#[cfg(all(test, feature = "cpu"))]
mod tests;
