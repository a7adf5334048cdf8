//! ModernBERT: pre-norm, rotary positions, a gate, and layers that see a window between those that see all tokens.

use super::rope::{BASES, LAYER_KEYS, Scalings, check_head_size, number, read_parameters};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig, rope};
use crate::Result;
use crate::model::Weights;
use crate::model::architecture::{
    Architecture, Attention, Embeddings, Expansion, FeedForward, GateOrder, Layer, NormPlacement, Projections, Reach, Rotary,
    ScoreBias,
};
use crate::model::config::{EncoderConfig, MAX_POSITIONS, Positions, SizeKeys};
use crate::model::config_keys::{CODE, COMMON, HEADS, MODEL_TYPE, TRAINING};
use crate::model::json::shown;
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use serde_json::Value;
use std::sync::Arc;

const WORDS: &str = "embeddings.tok_embeddings";
const EMBEDDINGS_NORM: &str = "embeddings.norm";
const FINAL_NORM: &str = "final_norm";
const LAYERS: &str = "layers.";
const QKV: &str = "attn.Wqkv";
const ATTENTION_OUTPUT: &str = "attn.Wo";
const ATTENTION_NORM: &str = "attn_norm";
const GATED: &str = "mlp.Wi";
const OUTPUT: &str = "mlp.Wo";
const OUTPUT_NORM: &str = "mlp_norm";

pub(super) static FAMILY: Definition = Definition {
    model_type: "modernbert",
    variant: None,
    title: "ModernBERT",
    tensor_prefixes: &["model"],
    graph_name: "modernbert",
    keys: Schema { title: "config.json of ModernBERT", keys: &[MODEL_TYPE, KEYS, CODE, COMMON], unknown: Unknown::Warn },
    modules: Modules {
        roots: &["embeddings.", "layers.", "final_norm."],
        layers: LAYERS,
        layer_linears: &[QKV, ATTENTION_OUTPUT, GATED, OUTPUT],
        layer_norms: &[ATTENTION_NORM, OUTPUT_NORM],
        tables: &[WORDS],
        norms: &[EMBEDDINGS_NORM, FINAL_NORM],
        buffers: &[],
    },
    lora_targets: None,
    read,
};

const KEYS: &[Key] = &[
    Key::honoured("hidden_size", "width of a hidden state (768)"),
    Key::honoured("num_hidden_layers", "transformer layers (22)"),
    Key::honoured("num_attention_heads", "attention heads (12); divides hidden_size"),
    Key::honoured("intermediate_size", "width of the feed-forward part behind its gate (1152)"),
    Key::honoured("vocab_size", "rows of the token embedding table (50368)"),
    Key::honoured("max_position_embeddings", "the longest text, unless sentence_bert_config.json asks for longer ones (8192)"),
    Key::honoured("norm_eps", "epsilon of every LayerNorm (1e-5)"),
    Key::honoured("norm_bias", "whether LayerNorms have a bias (false)"),
    Key::honoured("hidden_activation", "activation of the feed-forward part's gate (gelu)"),
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (50283)"),
    Key::honoured("attention_bias", "whether attention's linears have a bias (false)"),
    Key::honoured("mlp_bias", "whether those of the feed-forward part have one (false)"),
    Key::honoured("global_attn_every_n_layers", "every how many layers one sees all tokens, from the first on (3)"),
    Key::honoured("layer_types", "which layers see all tokens and which a window; wins over global_attn_every_n_layers"),
    Key::honoured("local_attention", "width of the window: half of it to each side (128)"),
    Key::honoured("sliding_window", "half of local_attention"),
    Key::honoured("global_rope_theta", "base of the rotary frequencies of layers that see all tokens (160000)"),
    Key::honoured("local_rope_theta", "of those that see a window (10000); where it is null, global_rope_theta"),
    Key::honoured("rope_parameters", "both, as transformers 5 writes them"),
    Key::honoured("head_dim", "refused where it is not hidden_size / num_attention_heads"),
    Key::only("rope_scaling", &["{}"], "only the default is supported"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::harmless("position_embedding_type", "positions are rotary, whatever stands here"),
    Key::harmless("layer_norm_eps", "norm_eps counts"),
    Key::harmless("initializer_cutoff_factor", TRAINING),
    Key::harmless("attention_dropout", TRAINING),
    Key::harmless("embedding_dropout", TRAINING),
    Key::harmless("mlp_dropout", TRAINING),
    Key::harmless("decoder_bias", HEADS),
    Key::harmless("classifier_activation", HEADS),
    Key::harmless("classifier_bias", HEADS),
    Key::harmless("classifier_pooling", HEADS),
    Key::harmless("deterministic_flash_attn", TRAINING),
    Key::harmless("sparse_prediction", TRAINING),
    Key::harmless("sparse_pred_ignore_index", TRAINING),
    Key::harmless("reference_compile", "how the reference computes, not what"),
    Key::harmless("repad_logits_with_grad", TRAINING),
];

/// What only ModernBERT's configuration has.
#[derive(Debug)]
struct ModernBert {
    /// Which tokens the tokens of each layer see.
    reach: Vec<Reach>,
    /// Rotary positions of layers that see all tokens, and of those that see a window.
    global: Rotary,
    local: Rotary,
    norm_bias: bool,
    attention_bias: bool,
    mlp_bias: bool,
}

/// Absent fields have the values of transformers' `ModernBertConfig`.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    let keys = SizeKeys {
        num_hidden_layers: ("num_hidden_layers", 22),
        intermediate_size: ("intermediate_size", 1152),
        vocab_size: ("vocab_size", 50368),
        max_position_embeddings: ("max_position_embeddings", 8192),
        layer_norm_eps: (Some("norm_eps"), 1e-5),
        activation: (Some("hidden_activation"), "gelu"),
        ..SizeKeys::BERT
    };
    let (hidden_size, heads) = keys.read_width(json)?;
    check_head_size(json, hidden_size / heads)?;
    let (global, local) = read_rotary(json, hidden_size / heads)?;
    let flag = |field| json.boolean(field).map(|flag| flag.unwrap_or(false));
    let own = ModernBert {
        reach: read_reach(json, keys.read_layers(json)?)?,
        global,
        local,
        norm_bias: flag("norm_bias")?,
        attention_bias: flag("attention_bias")?,
        mlp_bias: flag("mlp_bias")?,
    };
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 50283)?, first: 0, padding: None };
    EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(own))
}

fn read_reach(json: &JsonObject, layers: usize) -> Result<Vec<Reach>> {
    let width = json.size("local_attention", 0..=2 * MAX_POSITIONS)?;
    let half = json.size("sliding_window", 0..=MAX_POSITIONS)?;
    let window = match (width, half) {
        (Some(width), Some(half)) if width / 2 != half => {
            let expected = format!("half of local_attention, which is {width}, is expected");
            return Err(json.field_error("sliding_window", &expected));
        }
        (Some(width), _) => Reach::Window(width / 2),
        (None, half) => Reach::Window(half.unwrap_or(64)),
    };
    let every = json.size("global_attn_every_n_layers", 1..=usize::MAX)?.unwrap_or(3);
    let Some(types) = json.get("layer_types") else {
        return Ok((0..layers).map(|layer| if layer % every == 0 { Reach::All } else { window }).collect());
    };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| json.field_error("layer_types", &format!("a list of {layers} layers is expected")))?;
    let reach = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(Reach::All),
        Some("sliding_attention") => Ok(window),
        _ => Err(json.error(format!("layer_types has {}; \"full_attention\" or \"sliding_attention\" is expected", shown(kind)))),
    };
    types.iter().map(reach).collect()
}

/// The rotary positions of layers that see all tokens, and of those that see a window.
fn read_rotary(json: &JsonObject, size: usize) -> Result<(Rotary, Rotary)> {
    let global = number(json, "global_rope_theta", BASES)?;
    let mut local = number(json, "local_rope_theta", BASES)?;
    if json.fields().get("local_rope_theta").is_some_and(Value::is_null) {
        local = Some(global.unwrap_or(GLOBAL_BASE));
    }
    let parameters = json.child("rope_parameters", &LAYER_KEYS)?;
    let of = |kind: &str, outer: (Option<f64>, &str), base| {
        let inner = match &parameters {
            Some(parameters) => parameters.child(kind, &rope::KEYS)?,
            None => None,
        };
        match inner {
            Some(inner) => read_parameters(&inner, outer, base, size, Scalings::None),
            None => rope::rotary(outer.0.unwrap_or(base), size, json),
        }
    };
    let global = of("full_attention", (global, "global_rope_theta"), GLOBAL_BASE)?;
    let local = of("sliding_attention", (local, "local_rope_theta"), LOCAL_BASE)?;
    Ok((global, local))
}

/// Bases where none are given.
const GLOBAL_BASE: f64 = 160_000.0;
const LOCAL_BASE: f64 = 10_000.0;

impl OwnConfig for ModernBert {
    fn computes_positions(&self) -> bool {
        true
    }

    fn architecture(&self, config: &EncoderConfig, weights: &Weights) -> Result<Architecture> {
        let tensors = Tensors { config, weights };
        let hidden = config.hidden_size;
        let embeddings = Embeddings {
            words: tensors.table(WORDS, config.vocab_size, hidden)?,
            positions: None,
            token_types: None,
            norm: Some(tensors.norm(EMBEDDINGS_NORM, self.norm_bias)?),
        };
        let layers = self.reach.iter().enumerate().map(|(at, reach)| self.layer(&tensors, at, *reach));
        let layers = layers.collect::<Result<_>>()?;
        let final_norm = Some(tensors.norm(FINAL_NORM, self.norm_bias)?);
        Ok(Architecture { final_norm, ..config.architecture_of(embeddings, ScoreBias::None, layers) })
    }
}

impl ModernBert {
    fn layer(&self, tensors: &Tensors<'_>, layer: usize, reach: Reach) -> Result<Layer> {
        let config = tensors.config;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("{LAYERS}{layer}.{part}");
        let rotary = if reach == Reach::All { &self.global } else { &self.local };
        // The first layer's input is normalised already.
        let attention_norm = match layer {
            0 => None,
            _ => Some(tensors.norm(&name(ATTENTION_NORM), self.norm_bias)?),
        };
        Ok(Layer {
            placement: NormPlacement::Pre,
            attention: Attention {
                projections: Projections::Packed(tensors.linear(&name(QKV), 3 * hidden, hidden, self.attention_bias)?),
                query_norm: None,
                key_norm: None,
                output: tensors.linear(&name(ATTENTION_OUTPUT), hidden, hidden, self.attention_bias)?,
                output_norm: None,
                reach,
                rotary: Some(rotary.clone()),
            },
            attention_norm,
            feed_forward: FeedForward {
                expansion: Expansion::GatedPacked {
                    both: tensors.linear(&name(GATED), 2 * wide, hidden, self.mlp_bias)?,
                    order: GateOrder::GateFirst,
                },
                activation: config.activation,
                output: tensors.linear(&name(OUTPUT), hidden, wide, self.mlp_bias)?,
            },
            feed_forward_norm: Some(tensors.norm(&name(OUTPUT_NORM), self.norm_bias)?),
        })
    }
}
