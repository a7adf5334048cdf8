//! GTE as transformers 5 has it (`gte`): post-norm, rotary positions and a packed gate. `new.rs` is the same with its authors' code.

use super::post_norm::{EMBEDDINGS_NORM, LAYERS, ROOTS, WORDS};
use super::rope::{Scalings, check_head_size};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig, check_code, rope};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{
    Architecture, Attention, Embeddings, Expansion, FeedForward, GateOrder, Layer, NormPlacement, Projections, Reach, Rotary,
    ScoreBias,
};
use crate::model::config::{EncoderConfig, MAX_POSITIONS, MAX_WIDTH, Positions, SizeKeys};
use crate::model::config_keys::{ACTIVATION, COMMON, HEADS, MODEL_TYPE, SIZES};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use std::sync::Arc;

const TOKEN_TYPES: &str = "embeddings.token_type_embeddings";
const QKV: &str = "attention.qkv_proj";
const ATTENTION_OUTPUT: &str = "attention.o_proj";
const ATTENTION_NORM: &str = "attn_ln";
const GATED: &str = "mlp.up_gate_proj";
const OUTPUT: &str = "mlp.down_proj";
const OUTPUT_NORM: &str = "mlp_ln";

pub(super) const MODULES: Modules = Modules {
    roots: &ROOTS,
    layers: LAYERS,
    layer_linears: &[QKV, ATTENTION_OUTPUT, GATED, OUTPUT],
    layer_norms: &[ATTENTION_NORM, OUTPUT_NORM],
    tables: &[WORDS, TOKEN_TYPES],
    norms: &[EMBEDDINGS_NORM],
    buffers: &["attention.rotary_emb.inv_freq"],
};

pub(super) static FAMILY: Definition = Definition {
    model_type: "gte",
    variant: None,
    title: "GTE",
    tensor_prefixes: &["gte", "new"],
    graph_name: "gte",
    keys: Schema { title: "config.json of GTE", keys: &[MODEL_TYPE, SIZES, ACTIVATION, COMMON, KEYS], unknown: Unknown::Warn },
    modules: MODULES,
    lora_targets: None,
    read: |family, json| read(family, json, &GTE),
};

const MEMORY: &str = "how the reference computes, not what";

pub(super) const KEYS: &[Key] = &[
    Key::honoured("max_position_embeddings", "the longest text, unless sentence_bert_config.json asks for longer ones"),
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked"),
    Key::honoured("type_vocab_size", "rows of the token type table, of which row 0 is used (1); 0 for none"),
    Key::honoured("rope_theta", "base of the rotary frequencies"),
    Key::honoured("rope_scaling", "how they are changed for longer texts"),
    Key::honoured("rope_parameters", "both, as transformers 5 writes them"),
    Key::honoured("head_dim", "refused where it is not hidden_size / num_attention_heads"),
    Key::honoured("auto_map", "the authors' code, which is not run: what it computes is computed here; other code is refused"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::only("position_embedding_type", &["\"rope\""], "only \"rope\" is supported"),
    Key::only("layer_norm_type", &["\"layer_norm\""], "only \"layer_norm\" is supported"),
    Key::only("pack_qkv", &["true"], "only packed queries, keys and values are supported"),
    Key::only("logn_attention_scale", &["false"], "scores that are scaled by the length of the text are not supported"),
    Key::only("logn_attention_clip1", &["false"], "scores that are scaled by the length of the text are not supported"),
    Key::harmless("use_memory_efficient_attention", MEMORY),
    Key::harmless("unpad_inputs", MEMORY),
    Key::harmless("matryoshka_dimensions", HEADS),
];

/// What the two names of the family have of their own where a key is absent.
pub(super) struct Kind {
    pub vocab_size: usize,
    pub longest: usize,
    pub pad_token_id: u32,
    pub base: f64,
    /// Whether scaling is that of the authors' code.
    pub ntk: bool,
    /// Classes of the code that this is.
    pub code: &'static [&'static str],
}

/// transformers' `GteConfig`.
const GTE: Kind =
    Kind { vocab_size: 250_048, longest: 8192, pad_token_id: 1, base: 160_000.0, ntk: false, code: &["GteConfig", "GteModel"] };

/// What only GTE's configuration has.
#[derive(Debug)]
struct Gte {
    /// Rows of the token type table; 0 for none.
    type_vocab_size: usize,
    rotary: Rotary,
}

pub(super) fn read(family: Family, json: &JsonObject, kind: &Kind) -> Result<EncoderConfig> {
    check_code(json, kind.code)?;
    let keys = SizeKeys {
        vocab_size: ("vocab_size", kind.vocab_size),
        max_position_embeddings: ("max_position_embeddings", kind.longest),
        ..SizeKeys::BERT
    };
    let (hidden_size, heads) = keys.read_width(json)?;
    check_head_size(json, hidden_size / heads)?;
    let longest = json.size("max_position_embeddings", 1..=MAX_POSITIONS)?.unwrap_or(kind.longest);
    let scalings = if kind.ntk { Scalings::Ntk } else { Scalings::Dynamic(longest) };
    let own = Gte {
        type_vocab_size: json.size("type_vocab_size", 0..=MAX_WIDTH)?.unwrap_or(1),
        rotary: rope::read(json, kind.base, hidden_size / heads, scalings)?,
    };
    let pad_token_id = EncoderConfig::read_pad(json, kind.pad_token_id)?;
    let positions = Positions { pad_token_id, first: 0, padding: None };
    EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(own))
}

impl OwnConfig for Gte {
    fn computes_positions(&self) -> bool {
        true
    }

    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let token_types = match self.type_vocab_size {
            0 => None,
            rows => Some(tensors.table(TOKEN_TYPES, rows, config.hidden_size)?),
        };
        let embeddings = Embeddings {
            words: tensors.table(WORDS, config.vocab_size, config.hidden_size)?,
            positions: None,
            token_types,
            norm: Some(tensors.norm(EMBEDDINGS_NORM, true)?),
        };
        let layers = (0..config.num_hidden_layers).map(|layer| self.layer(&tensors, layer)).collect::<Result<_>>()?;
        Ok(config.architecture_of(embeddings, ScoreBias::None, layers))
    }
}

impl Gte {
    fn layer(&self, tensors: &Tensors<'_>, layer: usize) -> Result<Layer> {
        let config = tensors.config;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("{LAYERS}{layer}.{part}");
        Ok(Layer {
            placement: NormPlacement::Post,
            attention: Attention {
                projections: Projections::Packed(tensors.linear(&name(QKV), 3 * hidden, hidden, true)?),
                query_norm: None,
                key_norm: None,
                output: tensors.linear(&name(ATTENTION_OUTPUT), hidden, hidden, true)?,
                output_norm: None,
                reach: Reach::All,
                rotary: Some(self.rotary.clone()),
            },
            attention_norm: Some(tensors.norm(&name(ATTENTION_NORM), true)?),
            feed_forward: FeedForward {
                expansion: Expansion::GatedPacked {
                    both: tensors.linear(&name(GATED), 2 * wide, hidden, false)?,
                    order: GateOrder::ValueFirst,
                },
                activation: config.activation,
                output: tensors.linear(&name(OUTPUT), hidden, wide, true)?,
            },
            feed_forward_norm: Some(tensors.norm(&name(OUTPUT_NORM), true)?),
        })
    }
}
