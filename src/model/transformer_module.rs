//! `sentence_bert_config.json`: what sentence-transformers' Transformer module asks of encoder and tokenizer.

use super::json::{config_error, shown};
use super::schema::{JsonObject, Key, Schema, Unknown};
use crate::Result;
use serde_json::{Map, Value};
use std::path::Path;

/// The names that the file may have, in the order in which sentence-transformers looks for them.
pub(super) const FILES: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

const HUB: &str = "where files are fetched from; replaced by the caller's";

/// Keys of the file. The reference refuses others too: each is an argument of its Transformer class.
pub(super) static KEYS: Schema = Schema {
    title: "sentence_bert_config.json",
    keys: &[&[
        Key::honoured(
            "max_seq_length",
            "most tokens of a text, as far as a table of positions reaches; wins over model_max_length",
        ),
        Key::honoured("do_lower_case", "texts are put into lower case before the tokenizer's own normalisation"),
        Key::honoured("config_args", "fields that replace those of config.json"),
        Key::honoured("config_kwargs", "as config_args, which win"),
        Key::honoured("tokenizer_args", "fields that replace those of tokenizer_config.json"),
        Key::honoured("processor_kwargs", "as tokenizer_args, which win"),
        Key::honoured("model_args", "how the reference loads the weights; keys that change them are refused"),
        Key::honoured("model_kwargs", "as model_args, which win"),
        Key::honoured("processing_kwargs", "how the tokenizer is called"),
        Key::honoured("modality_config", "text alone, by forward and last_hidden_state"),
        Key::only("module_output_name", &["\"token_embeddings\""], "only \"token_embeddings\" is supported"),
        Key::only("transformer_task", &["\"feature-extraction\""], "only \"feature-extraction\" is supported"),
        Key::only("query_length", &[], "lengths of their own for queries are not supported"),
        Key::only("document_length", &[], "lengths of their own for documents are not supported"),
        Key::only("query_expansion", &[], "the expansion of queries is not supported"),
        Key::only("tokenizer_name_or_path", &[], "a tokenizer of another folder is not read; save it into this one"),
        Key::harmless("unpad_inputs", "how the reference computes, not what"),
        Key::harmless("backend", "the executor is chosen here"),
        Key::harmless("cache_dir", HUB),
    ]],
    unknown: Unknown::Refuse,
};

/// Keys of `model_args`.
pub(super) static MODEL_KEYS: Schema = Schema {
    title: "model_args of sentence_bert_config.json",
    keys: &[&[
        Key::harmless("attn_implementation", "how the reference computes, not what"),
        Key::harmless("torch_dtype", "the weights' own types count; arithmetic is the executor's"),
        Key::harmless("dtype", "the weights' own types count; arithmetic is the executor's"),
        Key::harmless("device_map", "where the reference computes"),
        Key::harmless("low_cpu_mem_usage", "how the reference loads"),
        Key::harmless("use_safetensors", "safetensors alone are read"),
        Key::harmless("add_pooling_layer", "the pooler is not read"),
        Key::harmless("export", "of the reference's ONNX executor"),
        Key::harmless("provider", "of the reference's ONNX executor"),
        Key::harmless("file_name", "of the reference's ONNX executor"),
        Key::harmless("trust_remote_code", "left out by the reference too"),
        Key::harmless("token", HUB),
        Key::harmless("cache_dir", HUB),
        Key::harmless("revision", HUB),
        Key::harmless("subfolder", HUB),
        Key::harmless("local_files_only", HUB),
        Key::only(
            "load_in_8bit",
            &["false"],
            "quantised arithmetic is not the reference's own; choose a precision for the engine",
        ),
        Key::only(
            "load_in_4bit",
            &["false"],
            "quantised arithmetic is not the reference's own; choose a precision for the engine",
        ),
        Key::only(
            "quantization_config",
            &["{}"],
            "quantised arithmetic is not the reference's own; choose a precision for the engine",
        ),
        Key::only("ignore_mismatched_sizes", &["false"], "weights of other sizes would be drawn at random"),
        Key::only("variant", &["\"\""], "weight files of a variant are not read; rename them to model.safetensors"),
    ]],
    unknown: Unknown::Refuse,
};

/// Keys of `processing_kwargs`.
pub(super) static PROCESSING_KEYS: Schema = Schema {
    title: "processing_kwargs of sentence_bert_config.json",
    keys: &[&[
        Key::honoured("text", "arguments of the tokenizer's call"),
        Key::honoured("common", "as text, over which it wins"),
        Key::harmless("audio", "not text"),
        Key::harmless("image", "not text"),
        Key::harmless("video", "not text"),
        Key::harmless("chat_template", "chats are not embedded"),
    ]],
    unknown: Unknown::Warn,
};

/// Keys of `processing_kwargs.text` and `.common`.
pub(super) static TEXT_KEYS: Schema = Schema {
    title: "processing_kwargs.text and .common of sentence_bert_config.json",
    keys: &[&[
        Key::honoured("max_length", "most tokens of a text, as far as a table of positions reaches; wins over max_seq_length"),
        Key::honoured("add_special_tokens", "whether texts get the tokenizer's special tokens (true)"),
        Key::only("truncation", &["true", "\"longest_first\"", "\"only_first\""], "texts are cut at the limit"),
        Key::only("stride", &["0"], "only 0 is supported"),
        Key::only("padding_side", &["\"right\""], "texts are padded on the right"),
        Key::only("is_split_into_words", &["false"], "texts are not split before the tokenizer"),
        Key::only("split_special_tokens", &["false"], "special tokens within a text stay whole"),
        Key::only("return_overflowing_tokens", &["false"], "what is cut off a text is not embedded"),
        Key::only("return_tensors", &["\"pt\""], "only \"pt\" is supported"),
        Key::harmless("padding", "padding is masked"),
        Key::harmless("pad_to_multiple_of", "padding is masked"),
        Key::harmless("return_token_type_ids", "all are 0"),
        Key::harmless("return_attention_mask", "every token of a text counts"),
        Key::harmless("return_special_tokens_mask", "further outputs"),
        Key::harmless("return_offsets_mapping", "further outputs"),
        Key::harmless("return_length", "further outputs"),
        Key::harmless("verbose", "of messages alone"),
    ]],
    unknown: Unknown::Refuse,
};

/// Keys of `modality_config`.
pub(super) static MODALITY_KEYS: Schema = Schema {
    title: "modality_config of sentence_bert_config.json",
    keys: &[&[Key::honoured("text", "by forward and last_hidden_state"), Key::harmless("message", "chats are not embedded")]],
    unknown: Unknown::Refuse,
};

/// Keys of `modality_config.text`.
pub(super) static TEXT_MODALITY_KEYS: Schema = Schema {
    title: "modality_config.text of sentence_bert_config.json",
    keys: &[&[
        Key::only("method", &["\"forward\""], "only \"forward\" is supported"),
        Key::only(
            "method_output_name",
            &["\"last_hidden_state\"", "[\"last_hidden_state\"]"],
            "only \"last_hidden_state\" is supported",
        ),
    ]],
    unknown: Unknown::Refuse,
};

/// Arguments of `from_pretrained` that say where files come from; the reference replaces them by the caller's.
const HUB_ARGUMENTS: [&str; 6] = ["subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code"];

/// What the Transformer module asks for.
#[derive(Debug, Default)]
pub(super) struct TransformerModule {
    pub do_lower_case: bool,
    /// Fields that replace those of tokenizer_config.json; `model_max_length` among them where `max_seq_length` gives it.
    pub tokenizer_overrides: Map<String, Value>,
    pub text: TextCall,
    /// The file, and its field that replaces fields of config.json, where it has one.
    pub config_overrides: Option<(JsonObject, &'static str)>,
}

/// How the tokenizer is called for a text.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextCall {
    /// `max_length`: wins over the tokenizer's own limit.
    pub max_length: Option<usize>,
    /// `add_special_tokens`.
    pub add_special_tokens: bool,
}

impl Default for TextCall {
    fn default() -> Self {
        Self { max_length: None, add_special_tokens: true }
    }
}

impl TransformerModule {
    /// Reads the file in the encoder's folder, whichever of its names it has.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a key that is not known or a value that cannot be honoured.
    pub fn read(encoder: &Path) -> Result<Self> {
        for name in FILES {
            // As in the reference, an empty one is passed over for the next.
            match JsonObject::read_if_present(&encoder.join(name), &KEYS)? {
                Some(json) if !json.fields().is_empty() => return Self::of(json),
                _ => {}
            }
        }
        Ok(Self::default())
    }

    /// Whether the file says how long texts may be, which the tokenizer's own limit does not outdo.
    pub fn limits_texts(&self) -> bool {
        self.text.max_length.is_some() || self.tokenizer_overrides.contains_key("model_max_length")
    }

    fn of(json: JsonObject) -> Result<Self> {
        for field in ["model_args", "model_kwargs"] {
            json.child(field, &MODEL_KEYS)?;
        }
        if let Some(modality) = json.child("modality_config", &MODALITY_KEYS)? {
            modality.child("text", &TEXT_MODALITY_KEYS)?;
            if modality.get("text").is_none() {
                return Err(json.field_error("modality_config", "a way for \"text\" is expected"));
            }
            if json.get("module_output_name").is_none() {
                return Err(json.field_error("module_output_name", "modality_config needs it; \"token_embeddings\" is expected"));
            }
        }
        // The older name of each pair wins in the reference, where both stand.
        let mut tokenizer_overrides = match json.object("tokenizer_args")? {
            Some(fields) => fields.clone(),
            None => json.object("processor_kwargs")?.cloned().unwrap_or_default(),
        };
        for argument in HUB_ARGUMENTS {
            tokenizer_overrides.remove(argument);
        }
        let max_seq_length = json.size("max_seq_length", 1..=usize::MAX)?;
        if let Some(tokens) = max_seq_length {
            tokenizer_overrides.entry("model_max_length").or_insert_with(|| tokens.into());
        }
        let config_overrides = ["config_args", "config_kwargs"].into_iter().find(|field| json.get(field).is_some());
        Ok(Self {
            do_lower_case: json.boolean("do_lower_case")?.unwrap_or(false),
            tokenizer_overrides,
            text: read_text_call(&json)?,
            config_overrides: match config_overrides {
                Some(field) => Some((check_config_overrides(json, field)?, field)),
                None => None,
            },
        })
    }
}

/// Refuses what the reference would not let into a configuration.
fn check_config_overrides(json: JsonObject, field: &'static str) -> Result<JsonObject> {
    match json.object(field)?.and_then(|fields| fields.get("model_type")) {
        Some(found) => {
            Err(config_error(json.path(), format!("{field}.model_type is {}; config.json alone says it", shown(found))))
        }
        None => Ok(json),
    }
}

fn read_text_call(json: &JsonObject) -> Result<TextCall> {
    let mut call = TextCall::default();
    let Some(processing) = json.child("processing_kwargs", &PROCESSING_KEYS)? else { return Ok(call) };
    // The later one wins.
    for field in ["text", "common"] {
        let Some(text) = processing.child(field, &TEXT_KEYS)? else { continue };
        call.max_length = text.size("max_length", 1..=usize::MAX)?.or(call.max_length);
        call.add_special_tokens = text.boolean("add_special_tokens")?.unwrap_or(call.add_special_tokens);
    }
    Ok(call)
}
