//! GTE with its authors' code (`new`, gte-base-en-v1.5 and gte-multilingual-base): see `gte.rs`. Its configuration has defaults of its own, and a
//! scaling of rotary positions by a fixed factor at every length.

use super::Definition;
use super::gte::{KEYS, Kind, MODULES, read};
use crate::model::config_keys::{ACTIVATION, COMMON, MODEL_TYPE, SIZES};
use crate::model::schema::{Schema, Unknown};

pub(super) static FAMILY: Definition = Definition {
    model_type: "new",
    variant: None,
    title: "GTE v1.5",
    tensor_prefixes: &["new"],
    graph_name: "new",
    keys: Schema {
        title: "config.json of GTE v1.5",
        keys: &[MODEL_TYPE, SIZES, ACTIVATION, COMMON, KEYS],
        unknown: Unknown::Warn,
    },
    modules: MODULES,
    lora_targets: None,
    read: |family, json| read(family, json, &NEW),
};

/// The authors' `NewConfig`.
const NEW: Kind = Kind {
    vocab_size: 30_528,
    longest: 2048,
    pad_token_id: 0,
    base: 10_000.0,
    ntk: true,
    code: &["NewConfig", "NewModel", "NewForMaskedLM", "NewForSequenceClassification", "NewForTokenClassification"],
};
