//! BERT: absolute positions from 0, and token types.

use super::absolute::{definition, from_zero};
use super::{Definition, absolute};
use crate::model::config_keys::{ACTIVATION, CODE, COMMON, MODEL_TYPE, POSITION_ROWS, SIZES};
use crate::model::schema::{Key, Schema, Unknown};

pub(super) static FAMILY: Definition = definition("bert", "BERT", &["bert"], KEYS, |family, json| from_zero(family, json, 30522));

const KEYS: Schema = Schema {
    title: "config.json of BERT",
    keys: &[MODEL_TYPE, SIZES, ACTIVATION, POSITION_ROWS, CODE, COMMON, PAD, absolute::KEYS],
    unknown: Unknown::Warn,
};

const PAD: &[Key] = &[Key::honoured("pad_token_id", "id that fills the places behind a text in its batch; masked (0)")];
