//! DistilBERT: BERT without token types, with names of its own throughout.

use super::post_norm::{EMBEDDINGS_NORM, LayerNames, POSITIONS, WORDS};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig, one_of};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{Architecture, ScoreBias};
use crate::model::config::{EncoderConfig, Positions, SizeKeys};
use crate::model::config_keys::{CODE, COMMON, HEADS, MODEL_TYPE, TRAINING};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use std::sync::Arc;

const LAYER: LayerNames = LayerNames {
    layers: "transformer.layer.",
    query: "attention.q_lin",
    key: "attention.k_lin",
    value: "attention.v_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    intermediate: "ffn.lin1",
    output: "ffn.lin2",
    output_norm: "output_layer_norm",
};

/// A constant of transformers' `DistilBertModel`.
const EPSILON: f64 = 1e-12;

pub(super) static FAMILY: Definition = Definition {
    model_type: "distilbert",
    variant: None,
    title: "DistilBERT",
    tensor_prefixes: &["distilbert"],
    graph_name: "distilbert",
    keys: Schema { title: "config.json of DistilBERT", keys: &[MODEL_TYPE, KEYS, CODE, COMMON], unknown: Unknown::Warn },
    modules: Modules {
        roots: &["embeddings.", "transformer."],
        layers: LAYER.layers,
        layer_linears: &LAYER.linears(),
        layer_norms: &LAYER.norms(),
        tables: &[WORDS, POSITIONS],
        norms: &[EMBEDDINGS_NORM],
        buffers: &[],
    },
    lora_targets: None,
    read,
};

const KEYS: &[Key] = &[
    Key::honoured("dim", "width of a hidden state (768)"),
    Key::honoured("hidden_size", "as dim"),
    Key::honoured("n_layers", "transformer layers (6)"),
    Key::honoured("num_hidden_layers", "as n_layers"),
    Key::honoured("n_heads", "attention heads (12); divides dim"),
    Key::honoured("num_attention_heads", "as n_heads"),
    Key::honoured("hidden_dim", "width of the feed-forward part (3072)"),
    Key::honoured("vocab_size", "rows of the token embedding table (30522)"),
    Key::honoured("max_position_embeddings", "rows of the position embedding table (512)"),
    Key::honoured("activation", "activation of the feed-forward part (gelu)"),
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (0)"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::harmless("sinusoidal_pos_embds", "how the position table was made; it is among the weights"),
    Key::harmless("layer_norm_eps", "DistilBERT's is 1e-12, whatever stands here"),
    Key::harmless("type_vocab_size", "DistilBERT has no token types"),
    Key::harmless("dropout", TRAINING),
    Key::harmless("attention_dropout", TRAINING),
    Key::harmless("qa_dropout", HEADS),
    Key::harmless("seq_classif_dropout", HEADS),
    Key::harmless("tie_weights_", HEADS),
];

#[derive(Debug)]
struct DistilBert;

/// Absent fields have the values of transformers' `DistilBertConfig`.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    let keys = SizeKeys {
        hidden_size: (one_of(json, "dim", "hidden_size")?, 768),
        num_hidden_layers: (one_of(json, "n_layers", "num_hidden_layers")?, 6),
        num_attention_heads: (one_of(json, "n_heads", "num_attention_heads")?, 12),
        intermediate_size: ("hidden_dim", 3072),
        layer_norm_eps: (None, EPSILON),
        activation: (Some("activation"), "gelu"),
        ..SizeKeys::BERT
    };
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 0)?, first: 0, padding: None };
    EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(DistilBert))
}

impl OwnConfig for DistilBert {
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        Tensors { config, weights }.architecture(&LAYER, 0, None, ScoreBias::None)
    }
}
