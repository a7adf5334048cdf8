//! The pipeline and the crate's one public door: texts to vectors.

use crate::backend::{Backend, Limits};
use crate::model::{EncoderConfig, ModelFolder};
use crate::pooling::{Head, Pooling, PoolingMode, check_finite};
use crate::tokens::{BatchPlan, TokenBatch, Tokenized, Tokenizer, TokenizerSettings};
use crate::trace;
use crate::{Error, Result};
use rayon::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// Which executor runs the graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BackendChoice {
    /// The best executor that this build and this machine have; [`Info::backend`] says which it was.
    #[default]
    Auto,
    /// `tract` on the CPU.
    Cpu,
    /// TensorRT on an NVIDIA GPU; an error where there is none, never the CPU instead.
    TensorRt,
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

/// Receives the progress of slow steps (downloads, loading). Every method may be called from any thread.
pub trait Progress: Send + Sync {
    /// `done` of `total` bytes of `file` have arrived.
    fn download(&self, file: &str, done: u64, total: u64);
}

/// Settings of an [`Embedder`].
#[derive(Clone)]
pub struct EmbedderBuilder {
    model: String,
    prompt: Option<PromptChoice>,
    dim: Option<usize>,
    normalize: Normalize,
    pooling: Option<Vec<PoolingMode>>,
    batch_size: Option<usize>,
    batch_tokens: Option<usize>,
    max_tokens: Option<usize>,
    threads: Option<usize>,
    backend: BackendChoice,
    progress: Option<Arc<dyn Progress>>,
}

#[derive(Clone)]
enum PromptChoice {
    Name(String),
    Text(String),
}

/// Texts to vectors. `Send + Sync`: share one behind an `Arc`, call it from many threads.
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
    backend: Box<dyn Backend>,
    plan: BatchPlan,
    /// Threads that batches are spread over, where the backend gains from several at once.
    workers: Option<rayon::ThreadPool>,
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
    /// Longest text in tokens; longer ones are cut.
    pub max_tokens: usize,
    /// `cpu` or `tensorrt`.
    pub backend: &'static str,
    /// The executor's limits.
    pub limits: Limits,
    /// Prompt put before every text, if any.
    pub prompt: Option<String>,
}

impl Embedder {
    /// Starts with `model`: a folder, or a hub id `org/name[@revision]`.
    pub fn builder(model: impl Into<String>) -> EmbedderBuilder {
        EmbedderBuilder {
            model: model.into(),
            prompt: None,
            dim: None,
            normalize: Normalize::Auto,
            pooling: None,
            batch_size: None,
            batch_tokens: None,
            max_tokens: None,
            threads: None,
            backend: BackendChoice::Auto,
            progress: None,
        }
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
        let dim = self.info.dim;
        let expected = texts.len() * dim;
        if out.len() != expected {
            return Err(Error::OutputLength { expected, found: out.len(), texts: texts.len(), dim });
        }
        self.encode_batches(&self.tokenize(texts)?.batches, out)
    }

    /// As [`Embedder::embed`] for texts that are token ids already, special tokens included.
    ///
    /// # Errors
    /// [`Error::Setting`] for a row that is empty or longer than [`Info::max_tokens`]; see [`Embedder::embed`].
    pub fn embed_ids<R: AsRef<[u32]>>(&self, rows: &[R]) -> Result<Embeddings> {
        self.embed_tokens(self.tokenizer.batches_from_ids(rows, &self.plan)?)
    }

    /// Cuts, sorts and batches `texts` without running them: [`Tokenized::batches`] is what [`Embedder::embed`] would run.
    ///
    /// # Errors
    /// [`Error::TokenId`], [`Error::Tokenizer`].
    pub fn tokenize<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Tokenized> {
        let _range = trace::range("tokenise");
        self.tokenizer.encode(texts, &self.plan)
    }

    /// Hidden states of each text, in input order.
    ///
    /// # Errors
    /// See [`Embedder::embed`].
    pub fn hidden_states<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<HiddenStates>> {
        let hidden_size = self.info.config.hidden_size;
        let tokenized = self.tokenize(texts)?;
        let mut states = vec![HiddenStates { values: Vec::new(), tokens: 0, hidden_size }; texts.len()];
        let mut hidden = Vec::new();
        for batch in &tokenized.batches {
            hidden.resize(batch.batch() * batch.seq * hidden_size, 0.0);
            self.backend.hidden(batch, &mut hidden)?;
            for ((row, &length), &text) in hidden.chunks_exact(batch.seq * hidden_size).zip(&batch.lengths).zip(&batch.rows) {
                let values = &row[..length as usize * hidden_size];
                check_finite(values, values.len(), &[text])?;
                states[text] = HiddenStates { values: values.to_vec(), tokens: length as usize, hidden_size };
            }
        }
        Ok(states)
    }

    /// What this embedder is made of.
    pub fn info(&self) -> &Info {
        &self.info
    }

    fn embed_tokens(&self, tokenized: Tokenized) -> Result<Embeddings> {
        let dim = self.info.dim;
        let mut values = vec![0.0; tokenized.tokens.len() * dim];
        self.encode_batches(&tokenized.batches, &mut values)?;
        Ok(Embeddings { values, dim, tokens: tokenized.tokens, truncated: tokenized.truncated })
    }

    /// Runs `batches` and puts each vector at its text's place in `out`, `[texts, dim]`.
    fn encode_batches(&self, batches: &[TokenBatch], out: &mut [f32]) -> Result<()> {
        let dim = self.info.dim;
        // One text, or several of one batch that came sorted: no copy.
        if let [batch] = batches
            && batch.rows.iter().enumerate().all(|(row, &text)| row == text)
        {
            return self.encode_batch(batch, out);
        }
        let encode = |batch: &TokenBatch| {
            let mut vectors = vec![0.0; batch.batch() * dim];
            self.encode_batch(batch, &mut vectors).map(|()| vectors)
        };
        let encoded: Vec<Result<Vec<f32>>> = match &self.workers {
            Some(workers) if batches.len() > 1 => workers.install(|| batches.par_iter().map(encode).collect()),
            _ => batches.iter().map(encode).collect(),
        };
        for (batch, vectors) in batches.iter().zip(encoded) {
            for (vector, &text) in vectors?.chunks_exact(dim).zip(&batch.rows) {
                out[text * dim..(text + 1) * dim].copy_from_slice(vector);
            }
        }
        Ok(())
    }

    /// Runs `batch` into `out`, `[batch, dim]`, in the batch's row order.
    fn encode_batch(&self, batch: &TokenBatch, out: &mut [f32]) -> Result<()> {
        {
            let _range = trace::range("encode batch");
            self.backend.encode(batch, out)?;
        }
        let _range = trace::range("finite check");
        check_finite(out, self.info.dim, &batch.rows)
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
        self.values.chunks_exact(self.dim)
    }
}

impl EmbedderBuilder {
    /// Prompt by its name in the model folder; an unknown name is an error that lists the known ones.
    #[must_use]
    pub fn prompt_name(mut self, name: impl Into<String>) -> Self {
        self.prompt = Some(PromptChoice::Name(name.into()));
        self
    }

    /// Prompt put before every text; empty for none, whatever the model folder's default.
    #[must_use]
    pub fn prompt(mut self, text: impl Into<String>) -> Self {
        self.prompt = Some(PromptChoice::Text(text.into()));
        self
    }

    /// Keeps the first `dim` values of each vector (before normalisation).
    #[must_use]
    pub fn dim(mut self, dim: usize) -> Self {
        self.dim = Some(dim);
        self
    }

    /// Whether vectors are scaled to unit length.
    #[must_use]
    pub fn normalize(mut self, normalize: Normalize) -> Self {
        self.normalize = normalize;
        self
    }

    /// Pools otherwise than the model folder says; several modes are concatenated.
    #[must_use]
    pub fn pooling(mut self, modes: &[PoolingMode]) -> Self {
        self.pooling = Some(modes.to_vec());
        self
    }

    /// Most texts of one batch; the executor's own limit where not set.
    #[must_use]
    pub fn batch_size(mut self, texts: usize) -> Self {
        self.batch_size = Some(texts);
        self
    }

    /// Most tokens of one batch, padding included; what the executor gains from where not set.
    #[must_use]
    pub fn batch_tokens(mut self, tokens: usize) -> Self {
        self.batch_tokens = Some(tokens);
        self
    }

    /// Cuts texts at `tokens` instead of the model's own limit (which it may not exceed).
    #[must_use]
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = Some(tokens);
        self
    }

    /// Threads of the CPU backend; all cores where not set.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Which executor runs the graph.
    #[must_use]
    pub fn backend(mut self, choice: BackendChoice) -> Self {
        self.backend = choice;
        self
    }

    /// Hears of slow steps.
    #[must_use]
    pub fn progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// Opens (or downloads) the model, exports its graph and makes the executor ready.
    ///
    /// # Errors
    /// A model that cannot be found or read, a setting that it cannot give ([`Error::Setting`]), an executor that this build or
    /// machine lacks ([`Error::Backend`]).
    pub fn build(self) -> Result<Embedder> {
        let path = crate::model::resolve(&self.model, self.progress.as_ref())?;
        let folder = ModelFolder::open(&path)?;
        let prompt = self.prompt_text(&folder)?;
        let max_tokens = self.token_limit(&folder)?;
        let pooling = match &self.pooling {
            None => folder.pooling.clone(),
            Some(modes) => Pooling::new(modes.iter().copied(), folder.pooling.include_prompt)?,
        };
        let normalize = match self.normalize {
            Normalize::Auto => folder.normalize,
            Normalize::On => true,
            Normalize::Off => false,
        };
        let head = Head::new(pooling.clone(), folder.dense.clone(), folder.config.hidden_size, self.dim, normalize)?;
        let dim = head.dim;
        let tokenizer = Tokenizer::open(
            &folder.tokenizer_path(),
            TokenizerSettings {
                max_tokens,
                pad_token_id: folder.config.pad_token_id,
                vocab_size: folder.config.vocab_size,
                lower_case: folder.do_lower_case,
                skip_prompt: prompt.is_some() && !pooling.include_prompt,
                prompt: prompt.clone(),
            },
        )?;
        let backend = self.executor(&folder, head, max_tokens)?;
        let limits = backend.limits();
        let plan = BatchPlan {
            max_batch: self.batch_size.map_or(limits.max_batch, |rows| rows.clamp(1, limits.max_batch)),
            batch_tokens: self.batch_tokens.unwrap_or(limits.batch_tokens).max(1),
            parallelism: limits.parallelism,
        };
        let workers = if limits.parallelism > 1 { Some(thread_pool(limits.parallelism)?) } else { None };
        let info = Info {
            model: self.model,
            folder: path,
            config: folder.config,
            pooling,
            normalize,
            dim,
            max_tokens,
            backend: backend.name(),
            limits,
            prompt,
        };
        Ok(Embedder { info, tokenizer, backend, plan, workers })
    }

    fn prompt_text(&self, folder: &ModelFolder) -> Result<Option<String>> {
        let prompts = &folder.prompts;
        let name = match &self.prompt {
            Some(PromptChoice::Text(text)) => return Ok(Some(text.clone()).filter(|text| !text.is_empty())),
            Some(PromptChoice::Name(name)) => Some(name),
            None => prompts.default_name.as_ref(),
        };
        let Some(name) = name else { return Ok(None) };
        let Some(text) = prompts.by_name.get(name) else {
            let known = match prompts.by_name.len() {
                0 => "the model has no prompts".into(),
                _ => format!("the model has {}", prompts.by_name.keys().cloned().collect::<Vec<_>>().join(", ")),
            };
            return Err(Error::Setting { setting: "--prompt", reason: format!("\"{name}\" is not known; {known}") });
        };
        Ok(Some(text.clone()).filter(|text| !text.is_empty()))
    }

    fn token_limit(&self, folder: &ModelFolder) -> Result<usize> {
        let limit = folder.config.max_tokens();
        match self.max_tokens {
            None => Ok(folder.max_tokens()),
            Some(tokens) if (1..=limit).contains(&tokens) => Ok(tokens),
            Some(tokens) => Err(Error::Setting {
                setting: "--max-tokens",
                reason: format!("{tokens} is outside 1..={limit}, which the model's positions serve"),
            }),
        }
    }

    fn executor(&self, folder: &ModelFolder, head: Head, max_tokens: usize) -> Result<Box<dyn Backend>> {
        match self.backend {
            BackendChoice::Auto | BackendChoice::Cpu => self.cpu(folder, head, max_tokens),
            BackendChoice::TensorRt => Err(Error::Backend {
                backend: "tensorrt",
                reason: "this build has no TensorRT support; use --backend cpu".into(),
            }),
        }
    }

    #[cfg(feature = "cpu")]
    fn cpu(&self, folder: &ModelFolder, head: Head, max_tokens: usize) -> Result<Box<dyn Backend>> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = self.threads.unwrap_or(cores).max(1);
        let backend = crate::backend::CpuBackend::new(&folder.config, folder.weights()?, head, max_tokens, threads)?;
        Ok(Box::new(backend))
    }

    #[cfg(not(feature = "cpu"))]
    fn cpu(&self, _: &ModelFolder, _: Head, _: usize) -> Result<Box<dyn Backend>> {
        Err(Error::Backend { backend: "cpu", reason: "this build lacks the feature `cpu`; build it with --features cpu".into() })
    }
}

fn thread_pool(threads: usize) -> Result<rayon::ThreadPool> {
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("trt-embed-{n}"));
    builder.build().map_err(|error| Error::Backend { backend: "cpu", reason: format!("cannot start {threads} threads: {error}") })
}
