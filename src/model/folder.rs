//! A model folder as sentence-transformers or plain Hugging Face lay it out.

use crate::Result;
use crate::model::{EncoderConfig, Weights};
use crate::pooling::Pooling;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Prompts of `config_sentence_transformers.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Prompt text by name.
    pub by_name: BTreeMap<String, String>,
    /// The one used when the caller names none.
    pub default_name: Option<String>,
}

/// Activation of a [`Dense`] module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DenseActivation {
    /// `torch.nn.modules.linear.Identity`.
    Identity,
    /// `torch.nn.modules.activation.Tanh`.
    Tanh,
    /// `torch.nn.modules.activation.ReLU`.
    Relu,
    /// `torch.nn.modules.activation.GELU`.
    Gelu,
    /// `torch.nn.modules.activation.Sigmoid`.
    Sigmoid,
}

/// A `Dense` module applied to the pooled vector: `activation(x W^T + b)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Width of the input.
    pub in_features: usize,
    /// Width of the output.
    pub out_features: usize,
    /// `[out_features, in_features]`, row-major.
    pub weight: Vec<f32>,
    /// `[out_features]`, absent when the module has no bias.
    pub bias: Option<Vec<f32>>,
    /// Applied last.
    pub activation: DenseActivation,
}

/// An opened model folder: everything but the encoder's weights is read and checked.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ModelFolder {
    /// The folder that was opened (holds modules.json where there is one).
    pub root: PathBuf,
    /// The folder of the Transformer module: config.json, weights and tokenizer.json.
    pub encoder: PathBuf,
    /// config.json.
    pub config: EncoderConfig,
    /// The Pooling module; mean pooling for a plain Hugging Face folder.
    pub pooling: Pooling,
    /// Dense modules between pooling and normalisation, in order.
    pub dense: Vec<Dense>,
    /// Whether modules.json has a Normalize module.
    pub normalize: bool,
    /// Prompts, possibly none.
    pub prompts: Prompts,
    /// `max_seq_length` of sentence_bert_config.json.
    pub max_seq_length: Option<usize>,
}

impl ModelFolder {
    /// Opens a sentence-transformers folder (modules.json) or a plain Hugging Face folder (config.json).
    ///
    /// # Errors
    /// A missing file, a field that cannot be used (named with its value), or sizes that disagree.
    pub fn open(_path: impl AsRef<Path>) -> Result<Self> {
        todo!()
    }

    /// Memory-maps the encoder's weights (`model.safetensors`, or the shards of `model.safetensors.index.json`).
    ///
    /// # Errors
    /// See [`Weights::open`].
    pub fn weights(&self) -> Result<Weights> {
        todo!()
    }

    /// The most tokens a text may have: min(`max_seq_length`, positions).
    pub fn max_tokens(&self) -> usize {
        let positions = self.config.max_tokens();
        self.max_seq_length.map_or(positions, |n| n.min(positions))
    }

    /// Values of one vector before any cut: the pooled width, or the last Dense module's output.
    pub fn embedding_size(&self) -> usize {
        self.dense.last().map_or(self.pooling.width(self.config.hidden_size), |dense| dense.out_features)
    }
}
