//! `config.json` of the encoder: the sizes that the graph and the weights are checked against.

use crate::model::config_keys::{BERT_CONFIG, MPNET_CONFIG};
use crate::model::json::{config_error, read_value, shown};
use crate::model::schema::{JsonObject, Schema};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Bounds of the sizes in config.json: far above any model, and low enough that the product of two cannot overflow.
const MAX_WIDTH: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 20;
const MAX_BUCKETS: usize = 1 << 12;

/// Fewer buckets leave transformers' `relative_position_bucket` without an exact bucket (it divides by a quarter of them).
const MIN_BUCKETS: usize = 4;

/// `padding_idx` of transformers' `MPNetEmbeddings`: a constant there, whatever config.json says.
const MPNET_PADDING: u32 = 1;

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

    /// The keys of its config.json.
    fn schema(self) -> &'static Schema {
        match self {
            Self::MpNet => &MPNET_CONFIG,
            Self::Bert => &BERT_CONFIG,
        }
    }

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
    /// `gelu_new`, `gelu_pytorch_tanh`, `gelu_python_tanh`, `gelu_fast`, `gelu_accurate`: the tanh approximation.
    GeluTanh,
    /// `gelu_10`: [`Activation::Gelu`], cut to -10 to 10.
    GeluClipped,
    /// `quick_gelu`: x sigmoid(1.702 x).
    QuickGelu,
    /// `relu`.
    Relu,
    /// `relu2`: the square of ReLU.
    ReluSquared,
    /// `silu`, `swish`: x sigmoid(x).
    Silu,
    /// `mish`: x tanh(ln(1 + e^x)).
    Mish,
    /// `tanh`.
    Tanh,
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

/// Names in `transformers.activations.ACT2FN`, and what each is.
const ACTIVATIONS: [(&str, Activation); 15] = [
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_accurate", Activation::GeluTanh),
    ("gelu_10", Activation::GeluClipped),
    ("quick_gelu", Activation::QuickGelu),
    ("relu", Activation::Relu),
    ("relu2", Activation::ReluSquared),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("mish", Activation::Mish),
    ("tanh", Activation::Tanh),
];

impl EncoderConfig {
    /// The same encoder with the tanh approximation in the place of GELU.
    pub fn with_tanh_gelu(&self) -> Self {
        match self.activation {
            Activation::Gelu => Self { activation: Activation::GeluTanh, ..self.clone() },
            _ => self.clone(),
        }
    }

    /// Reads and checks `config.json`. An absent field has the value that transformers' `MPNetConfig` or `BertConfig` gives it.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Config`] with the field and its value, [`Error::UnknownFamily`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_with(path, None)
    }

    /// As [`EncoderConfig::read`], with the fields of the object `over.1` of the file `over.0` in the place of those of the same name.
    pub(super) fn read_with(path: &Path, over: Option<(&JsonObject, &str)>) -> Result<Self> {
        let Some(value) = read_value(path)? else {
            let next = "give a folder that holds a Hugging Face encoder".to_owned();
            return Err(Error::NotFound { what: "config.json".to_owned(), path: path.to_path_buf(), next });
        };
        let family = read_family(path, &value)?;
        let mut json = JsonObject::new(path, value, family.schema())?;
        if let Some((over, field)) = over {
            json = json.overlaid(over, field)?;
        }
        let size = |field, default, max| json.size(field, 1..=max).map(|found| found.unwrap_or(default));
        let hidden_size = size("hidden_size", 768, MAX_WIDTH)?;
        let num_attention_heads = size("num_attention_heads", 12, MAX_WIDTH)?;
        if hidden_size % num_attention_heads != 0 {
            return Err(json.error(format!(
                "hidden_size is {hidden_size}, which num_attention_heads ({num_attention_heads}) does not divide"
            )));
        }
        let default_vocab = match family {
            Family::MpNet => 30527,
            Family::Bert => 30522,
        };
        let config = Self {
            family,
            hidden_size,
            num_hidden_layers: size("num_hidden_layers", 12, MAX_LAYERS)?,
            num_attention_heads,
            intermediate_size: size("intermediate_size", 3072, MAX_INTERMEDIATE)?,
            vocab_size: size("vocab_size", default_vocab, MAX_VOCAB)?,
            max_position_embeddings: size("max_position_embeddings", 512, MAX_POSITIONS)?,
            layer_norm_eps: read_eps(&json)?,
            pad_token_id: read_pad(&json, family)?,
            activation: read_activation(&json)?,
            type_vocab_size: match family {
                Family::MpNet => 0,
                Family::Bert => size("type_vocab_size", 2, MAX_WIDTH)?,
            },
            relative_attention_num_buckets: match family {
                Family::MpNet => json.size("relative_attention_num_buckets", MIN_BUCKETS..=MAX_BUCKETS)?.unwrap_or(32),
                Family::Bert => 0,
            },
        };
        config.check(&json)?;
        Ok(config)
    }

    /// What spans several fields, or excludes a variant that the graph does not have.
    fn check(&self, json: &JsonObject) -> Result<()> {
        if self.pad_token_id as usize >= self.vocab_size {
            return Err(json.error(format!("pad_token_id is {}, vocab_size only {}", self.pad_token_id, self.vocab_size)));
        }
        match self.family {
            Family::MpNet if self.max_position_embeddings <= MPNET_PADDING as usize + 1 => Err(json.error(format!(
                "max_position_embeddings is {}; MPNet's positions start at {}, so more rows are needed",
                self.max_position_embeddings,
                MPNET_PADDING + 1
            ))),
            Family::MpNet => Ok(()),
            Family::Bert => Ok(()),
        }
    }

    /// The most tokens of one text that the position table serves (MPNet's positions start at `pad_token_id + 1`).
    pub fn max_tokens(&self) -> usize {
        match self.family {
            Family::MpNet => self.max_position_embeddings.saturating_sub(self.pad_token_id as usize + 1),
            Family::Bert => self.max_position_embeddings,
        }
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// `model_type`, before anything else of the file is held against the keys of a family.
fn read_family(path: &Path, value: &Value) -> Result<Family> {
    let known = Family::ALL.map(Family::name).join(", ");
    match value.get("model_type") {
        Some(Value::String(found)) => Family::ALL
            .into_iter()
            .find(|family| family.name() == found)
            .ok_or_else(|| Error::UnknownFamily { path: path.to_path_buf(), found: found.clone(), known }),
        Some(other) if !other.is_null() => {
            Err(config_error(path, format!("model_type is {}; a string, one of {known}, is expected", shown(other))))
        }
        _ if value.is_object() => Err(config_error(path, format!("model_type is absent; one of {known} is expected"))),
        _ => Err(config_error(path, format!("an object is expected, not {}", shown(value)))),
    }
}

fn read_eps(json: &JsonObject) -> Result<f64> {
    match json.number("layer_norm_eps")? {
        None => Ok(1e-12),
        // Above 1 it would drown every variance; no model has that.
        Some(eps) if (0.0..=1.0).contains(&eps) => Ok(eps),
        Some(_) => Err(json.field_error("layer_norm_eps", "a number from 0 to 1 is expected")),
    }
}

fn read_pad(json: &JsonObject, family: Family) -> Result<u32> {
    match family {
        Family::MpNet => Ok(MPNET_PADDING),
        Family::Bert => match json.size("pad_token_id", 0..=MAX_VOCAB)? {
            None => Ok(0),
            Some(pad) => u32::try_from(pad).map_err(|_| json.field_error("pad_token_id", "a token id is expected")),
        },
    }
}

fn read_activation(json: &JsonObject) -> Result<Activation> {
    let name = json.string("hidden_act")?.unwrap_or("gelu");
    let found = ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation);
    found.ok_or_else(|| {
        let known = ACTIVATIONS.map(|(name, _)| name).join(", ");
        json.field_error("hidden_act", &format!("known: {known}"))
    })
}
