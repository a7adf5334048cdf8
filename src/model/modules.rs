//! `modules.json` and the Pooling module's configuration, as sentence-transformers writes them (old and new spellings).

use crate::model::json::{JsonObject, config_error, read_value, shown};
use crate::pooling::{Pooling, PoolingMode};
use crate::{Error, Result};
use serde_json::Value;
use std::path::{Component, Path};

/// The modules that make a sentence vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ModuleKind {
    Transformer,
    Pooling,
    Dense,
    Normalize,
}

/// One entry of `modules.json`.
#[derive(Debug, Clone)]
pub(super) struct Module {
    pub kind: ModuleKind,
    /// Folder below the one of `modules.json`, `/` between parts; empty for that folder itself.
    pub path: String,
}

impl ModuleKind {
    const ALL: [Self; 4] = [Self::Transformer, Self::Pooling, Self::Dense, Self::Normalize];

    /// The class name, last part of `type`.
    fn name(self) -> &'static str {
        match self {
            Self::Transformer => "Transformer",
            Self::Pooling => "Pooling",
            Self::Dense => "Dense",
            Self::Normalize => "Normalize",
        }
    }

    /// From `type`: `sentence_transformers.models.Pooling`, or since version 5.4 the class's full path. A class of another package
    /// is the model's own Python code, whatever its name.
    fn by_type(class: &str) -> Option<Self> {
        let (package, rest) = class.split_once('.')?;
        let name = rest.rsplit('.').next()?;
        Self::ALL.into_iter().find(|kind| package == "sentence_transformers" && kind.name() == name)
    }
}

/// Reads `modules.json`: one Transformer, one Pooling, any number of Dense, at most one Normalize, in this order.
///
/// # Errors
/// [`Error::Config`] for an unknown module (names the known ones), another order, or a path that leads out of the folder.
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
    let single = |kind| kinds.iter().filter(|found| **found == kind).count() <= 1;
    let ordered = kinds.is_sorted()
        && kinds.starts_with(&[ModuleKind::Transformer, ModuleKind::Pooling])
        && [ModuleKind::Transformer, ModuleKind::Pooling, ModuleKind::Normalize].into_iter().all(single);
    if !ordered {
        let found = kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        return Err(config_error(
            path,
            format!("the modules are [{found}]; supported: Transformer, Pooling, then any Dense, then at most one Normalize"),
        ));
    }
    Ok(modules)
}

fn read_module(path: &Path, entry: &Value) -> Result<Module> {
    let text = |field| entry.get(field).and_then(Value::as_str);
    let Some(class) = text("type") else {
        return Err(config_error(path, format!("module {} has no \"type\"", shown(entry))));
    };
    let Some(kind) = ModuleKind::by_type(class) else {
        let known = ModuleKind::ALL.map(ModuleKind::name).join(", ");
        return Err(config_error(
            path,
            format!("module type {} is not supported; known: {known} of sentence_transformers", shown(&class.into())),
        ));
    };
    let folder = text("path").and_then(inner_path).ok_or_else(|| {
        let found = entry.get("path").map_or_else(|| "absent".to_owned(), shown);
        config_error(path, format!("the path of module {} is {found}; a folder inside the model's is expected", kind.name()))
    })?;
    Ok(Module { kind, path: folder })
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

/// The modes by their boolean (up to version 5.3) and their name in `pooling_mode` (since), in concatenation order.
const MODES: [(&str, &str, PoolingMode); 6] = [
    ("pooling_mode_cls_token", "cls", PoolingMode::Cls),
    ("pooling_mode_max_tokens", "max", PoolingMode::Max),
    ("pooling_mode_mean_tokens", "mean", PoolingMode::Mean),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", PoolingMode::MeanSqrtLen),
    ("pooling_mode_weightedmean_tokens", "weightedmean", PoolingMode::WeightedMean),
    ("pooling_mode_lasttoken", "lasttoken", PoolingMode::LastToken),
];

/// Reads the Pooling module's `config.json` and checks it against the encoder's width.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Config`] for no mode, an unknown one, or another width.
pub(super) fn read_pooling(path: &Path, hidden_size: usize) -> Result<Pooling> {
    let json = JsonObject::read(path, "modules.json names a Pooling module there; fetch the model again")?;
    for field in ["word_embedding_dimension", "embedding_dimension"] {
        if json.size(field, 1..=usize::MAX)?.is_some_and(|width| width != hidden_size) {
            return Err(json.field_error(field, &format!("the encoder's hidden_size is {hidden_size}")));
        }
    }
    Ok(Pooling { modes: read_modes(&json)?, include_prompt: json.boolean("include_prompt")?.unwrap_or(true) })
}

/// `pooling_mode` wins over the booleans, as in sentence-transformers 6; without either it is the mean.
fn read_modes(json: &JsonObject) -> Result<Vec<PoolingMode>> {
    let names: Vec<&Value> = match json.get("pooling_mode") {
        Some(Value::Array(names)) => names.iter().collect(),
        Some(name) => vec![name],
        None => return read_booleans(json),
    };
    let known = MODES.map(|(_, name, _)| name).join(", ");
    let mode = |name: &Value| MODES.into_iter().find(|(_, known, _)| name.as_str() == Some(known)).map(|(_, _, mode)| mode);
    let modes: Option<Vec<PoolingMode>> = names.into_iter().map(mode).collect();
    match modes {
        None => Err(json.field_error("pooling_mode", &format!("known: {known}"))),
        Some(modes) if modes.is_empty() || !modes.is_sorted_by(|a, b| a < b) => {
            Err(json.field_error("pooling_mode", &format!("one or several different modes are expected, in the order {known}")))
        }
        Some(modes) => Ok(modes),
    }
}

fn read_booleans(json: &JsonObject) -> Result<Vec<PoolingMode>> {
    let mut given = false;
    let mut modes = Vec::new();
    for (field, _, mode) in MODES {
        let value = json.boolean(field)?;
        given |= value.is_some();
        if value == Some(true) {
            modes.push(mode);
        }
    }
    if !given {
        modes.push(PoolingMode::Mean);
    }
    if modes.is_empty() {
        let fields = MODES.map(|(field, _, _)| field).join(", ");
        return Err(json.error(format!("no pooling mode is true; set one of {fields}")));
    }
    Ok(modes)
}
