//! What is done with every key of tokenizer_config.json and special_tokens_map.json.

use super::json::{config_error, read_value, shown};
use super::schema::{JsonObject, Key, Schema, Unknown};
use crate::Result;
use serde_json::{Map, Value};
use std::path::Path;

const TOKEN: &str = "a special token: found whole where a text spells it";
const DECODING: &str = "of turning ids into text";
const PADDING: &str = "padding is masked";
const CALL: &str = "of calls without limits of their own; sentence-transformers gives them";
const ORIGIN: &str = "where the tokenizer comes from";
const CHAT: &str = "chats are not embedded";
const OLD: &str = "of older releases; transformers 5 does not read it";
const OWN_PARTS: &str = "parts of the tokenizer come from tokenizer.json or the class";

/// Keys that tokenizer_config.json, special_tokens_map.json and the overrides of sentence_bert_config.json share: arguments of the
/// tokenizer's class. A key `*_token` that is not here is a special token of this model.
const ARGUMENTS: &[Key] = &[
    Key::honoured("bos_token", TOKEN),
    Key::honoured("eos_token", TOKEN),
    Key::honoured("unk_token", "a special token, and the one that unknown words become"),
    Key::honoured("sep_token", "a special token, and the one that ends every text"),
    Key::honoured("pad_token", TOKEN),
    Key::honoured("cls_token", "a special token, and the one that begins every text"),
    Key::honoured("mask_token", TOKEN),
    Key::honoured("additional_special_tokens", "as extra_special_tokens, where that is empty"),
    Key::honoured("extra_special_tokens", "further special tokens: a list, or an object by name"),
    Key::honoured("truncation_side", "the side on which long texts are cut (tokenizer.json's, else right)"),
    Key::honoured("model_max_length", "most tokens of a text, as far as the positions reach"),
    Key::honoured("max_len", "as model_max_length, where that is absent"),
    Key::honoured("do_lower_case", "BertTokenizer and MPNetTokenizer: lower case (true)"),
    Key::honoured("strip_accents", "BertTokenizer and MPNetTokenizer: whether accents are taken off (with do_lower_case)"),
    Key::honoured("tokenize_chinese_chars", "BertTokenizer and MPNetTokenizer: whether ideographs are words (true)"),
    Key::honoured(
        "add_prefix_space",
        "XLMRobertaTokenizer, CamembertTokenizer (true) and RobertaTokenizer (false): a space before the text",
    ),
    Key::honoured("split_special_tokens", "special tokens that a text spells are not found whole (false)"),
    Key::honoured("model_input_names", "token types other than 0 are refused where it asks for them"),
    Key::honoured("padding_side", "\"left\" or \"right\"; texts are computed as each alone, without padding"),
    Key::only("init_inputs", &["[]"], "arguments without names are not supported"),
    Key::only("processor_class", &[], "models of more than text are not supported"),
    Key::only("gguf_file", &[], "GGUF files are not read"),
    Key::only("tokenizer_object", &[], OWN_PARTS),
    Key::only("post_processor", &[], OWN_PARTS),
    Key::only("tokenizer_truncation", &[], OWN_PARTS),
    Key::only("tokenizer_padding", &[], OWN_PARTS),
    Key::only("_json_truncation", &[], OWN_PARTS),
    Key::only("_json_padding", &[], OWN_PARTS),
    Key::only("_spm_precompiled_charsmap", &[], OWN_PARTS),
    Key::only("fast_tokenizer_files", &["[]", "[\"tokenizer.json\"]"], "tokenizer files of several versions are not supported"),
    Key::harmless("clean_up_tokenization_spaces", DECODING),
    Key::harmless("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", DECODING),
    Key::harmless("errors", DECODING),
    Key::harmless("trim_offsets", "of places in the text"),
    Key::harmless("pad_token_type_id", PADDING),
    Key::harmless("pad_to_multiple_of", PADDING),
    Key::harmless("pad_token_id", PADDING),
    Key::harmless("max_length", CALL),
    Key::harmless("stride", CALL),
    Key::harmless("truncation_strategy", CALL),
    Key::harmless("truncation", CALL),
    Key::harmless("padding", CALL),
    Key::harmless("name_or_path", ORIGIN),
    Key::harmless("_name_or_path", ORIGIN),
    Key::harmless("_commit_hash", ORIGIN),
    Key::harmless("special_tokens_map_file", ORIGIN),
    Key::harmless("transformers_version", ORIGIN),
    Key::harmless("backend", ORIGIN),
    Key::harmless("is_local", ORIGIN),
    Key::harmless("local_files_only", ORIGIN),
    Key::harmless("files_loaded", ORIGIN),
    Key::harmless("use_fast", "transformers 5 has one form of each tokenizer"),
    Key::harmless("do_basic_tokenize", OLD),
    Key::harmless("never_split", OLD),
    Key::harmless("wordpieces_prefix", OLD),
    Key::harmless("clean_text", OLD),
    Key::harmless("do_lower", OLD),
    Key::harmless("do_subword_tokenize", OLD),
    Key::harmless("do_word_tokenize", OLD),
    Key::harmless("full_tokenizer_file", OLD),
    Key::harmless("sp_model_kwargs", OLD),
    Key::harmless("legacy", OLD),
    Key::harmless("keep_accents", OLD),
    Key::harmless("from_slow", OLD),
    Key::harmless("fix_mistral_regex", "of Mistral models alone"),
    Key::harmless("use_default_system_prompt", CHAT),
    Key::harmless("chat_template", CHAT),
    Key::harmless("chat_control_tokens", CHAT),
    Key::harmless("response_template", CHAT),
    Key::harmless("response_schema", CHAT),
    Key::harmless("verbose", "of messages alone"),
    Key::harmless("device_map", "where the reference computes"),
];

/// Keys of tokenizer_config.json and the overrides alone.
const BY_NAME: &[Key] = &[
    Key::honoured(
        "added_tokens_decoder",
        "added tokens with their flags; without it special_tokens_map.json and added_tokens.json are read",
    ),
    Key::honoured("model_specific_special_tokens", "further special tokens by name"),
];

/// What special_tokens_map.json cannot have: the reference takes every object in it for one token.
const NOT_BY_NAME: &[Key] = &[
    Key::harmless("added_tokens_decoder", "where tokenizer_config.json has none, tokenizer.json says it"),
    Key::only("model_specific_special_tokens", &[], "extra_special_tokens can name tokens here"),
];

/// Names of files, which a folder has of its own.
const FILES: &[Key] =
    &[Key::harmless("tokenizer_file", ORIGIN), Key::harmless("vocab_file", ORIGIN), Key::harmless("merges_file", ORIGIN)];

/// Keys that tokenizer.json wins over where tokenizer_config.json has them.
const SPECIAL_OF_EVERY_TEXT: &[Key] = &[
    Key::honoured(
        "add_bos_token",
        "whether bos_token begins every text; classes with special tokens of their own leave it unread",
    ),
    Key::honoured("add_eos_token", "as add_bos_token, for the end"),
];

/// Keys of tokenizer_config.json.
pub(super) static CONFIG_KEYS: Schema = Schema {
    title: "tokenizer_config.json",
    keys: &[
        &[
            Key::honoured("tokenizer_class", "what is taken of tokenizer.json; classes that cannot be served are refused"),
            Key::honoured("auto_map", "a tokenizer with code of its own is refused"),
            Key::harmless("add_bos_token", "tokenizer.json says it"),
            Key::harmless("add_eos_token", "tokenizer.json says it"),
        ],
        ARGUMENTS,
        BY_NAME,
        FILES,
    ],
    unknown: Unknown::Warn,
};

/// Keys of special_tokens_map.json.
pub(super) static MAP_KEYS: Schema = Schema {
    title: "special_tokens_map.json",
    keys: &[ARGUMENTS, NOT_BY_NAME, FILES, SPECIAL_OF_EVERY_TEXT],
    unknown: Unknown::Warn,
};

/// Keys of `tokenizer_args` and `processor_kwargs` of sentence_bert_config.json.
pub(super) static OVERRIDE_KEYS: Schema = Schema {
    title: "tokenizer_args and processor_kwargs of sentence_bert_config.json",
    keys: &[
        &[
            Key::harmless("tokenizer_class", "transformers chooses the class without it"),
            Key::harmless("force_download", ORIGIN),
            Key::harmless("proxies", ORIGIN),
            Key::only("tokenizer_type", &[], "a tokenizer of another family is not supported"),
            Key::only("config", &[], "a configuration of the tokenizer's own is not supported"),
            Key::only("mistral_format", &["false"], "Mistral's own tokenizer is not supported"),
            Key::only("tokenizer_file", &[], "a file elsewhere is not read"),
            Key::only("vocab_file", &[], "a file elsewhere is not read"),
            Key::only("merges_file", &[], "a file elsewhere is not read"),
        ],
        ARGUMENTS,
        BY_NAME,
        SPECIAL_OF_EVERY_TEXT,
    ],
    unknown: Unknown::Refuse,
};

/// Holds the fields of tokenizer_config.json against their table.
pub(super) fn check_config(path: &Path, fields: &Map<String, Value>) -> Result<()> {
    check(path, fields, &CONFIG_KEYS)
}

/// The fields of special_tokens_map.json at `path`, where it is there.
pub(super) fn read_special_tokens_map(path: &Path) -> Result<Option<Map<String, Value>>> {
    let fields = read_fields(path)?;
    fields.iter().try_for_each(|fields| check(path, fields, &MAP_KEYS))?;
    Ok(fields)
}

/// Holds overrides, which stand in the file at `path`, against their table.
pub(super) fn check_overrides(path: &Path, overrides: &Map<String, Value>) -> Result<()> {
    check(path, overrides, &OVERRIDE_KEYS)
}

/// The fields of the JSON object at `path`, where it is there; not yet held against a table.
pub(super) fn read_fields(path: &Path) -> Result<Option<Map<String, Value>>> {
    match read_value(path)? {
        None => Ok(None),
        Some(Value::Object(fields)) => Ok(Some(fields)),
        Some(other) => Err(config_error(path, format!("an object is expected, not {}", shown(&other)))),
    }
}

/// Holds fields against a table, but for the special tokens that a model has of its own: no table knows their names.
fn check(path: &Path, fields: &Map<String, Value>, schema: &'static Schema) -> Result<()> {
    let own = |key: &str, value: &Value| {
        schema.key(key).is_none() && key.ends_with("_token") && (value.is_string() || value.is_object())
    };
    let known = fields.iter().filter(|(key, value)| !own(key, value)).map(|(key, value)| (key.clone(), value.clone()));
    JsonObject::new(path, Value::Object(known.collect()), schema).map(drop)
}
