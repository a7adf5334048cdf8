//! `config.json` of the encoder: the sizes that the graph and the weights are checked against.

use crate::Result;
use std::path::Path;

/// The encoder families that this crate exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// `model_type: "mpnet"`: relative position bias shared by all layers, positions from `pad_token_id + 1`.
    MpNet,
    /// `model_type: "bert"`: absolute positions from 0, token type 0 added to every token.
    Bert,
}

impl Family {
    /// Every family, in the order in which messages list them.
    pub const ALL: [Self; 2] = [Self::MpNet, Self::Bert];

    /// `model_type` in config.json, which is also the prefix of tensor names in checkpoints that carry a head.
    pub fn name(self) -> &'static str {
        match self {
            Self::MpNet => "mpnet",
            Self::Bert => "bert",
        }
    }
}

/// `hidden_act` of the feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `gelu`: x/2 (1 + erf(x / sqrt 2)).
    Gelu,
    /// `gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`: the tanh approximation.
    GeluTanh,
    /// `relu`.
    Relu,
}

/// The sizes of an encoder, checked for consistency when read.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EncoderConfig {
    /// Which graph to build.
    pub family: Family,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Attention heads; divides `hidden_size`.
    pub num_attention_heads: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
    /// Rows of the position embedding table.
    pub max_position_embeddings: usize,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
    /// The padding token's id.
    pub pad_token_id: u32,
    /// Activation of the feed-forward part.
    pub activation: Activation,
    /// Rows of the token type table (BERT; 0 for MPNet).
    pub type_vocab_size: usize,
    /// Buckets of the relative position bias (MPNet; 0 for BERT).
    pub relative_attention_num_buckets: usize,
}

impl EncoderConfig {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::Error::NotFound), [`Error::Config`](crate::Error::Config) with the field and its value,
    /// [`Error::UnknownFamily`](crate::Error::UnknownFamily).
    pub fn read(_path: &Path) -> Result<Self> {
        todo!()
    }

    /// The most tokens of one text that the position table serves (MPNet's positions start at `pad_token_id + 1`).
    pub fn max_tokens(&self) -> usize {
        match self.family {
            Family::MpNet => self.max_position_embeddings - self.pad_token_id as usize - 1,
            Family::Bert => self.max_position_embeddings,
        }
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}
