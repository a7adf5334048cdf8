//! The ONNX writer: an [`Architecture`] to a graph. Knows no family, no executor and no device.
//!
//! The contract of every exported graph: inputs `input_ids` and `attention_mask`, INT32 `[batch, sequence]`, rows padded on
//! the right; output `last_hidden_state` `[batch, sequence, hidden]`; opset 17 (see
//! [`Graph::quantized`] for INT8). Other programs may be given other [`Inputs`]. What a graph cannot have
//! is refused by name ([`Error::NotInGraph`]).

mod activation;
mod builder;
mod constant;
mod digest;
mod encoder;
mod export;
pub mod onnx;
mod positions;
mod quantization;
mod supported;

pub use export::{Export, ExportedFile, export_to_folder};
pub use quantization::{Linear, Quantization, Range, Role};

use crate::model::Architecture;
use crate::{Error, Result, Setting};
use builder::Builder;
use constant::Constant;
use onnx::{Dim, ModelProto};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Type of a graph's weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    Fp32,
    /// 16-bit floats throughout, the output included.
    Fp16,
}

impl Precision {
    pub(crate) fn element(self) -> onnx::ElementType {
        match self {
            Self::Fp32 => onnx::ElementType::Float32,
            Self::Fp16 => onnx::ElementType::Float16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "fp32" => Ok(Self::Fp32),
            "fp16" => Ok(Self::Fp16),
            _ => Err(Error::Setting { setting: Setting::Precision, reason: format!("\"{text}\" is not one of fp32, fp16") }),
        }
    }
}

/// What a graph is fed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Inputs {
    /// Type of all inputs.
    pub integers: Integers,
    /// Whether `token_type_ids`, `[batch, sequence]`, is an input, too: the row of the token type table that is added at each token.
    /// Without it that is row 0 everywhere, all that a sentence needs.
    pub token_types: bool,
}

/// Type of a graph's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Integers {
    /// 32 bits: what the executors of this crate are fed with.
    #[default]
    Int32,
    /// 64 bits, as most other exporters write.
    Int64,
}

impl Inputs {
    /// Inputs of this type, without token types.
    pub fn new(integers: Integers) -> Self {
        Self { integers, token_types: false }
    }

    /// With `token_type_ids` as a further input.
    #[must_use]
    pub fn with_token_types(self) -> Self {
        Self { token_types: true, ..self }
    }
}

/// An encoder's graph: nodes, and constants that still lie in the weight files.
#[derive(Debug)]
pub struct Graph {
    /// The model without its constants.
    header: ModelProto,
    constants: Vec<Constant>,
    linears: Vec<Linear>,
    vocab_size: usize,
}

impl Graph {
    /// Builds the encoder's graph. Weights are read when the graph is written.
    ///
    /// # Errors
    /// [`Error::NotInGraph`] for what the model computes and a graph cannot.
    pub fn new(architecture: &Architecture, precision: Precision) -> Result<Self> {
        encoder::write(architecture, Builder::new(architecture, precision))
    }

    /// The graph of [`Graph::new`] in fp32 with attention as one operator, for an executor of this crate that has it: nothing in it is as large as all pairs
    /// of a text's positions. Not for architectures with a learnt bias of pairs. No other program reads it.
    ///
    /// `Attention(queries, keys, values, bias, slopes?)`: queries (divided by the root of the head size), keys, values and the outcome are
    /// `[batch, heads, sequence, head size]`; bias, added to the scores, is `[batch, 1, 1, sequence]`; slopes
    /// `[heads]` times the distance are taken away. Attributes `heads`, `head_size`, and `window`: how far a key that counts is away, -1 for any.
    ///
    /// # Errors
    /// As [`Graph::new`].
    #[cfg(feature = "cpu")]
    pub(crate) fn with_one_attention(architecture: &Architecture) -> Result<Self> {
        let mut builder = Builder::new(architecture, Precision::Fp32);
        builder.one_attention = true;
        encoder::write(architecture, builder)
    }

    /// Rows of the token embedding table: ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether the weight files are as they were when the graph was made: asked when all has been read, so that no half of another
    /// model is taken for this one.
    ///
    /// # Errors
    /// [`Error::FileChanged`]; [`Error::Io`].
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.constants.iter().try_for_each(Constant::check_unchanged)
    }

    /// The graph of [`Graph::new`], or of [`Graph::quantized`] where there is a `quantization`, with other inputs. For other programs: the
    /// executors of this crate take graphs with the default ones.
    ///
    /// # Errors
    /// As those; [`Error::Setting`] for token types of a model that has none.
    pub fn with_inputs(
        architecture: &Architecture,
        precision: Precision,
        quantization: Option<&Quantization>,
        inputs: Inputs,
    ) -> Result<Self> {
        if inputs.token_types && architecture.embeddings.token_types.is_none() {
            let reason = format!("{} has no token types; leave it out", architecture.name);
            return Err(Error::Setting { setting: Setting::TokenTypes, reason });
        }
        let builder = Builder::new(architecture, precision).with_inputs(inputs);
        match quantization {
            None => encoder::write(architecture, builder),
            Some(quantization) => Self::write_quantized(architecture, builder, quantization),
        }
    }
}
