//! MPNet: a relative position bias shared by all layers, and positions that start after the padding id.

use super::post_norm::{EMBEDDINGS_NORM, LAYERS, LayerNames, POSITIONS, ROOTS, WORDS};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{Architecture, RelativeBias, ScoreBias};
use crate::model::config::{EncoderConfig, Positions, SizeKeys};
use crate::model::config_keys::{ACTIVATION, CODE, COMMON, MODEL_TYPE, POSITION_ROWS, SIZES};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use std::sync::Arc;

/// `padding_idx` of transformers' `MPNetEmbeddings`: a constant there, whatever config.json says.
const PADDING: u32 = 1;

/// The row of the first token's position.
const FIRST: usize = PADDING as usize + 1;

/// `max_distance` of transformers' `MPNetEncoder.relative_position_bucket`.
const MAX_DISTANCE: usize = 128;

const MAX_BUCKETS: usize = 1 << 12;

/// Fewer buckets leave transformers' `relative_position_bucket` without an exact bucket (it divides by a quarter of them).
const MIN_BUCKETS: usize = 4;

const RELATIVE_BIAS: &str = "encoder.relative_attention_bias";

const LAYER: LayerNames = LayerNames {
    layers: LAYERS,
    query: "attention.attn.q",
    key: "attention.attn.k",
    value: "attention.attn.v",
    attention_output: "attention.attn.o",
    attention_norm: "attention.LayerNorm",
    intermediate: "intermediate.dense",
    output: "output.dense",
    output_norm: "output.LayerNorm",
};

pub(super) static FAMILY: Definition = Definition {
    model_type: "mpnet",
    variant: None,
    title: "MPNet",
    tensor_prefixes: &["mpnet"],
    graph_name: "mpnet",
    keys: Schema {
        title: "config.json of MPNet",
        keys: &[MODEL_TYPE, SIZES, ACTIVATION, POSITION_ROWS, CODE, COMMON, KEYS],
        unknown: Unknown::Warn,
    },
    modules: Modules {
        roots: &ROOTS,
        layers: LAYERS,
        layer_linears: &LAYER.linears(),
        layer_norms: &LAYER.norms(),
        tables: &[WORDS, POSITIONS, RELATIVE_BIAS],
        norms: &[EMBEDDINGS_NORM],
        buffers: &[],
    },
    lora_targets: None,
    read,
};

const KEYS: &[Key] = &[
    Key::honoured("relative_attention_num_buckets", "buckets of the relative position bias (32)"),
    Key::harmless("pad_token_id", "MPNet counts positions from padding id 1, whatever stands here"),
    Key::harmless("type_vocab_size", "MPNet has no token types"),
    Key::harmless("is_causal", "MPNet's attention sees all tokens, whatever stands here"),
];

/// What only MPNet's configuration has.
#[derive(Debug)]
struct MpNet {
    /// Rows of the relative position bias.
    buckets: usize,
}

/// Absent fields have the values of transformers' `MPNetConfig`.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    let mpnet = MpNet { buckets: json.size("relative_attention_num_buckets", MIN_BUCKETS..=MAX_BUCKETS)?.unwrap_or(32) };
    let positions = Positions { pad_token_id: PADDING, first: FIRST, padding: Some(PADDING) };
    let keys = SizeKeys { vocab_size: ("vocab_size", 30527), ..SizeKeys::BERT };
    let config = EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(mpnet))?;
    if config.max_tokens() == 0 {
        let rows = config.max_position_embeddings;
        return Err(
            json.error(format!("max_position_embeddings is {rows}; MPNet's positions start at {FIRST}, so more rows are needed"))
        );
    }
    Ok(config)
}

impl OwnConfig for MpNet {
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let bias = tensors.table(RELATIVE_BIAS, self.buckets, config.num_attention_heads)?;
        let bias = RelativeBias { name: bias.name, table: bias.rows, max_distance: MAX_DISTANCE };
        tensors.architecture(&LAYER, FIRST, None, ScoreBias::Relative(bias))
    }
}
