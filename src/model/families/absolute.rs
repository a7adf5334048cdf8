//! Encoders that are built as BERT is, with absolute positions and token types: BERT itself, and RoBERTa's families, whose positions
//! start after the padding id.

use super::post_norm::{EMBEDDINGS_NORM, LAYERS, LayerNames, POSITIONS, ROOTS, WORDS};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{Architecture, ScoreBias};
use crate::model::config::{EncoderConfig, MAX_WIDTH, Positions, SizeKeys};
use crate::model::config_keys::{HEADS, TRAINING};
use crate::model::schema::{JsonObject, Key, Schema};
use std::sync::Arc;

const TOKEN_TYPES: &str = "embeddings.token_type_embeddings";

const LAYER: LayerNames = LayerNames {
    layers: LAYERS,
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    intermediate: "intermediate.dense",
    output: "output.dense",
    output_norm: "output.LayerNorm",
};

const LINEARS: [&str; 6] = LAYER.linears();
const NORMS: [&str; 2] = LAYER.norms();

/// Keys of `config.json` beside those of sizes and the common ones.
pub(super) const KEYS: &[Key] = &[
    Key::honoured("type_vocab_size", "rows of the token type table, of which row 0 is used (2)"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::only("position_embedding_type", &["\"absolute\""], "only \"absolute\" is supported"),
    Key::harmless("pooler_fc_size", HEADS),
    Key::harmless("pooler_num_attention_heads", HEADS),
    Key::harmless("pooler_num_fc_layers", HEADS),
    Key::harmless("pooler_size_per_head", HEADS),
    Key::harmless("pooler_type", HEADS),
    Key::harmless("directionality", TRAINING),
    Key::harmless("summary_activation", HEADS),
    Key::harmless("summary_first_dropout", HEADS),
    Key::harmless("summary_last_dropout", HEADS),
    Key::harmless("summary_proj_to_labels", HEADS),
    Key::harmless("summary_type", HEADS),
    Key::harmless("summary_use_proj", HEADS),
    Key::harmless("classifier_activation", HEADS),
];

/// Where a family counts from the padding id.
pub(super) const PAD: &[Key] =
    &[Key::honoured("pad_token_id", "id that fills the places behind a text; positions start one above it (1)")];

/// What these configurations have beside their sizes.
#[derive(Debug)]
struct Absolute {
    /// Rows of the token type table.
    type_vocab_size: usize,
    /// The row of the first token's position.
    first: usize,
}

/// A family of these: its `model_type`, its name, what stands before its tensors' names, its keys, and how it is read.
pub(super) const fn definition(
    model_type: &'static str,
    title: &'static str,
    tensor_prefixes: &'static [&'static str],
    keys: Schema,
    read: fn(Family, &JsonObject) -> Result<EncoderConfig>,
) -> Definition {
    Definition {
        model_type,
        variant: None,
        title,
        tensor_prefixes,
        graph_name: model_type,
        keys,
        modules: Modules {
            roots: &ROOTS,
            layers: LAYER.layers,
            layer_linears: &LINEARS,
            layer_norms: &NORMS,
            tables: &[WORDS, POSITIONS, TOKEN_TYPES],
            norms: &[EMBEDDINGS_NORM],
            buffers: &[],
        },
        lora_targets: Some(&["query", "value"]),
        read,
    }
}

/// Positions from 0, as BERT's.
pub(super) fn from_zero(family: Family, json: &JsonObject, vocab_size: usize) -> Result<EncoderConfig> {
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 0)?, first: 0, padding: None };
    read(family, json, vocab_size, positions)
}

/// Positions from the padding id + 1, as RoBERTa's: the running count of the tokens that are not the padding token, plus its id.
pub(super) fn from_padding(family: Family, json: &JsonObject, vocab_size: usize) -> Result<EncoderConfig> {
    let pad_token_id = EncoderConfig::read_pad(json, 1)?;
    let first = pad_token_id as usize + 1;
    let config = read(family, json, vocab_size, Positions { pad_token_id, first, padding: Some(pad_token_id) })?;
    if config.max_tokens() == 0 {
        let rows = config.max_position_embeddings;
        let reason = format!(
            "max_position_embeddings is {rows}; positions start at {first}, one above pad_token_id, so more rows are needed"
        );
        return Err(json.error(reason));
    }
    Ok(config)
}

fn read(family: Family, json: &JsonObject, vocab_size: usize, positions: Positions) -> Result<EncoderConfig> {
    let type_vocab_size = json.size("type_vocab_size", 1..=MAX_WIDTH)?.unwrap_or(2);
    let own = Absolute { type_vocab_size, first: positions.first };
    let keys = SizeKeys { vocab_size: ("vocab_size", vocab_size), ..SizeKeys::BERT };
    EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(own))
}

impl OwnConfig for Absolute {
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let types = tensors.table(TOKEN_TYPES, self.type_vocab_size, config.hidden_size)?;
        tensors.architecture(&LAYER, self.first, Some(types), ScoreBias::None)
    }
}
