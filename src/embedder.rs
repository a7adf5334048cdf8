//! The pipeline and the crate's one public door: texts to vectors.

use crate::Result;
use crate::backend::Limits;
use crate::model::EncoderConfig;
use crate::pooling::{Pooling, PoolingMode};
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
    #[allow(dead_code)]
    model: String,
}

/// Texts to vectors. `Send + Sync`: share one behind an `Arc`, call it from many threads.
pub struct Embedder {}

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
    pub folder: std::path::PathBuf,
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
        EmbedderBuilder { model: model.into() }
    }

    /// Encodes `texts` into rows `[texts.len(), dim]`, in input order. No texts give no rows.
    ///
    /// # Errors
    /// See [`crate::Error`].
    pub fn embed(&self, _texts: &[impl AsRef<str>]) -> Result<Embeddings> {
        todo!()
    }

    /// As [`Embedder::embed`], into `out` of `texts.len() * dim` values.
    ///
    /// # Errors
    /// [`Error::OutputLength`](crate::Error::OutputLength) when `out` has another length; see [`crate::Error`].
    pub fn embed_into(&self, _texts: &[impl AsRef<str>], _out: &mut [f32]) -> Result<()> {
        todo!()
    }

    /// Hidden states of each text, in input order.
    ///
    /// # Errors
    /// See [`crate::Error`].
    pub fn hidden_states(&self, _texts: &[impl AsRef<str>]) -> Result<Vec<HiddenStates>> {
        todo!()
    }

    /// What this embedder is made of.
    pub fn info(&self) -> &Info {
        todo!()
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
    pub fn prompt_name(self, _name: impl Into<String>) -> Self {
        todo!()
    }

    /// Keeps the first `dim` values of each vector (before normalisation).
    #[must_use]
    pub fn dim(self, _dim: usize) -> Self {
        todo!()
    }

    /// Whether vectors are scaled to unit length.
    #[must_use]
    pub fn normalize(self, _normalize: Normalize) -> Self {
        todo!()
    }

    /// Pools otherwise than the model folder says.
    #[must_use]
    pub fn pooling(self, _modes: &[PoolingMode]) -> Self {
        todo!()
    }

    /// Most texts of one batch.
    #[must_use]
    pub fn batch_size(self, _rows: usize) -> Self {
        todo!()
    }

    /// Cuts texts at `tokens` instead of the model's own limit (which it may not exceed).
    #[must_use]
    pub fn max_tokens(self, _tokens: usize) -> Self {
        todo!()
    }

    /// Threads of the CPU backend; all cores where not set.
    #[must_use]
    pub fn threads(self, _threads: usize) -> Self {
        todo!()
    }

    /// Which executor runs the graph.
    #[must_use]
    pub fn backend(self, _choice: BackendChoice) -> Self {
        todo!()
    }

    /// Hears of slow steps.
    #[must_use]
    pub fn progress(self, _progress: Arc<dyn Progress>) -> Self {
        todo!()
    }

    /// Opens (or downloads) the model, exports its graph and makes the executor ready.
    ///
    /// # Errors
    /// See [`crate::Error`].
    pub fn build(self) -> Result<Embedder> {
        todo!()
    }
}
