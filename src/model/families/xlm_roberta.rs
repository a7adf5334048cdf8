//! XLM-RoBERTa: BERT's layers, with positions that start after the padding id. Its tensors bear RoBERTa's prefix.

use super::Definition;
use super::absolute::{KEYS as ABSOLUTE, PAD, definition, from_padding};
use crate::model::config_keys::{ACTIVATION, CODE, COMMON, MODEL_TYPE, POSITION_ROWS, SIZES};
use crate::model::schema::{Schema, Unknown};

/// Absent fields have the values of transformers' `XLMRobertaConfig`.
pub(super) static FAMILY: Definition =
    definition("xlm-roberta", "XLM-RoBERTa", &["roberta"], KEYS, |family, json| from_padding(family, json, 30522));

const KEYS: Schema = Schema {
    title: "config.json of XLM-RoBERTa",
    keys: &[MODEL_TYPE, SIZES, ACTIVATION, POSITION_ROWS, CODE, COMMON, PAD, ABSOLUTE],
    unknown: Unknown::Warn,
};
