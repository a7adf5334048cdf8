//! NomicBERT v1 and v1.5: post-norm, rotary positions and a gate of two linears. Its configuration is spelled as GPT-2's (with the code of its
//! authors) or as BERT's (by transformers 5); the tensors have the same names with both.

use super::post_norm::WORDS;
use super::rope::{BASES, FACTORS, Scalings, check_head_size, check_size, number};
use super::tensors::Tensors;
use super::{Definition, Family, Modules, OwnConfig, check_code, one_of, rope};
use crate::Result;
use crate::model::architecture::{
    Architecture, Attention, Embeddings, Expansion, FeedForward, Layer, NormPlacement, Projections, Reach, Rotary, RotaryScaling,
    ScoreBias,
};
use crate::model::config::{EncoderConfig, MAX_POSITIONS, MAX_WIDTH, Positions, SizeKeys};
use crate::model::config_keys::{COMMON, HEADS, MODEL_TYPE, TRAINING};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::model::{Activation, Weights};
use std::sync::Arc;

const TOKEN_TYPES: &str = "embeddings.token_type_embeddings";
const EMBEDDINGS_NORM: &str = "emb_ln";
const LAYERS: &str = "encoder.layers.";
const QKV: &str = "attn.Wqkv";
const ATTENTION_OUTPUT: &str = "attn.out_proj";
const ATTENTION_NORM: &str = "norm1";
const VALUE: &str = "mlp.fc11";
const GATE: &str = "mlp.fc12";
const OUTPUT: &str = "mlp.fc2";
const OUTPUT_NORM: &str = "norm2";

pub(super) static FAMILY: Definition = Definition {
    model_type: "nomic_bert",
    variant: None,
    title: "NomicBERT",
    tensor_prefixes: &["nomic_bert", "bert"],
    graph_name: "nomic_bert",
    keys: Schema { title: "config.json of NomicBERT", keys: &[MODEL_TYPE, KEYS, COMMON], unknown: Unknown::Warn },
    modules: Modules {
        roots: &["embeddings.", "emb_ln.", "encoder."],
        layers: LAYERS,
        layer_linears: &[QKV, ATTENTION_OUTPUT, VALUE, GATE, OUTPUT],
        layer_norms: &[ATTENTION_NORM, OUTPUT_NORM],
        tables: &[WORDS, TOKEN_TYPES],
        norms: &[EMBEDDINGS_NORM],
        buffers: &["attn.rotary_emb.inv_freq"],
    },
    lora_targets: None,
    read,
};

const EXPERTS: &str = "layers with experts (nomic-embed-text-v2-moe) are not supported";
const OF_EXPERTS: &str = "of layers with experts, which are refused by num_experts";

const KEYS: &[Key] = &[
    Key::honoured("hidden_size", "width of a hidden state (768)"),
    Key::honoured("n_embd", "the same; where it is given, the keys are those of the authors' code"),
    Key::honoured("num_hidden_layers", "transformer layers (12)"),
    Key::honoured("n_layer", "the same"),
    Key::honoured("num_attention_heads", "attention heads (12); divides hidden_size"),
    Key::honoured("n_head", "the same"),
    Key::honoured("intermediate_size", "width of the feed-forward part behind its gate (3072)"),
    Key::honoured("n_inner", "the same (4 n_embd)"),
    Key::honoured("vocab_size", "rows of the token embedding table (30528)"),
    Key::honoured("pad_vocab_size_multiple", "vocab_size is rounded up to a multiple of it"),
    Key::honoured("max_position_embeddings", "the longest text, unless sentence_bert_config.json asks for longer ones (2048)"),
    Key::honoured("n_positions", "the same"),
    Key::honoured("layer_norm_eps", "epsilon of every LayerNorm (1e-12)"),
    Key::honoured("layer_norm_epsilon", "the same"),
    Key::honoured("hidden_act", "activation of the feed-forward part's gate (silu)"),
    Key::honoured("activation_function", "the same, as swiglu (silu) or geglu (gelu)"),
    Key::honoured("type_vocab_size", "rows of the token type table, of which row 0 is used (2); 0 for none"),
    Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (0)"),
    Key::honoured("rope_theta", "base of the rotary frequencies (1000)"),
    Key::honoured("rope_scaling", "how they are changed for longer texts"),
    Key::honoured("rope_parameters", "both, as transformers 5 writes them"),
    Key::honoured("rotary_emb_base", "base of the rotary frequencies; needed beside n_embd"),
    Key::honoured("rotary_emb_fraction", "part of each head that is turned; needed beside n_embd"),
    Key::honoured("rotary_scaling_factor", "how far frequencies fall for texts longer than max_trained_positions"),
    Key::honoured("max_trained_positions", "the longest text of training (2048)"),
    Key::honoured("head_dim", "refused where it is not hidden_size / num_attention_heads"),
    Key::honoured("qkv_proj_bias", "whether attention's linears have a bias; needed beside n_embd"),
    Key::honoured("mlp_fc1_bias", "whether the gate's linears have a bias; needed beside n_embd"),
    Key::honoured("mlp_fc2_bias", "whether the last linear has a bias; needed beside n_embd"),
    Key::honoured("auto_map", "the authors' code, which is not run: what it computes is computed here; other code is refused"),
    Key::only("prenorm", &["false"], "only norms behind each part are supported"),
    Key::only("causal", &["false"], "only encoders are supported"),
    Key::only("is_causal", &["false"], "only encoders are supported"),
    Key::only("use_rms_norm", &["false"], "only LayerNorm is supported"),
    Key::only("parallel_block", &["false"], "only attention before the feed-forward part is supported"),
    Key::only("rotary_emb_interleaved", &["false"], "only halves that are turned with each other are supported"),
    Key::only("rotary_emb_scale_base", &[], "xPos is not supported"),
    Key::only("num_experts", &["0"], EXPERTS),
    Key::only("moe_every_n_layers", &["0"], EXPERTS),
    Key::only("scale_attn_weights", &["true"], "scores are divided by the root of a head's width"),
    Key::only("scale_attn_by_inverse_layer_idx", &["false"], "scores are divided by the root of a head's width"),
    Key::harmless("moe_top_k", OF_EXPERTS),
    Key::harmless("moe_impl", OF_EXPERTS),
    Key::harmless("moe_normalize_expert_weights", OF_EXPERTS),
    Key::harmless("moe_resid_pdrop", OF_EXPERTS),
    Key::harmless("expert_choice_router", OF_EXPERTS),
    Key::harmless("ffn_div", OF_EXPERTS),
    Key::harmless("num_shared_experts", OF_EXPERTS),
    Key::harmless("parallel_block_tied_norm", "of parallel blocks, which are refused"),
    Key::harmless("reorder_and_upcast_attn", "how the reference computes, not what"),
    Key::harmless("use_flash_attn", "how the reference computes, not what"),
    Key::harmless("use_xentropy", TRAINING),
    Key::harmless("fused_bias_fc", "how the reference computes, not what"),
    Key::harmless("fused_dropout_add_ln", "how the reference computes, not what"),
    Key::harmless("dense_seq_output", HEADS),
    Key::harmless("attn_pdrop", TRAINING),
    Key::harmless("embd_pdrop", TRAINING),
    Key::harmless("resid_pdrop", TRAINING),
    Key::harmless("summary_activation", HEADS),
    Key::harmless("summary_first_dropout", HEADS),
    Key::harmless("summary_proj_to_labels", HEADS),
    Key::harmless("summary_type", HEADS),
    Key::harmless("summary_use_proj", HEADS),
];

/// What only NomicBERT's configuration has.
#[derive(Debug)]
struct NomicBert {
    /// Rows of the token type table; 0 for none.
    type_vocab_size: usize,
    rotary: Rotary,
    attention_bias: bool,
    gate_bias: bool,
    output_bias: bool,
}

/// Absent fields have the values of transformers' `NomicBertConfig`; those on which its authors' code decides otherwise must be there.
fn read(family: Family, json: &JsonObject) -> Result<EncoderConfig> {
    check_code(json, &["NomicBertConfig", "NomicBertModel", "NomicBertForPreTraining"])?;
    check_spelling(json)?;
    let keys = SizeKeys {
        hidden_size: (one_of(json, "hidden_size", "n_embd")?, 768),
        num_hidden_layers: (one_of(json, "num_hidden_layers", "n_layer")?, 12),
        num_attention_heads: (one_of(json, "num_attention_heads", "n_head")?, 12),
        vocab_size: ("vocab_size", 30528),
        max_position_embeddings: (one_of(json, "max_position_embeddings", "n_positions")?, 2048),
        layer_norm_eps: (Some(one_of(json, "layer_norm_eps", "layer_norm_epsilon")?), 1e-12),
        activation: (Some("hidden_act"), "silu"),
        ..SizeKeys::BERT
    };
    let (hidden_size, heads) = keys.read_width(json)?;
    let inner = if json.get("n_embd").is_some() { 4 * hidden_size } else { 3072 };
    let keys = SizeKeys { intermediate_size: (one_of(json, "intermediate_size", "n_inner")?, inner), ..keys };
    check_head_size(json, hidden_size / heads)?;
    let own = NomicBert {
        type_vocab_size: json.size("type_vocab_size", 0..=MAX_WIDTH)?.unwrap_or(2),
        rotary: read_rotary(json, hidden_size / heads, keys.max_position_embeddings)?,
        attention_bias: read_bias(json, "qkv_proj_bias")?,
        gate_bias: read_bias(json, "mlp_fc1_bias")?,
        output_bias: read_bias(json, "mlp_fc2_bias")?,
    };
    let positions = Positions { pad_token_id: EncoderConfig::read_pad(json, 0)?, first: 0, padding: None };
    let mut config = EncoderConfig::read_sizes(family, json, &keys, positions, Arc::new(own))?;
    let multiple = json.size("pad_vocab_size_multiple", 1..=MAX_WIDTH)?.unwrap_or(1);
    config.vocab_size = config.vocab_size.next_multiple_of(multiple);
    if let Some(name) = json.string("activation_function")? {
        let activation = match name {
            "swiglu" => Activation::Silu,
            "geglu" => Activation::Gelu,
            _ => return Err(json.field_error("activation_function", "swiglu and geglu are supported")),
        };
        if json.get("hidden_act").is_some() && config.activation != activation {
            return Err(json.field_error("activation_function", "hidden_act says otherwise; give one of them"));
        }
        config.activation = activation;
    }
    Ok(config)
}

/// Keys of the authors' code that mean nothing beside the spelling of transformers.
const AUTHORS: [&str; 9] = [
    "activation_function",
    "pad_vocab_size_multiple",
    "rotary_emb_base",
    "rotary_emb_fraction",
    "rotary_scaling_factor",
    "max_trained_positions",
    "qkv_proj_bias",
    "mlp_fc1_bias",
    "mlp_fc2_bias",
];

/// Refuses keys of one spelling that the other would pass over.
fn check_spelling(json: &JsonObject) -> Result<()> {
    match AUTHORS.into_iter().find(|key| json.get(key).is_some()) {
        Some(key) if json.get("n_embd").is_none() => Err(json.field_error(
            key,
            "it is a key of the authors' code, which says n_embd in the place of hidden_size; give all of either",
        )),
        _ => Ok(()),
    }
}

/// A flag that is false with transformers, and must be given beside the keys of the authors' code, where it is true.
fn read_bias(json: &JsonObject, field: &str) -> Result<bool> {
    match json.boolean(field)? {
        Some(flag) => Ok(flag),
        None if json.get("n_embd").is_some() => Err(json.field_error(field, "true or false is expected beside n_embd")),
        None => Ok(false),
    }
}

fn read_rotary(json: &JsonObject, size: usize, positions: (&'static str, usize)) -> Result<Rotary> {
    let of_transformers = || {
        let longest = json.size(positions.0, 1..=MAX_POSITIONS)?.unwrap_or(positions.1);
        rope::read(json, 1000.0, size, Scalings::Dynamic(longest))
    };
    if json.get("n_embd").is_none() {
        return of_transformers();
    }
    let needed = |field| json.field_error(field, "a number is expected beside n_embd");
    let base = number(json, "rotary_emb_base", BASES)?.ok_or_else(|| needed("rotary_emb_base"))?;
    let fraction = number(json, "rotary_emb_fraction", 0.0..=1.0)?.ok_or_else(|| needed("rotary_emb_fraction"))?;
    let size = (size as f64 * fraction) as usize;
    check_size(size, json)?;
    let trained = json.size("max_trained_positions", 1..=MAX_POSITIONS)?.unwrap_or(2048);
    let scaling = match number(json, "rotary_scaling_factor", FACTORS)? {
        Some(factor) => RotaryScaling::DynamicNtk { factor, trained },
        None => RotaryScaling::None,
    };
    let rotary = Rotary { base, size, scaling };
    // transformers writes its own keys beside those that it did not know.
    for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
        if json.get(key).is_some() && of_transformers()? != rotary {
            let expected = format!("rotary_emb_base ({base}) and what is beside it say otherwise; give one of them");
            return Err(json.field_error(key, &expected));
        }
    }
    Ok(rotary)
}

impl OwnConfig for NomicBert {
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

impl NomicBert {
    fn layer(&self, tensors: &Tensors<'_>, layer: usize) -> Result<Layer> {
        let config = tensors.config;
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("{LAYERS}{layer}.{part}");
        Ok(Layer {
            placement: NormPlacement::Post,
            attention: Attention {
                projections: Projections::Packed(tensors.linear(&name(QKV), 3 * hidden, hidden, self.attention_bias)?),
                query_norm: None,
                key_norm: None,
                output: tensors.linear(&name(ATTENTION_OUTPUT), hidden, hidden, self.attention_bias)?,
                output_norm: None,
                reach: Reach::All,
                rotary: Some(self.rotary.clone()),
            },
            attention_norm: Some(tensors.norm(&name(ATTENTION_NORM), true)?),
            feed_forward: FeedForward {
                expansion: Expansion::Gated {
                    gate: tensors.linear(&name(GATE), wide, hidden, self.gate_bias)?,
                    value: tensors.linear(&name(VALUE), wide, hidden, self.gate_bias)?,
                },
                activation: config.activation,
                output: tensors.linear(&name(OUTPUT), hidden, wide, self.output_bias)?,
            },
            feed_forward_norm: Some(tensors.norm(&name(OUTPUT_NORM), true)?),
        })
    }
}
