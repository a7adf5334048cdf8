//! BERT: absolute positions from 0, and token types.

use super::post_norm::{EMBEDDINGS_NORM, LAYERS, LayerNames, POSITIONS, ROOTS, Tensors, WORDS};
use super::{Definition, Family, Modules, OwnConfig};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{Architecture, ScoreBias};
use crate::model::config::{EncoderConfig, MAX_WIDTH, Positions, SizeKeys};
use crate::model::config_keys::{COMMON, HEADS, MODEL_TYPE, SIZES, TRAINING};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use std::sync::Arc;

const TOKEN_TYPES: &str = "embeddings.token_type_embeddings";

const LAYER: LayerNames = LayerNames {
    query: "attention.self.query",
    key: "attention.self.key",
    value: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    intermediate: "intermediate.dense",
    output: "output.dense",
    output_norm: "output.LayerNorm",
};

pub(super) static FAMILY: Definition = Definition {
    model_type: "bert",
    title: "BERT",
    tensor_prefix: "bert",
    graph_name: "bert",
    keys: Schema { title: "config.json of BERT", keys: &[MODEL_TYPE, SIZES, COMMON, KEYS], unknown: Unknown::Warn },
    modules: Modules {
        roots: &ROOTS,
        layers: LAYERS,
        layer_linears: &LAYER.linears(),
        layer_norms: &LAYER.norms(),
        tables: &[WORDS, POSITIONS, TOKEN_TYPES],
        norms: &[EMBEDDINGS_NORM],
    },
    lora_targets: Some(&["query", "value"]),
    read,
};

const KEYS: &[Key] = &[
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (0)"),
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

/// What only BERT's configuration has.
#[derive(Debug)]
struct Bert {
    /// Rows of the token type table.
    type_vocab_size: usize,
}

/// Absent fields have the values of transformers' `BertConfig`.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    let bert = Bert { type_vocab_size: json.size("type_vocab_size", 1..=MAX_WIDTH)?.unwrap_or(2) };
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 0)?, first: 0, padding: None };
    EncoderConfig::read_sizes(
        family,
        json,
        &SizeKeys { vocab_size: ("vocab_size", 30522), ..SizeKeys::BERT },
        positions,
        Arc::new(bert),
    )
}

impl OwnConfig for Bert {
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let types = tensors.table(TOKEN_TYPES, self.type_vocab_size, config.hidden_size)?;
        tensors.architecture(&LAYER, 0, Some(types), ScoreBias::None)
    }
}
