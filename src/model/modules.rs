//! `modules.json` and the configurations of modules without weights, as sentence-transformers writes them (old and new spellings).

use super::pooling::{Pooling, PoolingMode};
use crate::model::json::{config_error, read_value, shown};
use crate::model::schema::{JsonObject, Key, Schema, Unknown};
use crate::notice::warn_once;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Component, Path};

/// Keys of an entry of `modules.json`.
pub(super) static MODULE_KEYS: Schema = Schema {
    title: "an entry of modules.json",
    keys: &[&[
        Key::honoured("type", "the module's class"),
        Key::honoured("path", "the module's folder, inside the model's"),
        Key::honoured("name", "two modules of one name are refused: the reference keeps only the later"),
        Key::harmless("idx", "the order of the list counts"),
        Key::harmless("kwargs", "names of arguments that a call may pass on to the module"),
    ]],
    unknown: Unknown::Warn,
};

/// Keys of a Pooling module's `config.json`. The reference refuses others too.
pub(super) static POOLING_KEYS: Schema = Schema {
    title: "config.json of a Pooling module",
    keys: &[&[
        Key::honoured("pooling_mode", "a mode or a list of modes, concatenated; wins over the flags (mean)"),
        Key::honoured("pooling_mode_cls_token", "cls"),
        Key::honoured("pooling_mode_max_tokens", "max"),
        Key::honoured("pooling_mode_mean_tokens", "mean"),
        Key::honoured("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
        Key::honoured("pooling_mode_weightedmean_tokens", "weightedmean"),
        Key::honoured("pooling_mode_lasttoken", "lasttoken"),
        Key::honoured("include_prompt", "whether the prompt's tokens count (true)"),
        Key::honoured("embedding_dimension", "one that is not the encoder's width is said, and not used"),
        Key::honoured("word_embedding_dimension", "as embedding_dimension"),
    ]],
    unknown: Unknown::Refuse,
};

/// Keys of a Normalize module's `config.json`, where there is one.
pub(super) static NORMALIZE_KEYS: Schema = Schema {
    title: "config.json of a Normalize module",
    keys: &[&[
        Key::only("module_input_name", &["\"sentence_embedding\""], "only \"sentence_embedding\" is supported"),
        Key::only("module_output_name", &["\"sentence_embedding\""], "only \"sentence_embedding\" is supported"),
    ]],
    unknown: Unknown::Ignore,
};

/// Keys of a Dropout module's `config.json`.
pub(super) static DROPOUT_KEYS: Schema = Schema {
    title: "config.json of a Dropout module",
    keys: &[&[Key::harmless("dropout", "of training alone")]],
    unknown: Unknown::Refuse,
};

/// The modules that make a sentence vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ModuleKind {
    Transformer,
    Pooling,
    Dense,
    Dropout,
    Normalize,
}

/// One entry of `modules.json`.
#[derive(Debug, Clone)]
pub(super) struct Module {
    pub kind: ModuleKind,
    /// Folder below the one of `modules.json`, `/` between parts; empty for that folder itself.
    pub path: String,
    /// Its key in the reference's chain.
    name: Option<String>,
}

impl ModuleKind {
    const ALL: [Self; 5] = [Self::Transformer, Self::Pooling, Self::Dense, Self::Dropout, Self::Normalize];

    /// The class name, last part of `type`.
    fn name(self) -> &'static str {
        match self {
            Self::Transformer => "Transformer",
            Self::Pooling => "Pooling",
            Self::Dense => "Dense",
            Self::Dropout => "Dropout",
            Self::Normalize => "Normalize",
        }
    }

    /// From `type`: `sentence_transformers.models.Pooling`, or since version 5.4 the class's full path. A class of another package
    /// is the model's own Python code, whatever its name.
    fn by_type(class: &str) -> Option<Self> {
        let name = own_class(class)?;
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// The last part of a class of sentence-transformers: old and new spellings differ in what stands before it.
fn own_class(class: &str) -> Option<&str> {
    let (package, rest) = class.split_once('.')?;
    if package == "sentence_transformers" { rest.rsplit('.').next() } else { None }
}

const ROUTES: &str =
    "its routes are models of their own for queries and documents; save the modules of one route as a model and give that";
const SPARSE: &str = "it makes sparse vectors; give a model of dense ones";
const MULTI_VECTOR: &str = "it makes a vector of every token; give a model of one vector a text";
const OWN_TOKENIZER: &str =
    "its tokenizer is sentence-transformers' own, not a tokenizer.json; give a model with a Transformer module";

/// Modules of sentence-transformers that are not served: why, and what to do.
static NOT_SERVED: [(&str, &str); 19] = [
    ("Router", ROUTES),
    ("Asym", ROUTES),
    ("StaticEmbedding", "it averages rows of a table, without an encoder; give a model with a Transformer module"),
    (
        "WeightedLayerPooling",
        "it needs the hidden states of every layer, and the encoder gives the last one's; give a model that pools the last layer",
    ),
    ("LSTM", "recurrent layers are not computed here; give a model that pools the Transformer's own states"),
    ("CNN", "convolutions are not computed here; give a model that pools the Transformer's own states"),
    ("LayerNorm", "norms behind the pooling are not computed here; give a model without it"),
    ("WordWeights", "weights of single words are not computed here; give a model that weighs its tokens alike"),
    ("WordEmbeddings", OWN_TOKENIZER),
    ("BoW", OWN_TOKENIZER),
    ("CLIPModel", "images are not embedded; give a model of text alone"),
    ("MLMTransformer", SPARSE),
    ("SpladePooling", SPARSE),
    ("SparseAutoEncoder", SPARSE),
    ("SparseStaticEmbedding", SPARSE),
    ("MultiVectorMask", MULTI_VECTOR),
    ("HierarchicalTokenPooling", MULTI_VECTOR),
    ("LambdaTokenPooling", MULTI_VECTOR),
    ("LogitScore", "it scores pairs of texts; give a model of vectors, not a cross-encoder"),
];

/// Reads `modules.json`: one Transformer, one Pooling, any number of Dense, then Normalize or nothing, with Dropout anywhere after
/// Pooling.
///
/// # Errors
/// [`Error::Config`] for an unknown module (names the known ones), another order, a name that stands twice, or a path that leads out of
/// the folder.
pub(super) fn read_modules(path: &Path) -> Result<Vec<Module>> {
    let entries = match read_value(path)? {
        Some(Value::Array(entries)) => entries,
        Some(other) => return Err(config_error(path, format!("a list of modules is expected, not {}", shown(&other)))),
        None => {
            let next = "give a sentence-transformers folder".to_owned();
            return Err(Error::NotFound { what: "modules.json".to_owned(), path: path.to_path_buf(), next });
        }
    };
    let modules = entries.iter().map(|entry| read_module(path, entry)).collect::<Result<Vec<_>>>()?;
    let kinds: Vec<_> = modules.iter().map(|module| module.kind).collect();
    let count = |kind| kinds.iter().filter(|found| **found == kind).count();
    let ordered = kinds.starts_with(&[ModuleKind::Transformer, ModuleKind::Pooling])
        && count(ModuleKind::Transformer) == 1
        && count(ModuleKind::Pooling) == 1
        && kinds.iter().filter(|kind| **kind != ModuleKind::Dropout).is_sorted();
    if !ordered {
        let found = kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        return Err(config_error(
            path,
            format!("the modules are [{found}]; supported: Transformer, Pooling, then any Dense, then Normalize or nothing"),
        ));
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = modules.iter().filter_map(|module| module.name.as_deref()).find(|name| !names.insert(*name)) {
        return Err(config_error(
            path,
            format!("two modules have the name \"{twice}\"; the reference would keep only the later one"),
        ));
    }
    Ok(modules)
}

fn read_module(path: &Path, entry: &Value) -> Result<Module> {
    let json = JsonObject::new(path, entry.clone(), &MODULE_KEYS)?;
    let Some(class) = json.string("type")? else {
        return Err(config_error(path, format!("module {} has no \"type\"", shown(entry))));
    };
    let Some(kind) = ModuleKind::by_type(class) else {
        return Err(config_error(path, refusal(class)));
    };
    let folder = json.get("path").and_then(Value::as_str).and_then(inner_path).ok_or_else(|| {
        let found = json.get("path").map_or_else(|| "absent".to_owned(), shown);
        config_error(path, format!("the path of module {} is {found}; a folder inside the model's is expected", kind.name()))
    })?;
    Ok(Module { kind, path: folder, name: json.string("name")?.map(str::to_owned) })
}

/// Why a module of this class is not served, by its short name too: a long `type` is shortened in messages.
fn refusal(class: &str) -> String {
    let shown = shown(&class.into());
    let known = ModuleKind::ALL.map(ModuleKind::name).join(", ");
    let known = format!("known: {known} of sentence_transformers");
    let Some(name) = own_class(class) else {
        return format!("module type {shown} is not supported: it is the model's own Python code, which is not run; {known}");
    };
    match NOT_SERVED.iter().find(|(not_served, _)| *not_served == name) {
        Some((_, reason)) => format!("module {name} is not supported: {reason} (its type is {shown}; {known})"),
        None => format!("module type {shown} is not supported: no such module is known here; {known}"),
    }
}

/// `path` with `/` between its parts, if it stays inside its folder on any system.
fn inner_path(path: &str) -> Option<String> {
    if path.contains(['\\', ':', '\0']) {
        return None;
    }
    let mut parts = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => parts.push(name.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(parts.join("/"))
}

/// Reads the Pooling module's `config.json`.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Config`] for an unknown mode or key.
pub(super) fn read_pooling(path: &Path, hidden_size: usize) -> Result<Pooling> {
    let json = JsonObject::read(path, &POOLING_KEYS, "modules.json names a Pooling module there; fetch the model again")?;
    for field in ["word_embedding_dimension", "embedding_dimension"] {
        // The reference pools what the encoder gives, whatever it says here.
        if let Some(width) = json.size(field, 1..=usize::MAX)?.filter(|width| *width != hidden_size) {
            warn_once(format!("{}: {field} is {width}, the encoder's hidden_size {hidden_size}, which counts", path.display()));
        }
    }
    Ok(Pooling { modes: read_modes(&json)?, include_prompt: json.boolean("include_prompt")?.unwrap_or(true) })
}

/// Checks the configuration of a Normalize module. Older versions write none, and may give the module the path of the encoder, whose
/// keys are not the module's.
pub(super) fn check_normalize(folder: &Path) -> Result<()> {
    JsonObject::read_if_present(&folder.join("config.json"), &NORMALIZE_KEYS).map(drop)
}

/// Checks the configuration of a Dropout module, which does nothing when vectors are made.
pub(super) fn check_dropout(folder: &Path) -> Result<()> {
    JsonObject::read_if_present(&folder.join("config.json"), &DROPOUT_KEYS).map(drop)
}

/// `pooling_mode` wins over the booleans, as in sentence-transformers 6; without a mode it is the mean.
fn read_modes(json: &JsonObject) -> Result<Vec<PoolingMode>> {
    let names: Vec<&Value> = match json.get("pooling_mode") {
        Some(Value::Array(names)) => names.iter().collect(),
        Some(name) => vec![name],
        None => return read_booleans(json),
    };
    let modes: Option<Vec<PoolingMode>> =
        names.into_iter().map(|name| name.as_str().and_then(|name| name.parse().ok())).collect();
    // A list is concatenated as given.
    match modes {
        Some(modes) if !modes.is_empty() => Ok(modes),
        _ => {
            let known = PoolingMode::ALL.map(PoolingMode::name).join(", ");
            Err(json.field_error("pooling_mode", &format!("one or several modes are expected; known: {known}")))
        }
    }
}

fn read_booleans(json: &JsonObject) -> Result<Vec<PoolingMode>> {
    let mut modes = Vec::new();
    for mode in PoolingMode::ALL {
        if json.boolean(mode.config_flag())? == Some(true) {
            modes.push(mode);
        }
    }
    if modes.is_empty() {
        modes.push(PoolingMode::Mean);
    }
    Ok(modes)
}
