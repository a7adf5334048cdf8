//! `config_sentence_transformers.json`: prompts, the cut of finished vectors, and how they are compared.

use super::json::shown;
use super::schema::{JsonObject, Key, Schema, Unknown};
use crate::Result;
use crate::similarity::Similarity;
use std::collections::BTreeMap;
use std::path::Path;

/// Keys of the file.
pub(super) static KEYS: Schema = Schema {
    title: "config_sentence_transformers.json",
    keys: &[&[
        Key::honoured("prompts", "texts put before others, by name"),
        Key::honoured("default_prompt_name", "the prompt that is used where the caller names none"),
        Key::honoured("truncate_dim", "finished vectors are cut to so many values, and not scaled again"),
        Key::honoured("similarity_fn_name", "how `similarity` compares vectors (cosine)"),
        Key::only("model_type", &["\"SentenceTransformer\""], "only \"SentenceTransformer\" is supported"),
        Key::harmless("__version__", "the versions that the model was saved with"),
        Key::harmless("requirements", "Python packages that the reference wants"),
    ]],
    unknown: Unknown::Warn,
};

/// Prompts that sentence-transformers gives every model, empty unless the model has its own.
const STANDARD_PROMPTS: [&str; 2] = ["query", "document"];

/// Prompts of `config_sentence_transformers.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompts {
    /// Prompt text by name.
    pub by_name: BTreeMap<String, String>,
    /// The one used when the caller names none.
    pub default_name: Option<String>,
}

/// What the file says of the whole model.
#[derive(Debug, Default)]
pub(super) struct WholeModel {
    pub prompts: Prompts,
    pub truncate_dim: Option<usize>,
    pub similarity: Similarity,
}

impl Prompts {
    /// The prompt that is used when the caller names none.
    pub fn default_text(&self) -> Option<&str> {
        self.default_name.as_ref().and_then(|name| self.by_name.get(name)).map(String::as_str)
    }
}

impl WholeModel {
    /// Reads the file at `path`, which may be absent.
    pub fn read(path: &Path) -> Result<Self> {
        let Some(json) = JsonObject::read_if_present(path, &KEYS)? else { return Ok(Self::default()) };
        let similarity = match json.string("similarity_fn_name")? {
            None => Similarity::default(),
            Some(name) => Similarity::by_name(name).ok_or_else(|| {
                let known = Similarity::ALL.map(Similarity::name).join(", ");
                json.field_error("similarity_fn_name", &format!("known: {known}"))
            })?,
        };
        Ok(Self { prompts: read_prompts(&json)?, truncate_dim: json.size("truncate_dim", 1..=usize::MAX)?, similarity })
    }
}

fn read_prompts(json: &JsonObject) -> Result<Prompts> {
    let mut by_name = BTreeMap::new();
    for (name, prompt) in json.object("prompts")?.into_iter().flatten() {
        // sentence-transformers reads null as no prompt.
        let text = if prompt.is_null() { Some("") } else { prompt.as_str() };
        let Some(text) = text else {
            return Err(json.error(format!("prompt \"{name}\" is {}; a string is expected", shown(prompt))));
        };
        by_name.insert(name.clone(), text.to_owned());
    }
    let default_name = json.string("default_prompt_name")?.map(str::to_owned);
    if let Some(name) = &default_name
        && !by_name.contains_key(name)
    {
        if !STANDARD_PROMPTS.contains(&name.as_str()) {
            let known = by_name.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(json.field_error("default_prompt_name", &format!("the prompts are: {known}")));
        }
        by_name.insert(name.clone(), String::new());
    }
    Ok(Prompts { by_name, default_name })
}
