//! JinaBERT v2: post-norm, slopes by distance in the place of positions (ALiBi), a packed gate. Its `model_type` is `bert`, as which it would
//! give rubbish: its authors' code tells it apart. The tensors tell its two forms apart; the later one normalises queries and keys, too.

use super::post_norm::{EMBEDDINGS_NORM, LAYERS, ROOTS, WORDS};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig, Variant, check_code};
use crate::Result;
use crate::model::architecture::{
    Alibi, Architecture, Attention, Embeddings, Expansion, FeedForward, GateOrder, Layer, NormPlacement, Projections, Reach,
    ScoreBias,
};
use crate::model::config::{EncoderConfig, MAX_WIDTH, Positions, SizeKeys};
use crate::model::config_keys::{COMMON, HEADS, MODEL_TYPE, SIZES};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::{Activation, Weights};
use serde_json::Value;
use std::sync::Arc;

const TOKEN_TYPES: &str = "embeddings.token_type_embeddings";
const QUERY: &str = "attention.self.query";
const KEY: &str = "attention.self.key";
const VALUE: &str = "attention.self.value";
const ATTENTION_OUTPUT: &str = "attention.output.dense";
const ATTENTION_NORM: &str = "attention.output.LayerNorm";
const GATED: &str = "mlp.gated_layers";
const OUTPUT: &str = "mlp.wo";
const OUTPUT_NORM: &str = "mlp.layernorm";
/// Of the later form.
const LATER_GATED: &str = "mlp.up_gated_layer";
const LATER_OUTPUT: &str = "mlp.down_layer";
const QUERY_NORM: &str = "attention.self.layer_norm_q";
const KEY_NORM: &str = "attention.self.layer_norm_k";
const LATER_ATTENTION_NORM: &str = "layer_norm_1";
const LATER_OUTPUT_NORM: &str = "layer_norm_2";

/// The repositories of the authors' code.
const CODE: [&str; 2] = ["jina-bert-implementation", "jina-bert-v2-qk-post-norm"];

pub(super) static FAMILY: Definition = Definition {
    model_type: "bert",
    variant: Some(Variant { recognises }),
    title: "JinaBERT v2",
    tensor_prefixes: &["bert"],
    graph_name: "jina_bert",
    keys: Schema { title: "config.json of JinaBERT v2", keys: &[MODEL_TYPE, SIZES, COMMON, KEYS], unknown: Unknown::Warn },
    modules: Modules {
        roots: &ROOTS,
        layers: LAYERS,
        layer_linears: &[QUERY, KEY, VALUE, ATTENTION_OUTPUT, GATED, OUTPUT, LATER_GATED, LATER_OUTPUT],
        layer_norms: &[ATTENTION_NORM, OUTPUT_NORM, QUERY_NORM, KEY_NORM, LATER_ATTENTION_NORM, LATER_OUTPUT_NORM],
        tables: &[WORDS, TOKEN_TYPES],
        norms: &[EMBEDDINGS_NORM],
        buffers: &[],
    },
    lora_targets: None,
    read,
};

const KEYS: &[Key] = &[
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (0)"),
    Key::honoured("type_vocab_size", "rows of the token type table, of which row 0 is used (2)"),
    Key::honoured("max_position_embeddings", "the longest text (512)"),
    Key::honoured("feed_forward_type", "activation of the feed-forward part's gate: geglu (gelu) or reglu (relu)"),
    Key::harmless("hidden_act", "feed_forward_type counts"),
    Key::honoured("auto_map", "the authors' code, which is not run: what it computes is computed here; other code is refused"),
    Key::only("position_embedding_type", &["\"alibi\""], "only \"alibi\" is supported for JinaBERT"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::harmless("emb_pooler", HEADS),
    Key::harmless("model_max_length", "the tokenizer's own files say"),
    Key::harmless("with_flash_attn", "how the reference computes, not what"),
];

/// Whether a config.json of `model_type` `bert` is of this family.
fn recognises(config: &Value) -> bool {
    let names = |value: &Value| {
        value.as_str().is_some_and(|name| CODE.iter().any(|code| name.contains(code)) || name.ends_with("JinaBertConfig"))
    };
    let by_code = config.get("auto_map").and_then(|map| map.get("AutoConfig")).is_some_and(names);
    let by_class = config
        .get("architectures")
        .and_then(Value::as_array)
        .is_some_and(|classes| classes.iter().any(|class| class.as_str().is_some_and(|class| class.starts_with("JinaBert"))));
    by_code || by_class || config.get("_name_or_path").is_some_and(names)
}

/// What only JinaBERT's configuration has.
#[derive(Debug)]
struct JinaBert {
    /// Rows of the token type table.
    type_vocab_size: usize,
}

/// Absent fields have the values of the authors' `JinaBertConfig`.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    check_code(json, &["JinaBertConfig", "JinaBertModel", "JinaBertForMaskedLM"])?;
    if json.get("position_embedding_type").is_none() {
        return Err(json.field_error("position_embedding_type", "only \"alibi\" is supported for JinaBERT"));
    }
    let activation = match json.string("feed_forward_type")? {
        Some("geglu") => Activation::Gelu,
        Some("reglu") => Activation::Relu,
        _ => return Err(json.field_error("feed_forward_type", "geglu and reglu are supported")),
    };
    let own = JinaBert { type_vocab_size: json.size("type_vocab_size", 1..=MAX_WIDTH)?.unwrap_or(2) };
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 0)?, first: 0, padding: None };
    let keys = SizeKeys { activation: (None, "gelu"), ..SizeKeys::BERT };
    let mut config = EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(own))?;
    config.activation = activation;
    Ok(config)
}

impl OwnConfig for JinaBert {
    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let embeddings = Embeddings {
            words: tensors.table(WORDS, config.vocab_size, config.hidden_size)?,
            positions: None,
            token_types: Some(tensors.table(TOKEN_TYPES, self.type_vocab_size, config.hidden_size)?),
            norm: Some(tensors.norm(EMBEDDINGS_NORM, true)?),
        };
        // By either, so that one that is missing is told as such.
        let is_later = [LATER_GATED, QUERY_NORM].iter().any(|part| weights.contains(&format!("{LAYERS}0.{part}.weight")));
        let layers = (0..config.num_hidden_layers).map(|at| layer(&tensors, at, is_later)).collect::<Result<_>>()?;
        Ok(config.architecture_of(embeddings, ScoreBias::Alibi(Alibi), layers))
    }
}

fn layer(tensors: &Tensors<'_>, layer: usize, is_later: bool) -> Result<Layer> {
    let config = tensors.config;
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let name = |part: &str| format!("{LAYERS}{layer}.{part}");
    let norm = |part: &str| tensors.norm(&name(part), true);
    let later = |part: &str| if is_later { norm(part).map(Some) } else { Ok(None) };
    let (gated, order, output) = match is_later {
        true => (LATER_GATED, GateOrder::ValueFirst, LATER_OUTPUT),
        false => (GATED, GateOrder::GateFirst, OUTPUT),
    };
    Ok(Layer {
        placement: NormPlacement::Post,
        attention: Attention {
            projections: Projections::Separate {
                query: tensors.linear(&name(QUERY), hidden, hidden, true)?,
                key: tensors.linear(&name(KEY), hidden, hidden, true)?,
                value: tensors.linear(&name(VALUE), hidden, hidden, true)?,
            },
            query_norm: later(QUERY_NORM)?,
            key_norm: later(KEY_NORM)?,
            output: tensors.linear(&name(ATTENTION_OUTPUT), hidden, hidden, true)?,
            // Attention has a residual branch and a norm of its own there, within those of the layer.
            output_norm: later(ATTENTION_NORM)?,
            reach: Reach::All,
            rotary: None,
        },
        attention_norm: Some(norm(if is_later { LATER_ATTENTION_NORM } else { ATTENTION_NORM })?),
        feed_forward: FeedForward {
            expansion: Expansion::GatedPacked { both: tensors.linear(&name(gated), 2 * wide, hidden, false)?, order },
            activation: config.activation,
            output: tensors.linear(&name(output), hidden, wide, true)?,
        },
        feed_forward_norm: Some(norm(if is_later { LATER_OUTPUT_NORM } else { OUTPUT_NORM })?),
    })
}
