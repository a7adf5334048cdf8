//! `config.json` of the encoder: the sizes that the graph and the weights are checked against.

use crate::model::architecture::{Embeddings, Layer, ScoreBias};
use crate::model::families::{Family, OwnConfig};
use crate::model::json::{config_error, read_value, shown};
use crate::model::schema::JsonObject;
use crate::model::{Architecture, Weights};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// Bounds of the sizes in config.json: far above any model, and low enough that the product of two cannot overflow.
pub(super) const MAX_WIDTH: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_LAYERS: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_POSITIONS: usize = 1 << 20;

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
///
/// What only one family has is kept with it, and enters the [`Architecture`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EncoderConfig {
    /// Which tensors the encoder has, and what is computed with them.
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
    /// Positions that the encoder knows, those included that no token takes.
    pub max_position_embeddings: usize,
    /// Epsilon of every norm.
    pub layer_norm_eps: f64,
    /// The padding token's id.
    pub pad_token_id: u32,
    /// Activation of the feed-forward part.
    pub activation: Activation,
    /// `tokenizer_class`, which counts where tokenizer_config.json names none.
    pub tokenizer_class: Option<String>,
    /// The first token's position.
    first_position: usize,
    position_padding: Option<u32>,
    /// What only the family has.
    own: Arc<dyn OwnConfig>,
}

/// How a family's config.json calls what all encoders have, and the values of absent ones.
pub(super) struct SizeKeys {
    pub hidden_size: (&'static str, usize),
    pub num_hidden_layers: (&'static str, usize),
    pub num_attention_heads: (&'static str, usize),
    pub intermediate_size: (&'static str, usize),
    pub vocab_size: (&'static str, usize),
    pub max_position_embeddings: (&'static str, usize),
    /// Without a key where it is a constant of the family.
    pub layer_norm_eps: (Option<&'static str>, f64),
    /// Without a key where the family reads it itself.
    pub activation: (Option<&'static str>, &'static str),
}

impl SizeKeys {
    /// BERT's own, which most families took over.
    pub const BERT: Self = Self {
        hidden_size: ("hidden_size", 768),
        num_hidden_layers: ("num_hidden_layers", 12),
        num_attention_heads: ("num_attention_heads", 12),
        intermediate_size: ("intermediate_size", 3072),
        vocab_size: ("vocab_size", 30522),
        max_position_embeddings: ("max_position_embeddings", 512),
        layer_norm_eps: (Some("layer_norm_eps"), 1e-12),
        activation: (Some("hidden_act"), "gelu"),
    };
}

impl SizeKeys {
    /// The width of a hidden state, and the heads that divide it.
    pub fn read_width(&self, json: &JsonObject) -> Result<(usize, usize)> {
        let size = |(field, default)| json.size(field, 1..=MAX_WIDTH).map(|found| found.unwrap_or(default));
        let (hidden_size, heads) = (size(self.hidden_size)?, size(self.num_attention_heads)?);
        if hidden_size % heads != 0 {
            let (width, of) = (self.hidden_size.0, self.num_attention_heads.0);
            return Err(json.error(format!("{width} is {hidden_size}, which {of} ({heads}) does not divide")));
        }
        Ok((hidden_size, heads))
    }

    /// The number of layers.
    pub fn read_layers(&self, json: &JsonObject) -> Result<usize> {
        let (field, default) = self.num_hidden_layers;
        Ok(json.size(field, 1..=MAX_LAYERS)?.unwrap_or(default))
    }
}

/// How a family counts positions.
pub(super) struct Positions {
    /// The padding token's id.
    pub pad_token_id: u32,
    /// The first token's position.
    pub first: usize,
    /// See [`EncoderConfig::position_padding`].
    pub padding: Option<u32>,
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
    /// Reads and checks `config.json`. An absent field has the value that transformers' configuration of the family gives it.
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
        let definition = family.definition();
        let mut json = JsonObject::new(path, value, &definition.keys)?;
        if let Some((over, field)) = over {
            json = json.overlaid(over, field)?;
        }
        (definition.read)(family, &json)
    }

    /// Reads what all encoders have under the names `keys`.
    pub(super) fn read_sizes(
        family: Family,
        json: &JsonObject,
        keys: &SizeKeys,
        positions: Positions,
        own: Arc<dyn OwnConfig>,
    ) -> Result<Self> {
        let size = |(field, default), max| json.size(field, 1..=max).map(|found| found.unwrap_or(default));
        let (hidden_size, num_attention_heads) = keys.read_width(json)?;
        let config = Self {
            family,
            hidden_size,
            num_hidden_layers: keys.read_layers(json)?,
            num_attention_heads,
            intermediate_size: size(keys.intermediate_size, MAX_INTERMEDIATE)?,
            vocab_size: size(keys.vocab_size, MAX_VOCAB)?,
            max_position_embeddings: size(keys.max_position_embeddings, MAX_POSITIONS)?,
            layer_norm_eps: read_eps(json, keys.layer_norm_eps)?,
            pad_token_id: positions.pad_token_id,
            activation: read_activation(json, keys.activation)?,
            tokenizer_class: json.string("tokenizer_class")?.map(str::to_owned),
            first_position: positions.first,
            position_padding: positions.padding,
            own,
        };
        if config.pad_token_id as usize >= config.vocab_size {
            let (pad, vocab) = (config.pad_token_id, config.vocab_size);
            return Err(json.error(format!("pad_token_id is {pad}, {} only {vocab}", keys.vocab_size.0)));
        }
        Ok(config)
    }

    /// `pad_token_id`.
    pub(super) fn read_pad(json: &JsonObject, default: u32) -> Result<u32> {
        match json.size("pad_token_id", 0..=MAX_VOCAB)? {
            None => Ok(default),
            Some(pad) => u32::try_from(pad).map_err(|_| json.field_error("pad_token_id", "a token id is expected")),
        }
    }

    /// The encoder that this configuration and `weights` describe; its tensors stay in the mapped files.
    ///
    /// # Errors
    /// A tensor that is missing or misshapen, see [`Weights::tensor`].
    pub fn architecture(&self, weights: &Weights) -> Result<Architecture> {
        self.own.architecture(self, weights)
    }

    /// An encoder of these sizes, without a norm at its end.
    pub(super) fn architecture_of(&self, embeddings: Embeddings, score_bias: ScoreBias, layers: Vec<Layer>) -> Architecture {
        Architecture {
            name: self.family.definition().graph_name,
            hidden_size: self.hidden_size,
            num_heads: self.num_attention_heads,
            head_size: self.head_size(),
            vocab_size: self.vocab_size,
            max_tokens: self.max_tokens(),
            pad_token_id: self.pad_token_id,
            position_padding: self.position_padding,
            embeddings,
            score_bias,
            layers,
            final_norm: None,
        }
    }

    /// Makes room for texts of `tokens` tokens, where positions are computed for any length. Where they are rows of a table, or end
    /// otherwise, nothing changes.
    ///
    /// # Errors
    /// What is wrong with `tokens`, if they are more than any encoder serves.
    pub(super) fn lengthen(&mut self, tokens: usize) -> std::result::Result<(), String> {
        if !self.own.computes_positions() {
            return Ok(());
        }
        if tokens > MAX_POSITIONS {
            return Err(format!("{tokens} is more than the {MAX_POSITIONS} tokens that are served; give a lower one"));
        }
        self.max_position_embeddings = self.max_position_embeddings.max(tokens);
        Ok(())
    }

    /// The most tokens of one text that positions serve.
    pub fn max_tokens(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position)
    }

    /// The id by which the model counts positions: it takes none itself. A graph that counts tokens instead is wrong for a text with it.
    pub fn position_padding(&self) -> Option<u32> {
        self.position_padding
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// `model_type`, before anything else of the file is held against the keys of a family.
fn read_family(path: &Path, value: &Value) -> Result<Family> {
    let known = Family::model_types();
    match value.get("model_type") {
        Some(Value::String(found)) => Family::of_config(found, value).ok_or_else(|| Error::UnknownFamily {
            path: path.to_path_buf(),
            found: found.clone(),
            known,
        }),
        Some(other) if !other.is_null() => {
            Err(config_error(path, format!("model_type is {}; a string, one of {known}, is expected", shown(other))))
        }
        _ if value.is_object() => Err(config_error(path, format!("model_type is absent; one of {known} is expected"))),
        _ => Err(config_error(path, format!("an object is expected, not {}", shown(value)))),
    }
}

fn read_eps(json: &JsonObject, (field, default): (Option<&str>, f64)) -> Result<f64> {
    let Some(field) = field else { return Ok(default) };
    match json.number(field)? {
        None => Ok(default),
        // Above 1 it would drown every variance; no model has that.
        Some(eps) if (0.0..=1.0).contains(&eps) => Ok(eps),
        Some(_) => Err(json.field_error(field, "a number from 0 to 1 is expected")),
    }
}

fn read_activation(json: &JsonObject, (field, default): (Option<&str>, &str)) -> Result<Activation> {
    let given = match field {
        Some(field) => json.string(field)?,
        None => None,
    };
    let name = given.unwrap_or(default);
    let found = ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation);
    found.ok_or_else(|| {
        let known = ACTIVATIONS.map(|(name, _)| name).join(", ");
        json.field_error(field.unwrap_or(default), &format!("known: {known}"))
    })
}
